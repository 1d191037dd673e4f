//! The record of a hand-over: enough for `send --resolve` to end it, whatever died meanwhile.
//!
//! There is one file for each hand-over, in a fixed directory, so that every later `send` on this host finds
//! it. It is written before the tree is held, and removed when exactly one copy runs. Its lock is held by the
//! program that handles the hand-over, from before the record is written until it is removed.

use super::hold::{Hierarchy, Hold, HoldError};
use nix::sys::signal::Signal;
use nix::sys::stat::{major, minor};
use pageferry_common::proc::boot::boot_id;
use pageferry_common::proc::process::ProcessId;
use pageferry_common::proc::read_lossy;
use pageferry_common::sys::pidfd;
use pageferry_common::{Claim, MigrationId, ReceiverId, Token};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where records are, whatever the environment says. It is emptied when the host boots, and need not survive:
/// the recorded processes do not survive either.
const DIR: &str = "/run/pageferry";

/// How often the sender checks whether a killed tree has exited: the kernel notifies only parents.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Longest file that is read as a record, bytes.
const RECORD_MAX: u64 = 64 << 20;

/// A hand-over that is about to be committed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Address of the receiver.
    pub to: String,
    /// Id of the migration, 32 hex digits.
    id: String,
    /// Id of the receiver, 32 hex digits: only this one can know the outcome.
    receiver: String,
    /// Secret that authorises the sender to ask for the outcome, 64 hex digits.
    token: String,
    /// PID of the root in its own PID namespace.
    root_pid: u32,
    /// The root.
    pub root: ProcessId,
    /// Name of the root's program.
    pub command: String,
    /// When the record was written, in seconds since 1970.
    since: u64,
    /// The boot during which it was written: PIDs and start times of another one mean nothing.
    boot_id: String,
    tree: Vec<ProcessId>,
    hold: Hold,
}

/// Why a record could not be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The kernel refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Error from the kernel.
        source: io::Error,
    },
    /// There is no record of this process.
    #[error("there is no record of process {0}")]
    Missing(i32),
    /// The content of a record is damaged.
    #[error("the record {} is damaged", .0.display())]
    Damaged(PathBuf),
    /// Another program handles the hand-over.
    #[error("process {holder} is handling the hand-over of process {root}")]
    Busy {
        /// PID of the root.
        root: i32,
        /// PID of the program that holds the lock.
        holder: String,
    },
    /// An earlier hand-over of the tree is in doubt.
    #[error(
        "the hand-over of process {root} to {to} is in doubt; first run: send --resolve {root}"
    )]
    InDoubt {
        /// PID of the root of that hand-over.
        root: i32,
        /// Address of its receiver.
        to: String,
    },
}

impl Record {
    /// Returns a record of the tree under `root`, which must be frozen.
    ///
    /// # Errors
    /// [`HoldError`] if the cgroups of the tree cannot be read.
    ///
    /// # Panics
    /// If `tree` is empty.
    pub fn new(
        to: &str,
        receiver: ReceiverId,
        claim: Claim,
        tree: Vec<ProcessId>,
    ) -> Result<Self, HoldError> {
        let root = *tree.first().expect("a frozen tree has a root");
        let command = read_lossy(format!("/proc/{}/comm", root.pid)).unwrap_or_default();
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Self {
            to: to.to_owned(),
            receiver: receiver.to_string(),
            id: claim.id.to_string(),
            token: claim.token.to_hex(),
            root_pid: claim.root_pid,
            root,
            command: command.trim_end().to_owned(),
            since: since.unwrap_or_default().as_secs(),
            boot_id: boot_id().to_owned(),
            hold: Hold::plan(claim.id, &tree)?,
            tree,
        })
    }

    /// Returns the identity of the migration; `None` if the record is damaged.
    #[must_use]
    pub fn claim(&self) -> Option<Claim> {
        Some(Claim {
            id: MigrationId::from_hex(&self.id)?,
            root_pid: self.root_pid,
            token: Token::from_hex(&self.token)?,
        })
    }

    /// Returns the id of the receiver; `None` if the record is damaged.
    #[must_use]
    pub fn receiver(&self) -> Option<ReceiverId> {
        ReceiverId::from_hex(&self.receiver)
    }

    /// When the record was written.
    #[must_use]
    pub fn since(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.since)
    }

    /// Number of recorded processes.
    #[must_use]
    pub fn processes(&self) -> usize {
        self.tree.len()
    }

    /// Returns the recorded processes that still exist.
    pub fn alive(&self) -> impl Iterator<Item = ProcessId> + '_ {
        let this_boot = self.boot_id == boot_id();
        let tree = self.tree.iter().copied();
        tree.filter(move |process| this_boot && process.is_alive())
    }

    /// Removes what a tree that is gone has left: the cgroups in which it was held.
    pub(super) fn clean_up(&self) {
        if self.boot_id == boot_id()
            && let Ok(hierarchy) = Hierarchy::open()
        {
            self.hold.remove(&hierarchy);
        }
    }

    /// Returns whether nothing is left here that the hand-over could decide about.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.alive().next().is_none()
    }

    /// Freezes the tree.
    ///
    /// # Errors
    /// [`HoldError`].
    pub fn freeze(&self, hierarchy: &Hierarchy) -> Result<(), HoldError> {
        self.hold.freeze(hierarchy)
    }

    /// Lets the tree run here. May be repeated.
    ///
    /// # Errors
    /// [`HoldError`] if it is still frozen.
    pub fn release(&self, hierarchy: &Hierarchy) -> Result<(), HoldError> {
        match self.boot_id == boot_id() {
            true => self.hold.release(hierarchy),
            false => Ok(()),
        }
    }

    /// Kills the tree, waits until it is gone, and removes its cgroups. Returns the number of processes that
    /// were left.
    ///
    /// # Errors
    /// `EPERM` if the sender may not signal one of the processes.
    pub fn kill(&self, hierarchy: &Hierarchy) -> io::Result<usize> {
        let alive: Vec<_> = self.alive().collect();
        for process in &alive {
            let killed = pidfd::open(process.pid).and_then(|pidfd| match process.is_alive() {
                // The descriptor refers to the recorded process, and not to one that got its PID.
                true => pidfd::signal(pidfd.as_fd(), Signal::SIGKILL as i32),
                false => Ok(()),
            });
            match killed {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        while self.alive().next().is_some() {
            std::thread::sleep(POLL_INTERVAL);
        }
        self.hold.remove(hierarchy);
        Ok(alive.len())
    }
}

/// A record whose lock this program holds.
#[derive(Debug)]
pub struct LockedRecord {
    /// The record.
    pub record: Record,
    lock: Lock,
}

impl LockedRecord {
    /// Removes the record, once exactly one copy runs, and then its lock.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn remove(self) -> Result<(), RecordError> {
        remove(&self.lock.path.with_extension("json"))
    }
}

/// The lock on a record. The kernel releases it when this program exits.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes the lock at `path`.
    fn take(path: &Path, root: i32) -> Result<Self, RecordError> {
        let take = || loop {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let holder = holder_of(path).unwrap_or_else(|| "(unknown)".to_owned());
                    return Ok(Err(holder));
                }
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // The last holder may have removed the file after it was opened here.
            let locked = file.metadata()?.ino();
            if fs::metadata(path).is_ok_and(|now| now.ino() == locked) {
                return Ok(Ok(file));
            }
        };
        match take() {
            Ok(Ok(file)) => Ok(Self {
                path: path.to_owned(),
                _file: file,
            }),
            Ok(Err(holder)) => Err(RecordError::Busy { root, holder }),
            Err(source) => Err(io_error("lock", path, source)),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if !self.path.with_extension("json").exists() {
            // Still locked: a program that has opened it finds out that it is gone.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A record and its state, for a list.
#[derive(Debug)]
pub struct Listed {
    /// The record.
    pub record: Record,
    /// PID of the program that handles the hand-over, if there is one.
    pub holder: Option<String>,
}

/// The records of this host.
#[derive(Debug, Clone)]
pub struct Records {
    dir: PathBuf,
}

impl Default for Records {
    fn default() -> Self {
        Self { dir: DIR.into() }
    }
}

impl Records {
    /// Locks and writes a record.
    ///
    /// # Errors
    /// [`RecordError`]: there is no record then, unless it is that of an earlier hand-over.
    pub fn create(&self, record: Record) -> Result<LockedRecord, RecordError> {
        let dir = &self.dir;
        let made = DirBuilder::new().mode(0o700).recursive(true).create(dir);
        made.and_then(|()| check_dir(dir))
            .map_err(|source| io_error("create", dir, source))?;
        let path = self.path(record.root);
        let lock = Lock::take(&path.with_extension("lock"), record.root.pid)?;
        // Not only before the first round: another sender may have committed this tree since then.
        self.check_in_doubt(&record.tree)?;
        if let Err(source) = write(&record, &path) {
            // It may be there although its directory could not be synced.
            let _ = fs::remove_file(&path);
            return Err(io_error("write", &path, source));
        }
        Ok(LockedRecord { record, lock })
    }

    /// Locks and reads the record of the tree under `root`.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn open(&self, root: i32) -> Result<LockedRecord, RecordError> {
        let mut found = self.paths()?;
        found.retain(|path| root_of(path).is_some_and(|it| it.0 == root));
        // A PID may have been used again: the record of a living process comes first.
        found.sort_by_key(|path| read(path).is_ok_and(|record| record.is_stale()));
        let path = found.into_iter().next().ok_or(RecordError::Missing(root))?;
        let lock = Lock::take(&path.with_extension("lock"), root)?;
        match read(&path) {
            Ok(record) => Ok(LockedRecord { record, lock }),
            // The last holder of the lock has resolved it.
            Err(RecordError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Err(RecordError::Missing(root))
            }
            Err(error) => Err(error),
        }
    }

    /// Checks that no process of this tree belongs to a hand-over that is in doubt. Removes stale records.
    ///
    /// # Errors
    /// [`RecordError::InDoubt`], and others if records cannot be read.
    pub fn check_in_doubt(&self, tree: &[ProcessId]) -> Result<(), RecordError> {
        for path in self.paths()? {
            let record = match read(&path) {
                Ok(record) => record,
                Err(RecordError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                    continue;
                }
                Err(error) => match root_of(&path) {
                    Some((pid, start))
                        if tree
                            .iter()
                            .any(|it| it.pid == pid && it.start_time() == start) =>
                    {
                        return Err(error);
                    }
                    Some(_) | None => continue,
                },
            };
            if record.is_stale() {
                remove_stale(&path);
            } else if record.alive().any(|process| tree.contains(&process)) {
                let (root, to) = (record.root.pid, record.to);
                return Err(RecordError::InDoubt { root, to });
            }
        }
        Ok(())
    }

    /// Lists all records that can be read, and logs those that cannot.
    ///
    /// # Errors
    /// [`RecordError`] if the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, RecordError> {
        let mut list = Vec::new();
        for path in self.paths()? {
            match read(&path) {
                Ok(record) => list.push(Listed {
                    record,
                    holder: holder_of(&path.with_extension("lock")),
                }),
                Err(RecordError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
                Err(why) => {
                    tracing::warn!(event = "record_unreadable", %why, "cannot list a record");
                }
            }
        }
        list.sort_by_key(|listed| listed.record.since);
        Ok(list)
    }

    /// Paths of all records.
    fn paths(&self) -> Result<Vec<PathBuf>, RecordError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.and_then(|entries| {
                check_dir(&self.dir)?;
                entries.map(|entry| Ok(entry?.path())).collect()
            }),
        };
        let mut paths: Vec<_> = entries.map_err(|source| io_error("read", &self.dir, source))?;
        paths.retain(|path| path.extension().is_some_and(|it| it == "json"));
        Ok(paths)
    }

    fn path(&self, root: ProcessId) -> PathBuf {
        self.dir
            .join(format!("{}-{}.json", root.pid, root.start_time()))
    }
}

/// Checks that no other user can put files into the directory.
fn check_dir(dir: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(dir)?;
    let own = found.uid() == nix::unistd::geteuid().as_raw() && found.mode() & 0o022 == 0;
    match found.is_dir() && own {
        true => Ok(()),
        false => Err(io::Error::other(
            "it belongs to, or can be changed by, other users",
        )),
    }
}

/// Returns PID and start time of the root in the name of a record.
fn root_of(path: &Path) -> Option<(i32, u64)> {
    let (pid, start) = path.file_stem()?.to_str()?.split_once('-')?;
    Some((pid.parse().ok()?, start.parse().ok()?))
}

/// Writes a record: to a temporary file, synced, renamed, and the directory synced.
fn write(record: &Record, path: &Path) -> io::Result<()> {
    let tmp = path.with_extension("tmp");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&tmp)?;
    let written = file
        .write_all(&serde_json::to_vec(record).expect("it is plain data"))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&tmp, path));
    if written.is_err() {
        let _ = fs::remove_file(&tmp);
    }
    written?;
    File::open(path.parent().expect("it is in a directory"))?.sync_all()
}

fn read(path: &Path) -> Result<Record, RecordError> {
    let mut bytes = Vec::new();
    let mut open = OpenOptions::new();
    let file = open.read(true).custom_flags(libc::O_NOFOLLOW).open(path);
    file.and_then(|file| file.take(RECORD_MAX).read_to_end(&mut bytes))
        .map_err(|source| io_error("read", path, source))?;
    serde_json::from_slice(&bytes).map_err(|_| RecordError::Damaged(path.to_owned()))
}

fn remove(path: &Path) -> Result<(), RecordError> {
    fs::remove_file(path).map_err(|source| io_error("remove", path, source))
}

/// Removes a stale record, unless another program handles it.
fn remove_stale(path: &Path) {
    let Some((root, _)) = root_of(path) else {
        return;
    };
    if let Ok(_lock) = Lock::take(&path.with_extension("lock"), root)
        && let Ok(record) = read(path)
        && record.is_stale()
    {
        record.clean_up();
        tracing::info!(event = "stale_record_removed", record = %path.display(), "removed a stale record");
        let _ = fs::remove_file(path);
    }
}

/// Returns the PID of the program that holds a lock; `None` if it is free. Does not take the lock even for a
/// moment: a program that needs it would fail.
fn holder_of(lock: &Path) -> Option<String> {
    let lock = fs::metadata(lock).ok()?;
    let (major, minor) = (major(lock.dev()), minor(lock.dev()));
    let file = format!("{major:02x}:{minor:02x}:{}", lock.ino());
    let locks = read_lossy("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        // 1: FLOCK  ADVISORY  WRITE 4711 00:1a:17 0 EOF; a program that waits for it has `->` after the
        // number.
        let mut fields = line.split_ascii_whitespace().skip(1);
        let is_flock = fields.next() == Some("FLOCK");
        let pid = fields.nth(2)?;
        (is_flock && fields.next() == Some(&file)).then(|| pid.to_owned())
    })
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> RecordError {
    RecordError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let tree = vec![ProcessId::find(std::process::id().cast_signed()).unwrap()];
        let claim = Claim {
            id: MigrationId([7; 16]),
            root_pid: 1,
            token: Token([9; 32]),
        };
        Record::new("there:7700", ReceiverId([8; 16]), claim, tree).unwrap()
    }

    fn records() -> (Records, tempfile::TempDir) {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("pageferry");
        (Records { dir }, root)
    }

    fn names(records: &Records) -> Vec<String> {
        let entries = fs::read_dir(&records.dir).unwrap().flatten();
        entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn record_is_read_back_while_its_processes_live() {
        let (records, _dir) = records();
        let record = record();
        let (pid, tree) = (record.root.pid, record.tree.clone());
        assert!(matches!(records.open(pid), Err(RecordError::Missing(_))));
        records.check_in_doubt(&tree).unwrap();
        drop(records.create(record).unwrap());
        let in_doubt = records.check_in_doubt(&tree).unwrap_err();
        assert!(
            in_doubt
                .to_string()
                .contains(&format!("send --resolve {pid}"))
        );
        records.check_in_doubt(&[]).unwrap();
        let listed = &records.list().unwrap()[0];
        assert_eq!(
            (listed.record.alive().count(), &listed.holder),
            (1, &None::<String>)
        );
        let opened = records.open(pid).unwrap();
        assert_eq!(opened.record.claim().unwrap().token, Token([9; 32]));
        assert_eq!(opened.record.receiver(), Some(ReceiverId([8; 16])));
        opened.remove().unwrap();
        assert_eq!(names(&records), [""; 0]);
    }

    #[test]
    fn record_has_one_holder() {
        let (records, _dir) = records();
        let pid = record().root.pid;
        let first = records.create(record()).unwrap();
        for second in [records.create(record()), records.open(pid)] {
            let busy = second.unwrap_err().to_string();
            assert_eq!(
                busy,
                format!("process {pid} is handling the hand-over of process {pid}")
            );
        }
        assert_eq!(
            records.list().unwrap()[0].holder.as_deref(),
            Some(&*pid.to_string())
        );
        drop(first);
        assert!(matches!(
            records.create(record()),
            Err(RecordError::InDoubt { .. })
        ));
    }

    #[test]
    fn record_of_another_boot_is_stale() {
        let (records, _dir) = records();
        let mut old = record();
        old.boot_id = "another".to_owned();
        assert!(old.is_stale());
        drop(records.create(old).unwrap());
        records.check_in_doubt(&record().tree).unwrap();
        assert_eq!(names(&records), [""; 0]);
    }

    #[test]
    fn record_is_not_written_through_links_of_others() {
        let (records, root) = records();
        let elsewhere = root.path().join("elsewhere");
        fs::create_dir(&records.dir).unwrap();
        let lock = records.path(record().root).with_extension("lock");
        std::os::unix::fs::symlink(&elsewhere, &lock).unwrap();
        assert!(matches!(
            records.create(record()),
            Err(RecordError::Io { .. })
        ));
        assert!(!elsewhere.exists());
        fs::remove_dir_all(&records.dir).unwrap();
        std::os::unix::fs::symlink(root.path(), &records.dir).unwrap();
        assert!(matches!(
            records.create(record()),
            Err(RecordError::Io { .. })
        ));
    }
}
