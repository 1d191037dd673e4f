//! A move of a victim that is paused at a step, for tests that intervene there.

use crate::copies::{copies, has_record, the_only_copy};
use crate::criu::{Criu, free_address};
use crate::daemon::{kill_one, until};
use crate::host::Host;
use crate::link::{Link, Step};
use crate::memory;
use crate::pair::{Receiver, Sent, send_command};
use crate::program::{Finished, Program};
use crate::victim::Victim;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// The round after which such a move is paused: one of the running tree, one during the dump, the last.
const LAST: u32 = 3;

/// The receiver has restored the copy and reports that.
pub const RESTORED: Step = ("restored", 15, true, LAST);
/// The sender asks the receiver to commit.
pub const COMMIT: Step = ("commit", 16, false, LAST);
/// The receiver reports that the copy runs.
pub const RUNNING: Step = ("running", 17, true, LAST);

/// A move that is paused at a step.
#[derive(Debug)]
pub struct Move {
    /// The target.
    pub victim: Victim,
    /// PID of its root.
    pub pid: i32,
    /// PIDs of its processes.
    pub tree: Vec<i32>,
    /// The connection.
    pub link: Link,
    /// The sender, until it is awaited.
    pub send: Option<Program>,
    /// The receiver.
    pub receiver: Receiver,
    /// The cgroup in which the tree is held.
    pub hold: Option<PathBuf>,
    /// The receiver's `--dir`.
    pub dir: TempDir,
    /// The receiver's host.
    pub host: Host,
    criu: PathBuf,
    address: SocketAddr,
}

impl Move {
    /// Starts a move, and returns when it has reached the step.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn pause(criu: &Criu, step: Step, environment: &[(&str, &Path)]) -> Self {
        let (host, dir) = (Host::start(), tempfile::tempdir().expect("a directory"));
        let address = free_address();
        let receiver = receiver(&host, criu.path(), address, dir.path());
        let victim = Victim::detached("heap=8 children=2 dirty=20");
        let (pid, tree) = (victim.pid(), victim.tree());
        let link = Link::start(receiver.address(), step, false);
        let mut send = migrate(criu, link.address, pid);
        send.envs(environment.iter().copied());
        let send = Some(Program::start(&mut send));
        link.await_step();
        Self {
            victim,
            pid,
            tree,
            link,
            send,
            receiver,
            hold: None,
            dir,
            host,
            criu: criu.path().to_owned(),
            address,
        }
    }

    /// Starts a move and cuts it off at the step, so that `send` exits in doubt.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn in_doubt(criu: &Criu, step: Step, environment: &[(&str, &Path)]) -> Self {
        let mut paused = Self::pause(criu, step, environment);
        paused.cut_off();
        paused
    }

    /// Cuts off the sender, which then exits in doubt.
    ///
    /// # Panics
    /// If it does not.
    pub fn cut_off(&mut self) {
        self.link.close();
        self.link.cut();
        self.finish().assert_failed(6, &["send --resolve"]);
        memory::assert_held(&self.tree);
        self.hold = Some(memory::cgroup(self.pid));
    }

    /// Waits until the sender exits.
    ///
    /// # Panics
    /// If it was awaited before.
    pub fn finish(&mut self) -> Sent {
        self.send.take().expect("it runs").finish().into()
    }

    /// Returns the PID of `receive`.
    #[must_use]
    pub fn receive(&mut self) -> i32 {
        // It is a child of nsenter.
        memory::tree(self.receiver.program().pid())[1]
    }

    /// Returns the PID of the CRIU that restores.
    ///
    /// # Panics
    /// If there is not exactly one.
    #[must_use]
    pub fn restoring_criu(&mut self) -> i32 {
        let name = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let receive = self.receive();
        let children = memory::children(receive);
        let [criu] = children
            .into_iter()
            .filter(|pid| name(pid).starts_with("criu"))
            .collect::<Vec<_>>()[..]
        else {
            panic!("not one CRIU under {receive}");
        };
        criu
    }

    /// Kills `receive`, and nothing else.
    ///
    /// # Panics
    /// If it does not exit.
    pub fn kill_receive(&mut self) {
        let receive = self.receive();
        kill_one(receive);
        assert!(memory::await_end(&[receive]));
    }

    /// Starts a receiver in the place of one that was killed.
    ///
    /// # Panics
    /// If it does not start.
    pub fn restart_receive(&mut self) {
        self.receiver = receiver(&self.host, &self.criu, self.address, self.dir.path());
    }

    /// Returns the content of the migration's outcome file.
    #[must_use]
    pub fn outcome(&self) -> String {
        let homes = fs::read_dir(self.dir.path())
            .into_iter()
            .flatten()
            .flatten();
        let mut outcomes = homes.map(|home| home.path().join("outcome.json"));
        let outcome = outcomes.find_map(|path| fs::read_to_string(path).ok());
        outcome.unwrap_or_default().trim().to_owned()
    }

    /// Waits until the outcome file contains a word.
    ///
    /// # Panics
    /// If it never does.
    pub fn await_outcome(&self, word: &str) {
        until("the outcome is written", || {
            let outcome = self.outcome();
            outcome.contains(word).then_some(()).ok_or(outcome)
        });
    }

    /// Returns the processes of the copy at the receiver, in whichever state they are.
    #[must_use]
    pub fn copy(&self) -> Vec<i32> {
        let all = copies(&self.tree).into_iter().map(|(pid, _)| pid);
        all.filter(|pid| !self.tree.contains(pid)).collect()
    }

    /// Asserts that exactly one copy runs, complete, and that nothing is left to resolve. Returns whether it
    /// is at the source.
    ///
    /// # Panics
    /// If something else is so.
    pub fn assert_one_copy(&mut self) -> bool {
        assert!(!has_record(self.pid));
        assert!(!self.hold.as_ref().is_some_and(|hold| hold.exists()));
        let copy = the_only_copy(&self.tree);
        let here = copy == self.pid;
        if !here {
            self.victim.await_end();
        }
        let verdict = self.victim.report().verdict(copy);
        verdict.unwrap_or_else(|error| panic!("{error}"));
        assert!(here || !self.tree.iter().any(|&pid| memory::lives(pid)));
        here
    }
}

fn receiver(host: &Host, criu: &Path, address: SocketAddr, dir: &Path) -> Receiver {
    let criu = criu.to_str().expect("its path is UTF-8");
    host.receiver(
        &address.port().to_string(),
        dir,
        &["--restore", "--criu", criu],
    )
}

/// Returns the command that moves a process.
#[must_use]
pub fn migrate(criu: &Criu, to: SocketAddr, pid: i32) -> Command {
    let mut send = send_command();
    send.args(["--to", &to.to_string(), "--migrate", "--criu"]);
    send.arg(criu.path()).arg(pid.to_string());
    send.args(["--max-rounds", "1", "--timeout", "3s"]);
    send.args(["--reconnect-for", "0"]);
    send
}

/// Resolves the move of a process.
#[must_use]
pub fn resolve(pid: i32, options: &[&str]) -> Finished {
    let mut send = send_command();
    send.args(["--resolve", &pid.to_string()]).args(options);
    Program::start(&mut send).finish()
}

/// Asserts that `send --resolve` succeeded and printed these words.
///
/// # Panics
/// If it did not.
pub fn assert_resolved(resolved: &Finished, words: &str) {
    assert!(resolved.status.success(), "{}", resolved.stderr);
    assert!(resolved.stderr.contains(words), "{}", resolved.stderr);
}

/// Asserts that a program failed with this exit code and printed these words.
///
/// # Panics
/// If it did not.
pub fn assert_failed(failed: &Finished, code: i32, words: &str) {
    assert_eq!(failed.status.code(), Some(code), "{}", failed.stderr);
    assert!(failed.stderr.contains(words), "{}", failed.stderr);
}
