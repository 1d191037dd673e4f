//! Child programs whose output is read as it comes, and which cannot outlive the test.

use crate::log;
use crate::usage::{self, Usage};
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take before a test calls it hung.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The lines of a pipe, collected by a thread so that waiting for one can have a deadline.
#[derive(Debug)]
pub(crate) struct Lines(mpsc::Receiver<String>);

impl Lines {
    pub(crate) fn of(pipe: impl Read + std::marker::Send + 'static) -> Self {
        let (sender, receiver) = mpsc::channel();
        thread::Builder::new()
            .name("lines".into())
            .spawn(move || {
                let mut pipe = BufReader::new(pipe);
                let mut line = Vec::new();
                while matches!(pipe.read_until(b'\n', &mut line), Ok(1..)) {
                    let text = String::from_utf8_lossy(&line).trim_end_matches('\n').into();
                    if sender.send(text).is_err() {
                        break;
                    }
                    line.clear();
                }
            })
            .expect("a thread can be started");
        Self(receiver)
    }

    /// The next line; `Ok(None)` at the end; `Err` once the deadline has passed.
    pub(crate) fn next(&self, deadline: Instant) -> Result<Option<String>, DeadlinePassed> {
        match self
            .0
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => Err(DeadlinePassed),
        }
    }

    /// Everything up to the end, which must come before the deadline.
    fn rest(&self, into: &mut String, deadline: Instant) -> Result<(), DeadlinePassed> {
        while let Some(line) = self.next(deadline)? {
            into.push_str(&line);
            into.push('\n');
        }
        Ok(())
    }
}

#[derive(Debug)]
pub(crate) struct DeadlinePassed;

/// A running program under test. Dropping it kills it.
#[derive(Debug)]
pub struct Program {
    name: String,
    child: Child,
    stdout: Lines,
    stderr: Lines,
    log: String,
}

/// How a program ended and what it said.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
    /// What it took of the machine.
    pub usage: Usage,
}

impl Program {
    /// Starts a program.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        let name = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
        let stdout = Lines::of(child.stdout.take().expect("is a pipe"));
        let stderr = Lines::of(child.stderr.take().expect("is a pipe"));
        Self {
            name,
            child,
            stdout,
            stderr,
            log: String::new(),
        }
    }

    /// Its process ID.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Sends it SIGKILL.
    pub fn kill(&mut self) {
        // Fails only if it has ended, which is as well.
        let _ = self.child.kill();
    }

    /// The same, and waits until it is gone, with its port and its locks.
    ///
    /// # Panics
    /// If it is not our child.
    pub fn end(&mut self) {
        self.kill();
        self.child.wait().expect("it is our child");
    }

    /// Waits for a line on standard error that `wanted` makes something of.
    ///
    /// # Panics
    /// If there is none before the program or our patience ends.
    pub fn await_stderr<T>(&mut self, wanted: impl Fn(&str) -> Option<T>) -> T {
        self.await_stderr_within(PATIENCE, wanted)
    }

    /// The same with another patience.
    ///
    /// # Panics
    /// As [`Program::await_stderr`].
    pub fn await_stderr_within<T>(
        &mut self,
        patience: Duration,
        wanted: impl Fn(&str) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + patience;
        loop {
            match self.stderr.next(deadline) {
                Ok(Some(line)) => {
                    self.log.push_str(&line);
                    self.log.push('\n');
                    if let Some(found) = wanted(&line) {
                        return found;
                    }
                }
                Ok(None) => panic!("{} ended early:\n{}", self.name, self.log),
                Err(DeadlinePassed) => panic!("{} hangs:\n{}", self.name, self.log),
            }
        }
    }

    /// Waits for a log line that reports this event, and returns the line.
    ///
    /// # Panics
    /// As [`Program::await_stderr`].
    pub fn await_event(&mut self, name: &str) -> String {
        self.await_event_within(PATIENCE, name)
    }

    /// Does the same with another deadline.
    ///
    /// # Panics
    /// As [`Program::await_stderr`].
    pub fn await_event_within(&mut self, patience: Duration, name: &str) -> String {
        self.await_stderr_within(patience, |line| {
            (log::event(line) == Some(name)).then(|| line.to_owned())
        })
    }

    /// Waits until `send` reports that this round is done.
    ///
    /// # Panics
    /// As [`Program::await_stderr`].
    pub fn await_round(&mut self, round: u32) {
        let round = round.to_string();
        self.await_stderr(|line| {
            let done = log::event(line) == Some("round_done");
            (done && log::field(line, "round") == Some(&round)).then_some(())
        });
    }

    /// Forgets what it has said on standard error up to now, so that what is awaited next is new.
    pub fn skip_stderr(&mut self) {
        let now = Instant::now();
        while let Ok(Some(_)) = self.stderr.next(now) {}
    }

    /// Waits until it ends.
    ///
    /// # Panics
    /// If it takes longer than `patience`.
    #[must_use]
    pub fn finish_within(mut self, patience: Duration) -> Finished {
        let deadline = Instant::now() + patience;
        let mut stdout = String::new();
        let mut stderr = std::mem::take(&mut self.log);
        let ended = self
            .stderr
            .rest(&mut stderr, deadline)
            .and_then(|()| self.stdout.rest(&mut stdout, deadline));
        if ended.is_err() {
            self.kill();
            panic!("{} hangs; stderr:\n{stderr}", self.name);
        }
        let (status, usage) = usage::wait(&mut self.child).expect("it is our child");
        Finished {
            status,
            stdout,
            stderr,
            usage,
        }
    }

    /// Waits until it ends.
    ///
    /// # Panics
    /// If it takes longer than [`PATIENCE`].
    #[must_use]
    pub fn finish(self) -> Finished {
        self.finish_within(PATIENCE)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.wait();
    }
}

/// Finds a binary of the workspace: named by an environment variable, or beside the test's own.
///
/// # Panics
/// If it has not been built.
pub(crate) fn binary(variable: &str, name: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let exe = std::env::current_exe().expect("a test knows its own path");
    // target/PROFILE/deps/TEST: the same profile's directory comes first.
    exe.ancestors()
        .skip(1)
        .take(3)
        .flat_map(|dir| ["", "release", "debug"].map(|profile| dir.join(profile).join(name)))
        .find(|path| path.is_file())
        .unwrap_or_else(|| {
            panic!("`{name}` is not built: run `cargo build --workspace` first, or set {variable}")
        })
}
