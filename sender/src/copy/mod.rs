//! Moving pages: reading them from the target, and making chunks of what was read.

pub mod source;
pub mod stream;
