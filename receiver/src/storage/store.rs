//! The directory of `--dir`: one directory for each migration, with one for each of its rounds, and one
//! directory for each dump that CRIU itself sends.

use crate::file_error::{FileError, failed};
use crate::image::DirName;
use crate::image::chain::names;
use crate::image::durable::{create_image, sync};
use crate::storage::Durability;
use crate::storage::identity;
use crate::storage::lease::{Disconnect, Lease, Leases};
use nix::fcntl::{Flock, FlockArg};
use pageferry_common::proc::boot::boot_id;
use pageferry_common::{Claim, ImageId, ReceiverId, Token};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// File that the receiver using the directory keeps locked. It contains the PID, for error messages.
const LOCK: &str = ".lock";

/// File in a migration's directory. Its first line is the sender's [`Token`], its second the boot id of this
/// host when the migration began, its third the id of the receiver.
const TOKEN: &str = "token";

/// The directory of all migrations and dumps, locked against other receivers.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    id: ReceiverId,
    /// Number of the newest dump by CRIU.
    last_dump: AtomicU32,
    leases: Leases,
    _lock: Flock<File>,
}

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file cannot be accessed.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another receiver uses it.
    #[error("{dir} is in use by another receiver (process {by})")]
    InUse {
        /// The directory.
        dir: String,
        /// PID of that receiver, from its lock file.
        by: String,
    },
    /// It is a copy of the directory of another receiver.
    #[error("{0} is a copy of another receiver's directory, or comes from another host")]
    Copied(String),
}

/// What a claim to a migration is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The store has no such migration.
    Unknown,
    /// The claim is that of its sender.
    Owner,
    /// The claim is not that of its sender, or the migration is that of another receiver.
    Stranger,
}

impl Store {
    /// Opens and locks `dir`, creating it if it is missing, and removes incomplete rounds and dumps that an
    /// earlier receiver left. Complete ones stay.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(dir)
            .map_err(failed("create", dir))?;
        // Absolute, so that it does not depend on the working directory.
        let dir = fs::canonicalize(dir).map_err(failed("use", dir))?;
        let lock = lock(&dir)?;
        let id = identity::load(&dir)?;
        let id = id.ok_or_else(|| StoreError::Copied(dir.display().to_string()))?;
        let store = Self {
            dir,
            id,
            last_dump: AtomicU32::new(0),
            leases: Leases::default(),
            _lock: lock,
        };
        store.remove_incomplete()?;
        let last = store.dumps()?.into_iter().max();
        store.last_dump.store(last.unwrap_or(0), Ordering::Relaxed);
        Ok(store)
    }

    /// Returns the id of the receiver whose directory this is.
    #[must_use]
    pub fn id(&self) -> ReceiverId {
        self.id
    }

    /// Creates the directory of a new migration, durably, with the token that its sender authenticates itself with
    /// when it connects again.
    ///
    /// # Errors
    /// [`FileError`]; `AlreadyExists` if the store has that migration.
    pub fn create(&self, claim: &Claim) -> Result<PathBuf, FileError> {
        let home = self.home(claim);
        DirBuilder::new()
            .mode(0o700)
            .create(&home)
            .map_err(failed("create", &home))?;
        let path = home.join(TOKEN);
        let write = |mut file: File| {
            let (token, boot_id, id) = (claim.token.to_hex(), boot_id(), self.id);
            writeln!(file, "{token}\n{boot_id}\n{id}")?;
            file.sync_all()
        };
        write(create_image(&path)?).map_err(failed("write", &path))?;
        sync(&home)?;
        sync(&self.dir)?;
        Ok(home)
    }

    /// Returns the directory of a migration, which need not exist.
    #[must_use]
    pub fn home(&self, claim: &Claim) -> PathBuf {
        self.dir.join(format!("{}-{}", claim.root_pid, claim.id))
    }

    /// Returns what the claim is worth.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn standing(&self, claim: &Claim) -> Result<Standing, FileError> {
        let home = self.home(claim);
        let path = home.join(TOKEN);
        match fs::read_to_string(&path) {
            Ok(text) => {
                let token = text.lines().next().and_then(Token::from_hex);
                let is_owner = token == Some(claim.token) && self.is_named_in(&text);
                Ok(match is_owner {
                    true => Standing::Owner,
                    false => Standing::Stranger,
                })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(match home.exists() {
                true => Standing::Stranger,
                false => Standing::Unknown,
            }),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// Returns whether the content of a [`TOKEN`] file names this receiver.
    fn is_named_in(&self, text: &str) -> bool {
        text.lines().nth(2).and_then(ReceiverId::from_hex) == Some(self.id)
    }

    /// Leases the migration in `home` to the connection of `disconnect`. If another connection holds it,
    /// closes that one and returns `None`: try again.
    #[must_use]
    pub fn try_lease(&self, home: &Path, disconnect: &Disconnect) -> Option<Lease> {
        self.leases.try_lease(home, disconnect)
    }

    /// Returns whether a connection works on the migration in `home`.
    #[must_use]
    pub fn is_leased(&self, home: &Path) -> bool {
        self.leases.is_leased(home)
    }

    /// Returns the number of complete rounds of the migration in `home`.
    ///
    /// # Errors
    /// [`FileError`]; also if rounds were acknowledged before they were durable and this host was restarted
    /// since, because the last of them may then be incomplete.
    pub fn rounds(&self, home: &Path, durability: Durability) -> Result<u32, FileError> {
        let path = home.join(TOKEN);
        let text = fs::read_to_string(&path).map_err(failed("read", &path))?;
        let is_restarted = text.lines().nth(1) != Some(boot_id());
        if durability == Durability::AfterAck && is_restarted {
            let error = io::Error::other("this host has been rebooted since the migration began");
            return Err(failed("resume", home)(error));
        }
        let numbers = names(home)?.into_iter();
        let numbers = numbers.filter_map(|name| match DirName::parse(&name) {
            Some(round @ DirName::Round(number)) if round.to_string() == name => Some(number),
            Some(DirName::Round(_) | DirName::Dump(_) | DirName::Restore(_)) | None => None,
        });
        Ok(numbers.max().unwrap_or(0))
    }

    /// Returns the directories of all migrations of this receiver.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn migrations(&self) -> Result<Vec<PathBuf>, FileError> {
        let names = names(&self.dir)?.into_iter();
        let mut homes: Vec<_> = names
            .filter(|name| is_migration(name))
            .map(|name| self.dir.join(name))
            .collect();
        homes.retain(|home| {
            fs::read_to_string(home.join(TOKEN)).is_ok_and(|text| self.is_named_in(&text))
        });
        Ok(homes)
    }

    /// Returns the directory of the store.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the name of the next dump by CRIU, a directory in [`Store::dir`].
    #[must_use]
    pub fn new_dump(&self) -> DirName {
        DirName::Dump(self.last_dump.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Returns the newest complete dump by CRIU that has this image.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn newest_dump_of(&self, image: ImageId) -> Result<Option<DirName>, FileError> {
        let has = |&number: &u32| {
            let dump = self.dir.join(DirName::Dump(number).to_string());
            dump.join(image.pagemap_name()).exists()
        };
        let newest = self.dumps()?.into_iter().filter(has).max();
        Ok(newest.map(DirName::Dump))
    }

    /// Returns the numbers of all complete dumps by CRIU.
    fn dumps(&self) -> Result<Vec<u32>, FileError> {
        let number = |name: String| match DirName::parse(&name) {
            Some(dump @ DirName::Dump(number)) if dump.to_string() == name => Some(number),
            Some(DirName::Round(_) | DirName::Dump(_) | DirName::Restore(_)) | None => None,
        };
        Ok(names(&self.dir)?.into_iter().filter_map(number).collect())
    }

    fn remove_incomplete(&self) -> Result<(), FileError> {
        remove_incomplete_in(&self.dir, |name| matches!(name, DirName::Dump(_)))?;
        for name in names(&self.dir)? {
            let home = self.dir.join(&name);
            if is_migration(&name) && home.is_dir() {
                remove_incomplete_in(&home, |name| {
                    matches!(name, DirName::Round(_) | DirName::Restore(_))
                })?;
            }
        }
        Ok(())
    }
}

/// Locks the directory and writes this process's PID to the lock file.
fn lock(dir: &Path) -> Result<Flock<File>, StoreError> {
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
    // Only for the error message: a lock works without it.
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
    Ok(lock)
}

/// Removes directories that were not completed. Only names that exactly match a temporary name are
/// considered, because the user may keep other files here.
fn remove_incomplete_in(dir: &Path, ours: impl Fn(DirName) -> bool) -> Result<(), FileError> {
    for name in names(dir)? {
        if DirName::parse(&name).is_some_and(|it| ours(it) && it.temporary() == name) {
            let path = dir.join(name);
            tracing::info!(
                event = "incomplete_removed",
                path = %path.display(),
                "removing an incomplete directory"
            );
            fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
        }
    }
    Ok(())
}

/// Returns whether a name has the form of those that [`Store::home`] returns.
fn is_migration(name: &str) -> bool {
    name.split_once('-').is_some_and(|(pid, id)| {
        pid.parse::<u32>().is_ok()
            && id.len() == 32
            && id.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_common::MigrationId;
    use std::os::unix::fs::PermissionsExt;

    fn claim(secret: u8) -> Claim {
        Claim {
            id: MigrationId([0xab; 16]),
            root_pid: 7,
            token: Token([secret; 32]),
        }
    }

    #[test]
    fn only_a_claim_with_the_token_is_the_owner() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let standing = |secret| store.standing(&claim(secret)).unwrap();
        assert_eq!(standing(1), Standing::Unknown);
        let home = store.create(&claim(1)).unwrap();
        assert_eq!(
            (standing(1), standing(2)),
            (Standing::Owner, Standing::Stranger)
        );
        let mode = fs::metadata(home.join(TOKEN)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        for incomplete in ["", "01"] {
            fs::write(home.join(TOKEN), incomplete).unwrap();
            assert_eq!(standing(1), Standing::Stranger);
        }
        fs::remove_file(home.join(TOKEN)).unwrap();
        assert_eq!(standing(1), Standing::Stranger);
    }

    #[test]
    fn copied_directory_neither_answers_nor_restores() {
        let root = tempfile::tempdir().unwrap();
        let (original, copy) = (root.path().join("original"), root.path().join("copy"));
        let store = Store::open(&original).unwrap();
        store.create(&claim(1)).unwrap();
        assert_eq!(store.migrations().unwrap().len(), 1);
        let copied = std::process::Command::new("cp")
            .arg("-a")
            .args([&original, &copy])
            .status();
        assert!(copied.unwrap().success());
        assert!(matches!(Store::open(&copy), Err(StoreError::Copied(_))));
        // Now a receiver of its own.
        fs::remove_file(copy.join(identity::FILE_NAME)).unwrap();
        let other = Store::open(&copy).unwrap();
        assert_ne!(other.id(), store.id());
        assert_eq!(other.standing(&claim(1)).unwrap(), Standing::Stranger);
        assert_eq!(other.migrations().unwrap(), [""; 0].map(PathBuf::from));
        drop(store);
        let store = Store::open(&original).unwrap();
        assert_eq!(store.standing(&claim(1)).unwrap(), Standing::Owner);
    }

    #[test]
    fn incomplete_directories_are_removed_and_all_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let home = store.create(&claim(1)).unwrap();
        for name in ["1", ".2.tmp", ".x.tmp", ".2.tmp.bak"] {
            fs::create_dir(home.join(name)).unwrap();
        }
        fs::create_dir_all(dir.path().join("foreign/.2.tmp")).unwrap();
        for name in ["criu-3", ".criu-4.tmp", ".criu-x.tmp", "criu-05"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let taken = store.create(&claim(2)).unwrap_err();
        assert_eq!(taken.source.kind(), io::ErrorKind::AlreadyExists);
        assert!(matches!(
            Store::open(dir.path()),
            Err(StoreError::InUse { by, .. }) if by == std::process::id().to_string()
        ));
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.new_dump(), DirName::Dump(4));
        assert_eq!(store.newest_dump_of(ImageId::Process(7)).unwrap(), None);
        fs::write(dir.path().join("criu-3/pagemap-7.img"), "").unwrap();
        let newest = store.newest_dump_of(ImageId::Process(7)).unwrap();
        assert_eq!(newest, Some(DirName::Dump(3)));
        assert!(!home.join(".2.tmp").exists());
        for kept in ["1", ".x.tmp", ".2.tmp.bak"] {
            assert!(home.join(kept).exists());
        }
        for kept in ["foreign/.2.tmp", "criu-3", ".criu-x.tmp", "criu-05"] {
            assert!(dir.path().join(kept).exists(), "{kept}");
        }
        assert!(!dir.path().join(".criu-4.tmp").exists());
    }
}
