//! The outcome of a migration, and the durable file in the migration's directory that holds it.
//!
//! The outcome is durable before it is acted on, so that it survives the death of every program involved: a
//! committed migration runs here, if need be after another restore; an aborted one never does. An outcome that
//! is read is written again before it is acted on: what an earlier receiver wrote may not be on the disk yet.

use crate::file_error::{FileError, failed};
use crate::restore::copy::RestoredCopy;
use pageferry_common::proc::boot::boot_id;
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The process will run here, and never again on the source host.
    Committed(Committed),
    /// The process runs here, or did.
    Running,
    /// The process will never run here.
    Aborted,
}

/// What is needed to find out whether a committed process has run, and to restore it again if it has not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// The copy that may have been released; `None` if an earlier one was ended before it ran, and no other has
    /// been restored yet.
    pub copy: Option<RestoredCopy>,
    /// Options of the restore, as [`Options::bits`](pageferry_common::criu::Options::bits).
    pub options: u32,
    /// The boot of this host during which it was committed.
    boot_id: String,
}

impl Committed {
    /// Returns the outcome to record before `copy` is released.
    #[must_use]
    pub fn new(copy: RestoredCopy, options: u32) -> Self {
        Self {
            copy: Some(copy),
            options,
            boot_id: boot_id().to_owned(),
        }
    }

    /// Returns the outcome to record when no copy may have been released.
    pub(super) fn unreleased(&self) -> Self {
        Self {
            copy: None,
            ..self.clone()
        }
    }

    /// Returns whether this host has been rebooted since. The process may have run, and is lost with the host
    /// like any of its processes.
    #[must_use]
    pub fn is_of_another_boot(&self) -> bool {
        self.boot_id != boot_id()
    }
}

impl Outcome {
    /// Reads the outcome of the migration in `home`, and makes it durable: it may be answered and acted on.
    /// `None` while it is undecided.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn settled(home: &Path) -> Result<Option<Self>, FileError> {
        let outcome = Self::read(home)?;
        if let Some(outcome) = &outcome {
            // Syncing alone would not do: the kernel forgets a page that it could not write.
            outcome.write(home)?;
        }
        Ok(outcome)
    }

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
    pub fn write(&self, home: &Path) -> Result<(), FileError> {
        let mut text = serde_json::to_vec(self).expect("an outcome is plain data");
        let path = home.join(FILE_NAME);
        if text.len() > FILE_LEN {
            // Never one of ours: it was read from a file that something else has changed.
            return Err(failed("write", &path)(io::ErrorKind::InvalidData.into()));
        }
        text.resize(FILE_LEN, b' ');
        overwrite(home, &text).map_err(failed("write", &path))
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
