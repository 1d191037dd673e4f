//! The outcome of a migration, and the durable file in the migration's directory that holds it.
//!
//! The outcome is durable before it is acted on, so that it survives the death of every program involved: a
//! committed migration runs here, if need be after another restore; an aborted one never does.

use crate::file_error::{FileError, failed};
use pageferry_common::proc::process::ProcessId;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Name of the file. Its length is fixed, so that writing another outcome changes one sector of the disk and
/// no metadata: the write is atomic, and durable without waiting for the file system's journal.
const FILE_NAME: &str = "outcome.json";

/// Length of the file, bytes: one sector, padded with blanks.
const FILE_LEN: usize = 512;

/// Outcome of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The process will run here, and never again on the source host.
    Committed {
        /// The CRIU that holds the restored tree back, or has just resumed it.
        criu: Option<ProcessId>,
        /// Root of the restored tree.
        root: Option<ProcessId>,
        /// Options of the restore, as [`Options::bits`](pageferry_common::criu::Options::bits).
        options: u32,
    },
    /// The process runs here, or did.
    Running,
    /// The process will never run here.
    Aborted,
}

impl Outcome {
    /// Reads the outcome of the migration in `home`; `None` while it is undecided.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn read(home: &Path) -> Result<Option<Self>, FileError> {
        let path = home.join(FILE_NAME);
        match fs::read(&path) {
            Ok(text) if text.trim_ascii().is_empty() => Ok(None),
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|error| failed("parse", &path)(error.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// Creates a blank file, durably, so that [`Outcome::write`] is fast later.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn preallocate(home: &Path) -> Result<(), FileError> {
        replace(home, &[b' '; FILE_LEN]).map_err(failed("write", &home.join(FILE_NAME)))
    }

    /// Removes the file of [`Outcome::preallocate`] if the outcome is still undecided.
    pub fn discard_blank(home: &Path) {
        if matches!(Self::read(home), Ok(None)) {
            // It may not exist.
            let _ = fs::remove_file(home.join(FILE_NAME));
        }
    }

    /// Writes the outcome of the migration in `home`, durably.
    ///
    /// # Errors
    /// [`FileError`]; the outcome may or may not be on the disk then.
    pub fn write(self, home: &Path) -> Result<(), FileError> {
        let mut text = serde_json::to_vec(&self).expect("an outcome is plain data");
        assert!(text.len() <= FILE_LEN, "an outcome fits into a sector");
        text.resize(FILE_LEN, b' ');
        overwrite(home, &text).map_err(failed("write", &home.join(FILE_NAME)))
    }
}

/// Overwrites the file in place if it has its length already, else replaces it.
fn overwrite(home: &Path, text: &[u8]) -> io::Result<()> {
    match OpenOptions::new().write(true).open(home.join(FILE_NAME)) {
        Ok(file) if file.metadata()?.len() == FILE_LEN as u64 => {
            file.write_all_at(text, 0)?;
            file.sync_data()
        }
        Ok(_) => replace(home, text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => replace(home, text),
        Err(error) => Err(error),
    }
}

/// Creates the file, or replaces it atomically.
fn replace(home: &Path, text: &[u8]) -> io::Result<()> {
    let tmp = home.join(".outcome.tmp");
    let mut file = File::create(&tmp)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&tmp, home.join(FILE_NAME))?;
    File::open(home)?.sync_all()
}
