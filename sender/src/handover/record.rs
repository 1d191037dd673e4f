//! What is written down before a hand-over is decided: enough for `send --resolve` to find out how it
//! ended, whoever died meanwhile.

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

/// How often it is looked whether a tree is gone: nothing tells of processes that are not ours.
const LOOK: Duration = Duration::from_millis(1);

/// A hand-over that is about to be decided.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Where the receiver listens.
    pub to: String,
    /// What it knows the migration by: 32 hex digits.
    id: String,
    /// What proves to it that we may ask: 64 hex digits.
    token: String,
    /// The root, as its own PID namespace counts.
    root_pid: u32,
    root: i32,
    tree: Vec<ProcessId>,
    /// Those of the tree that were stopped by somebody else's signal.
    #[serde(default)]
    stopped: Vec<i32>,
}

/// A record that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}", path.display())]
pub struct RecordError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl Record {
    /// Of the tree under `root`, which is frozen; `stopped` are those who already were, by their PIDs where they
    /// see themselves.
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

    /// Which migration it is; `None` if that is not what was written down.
    #[must_use]
    pub fn claim(&self) -> Option<Claim> {
        Some(Claim {
            id: MigrationId::from_hex(&self.id)?,
            root_pid: self.root_pid,
            token: Token::from_hex(&self.token)?,
        })
    }

    /// Writes it down, durably as far as the place is.
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
            what: "write",
            path: path.clone(),
            source,
        })
    }

    /// The record of the tree under `root`.
    ///
    /// # Errors
    /// [`RecordError`]; `NotFound` if there is none.
    pub fn read(root: i32) -> Result<Self, RecordError> {
        let path = path(root);
        let read = || Ok(serde_json::from_slice(&fs::read(&path)?)?);
        read().map_err(|source| RecordError {
            what: "read",
            path: path.clone(),
            source,
        })
    }

    /// It is decided, and done.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn remove(root: i32) -> Result<(), RecordError> {
        let path = path(root);
        fs::remove_file(&path).map_err(|source| RecordError {
            what: "remove",
            path,
            source,
        })
    }

    /// Sends a signal to every process of the tree that still is the one it was. Returns one that we may
    /// not signal, if there is one.
    pub fn signal(&self, signal: Signal) -> Option<i32> {
        self.signal_but(&[], signal)
    }

    /// Lets the tree go on after a SIGSTOP, but for those whom somebody else had stopped before.
    pub fn let_go(&self) {
        self.signal_but(&self.stopped, Signal::SIGCONT);
    }

    fn signal_but(&self, others: &[i32], signal: Signal) -> Option<i32> {
        let mut forbidden = None;
        let meant = |process: &&ProcessId| !others.contains(&process.pid) && process.is_alive();
        for process in self.tree.iter().filter(meant) {
            // One that ended meanwhile needs none.
            if kill(Pid::from_raw(process.pid), signal) == Err(nix::Error::EPERM) {
                forbidden = Some(process.pid);
            }
        }
        forbidden
    }

    /// Waits until the whole tree, killed before, is gone.
    pub fn await_end(&self) {
        while self.tree.iter().any(|process| process.is_alive()) {
            std::thread::sleep(LOOK);
        }
    }
}

fn path(root: i32) -> PathBuf {
    let run = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| "/run".into(), PathBuf::from);
    run.join("pageferry").join(format!("{root}.json"))
}
