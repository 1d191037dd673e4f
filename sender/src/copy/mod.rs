//! Moving pages: reading them from the target, and making chunks of what was read.

pub use crate::target::tree::{CollectError, Copier, ListError, Pass, Scanned, SendError};

pub mod populated;
pub mod source;
pub mod stream;
