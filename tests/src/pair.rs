//! The two programs under test: `receive` on a free loopback port, and `send` to it.

use crate::log::{event, field};
use crate::program::{Finished, Program, binary};
use serde::Deserialize;
use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;
use tempfile::TempDir;

/// One round, as `send --json` reports it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Round {
    /// Number of the round.
    pub round: u64,
    /// Kind of the round.
    pub kind: String,
    /// Time for which the tree was frozen, in milliseconds.
    pub frozen_ms: f64,
    /// Pages examined.
    pub scanned_pages: u64,
    /// Pages sent with their content.
    pub sent_pages: u64,
    /// Pages written since the last round whose content the receiver has already.
    pub unchanged_pages: u64,
    /// Pages of zeros, sent without content.
    pub zero_pages: u64,
    /// Bytes of page contents before compression.
    pub bytes_raw: u64,
    /// Bytes on the wire.
    pub bytes_wire: u64,
    /// Duration, in seconds.
    pub seconds: f64,
}

/// Report printed by `send --json`.
///
/// Only the rounds are typed; tests name the other fields, so that a changed name fails a test.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Report {
    /// The rounds, oldest first.
    pub rounds: Vec<Round>,
    /// All other fields.
    #[serde(flatten)]
    pub totals: serde_json::Map<String, serde_json::Value>,
}

impl Report {
    /// Returns the directory of the last round, the newest of its chain.
    ///
    /// # Panics
    /// If the report has no directory or no round.
    #[must_use]
    pub fn last_round(&self) -> PathBuf {
        let directory = self.totals.get("directory").and_then(|it| it.as_str());
        let round = self.rounds.last().expect("there was a round").round;
        Path::new(directory.expect("a report names the directory")).join(round.to_string())
    }
}

/// A finished run of `send`.
#[derive(Debug)]
pub struct Sent {
    /// Exit status.
    pub status: ExitStatus,
    /// The report, if standard output contains one.
    pub report: Option<Report>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Sent {
    /// Returns the report of a run that must have succeeded.
    ///
    /// # Panics
    /// If it failed, with its standard error.
    #[must_use]
    pub fn expect_report(self) -> Report {
        assert!(
            self.status.success(),
            "send: {}\n{}",
            self.status,
            self.stderr
        );
        let text = self.stdout;
        self.report
            .unwrap_or_else(|| panic!("send printed no report but {text:?}"))
    }

    /// Asserts the exit code of a run that must have failed, and that its standard error contains these words.
    ///
    /// # Panics
    /// If not.
    pub fn assert_failed(&self, code: i32, words: &[&str]) {
        assert_eq!(self.status.code(), Some(code), "{}", self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "{word}: {}", self.stderr);
        }
    }
}

impl From<Finished> for Sent {
    fn from(finished: Finished) -> Self {
        Self {
            status: finished.status,
            report: serde_json::from_str(&finished.stdout).ok(),
            stdout: finished.stdout,
            stderr: finished.stderr,
        }
    }
}

/// A running `send`.
#[derive(Debug)]
pub struct Send(Program);

impl Send {
    /// Starts `send --to TO PID --json OPTIONS`; the binary is `$PAGEFERRY_SEND` or the workspace's.
    ///
    /// # Panics
    /// If the binary is not built.
    #[must_use]
    pub fn start(to: SocketAddr, pid: i32, options: &[&str]) -> Self {
        let mut command = send_command();
        command.arg("--to").arg(to.to_string());
        command.arg(pid.to_string()).arg("--json").args(options);
        Self(Program::start(&mut command))
    }

    /// Returns the running program, to observe or kill it.
    pub fn program(&mut self) -> &mut Program {
        &mut self.0
    }

    /// Waits until it exits.
    ///
    /// # Panics
    /// If it hangs.
    #[must_use]
    pub fn finish(self) -> Sent {
        self.0.finish().into()
    }

    /// Does the same with a longer timeout.
    ///
    /// # Panics
    /// If it runs longer than that.
    #[must_use]
    pub fn finish_within(self, patience: Duration) -> Sent {
        self.0.finish_within(patience).into()
    }
}

/// A `receive` that accepts connections.
#[derive(Debug)]
pub struct Receiver {
    program: Program,
    address: SocketAddr,
}

impl Receiver {
    /// Starts `receive --listen 0 --dir DIR OPTIONS`, and waits until it reports its address; the binary is
    /// `$PAGEFERRY_RECEIVE` or the workspace's.
    ///
    /// # Panics
    /// If the binary is not built, or does not start to listen.
    #[must_use]
    pub fn start(dir: &Path, options: &[&str]) -> Self {
        Self::listen("0", dir, options)
    }

    /// Does the same on a given port, such as that of a predecessor.
    ///
    /// # Panics
    /// As [`Receiver::start`].
    #[must_use]
    pub fn listen(port: &str, dir: &Path, options: &[&str]) -> Self {
        Self::run(receive_command(), port, dir, options)
    }

    /// Does the same through another command that executes `receive`.
    ///
    /// # Panics
    /// As [`Receiver::start`].
    #[must_use]
    pub fn run(mut command: Command, port: &str, dir: &Path, options: &[&str]) -> Self {
        command.args([OsStr::new("--listen"), port.as_ref()]);
        command
            .args([OsStr::new("--dir"), dir.as_ref()])
            .args(options);
        let mut program = Program::start(&mut command);
        let address = program.await_stderr(listening_on);
        Self { program, address }
    }

    /// Returns the address on which it accepts connections.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the running program, to observe or kill it.
    pub fn program(&mut self) -> &mut Program {
        &mut self.program
    }

    /// Waits until it exits by itself.
    ///
    /// # Panics
    /// If it hangs.
    #[must_use]
    pub fn finish(self) -> Finished {
        self.program.finish()
    }
}

/// Returns the command `send`: `$PAGEFERRY_SEND` or the workspace's.
///
/// # Panics
/// If it is not built.
#[must_use]
pub fn send_command() -> Command {
    Command::new(binary("PAGEFERRY_SEND", "send"))
}

/// Returns the command `receive`: `$PAGEFERRY_RECEIVE` or the workspace's.
///
/// # Panics
/// If it is not built.
#[must_use]
pub fn receive_command() -> Command {
    Command::new(binary("PAGEFERRY_RECEIVE", "receive"))
}

/// Returns the address in the log line of the event `listening`.
#[must_use]
pub fn listening_on(line: &str) -> Option<SocketAddr> {
    let listens = event(line) == Some("listening");
    field(line, "address").filter(|_| listens)?.parse().ok()
}

/// A receiver with its own directory.
#[derive(Debug)]
pub struct Pair {
    receiver: Receiver,
    dir: PathBuf,
    _root: TempDir,
}

impl Pair {
    /// Starts a receiver with these options and a new directory.
    ///
    /// # Panics
    /// As [`Receiver::start`].
    #[must_use]
    pub fn start(receiver_options: &[&str]) -> Self {
        let root = tempfile::tempdir().expect("a temporary directory can be made");
        let dir = root.path().join("images");
        std::fs::create_dir(&dir).expect("it is new");
        Self {
            receiver: Receiver::start(&dir, receiver_options),
            dir,
            _root: root,
        }
    }

    /// Returns the directory of the images.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the address of the receiver.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.receiver.address
    }

    /// Waits until the receiver exits by itself; `images` in the returned directory contains the images.
    ///
    /// # Panics
    /// If it hangs.
    #[must_use]
    pub fn finish(self) -> (TempDir, Finished) {
        (self._root, self.receiver.finish())
    }

    /// Returns the receiver.
    pub fn receiver(&mut self) -> &mut Receiver {
        &mut self.receiver
    }

    /// Starts to send a tree.
    ///
    /// # Panics
    /// As [`Send::start`].
    #[must_use]
    pub fn start_send(&self, pid: i32, options: &[&str]) -> Send {
        Send::start(self.receiver.address, pid, options)
    }

    /// Sends a tree, and waits until `send` exits.
    ///
    /// # Panics
    /// As [`Send::start`], or if it hangs.
    #[must_use]
    pub fn send(&self, pid: i32, options: &[&str]) -> Sent {
        self.start_send(pid, options).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_read_from_a_log_line() {
        let line = r#" INFO listening event="listening" address=127.0.0.1:4711"#;
        assert_eq!(listening_on(line), "127.0.0.1:4711".parse().ok());
        assert_eq!(
            listening_on("INFO other event=\"other\" address=127.0.0.1:4711"),
            None
        );
    }

    #[test]
    fn report_keeps_unknown_fields() {
        let text = r#"{"rounds": [{"round": 0, "kind": "full", "frozen_ms": 0.3, "scanned_pages": 9,
            "sent_pages": 5, "unchanged_pages": 3, "zero_pages": 1, "bytes_raw": 20480,
            "bytes_wire": 900, "seconds": 0.01, "later": true}], "downtime_ms": 4.5}"#;
        let report: Report = serde_json::from_str(text).unwrap();
        assert_eq!(report.rounds[0].sent_pages, 5);
        assert_eq!(report.totals["downtime_ms"], 4.5);
    }
}
