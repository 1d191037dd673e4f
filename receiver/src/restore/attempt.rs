//! The file that names the restore under way, so that a later receiver can end what this one leaves: CRIU and its
//! copy outlive the receiver.

use crate::file_error::{FileError, failed};
use crate::restore::copy::end_restore;
use pageferry_common::proc::boot::boot_id;
use pageferry_common::proc::process::ProcessId;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Name of the file in the migration's directory. It need not be durable: the processes do not survive the
/// host either.
const FILE_NAME: &str = "restoring.json";

/// A restore under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Attempt {
    criu: ProcessId,
    /// Root of the copy, as soon as CRIU reports it.
    root: Option<ProcessId>,
    boot_id: String,
    #[serde(skip)]
    path: PathBuf,
}

impl Attempt {
    /// Writes the file. To be called before CRIU begins.
    ///
    /// # Errors
    /// [`FileError`].
    pub(super) fn begin(home: &Path, criu: ProcessId) -> Result<Self, FileError> {
        let attempt = Self {
            criu,
            root: None,
            boot_id: boot_id().to_owned(),
            path: home.join(FILE_NAME),
        };
        attempt.write()?;
        Ok(attempt)
    }

    /// Adds the root of the copy.
    ///
    /// # Errors
    /// [`FileError`].
    pub(super) fn set_root(&mut self, root: ProcessId) -> Result<(), FileError> {
        self.root = Some(root);
        self.write()
    }

    /// Returns the root of the copy, if CRIU has reported it.
    pub(super) fn root(&self) -> Option<ProcessId> {
        self.root
    }

    /// Returns CRIU.
    pub(super) fn criu(&self) -> ProcessId {
        self.criu
    }

    /// Ends the restore, and removes the file.
    ///
    /// # Errors
    /// [`FileError`] if a process does not exit, or the file cannot be removed.
    pub(super) fn end(&self) -> Result<(), FileError> {
        end_restore(self.criu, self.root).map_err(failed("end the restore in", &self.path))?;
        remove(&self.path)
    }

    fn write(&self) -> Result<(), FileError> {
        let text = serde_json::to_vec(self).expect("an attempt is plain data");
        let tmp = self.path.with_extension("tmp");
        fs::write(&tmp, text)
            .and_then(|()| fs::rename(&tmp, &self.path))
            .map_err(failed("write", &self.path))
    }
}

/// Ends what an earlier receiver left of a restore in `home` that was not committed.
///
/// # Errors
/// [`FileError`].
pub fn end_leftovers(home: &Path) -> Result<(), FileError> {
    let path = home.join(FILE_NAME);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        text => text.map_err(failed("read", &path))?,
    };
    // The file is replaced as a whole, but not synced: a host that lost its power leaves it empty, and no process.
    if text.iter().all(|&byte| byte == 0) {
        return remove(&path);
    }
    let attempt: Attempt =
        serde_json::from_slice(&text).map_err(|error| failed("parse", &path)(error.into()))?;
    if attempt.boot_id != boot_id() {
        return remove(&path);
    }
    let is_left = attempt.criu.is_alive() || attempt.root.is_some_and(ProcessId::is_alive);
    if is_left {
        tracing::warn!(
            event = "leftovers_ended",
            home = %home.display(),
            "ending what an earlier receiver left of a restore"
        );
    }
    Attempt { path, ..attempt }.end()
}

/// Removes the file after a restore that is complete: the copy is not to be ended any more.
///
/// # Errors
/// [`FileError`].
pub fn forget(home: &Path) -> Result<(), FileError> {
    remove(&home.join(FILE_NAME))
}

fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn leftovers_are_ended_once() {
        let home = tempfile::tempdir().unwrap();
        end_leftovers(home.path()).unwrap();
        let start = || {
            let child = Command::new("sleep").arg("1000").spawn().unwrap();
            let id = ProcessId::find(child.id().cast_signed()).unwrap();
            (child, id)
        };
        let ((mut criu, criu_id), (mut root, root_id)) = (start(), start());
        let mut attempt = Attempt::begin(home.path(), criu_id).unwrap();
        attempt.set_root(root_id).unwrap();
        end_leftovers(home.path()).unwrap();
        assert!(!criu_id.is_alive() && !root_id.is_alive());
        assert!(!home.path().join(FILE_NAME).exists());
        criu.wait().unwrap();
        root.wait().unwrap();
    }

    #[test]
    fn file_without_content_names_no_process() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(FILE_NAME);
        for bytes in [&b""[..], &[0; 100]] {
            fs::write(&path, bytes).unwrap();
            end_leftovers(home.path()).unwrap();
            assert!(!path.exists());
        }
        fs::write(&path, "damaged").unwrap();
        end_leftovers(home.path()).unwrap_err();
    }

    #[test]
    fn processes_of_another_boot_are_not_killed() {
        let home = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let id = ProcessId::find(child.id().cast_signed()).unwrap();
        let mut attempt = Attempt::begin(home.path(), id).unwrap();
        attempt.boot_id = "another".to_owned();
        attempt.set_root(id).unwrap();
        end_leftovers(home.path()).unwrap();
        assert!(id.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
