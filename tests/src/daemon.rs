//! Real programs from Debian's packages, and their clients.

use crate::memory;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// A program of a package, killed with all its children when dropped.
#[derive(Debug)]
pub struct Daemon(Child);

impl Daemon {
    /// Starts it in a process group of its own.
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

    /// Starts it as CRIU wants it: in a session of its own, with no terminal or pipe of ours.
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

    /// Its process ID.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }

    /// The running program.
    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // One that has ended has no more children, and its number may be somebody else's.
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

/// Runs a client program to its end; its standard output.
///
/// # Errors
/// What it said if it failed.
pub fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    match output.status.success() {
        true => Ok(text(output.stdout)),
        false => Err(text(output.stderr)),
    }
}

/// Asks again and again until the answer is good: for what nothing but asking tells.
///
/// # Panics
/// If it never is, with the last answer.
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

/// An answer that must be `wanted`.
///
/// # Errors
/// The answer, if it is another.
pub fn answered(answer: Result<String, String>, wanted: &str) -> Result<(), String> {
    match answer {
        Ok(text) if text.trim() == wanted => Ok(()),
        Ok(text) | Err(text) => Err(text),
    }
}
