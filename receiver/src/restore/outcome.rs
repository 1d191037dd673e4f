//! What became of a migration: a durable file in its directory.

use crate::file_error::{FileError, failed};
use pageferry_common::proc::process::ProcessId;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The file in a migration's directory that has its [`Outcome`]. It always has as many bytes, so that another
/// outcome only changes what is in one sector of the disk: at once or not at all, and durable without waiting
/// for anything of the file system's.
const OUTCOME: &str = "outcome.json";

/// Length of that file, bytes: a sector. What is not used is blank.
const OUTCOME_LEN: usize = 512;

/// What became of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It will run here, and never again where it came from.
    Committed {
        /// The CRIU that holds it back or has just let it go.
        criu: Option<ProcessId>,
        /// The restored root.
        root: Option<ProcessId>,
        /// How it is to be restored, [`pageferry_common::criu::session::Options::bits`].
        options: u32,
    },
    /// It runs here, or did.
    Running,
    /// It will never run here.
    Aborted,
}

impl Outcome {
    /// Reads what became of a migration; `None` if nothing has been decided.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn read(home: &Path) -> Result<Option<Self>, FileError> {
        let path = home.join(OUTCOME);
        match fs::read(&path) {
            Ok(text) if text.trim_ascii().is_empty() => Ok(None),
            Ok(text) => {
                let outcome = serde_json::from_slice(&text).map_err(io::Error::from);
                Ok(Some(outcome.map_err(failed("understand", &path))?))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// Makes room for an outcome, durably, so that [`Outcome::record`] is fast.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn make_room(home: &Path) -> Result<(), FileError> {
        write_new(home, &[b' '; OUTCOME_LEN]).map_err(failed("write", &home.join(OUTCOME)))
    }

    /// Takes the room away again if nothing has been decided.
    pub fn give_back_room(home: &Path) {
        if matches!(Self::read(home), Ok(None)) {
            // There may be none.
            let _ = fs::remove_file(home.join(OUTCOME));
        }
    }

    /// Writes it down, durably.
    ///
    /// # Errors
    /// [`FileError`]; it may or may not be written then.
    pub fn record(self, home: &Path) -> Result<(), FileError> {
        let path = home.join(OUTCOME);
        let mut text = serde_json::to_vec(&self).expect("it is plain data");
        assert!(text.len() <= OUTCOME_LEN, "it is short");
        text.resize(OUTCOME_LEN, b' ');
        let write = || match OpenOptions::new().write(true).open(&path) {
            Ok(file) if file.metadata()?.len() == OUTCOME_LEN as u64 => {
                file.write_all_at(&text, 0)?;
                file.sync_data()
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(_) | Err(_) => write_new(home, &text),
        };
        write().map_err(failed("write", &path))
    }
}

/// Puts an outcome in the place of what there was.
fn write_new(home: &Path, text: &[u8]) -> io::Result<()> {
    let (path, tmp) = (home.join(OUTCOME), home.join(".outcome.tmp"));
    let mut file = File::create(&tmp)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&tmp, &path)?;
    File::open(home)?.sync_all()
}
