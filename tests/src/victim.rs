//! The victim program: a migration target that checks its own memory.
//!
//! `victim/victim.c` lists its features and commands.

use crate::memory;
use crate::program::{DeadlinePassed, Lines, PATIENCE};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Instant;
use tempfile::TempDir;

/// A running victim. Dropping it kills its whole tree.
#[derive(Debug)]
pub struct Victim {
    child: Child,
    pipes: Option<(ChildStdin, Lines)>,
    report: ReportFile,
    skipped: Vec<String>,
    dir: TempDir,
}

/// Errors that threads of the victim detected, and counts of interrupted system calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errors {
    /// Errors that must never happen.
    pub errors: u64,
    /// `EINTR` from calls that the kernel restarts after any plain stop; a restore by CRIU does not.
    pub interrupted: u64,
    /// `EINTR` from calls for which signal(7) allows it after a stop.
    pub eintr: u64,
    /// The first error.
    pub first: String,
}

/// A region of the victim's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// The process that owns it.
    pub pid: i32,
    /// First address; 0 if it is not mapped.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// Feature that created it.
    pub kind: String,
    /// Inode number of the shared segment or file, otherwise 0.
    pub inode: u64,
}

/// Returns the path of the victim: `$PAGEFERRY_VICTIM`, or the one built with this crate.
#[must_use]
pub fn path() -> PathBuf {
    std::env::var_os("PAGEFERRY_VICTIM")
        .unwrap_or_else(|| env!("PAGEFERRY_VICTIM_BUILT").into())
        .into()
}

impl Victim {
    /// Starts a victim with these words as its features (and options), and waits until it is ready.
    ///
    /// # Panics
    /// If it does not become ready.
    #[must_use]
    pub fn start(features: &str) -> Self {
        let (mut command, dir) = command(&[]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = spawn(command.args(features.split_whitespace()));
        let stdin = child.stdin.take().expect("is a pipe");
        let lines = Lines::of(child.stdout.take().expect("is a pipe"));
        let mut victim = Self {
            child,
            pipes: Some((stdin, lines)),
            report: ReportFile::new(dir.path().join("report")),
            skipped: Vec::new(),
            dir,
        };
        victim.await_ready();
        victim
    }

    /// Starts a victim as CRIU requires: in its own session, without pipes to other processes. A signal requests a
    /// check, and it reports the result in a file; so does a restored copy.
    ///
    /// # Panics
    /// If it does not become ready.
    #[must_use]
    pub fn detached(features: &str) -> Self {
        Self::detached_in(&[], features)
    }

    /// Does the same through a program that executes it, such as `unshare --ipc`.
    ///
    /// # Panics
    /// If it does not become ready.
    #[must_use]
    pub fn detached_in(through: &[&str], features: &str) -> Self {
        let (mut command, dir) = command(through);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.arg("--no-stdin").stderr(Stdio::null());
        let child = spawn(command.args(features.split_whitespace()));
        let mut victim = Self {
            child,
            pipes: None,
            report: ReportFile::new(dir.path().join("report")),
            skipped: Vec::new(),
            dir,
        };
        victim.await_ready();
        victim
    }

    fn await_ready(&mut self) {
        loop {
            let line = self.line().unwrap_or_else(|e| panic!("victim: {e}"));
            match line.split_once(' ') {
                Some(("skip", what)) => self.skipped.push(what.into()),
                Some(("ready", _)) => return,
                _ => panic!("victim printed {line:?} instead of ready"),
            }
        }
    }

    fn line(&mut self) -> Result<String, NoAnswer> {
        match &self.pipes {
            Some((_, lines)) => lines
                .next(Instant::now() + PATIENCE)
                .map_err(|DeadlinePassed| NoAnswer::Hung)?
                .ok_or(NoAnswer::Dead),
            None => self.report.next_line(),
        }
    }

    /// Returns the process ID of the root.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Returns the process IDs of the whole tree, the root first.
    #[must_use]
    pub fn tree(&self) -> Vec<i32> {
        memory::tree(self.pid())
    }

    /// Returns its directory, in which its files are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Stops the whole tree with SIGSTOP.
    ///
    /// # Panics
    /// If it does not stop.
    pub fn stop(&self) {
        let tree = self.tree();
        for &pid in &tree {
            kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("it is alive");
        }
        crate::daemon::until("the victim stops", || {
            match tree.iter().find(|&&pid| !memory::is_stopped(pid)) {
                Some(pid) => Err(format!("{pid} runs")),
                None => Ok(()),
            }
        });
    }

    /// Resumes the whole tree.
    pub fn resume(&self) {
        crate::scenario::resume(self.pid());
    }

    /// Returns the features that are not available here, such as `hugetlb: Cannot allocate memory`.
    #[must_use]
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }

    /// Sends a command and returns the answer. An answer of several lines keeps its line ends.
    ///
    /// # Panics
    /// If there is no answer, or the victim is detached.
    pub fn ask(&mut self, command: &str) -> String {
        self.try_ask(command)
            .unwrap_or_else(|e| panic!("victim, asked to {command}: {e}"))
    }

    /// Sends a command to a victim that may have died.
    ///
    /// # Errors
    /// [`NoAnswer`] if there is no answer.
    ///
    /// # Panics
    /// If the victim is detached.
    pub fn try_ask(&mut self, command: &str) -> Result<String, NoAnswer> {
        let (stdin, _) = self
            .pipes
            .as_mut()
            .expect("a detached victim takes no commands");
        writeln!(stdin, "{command}").map_err(|_| NoAnswer::Dead)?;
        let mut answer = String::new();
        loop {
            let line = self.line()?;
            answer.push_str(&line);
            if line.starts_with("ok") || line.starts_with("bad") {
                return Ok(answer);
            }
            answer.push('\n');
        }
    }

    /// Sends a command that is answered with `ok NUMBER`.
    ///
    /// # Panics
    /// If the answer is another.
    pub fn count(&mut self, command: &str) -> u64 {
        let answer = self.ask(command);
        answer
            .strip_prefix("ok ")
            .and_then(|number| number.parse().ok())
            .unwrap_or_else(|| panic!("victim, asked to {command}: {answer}"))
    }

    /// Changes this many pages of each process; returns the number of pages changed in the tree.
    ///
    /// # Panics
    /// If the victim does not answer.
    pub fn mutate(&mut self, pages: u64) -> u64 {
        self.count(&format!("mutate {pages}"))
    }

    /// Requests a check by every process; returns the number of correct pages.
    ///
    /// # Errors
    /// The victim's description of the first wrong page, or of the first error of a thread.
    ///
    /// # Panics
    /// If the victim does not answer.
    pub fn check(&mut self) -> Result<u64, String> {
        let answer = match &self.pipes {
            Some(_) => self.ask("check"),
            None => self.report.check(self.child.id().cast_signed()),
        };
        verdict(&answer)
    }

    /// Returns the errors that its threads have detected.
    ///
    /// # Panics
    /// If the victim does not answer.
    pub fn errors(&mut self) -> Errors {
        let answer = self.ask("errors");
        let mut words = answer.splitn(5, ' ').skip(1);
        let mut number = || words.next().and_then(|word| word.parse().ok());
        let numbers = [number(), number(), number()];
        let [Some(errors), Some(interrupted), Some(eintr)] = numbers else {
            panic!("victim, asked for errors: {answer}");
        };
        Errors {
            errors,
            interrupted,
            eintr,
            first: words.next().unwrap_or_default().into(),
        }
    }

    /// Asserts that the victim is unharmed: its memory is correct, no thread detected an error, and no call was
    /// interrupted that a stop must not interrupt.
    ///
    /// # Panics
    /// If it is harmed.
    pub fn assert_unharmed(&mut self) {
        self.check().expect("the victim is unharmed");
        if self.pipes.is_some() {
            let errors = self.errors();
            assert_eq!((errors.errors, errors.interrupted), (0, 0), "{errors:?}");
        }
    }

    /// Returns its regions, and those of its children.
    ///
    /// # Panics
    /// If the victim does not answer.
    pub fn regions(&mut self) -> Vec<Region> {
        let answer = self.ask("regions");
        let lines = answer
            .lines()
            .filter_map(|line| line.strip_prefix("region "));
        lines
            .map(|line| parse_region(line).unwrap_or_else(|| panic!("not a region: {line}")))
            .collect()
    }

    /// Executes the program again in the same process (`execve`), with the same features and no children.
    ///
    /// # Panics
    /// If it does not become ready again.
    pub fn exec(&mut self) {
        self.exec_with("exec");
    }

    /// Does the same with another command: `exec-by-thread`, or `exec-other` for another program, which echoes its
    /// input.
    ///
    /// # Panics
    /// If it does not become ready again.
    pub fn exec_with(&mut self, command: &str) {
        let (stdin, _) = self
            .pipes
            .as_mut()
            .expect("a detached victim takes no commands");
        writeln!(stdin, "{command}").expect("the victim is alive");
        self.skipped.clear();
        self.await_ready();
    }

    /// Returns the file in which it answers SIGUSR1.
    pub fn report(&mut self) -> &mut ReportFile {
        &mut self.report
    }

    /// Reaps the root of a tree that the sender kills.
    ///
    /// # Panics
    /// If the tree does not exit.
    pub fn await_end(&mut self) {
        if let Some((stdin, lines)) = self.pipes.take() {
            drop(stdin);
            // The pipe is closed by the last process of the tree.
            let deadline = Instant::now() + PATIENCE;
            while lines.next(deadline).expect("the tree ends").is_some() {}
        }
        self.child.wait().expect("it is our child");
    }
}

/// Reason for a missing answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// No answer before the deadline.
    #[error("hangs")]
    Hung,
    /// The victim has exited.
    #[error("is dead")]
    Dead,
}

fn command(through: &[&str]) -> (Command, TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let mut command = match through {
        [] => Command::new(path()),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(path());
            command
        }
    };
    command.arg("--dir").arg(dir.path());
    command.arg("--report").arg(dir.path().join("report"));
    (command, dir)
}

fn spawn(command: &mut Command) -> Child {
    command
        .spawn()
        .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"))
}

fn verdict(answer: &str) -> Result<u64, String> {
    let pages = answer.strip_prefix("ok ").and_then(|rest| {
        let (pages, errors) = rest.split_once(' ')?;
        (errors == "0").then(|| pages.parse().ok())?
    });
    pages.ok_or_else(|| answer.to_owned())
}

fn parse_region(line: &str) -> Option<Region> {
    let field = |name: &str| {
        line.split(' ')
            .filter_map(|word| word.split_once('='))
            .find_map(|(key, value)| (key == name).then_some(value))
    };
    Some(Region {
        pid: field("pid")?.parse().ok()?,
        start: u64::from_str_radix(field("start")?.trim_start_matches("0x"), 16).ok()?,
        length: field("length")?.parse().ok()?,
        kind: field("kind")?.into(),
        inode: field("inode")?.parse().ok()?,
    })
}

impl Drop for Victim {
    fn drop(&mut self) {
        let tree = self.tree();
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The kernel kills the children with their parent.
        let _ = memory::await_end(&tree);
    }
}

/// The file to which a victim without stdin appends its answers, line by line.
#[derive(Debug)]
pub struct ReportFile {
    path: PathBuf,
    read: usize,
}

impl ReportFile {
    /// Follows a file, which need not exist yet, from its start.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, read: 0 }
    }

    /// Returns the path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Requests a check by a victim, which may be a restored copy; returns its answer.
    ///
    /// # Panics
    /// If there is no answer.
    pub fn check(&mut self, pid: i32) -> String {
        kill(Pid::from_raw(pid), Signal::SIGUSR1).expect("the victim is alive");
        loop {
            let line = self
                .next_line()
                .unwrap_or_else(|e| panic!("victim {pid}: {e}"));
            // The answer counts the errors of threads.
            if !line.starts_with("ERROR") {
                return line;
            }
        }
    }

    /// Does the same as [`Victim::check`], for the process `pid`.
    ///
    /// # Errors
    /// The victim's description of the error.
    ///
    /// # Panics
    /// If there is no answer.
    pub fn verdict(&mut self, pid: i32) -> Result<u64, String> {
        verdict(&self.check(pid))
    }

    /// Returns the next line, once there is one.
    ///
    /// # Errors
    /// [`NoAnswer::Hung`] if none comes.
    ///
    /// # Panics
    /// If the directory of the file cannot be watched.
    pub fn next_line(&mut self) -> Result<String, NoAnswer> {
        let deadline = Instant::now() + PATIENCE;
        let notify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .expect("inotify is there");
        // Watched before it is read, so that no line is missed in between.
        let dir = self.path.parent().expect("a file is in a directory");
        notify
            .add_watch(dir, AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE)
            .expect("the directory is there");
        loop {
            let text = fs::read_to_string(&self.path).unwrap_or_default();
            if let Some((line, _)) = text[self.read..].split_once('\n') {
                self.read += line.len() + 1;
                return Ok(line.into());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NoAnswer::Hung);
            }
            let mut fds = [PollFd::new(notify.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            // Whatever the event is, the loop reads the file again.
            let _ = poll(&mut fds, timeout);
            let _ = notify.read_events();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clean_answer_counts_pages() {
        assert_eq!(verdict("ok 256 0"), Ok(256));
        for answer in ["ok 256 1", "bad pages=3", "ok", "ok x 0", ""] {
            assert_eq!(verdict(answer), Err(answer.to_owned()));
        }
    }

    #[test]
    fn region_is_parsed() {
        let line = "pid=7 id=10001 start=0x7f00 length=4096 kind=memfd inode=12";
        let region = parse_region(line).unwrap();
        assert_eq!((region.start, region.inode), (0x7f00, 12));
        assert_eq!(parse_region("pid=7"), None);
    }
}
