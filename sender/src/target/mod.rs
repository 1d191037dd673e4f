//! What is known of the target: its processes, mappings, shared segments, descriptors and files.

pub mod descriptors;
pub mod files;
pub mod guards;
pub mod pipes;
pub mod process;
pub mod segment;
pub mod sharing;
pub mod smaps;
pub mod tree;
pub mod vma;

use std::io;

/// Returns whether the error means that the process or thread does not exist any more.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
