//! Runs programs from Debian packages, and their clients.

use crate::memory;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// A running program. Dropping it kills it and all its descendants.
#[derive(Debug)]
pub struct Daemon(Child);

impl Daemon {
    /// Starts a program in its own process group.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        Self(
            command
                .process_group(0)
                .spawn()
                .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}; run scripts/setup")),
        )
    }

    /// Starts a program in its own session, without a terminal or inherited pipes, as CRIU requires.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn detached(command: &Command) -> Self {
        let mut setsid = Command::new("setsid");
        setsid.arg(command.get_program()).args(command.get_args());
        if let Some(dir) = command.get_current_dir() {
            setsid.current_dir(dir);
        }
        let null = || std::process::Stdio::null();
        setsid.stdin(null()).stdout(null()).stderr(null());
        Self(
            setsid
                .spawn()
                .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}; run scripts/setup")),
        )
    }

    /// Returns the process ID.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }

    /// Returns the child process.
    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // A program that exited has no descendants left, and its PID may have been reused.
        if matches!(self.0.try_wait(), Ok(None)) {
            kill_tree(self.pid());
            let _ = self.0.wait();
        }
    }
}

/// Sends SIGKILL to one process.
pub fn kill_one(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

/// Sends SIGKILL to a process and all its descendants.
pub fn kill_tree(root: i32) {
    for pid in memory::tree(root).into_iter().rev() {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Runs a client program until it exits, and returns its standard output.
///
/// # Errors
/// Returns its standard error if it fails.
pub fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    match output.status.success() {
        true => Ok(text(output.stdout)),
        false => Err(text(output.stderr)),
    }
}

/// Polls `so` every 20 ms until it returns `Ok`, for conditions that can only be polled.
///
/// # Panics
/// With the last error, if that takes longer than 60 seconds.
pub fn until<T>(what: &str, mut so: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match so() {
            Ok(done) => return done,
            Err(why) => assert!(Instant::now() < deadline, "{what}: {why}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Checks that an answer equals `wanted`.
///
/// # Errors
/// Returns any other answer.
pub fn answered(answer: Result<String, String>, wanted: &str) -> Result<(), String> {
    match answer {
        Ok(text) if text.trim() == wanted => Ok(()),
        Ok(text) | Err(text) => Err(text),
    }
}
