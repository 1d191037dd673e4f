//! Errors of files and directories.

use std::io;
use std::path::{Path, PathBuf};

/// A file or directory that could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}", path.display())]
pub struct FileError {
    /// What was tried: read, write, create…
    pub what: &'static str,
    /// On what.
    pub path: PathBuf,
    /// What the kernel said, or what is wrong with the contents.
    pub source: io::Error,
}

/// Names what was tried on which file.
pub(crate) fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError { what, path, source }
}
