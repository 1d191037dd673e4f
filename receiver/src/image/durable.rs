//! Creating image files, and making them durable.

use crate::file_error::{FileError, failed};
use std::fs::{self, DirEntry, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Number of files that [`sync_all`] syncs at a time.
const CONCURRENT_SYNCS: usize = 16;

/// Makes every file in a directory durable, and the directory. Syncs several at a time: each waits for the
/// file system's journal, which commits all of them in the time of one.
///
/// # Errors
/// [`FileError`].
pub fn sync_all(dir: &Path) -> Result<(), FileError> {
    let mut entries = fs::read_dir(dir).map_err(failed("list", dir))?;
    let first: Vec<_> = entries.by_ref().take(CONCURRENT_SYNCS).collect();
    let helpers = 1..first.len();
    // Not a list of all: the peer chooses how many there are.
    let entries = Mutex::new(first.into_iter().chain(entries));
    thread::scope(|scope| {
        let sync_rest = || sync_remaining(dir, &entries);
        let helpers: Vec<_> = helpers
            .filter_map(|_| thread::Builder::new().spawn_scoped(scope, sync_rest).ok())
            .collect();
        let mut result = sync_rest();
        for helper in helpers {
            result = result.and(helper.join().expect("syncing does not panic"));
        }
        result
    })?;
    sync(dir)
}

/// Syncs the files among the entries that no other thread has taken.
fn sync_remaining(
    dir: &Path,
    entries: &Mutex<impl Iterator<Item = io::Result<DirEntry>>>,
) -> Result<(), FileError> {
    let next = || {
        let mut entries = entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.next()
    };
    while let Some(entry) = next() {
        let found = entry.and_then(|entry| Ok((entry.file_type()?, entry.path())));
        let (kind, path) = found.map_err(failed("list", dir))?;
        // All else is the link to the parent.
        if kind.is_file() {
            sync(&path)?;
        }
    }
    Ok(())
}

/// Makes a file durable, or the names in a directory.
///
/// # Errors
/// [`FileError`].
pub fn sync(path: &Path) -> Result<(), FileError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(failed("sync", path))
}

/// Creates an image file that only its owner can read: memory is full of secrets.
pub(crate) fn create_image(path: &Path) -> Result<File, FileError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed("create", path))
}
