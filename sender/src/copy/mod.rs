//! Moving pages: finds out which pages of the target to send, reads them, and makes chunks of them.

mod copier;
mod pass;
mod populated;
pub mod source;
pub mod stream;

pub use crate::target::tree::ListError;
pub use copier::{CollectError, Copier, SendError, WrittenPages};
pub use pass::{Pass, Scanned};
