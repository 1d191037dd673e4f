//! Child programs whose output is read while they run, and which cannot outlive the test.

use crate::log;
use crate::usage::{self, Usage};
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// Timeout after which a test considers a program hung.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Lines of a pipe, collected by a thread so that a reader can have a deadline.
#[derive(Debug)]
pub(crate) struct Lines(mpsc::Receiver<String>);

impl Lines {
    pub(crate) fn of(pipe: impl Read + Send + 'static) -> Self {
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

    /// Returns the next line, `Ok(None)` at the end, or `Err` after the deadline.
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

    /// Appends all lines up to the end, which must come before the deadline.
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

/// Exit status and output of a program.
#[derive(Debug)]
pub struct Finished {
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Resources used.
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

    /// Returns the process ID.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        // Fails only if the program has exited.
        let _ = self.child.kill();
    }

    /// Sends SIGKILL, and waits until the program has exited and released its port and locks.
    ///
    /// # Panics
    /// If it is not a child of this process.
    pub fn kill_and_wait(&mut self) {
        self.kill();
        self.child.wait().expect("it is our child");
    }

    /// Waits for a line on standard error for which `wanted` returns a value.
    ///
    /// # Panics
    /// If the program exits or [`PATIENCE`] passes before that.
    pub fn await_stderr<T>(&mut self, wanted: impl Fn(&str) -> Option<T>) -> T {
        self.await_stderr_within(PATIENCE, wanted)
    }

    /// Does the same with another timeout.
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

    /// Does the same with another timeout.
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

    /// Discards the standard error received so far, so that the next awaited line is new.
    pub fn skip_stderr(&mut self) {
        let now = Instant::now();
        while let Ok(Some(_)) = self.stderr.next(now) {}
    }

    /// Returns the standard error received so far.
    pub fn log(&mut self) -> &str {
        let now = Instant::now();
        while let Ok(Some(line)) = self.stderr.next(now) {
            self.log.push_str(&line);
            self.log.push('\n');
        }
        &self.log
    }

    /// Waits until the program exits.
    ///
    /// # Panics
    /// If it runs longer than `patience`.
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

    /// Waits until the program exits.
    ///
    /// # Panics
    /// If it runs longer than [`PATIENCE`].
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

/// Finds a binary of the workspace: named by an environment variable, or next to the test's own.
///
/// # Panics
/// If it is not built.
pub(crate) fn binary(variable: &str, name: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let exe = std::env::current_exe().expect("a test knows its own path");
    // target/PROFILE/deps/TEST: the directory of the same profile comes first.
    exe.ancestors()
        .skip(1)
        .take(3)
        .flat_map(|dir| ["", "release", "debug"].map(|profile| dir.join(profile).join(name)))
        .find(|path| path.is_file())
        .unwrap_or_else(|| {
            panic!("`{name}` is not built: run `cargo build --workspace` first, or set {variable}")
        })
}
