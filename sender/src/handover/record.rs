//! The record of a hand-over: enough for `send --resolve` to find out how it ended, whatever died meanwhile.

use crate::target::process::{namespace_depth, pid_in_namespace};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_common::proc::process::ProcessId;
use pageferry_common::{Claim, MigrationId, Token};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Duration;

/// How often the sender checks whether a killed tree has exited: the kernel notifies only parents.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// A hand-over that is about to be committed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Address of the receiver.
    pub to: String,
    /// Id of the migration, 32 hex digits.
    id: String,
    /// Secret that authorises the sender to ask for the outcome, 64 hex digits.
    token: String,
    /// PID of the root in its own PID namespace.
    root_pid: u32,
    root: i32,
    tree: Vec<ProcessId>,
    /// PIDs of processes that had a job-control stop before the migration; they stay stopped.
    #[serde(default)]
    stopped: Vec<i32>,
}

/// Why a record could not be read, written or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct RecordError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl Record {
    /// Returns a record of the tree under `root`, which must be frozen. `stopped` are the PIDs, in their own
    /// namespace, of processes with a job-control stop.
    #[must_use]
    pub fn new(to: &str, claim: Claim, root: i32, stopped: &[u32]) -> Self {
        let tree = crate::freeze::process_list(root);
        let depth = namespace_depth(root).unwrap_or_default();
        let was_stopped = |pid: &i32| {
            let inner = pid_in_namespace(*pid, depth);
            inner.is_ok_and(|inner| stopped.contains(&inner))
        };
        let stopped = tree.iter().map(|it| it.pid).filter(was_stopped).collect();
        let tree = tree.iter().filter_map(|it| ProcessId::find(it.pid));
        Self {
            to: to.to_owned(),
            id: claim.id.to_string(),
            token: claim.token.to_hex(),
            root_pid: claim.root_pid,
            root,
            tree: tree.collect(),
            stopped,
        }
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

    /// Writes the record: to a temporary file, synced, renamed. It is as durable as its directory.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn write(&self) -> Result<(), RecordError> {
        let path = path(self.root);
        let write = || {
            let dir = path.parent().expect("it is in a directory");
            DirBuilder::new().mode(0o700).recursive(true).create(dir)?;
            let tmp = path.with_extension("tmp");
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&tmp)?;
            file.write_all(&serde_json::to_vec(self).expect("it is plain data"))?;
            file.sync_all()?;
            fs::rename(&tmp, &path)?;
            File::open(dir)?.sync_all()
        };
        write().map_err(|source| RecordError {
            action: "write",
            path: path.clone(),
            source,
        })
    }

    /// Reads the record of the tree under `root`.
    ///
    /// # Errors
    /// [`RecordError`], also if there is no record.
    pub fn read(root: i32) -> Result<Self, RecordError> {
        let path = path(root);
        let read = || Ok(serde_json::from_slice(&fs::read(&path)?)?);
        read().map_err(|source| RecordError {
            action: "read",
            path: path.clone(),
            source,
        })
    }

    /// Removes the record of the tree under `root`, once the hand-over is resolved.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn remove(root: i32) -> Result<(), RecordError> {
        let path = path(root);
        fs::remove_file(&path).map_err(|source| RecordError {
            action: "remove",
            path,
            source,
        })
    }

    /// Sends a signal to every process of the tree that still is the recorded one. Returns the PID of a
    /// process that the sender may not signal, if there is one.
    pub fn signal(&self, signal: Signal) -> Option<i32> {
        self.signal_except(&[], signal)
    }

    /// Resumes the tree after a SIGSTOP, except processes with a job-control stop from before the migration.
    pub fn release(&self) {
        self.signal_except(&self.stopped, Signal::SIGCONT);
    }

    fn signal_except(&self, excluded: &[i32], signal: Signal) -> Option<i32> {
        let mut forbidden = None;
        let selected =
            |process: &&ProcessId| !excluded.contains(&process.pid) && process.is_alive();
        for process in self.tree.iter().filter(selected) {
            // ESRCH is no failure: the process has exited meanwhile.
            if kill(Pid::from_raw(process.pid), signal) == Err(nix::Error::EPERM) {
                forbidden = Some(process.pid);
            }
        }
        forbidden
    }

    /// Waits until the whole tree, killed before, has exited.
    pub fn await_exit(&self) {
        while self.tree.iter().any(|process| process.is_alive()) {
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

fn path(root: i32) -> PathBuf {
    let run = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| "/run".into(), PathBuf::from);
    run.join("pageferry").join(format!("{root}.json"))
}
