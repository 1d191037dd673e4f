//! `--dir`: one directory for each migration, one in it for each round; and one for each dump that
//! CRIU itself sends.

use crate::file_error::{FileError, failed};
use crate::image::DirName;
use crate::image::chain::names;
use crate::image::durable::{create_image, sync};
use crate::storage::lease::{Disconnect, Lease, Leases};
use nix::fcntl::{Flock, FlockArg};
use pageferry_common::{Claim, ImageId, Token};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// The file that says which receiver works here.
const LOCK: &str = ".lock";

/// The file in a migration's directory that has its sender's [`Token`], and in a second line when this host was
/// started last before it began.
const TOKEN: &str = "token";

/// Another each time that the host is started.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// The directory of all migrations, ours alone while this lives.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// The number of the last dump that CRIU began.
    last_dump: AtomicU32,
    leases: Leases,
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
        let store = Self {
            dir,
            last_dump: AtomicU32::new(0),
            leases: Leases::default(),
            _lock: lock,
        };
        store.remove_torn()?;
        let last = store.dumps()?.into_iter().max();
        store.last_dump.store(last.unwrap_or(0), Ordering::Relaxed);
        Ok(store)
    }

    /// The directory of a new migration, with what its sender will prove itself by later.
    ///
    /// # Errors
    /// [`FileError`]; `AlreadyExists` if that migration was here before.
    pub fn create(&self, claim: &Claim) -> Result<PathBuf, FileError> {
        let home = self.home(claim);
        DirBuilder::new()
            .mode(0o700)
            .create(&home)
            .map_err(failed("create", &home))?;
        let path = home.join(TOKEN);
        let write = |mut file: File| {
            let boot = fs::read_to_string(BOOT)?;
            write!(file, "{}\n{boot}", claim.token.to_hex())?;
            file.sync_all()
        };
        write(create_image(&path)?).map_err(failed("write", &path))?;
        sync(&home)?;
        Ok(home)
    }

    /// Where a migration is, if it is here.
    #[must_use]
    pub fn home(&self, claim: &Claim) -> PathBuf {
        self.dir.join(format!("{}-{}", claim.root_pid, claim.id))
    }

    /// Whether the migration is the one's who says so; also if it is not here.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn is_owner(&self, claim: &Claim) -> Result<bool, FileError> {
        let home = self.home(claim);
        let path = home.join(TOKEN);
        match fs::read_to_string(&path) {
            Ok(text) => {
                let token = text.lines().next().and_then(Token::from_hex);
                Ok(token == Some(claim.token))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(!home.exists()),
            Err(error) => Err(failed("read", &path)(error)),
        }
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

    /// How many complete rounds there are of a migration. Those of before this host was started do not count if
    /// they need not be `durable`: then the last may be torn.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn rounds(&self, home: &Path, durable: bool) -> Result<u32, FileError> {
        let path = home.join(TOKEN);
        let text = fs::read_to_string(&path).map_err(failed("read", &path))?;
        let now = fs::read_to_string(BOOT).map_err(failed("read", Path::new(BOOT)))?;
        if !durable && text.lines().nth(1) != Some(now.trim()) {
            let what = io::Error::other("this host was restarted since the migration began");
            return Err(failed("go on with", home)(what));
        }
        let numbers = names(home)?.into_iter();
        let numbers = numbers.filter_map(|name| match DirName::parse(&name) {
            Some(round @ DirName::Round(number)) if round.to_string() == name => Some(number),
            Some(_) | None => None,
        });
        Ok(numbers.max().unwrap_or(0))
    }

    /// Where all migrations are that were ever to be restored here.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn migrations(&self) -> Result<Vec<PathBuf>, FileError> {
        let names = names(&self.dir)?.into_iter();
        let homes = names
            .filter(|name| is_migration(name))
            .map(|name| self.dir.join(name));
        Ok(homes.collect())
    }

    /// Where all of it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The name of a new dump by CRIU, in [`Store::dir`].
    #[must_use]
    pub fn new_dump(&self) -> DirName {
        // More than four thousand million dumps would take a while.
        DirName::Dump(self.last_dump.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The newest complete dump by CRIU that has this image, if there is one.
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

    /// The numbers of all complete dumps by CRIU.
    fn dumps(&self) -> Result<Vec<u32>, FileError> {
        let number = |name: String| match DirName::parse(&name) {
            Some(dump @ DirName::Dump(number)) if dump.to_string() == name => Some(number),
            _ => None,
        };
        Ok(names(&self.dir)?.into_iter().filter_map(number).collect())
    }

    fn remove_torn(&self) -> Result<(), FileError> {
        remove_torn_in(&self.dir, |name| matches!(name, DirName::Dump(_)))?;
        for name in names(&self.dir)? {
            let home = self.dir.join(&name);
            if is_migration(&name) && home.is_dir() {
                remove_torn_in(&home, |name| {
                    matches!(name, DirName::Round(_) | DirName::Restore(_))
                })?;
            }
        }
        Ok(())
    }
}

/// Removes what a writer did not complete. Only what has exactly the name that we give: the
/// directory is the user's.
fn remove_torn_in(dir: &Path, ours: impl Fn(DirName) -> bool) -> Result<(), FileError> {
    for name in names(dir)? {
        if DirName::parse(&name).is_some_and(|it| ours(it) && it.temporary() == name) {
            let path = dir.join(name);
            tracing::info!(path = %path.display(), "removing what is torn");
            fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
        }
    }
    Ok(())
}

/// Whether a name is one that [`Store::create`] gives.
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
    fn only_who_has_the_token_is_the_owner() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        // Of what is not here nobody learns anything.
        assert!(store.is_owner(&claim(1)).unwrap());
        let home = store.create(&claim(1)).unwrap();
        assert!(store.is_owner(&claim(1)).unwrap());
        assert!(!store.is_owner(&claim(2)).unwrap());
        let mode = fs::metadata(home.join(TOKEN)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        for torn in ["", "01"] {
            fs::write(home.join(TOKEN), torn).unwrap();
            assert!(!store.is_owner(&claim(1)).unwrap());
        }
        fs::remove_file(home.join(TOKEN)).unwrap();
        assert!(!store.is_owner(&claim(1)).unwrap());
    }

    #[test]
    fn what_is_torn_goes_and_everything_else_stays() {
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
