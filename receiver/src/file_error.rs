//! Error of an operation on a file or directory.

use std::io;
use std::path::{Path, PathBuf};

/// A file or directory could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}", path.display())]
pub struct FileError {
    /// The operation, as a verb: read, write, create…
    pub what: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// The kernel's error, or what is wrong with the contents.
    pub source: io::Error,
}

/// Returns a conversion from `io::Error` that adds the operation and the file.
pub(crate) fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError { what, path, source }
}
