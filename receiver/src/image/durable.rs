//! Files of images that only their owner can read, and that are durable.

use crate::file_error::{FileError, failed};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Makes every file in a directory, and the directory, durable: several at once, for each waits for the file
/// system's journal, which then writes for all of them what it would write for one.
///
/// # Errors
/// [`FileError`].
pub fn sync_all(dir: &Path) -> Result<(), FileError> {
    const AT_ONCE: usize = 16;
    let mut entries = fs::read_dir(dir).map_err(failed("list", dir))?;
    let first: Vec<_> = entries.by_ref().take(AT_ONCE).collect();
    let others = 1..first.len();
    // Not a list of all: a peer says how many there are.
    let entries = Mutex::new(first.into_iter().chain(entries));
    let next = || {
        let mut entries = entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.next()
    };
    let work = || {
        while let Some(entry) = next() {
            let found = entry.and_then(|entry| Ok((entry.file_type()?, entry.path())));
            match found.map_err(failed("list", dir))? {
                (kind, path) if kind.is_file() => sync(&path)?,
                // The link to the parent.
                _ => {}
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let others: Vec<_> = others
            .filter_map(|_| thread::Builder::new().spawn_scoped(scope, work).ok())
            .collect();
        let mut done = work();
        for other in others {
            done = done.and(other.join().expect("syncing does not panic"));
        }
        done
    })?;
    sync(dir)
}

/// Makes a file, or what is in a directory, durable.
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
