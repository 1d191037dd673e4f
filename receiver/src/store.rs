//! `--dir`: one directory for each migration, one in it for each round.

use crate::image::writer::temporary_name;
use crate::image::{FileError, failed};
use nix::fcntl::{Flock, FlockArg};
use pageferry_common::MigrationId;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The file that says which receiver works here.
const LOCK: &str = ".lock";

/// The directory of all migrations, ours alone while this lives.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    _lock: Flock<File>,
}

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another receiver is there.
    #[error("{dir} is in use by another receiver (process {by})")]
    InUse {
        /// The directory.
        dir: String,
        /// Its PID, as it wrote it down.
        by: String,
    },
}

impl Store {
    /// Takes `dir`, making it if it is not there, and removes rounds that an earlier receiver left
    /// torn. Complete ones stay.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(dir)
            .map_err(failed("create", dir))?;
        // Other paths must not change meaning with the working directory.
        let dir = fs::canonicalize(dir).map_err(failed("use", dir))?;
        let path = dir.join(LOCK);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed("write to", &path))?;
        let mut by = String::new();
        // The text of a lock is for people; without it there still is the lock.
        let _ = file.read_to_string(&mut by);
        let mut lock =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| StoreError::InUse {
                dir: dir.display().to_string(),
                by: by.trim().to_owned(),
            })?;
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(failed("write to", &path))?;
        let store = Self { dir, _lock: lock };
        store.remove_torn_rounds()?;
        Ok(store)
    }

    /// The directory of a new migration.
    ///
    /// # Errors
    /// [`FileError`]; `AlreadyExists` if that migration was here before.
    pub fn create(&self, root_pid: u32, id: MigrationId) -> Result<PathBuf, FileError> {
        let path = self.dir.join(format!("{root_pid}-{id}"));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(failed("create", &path))?;
        Ok(path)
    }

    fn remove_torn_rounds(&self) -> Result<(), FileError> {
        let list = |dir: &Path| fs::read_dir(dir).map_err(failed("list", dir));
        for migration in list(&self.dir)?.flatten() {
            let home = migration.path();
            if !is_migration(&migration.file_name().to_string_lossy()) || !home.is_dir() {
                continue;
            }
            for entry in list(&home)?.flatten() {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                let round = name.trim_matches(|c: char| !c.is_ascii_digit()).parse();
                // Only what has exactly the name that we give: the directory is the user's.
                if round.is_ok_and(|round| *name == temporary_name(round)) {
                    let path = entry.path();
                    tracing::info!(path = %path.display(), "removing a torn round");
                    fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
                }
            }
        }
        Ok(())
    }
}

/// Whether a name is one that [`Store::create`] gives.
fn is_migration(name: &str) -> bool {
    name.split_once('-').is_some_and(|(pid, id)| {
        pid.parse::<u32>().is_ok()
            && id.len() == 32
            && id.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

/// Whether an error says that the directory is there already.
#[must_use]
pub fn is_taken(error: &FileError) -> bool {
    error.source.kind() == io::ErrorKind::AlreadyExists
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_rounds_go_and_everything_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let home = store.create(7, MigrationId([0xab; 16])).unwrap();
        for name in ["1", ".2.tmp", ".x.tmp", ".2.tmp.bak"] {
            fs::create_dir(home.join(name)).unwrap();
        }
        fs::create_dir_all(dir.path().join("foreign/.2.tmp")).unwrap();
        assert!(is_taken(
            &store.create(7, MigrationId([0xab; 16])).unwrap_err()
        ));
        assert!(matches!(
            Store::open(dir.path()),
            Err(StoreError::InUse { by, .. }) if by == std::process::id().to_string()
        ));
        drop(store);
        Store::open(dir.path()).unwrap();
        assert!(!home.join(".2.tmp").exists());
        for kept in ["1", ".x.tmp", ".2.tmp.bak"] {
            assert!(home.join(kept).exists());
        }
        assert!(dir.path().join("foreign/.2.tmp").exists());
    }
}
