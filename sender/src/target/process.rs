//! A process of the target, and what `/proc` reports about it.

use crate::target::vma::{Class, Vma};
use pageferry_common::proc::stat::Stat;
use pageferry_common::proc::status;
use pageferry_common::sys::pidfd;
use pageferry_common::{ImageId, PageRange};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// One process of the target.
#[derive(Debug)]
pub struct Process {
    /// PID in the PID namespace of this program.
    pub pid: i32,
    /// A live thread. The leader may have exited before the other threads; then the PID gives no access to
    /// the memory and the descriptors any more.
    pub tid: i32,
    /// PID in the PID namespace of the target, which image names contain.
    pub vpid: u32,
    /// Mappings at the last freeze, in ascending order.
    pub vmas: Vec<Vma>,
    /// Mappings of segments whose writes are tracked, in ascending order.
    pub shared: Vec<PageRange>,
    /// Page table, opened at the last freeze: it stays with the memory of that time even if the process calls
    /// exec.
    pub pagemap: File,
    /// Memory, opened at the last freeze: also reads pages that the process itself may not read.
    pub memory: File,
    /// Whether devices may write to the memory, which write-protection does not detect.
    pub direct_io: bool,
    /// Page faults of children that the process has waited for, at the last freeze; `None` if it need not
    /// wait for them.
    children_faults: Option<u64>,
    pidfd: OwnedFd,
}

impl Process {
    /// Opens a process that was not known before.
    ///
    /// # Errors
    /// Errors of `/proc`; `NotFound` or `ESRCH` if the process is gone.
    pub fn open(pid: i32, tid: i32, namespace_depth: usize) -> io::Result<Self> {
        Ok(Self {
            pid,
            tid,
            vpid: pid_in_namespace(tid, namespace_depth)?,
            vmas: Vec::new(),
            shared: Vec::new(),
            pagemap: open_pagemap(tid)?,
            memory: open_memory(tid)?,
            direct_io: false,
            children_faults: None,
            pidfd: pidfd::open(pid)?,
        })
    }

    /// Opens the memory that the process has now.
    ///
    /// # Errors
    /// As [`Process::open`].
    pub fn reopen(&mut self, tid: i32) -> io::Result<()> {
        self.tid = tid;
        self.pagemap = open_pagemap(tid)?;
        self.memory = open_memory(tid)?;
        Ok(())
    }

    /// Returns whether the process is known not to have waited for a child since the last call. Every child
    /// has page faults, and the kernel adds them to those of its parent when the parent waits for it.
    ///
    /// # Errors
    /// As [`Process::open`].
    pub fn reaped_no_child(&mut self) -> io::Result<bool> {
        let now = children_faults(self.pid)?;
        let before = std::mem::replace(&mut self.children_faults, now);
        Ok(now.is_some() && now == before)
    }

    /// Returns whether the process is alive; a later process with the same PID does not count.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        pidfd::is_alive(self.pidfd.as_fd())
    }

    /// Returns whether one of its mappings may change while CRIU dumps the stopped process: CRIU runs code of
    /// its own there, the kernel may write to it, or a device may.
    #[must_use]
    pub fn may_change_during_dump(&self, vma: &Vma) -> bool {
        self.direct_io || vma.executable || vma.class == Class::Whole
    }

    /// Returns the name of its image.
    #[must_use]
    pub fn image(&self) -> ImageId {
        ImageId::Process(self.vpid)
    }
}

fn open_pagemap(tid: i32) -> io::Result<File> {
    File::open(format!("/proc/{tid}/pagemap"))
}

fn open_memory(tid: i32) -> io::Result<File> {
    File::open(format!("/proc/{tid}/mem"))
}

/// Returns the page faults of the children that a process has waited for; `None` if it need not wait for
/// them.
fn children_faults(pid: i32) -> io::Result<Option<u64>> {
    let status = fs::read(format!("/proc/{pid}/status"))?;
    children_faults_in(&status, &fs::read(format!("/proc/{pid}/stat"))?)
}

/// Returns the page faults of the children that a process has waited for, from the content of
/// `/proc/PID/status` and `/proc/PID/stat`; `None` if it need not wait for them.
///
/// # Errors
/// `InvalidData` if a field is missing.
pub fn children_faults_in(status: &[u8], stat: &[u8]) -> io::Result<Option<u64>> {
    let bad =
        |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("no {what} in /proc"));
    let ignored = status::mask(status, "SigIgn").ok_or_else(|| bad("SigIgn"))?;
    // A process that ignores SIGCHLD need not wait for its children.
    if ignored >> (libc::SIGCHLD - 1) & 1 != 0 {
        return Ok(None);
    }
    // Used only to detect a change.
    let faults = Stat::parse(stat).and_then(Stat::child_faults);
    faults.map(Some).ok_or_else(|| bad("cminflt"))
}

/// Returns the PIDs of a process in its nested PID namespaces, ours first; at least one.
fn nested_pids(tid: i32) -> io::Result<Vec<u32>> {
    let pids = status::nested_pids(&fs::read(format!("/proc/{tid}/status"))?);
    match pids.is_empty() {
        true => Err(io::Error::new(
            io::ErrorKind::NotFound,
            "no PID in /proc/PID/status",
        )),
        false => Ok(pids),
    }
}

/// Returns the number of PID namespaces that a process is in, counted from ours at 1.
///
/// # Errors
/// Errors of reading `/proc`.
pub fn namespace_depth(tid: i32) -> io::Result<usize> {
    Ok(nested_pids(tid)?.len())
}

/// Returns the PID of a process in the PID namespace at this depth.
///
/// # Errors
/// Errors of reading `/proc`.
pub fn pid_in_namespace(tid: i32, depth: usize) -> io::Result<u32> {
    let pids = nested_pids(tid)?;
    // A process of the target is in the namespace of its root or in a deeper one.
    Ok(pids[(depth - 1).min(pids.len() - 1)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, Write};

    #[test]
    fn child_that_came_and_went_is_noticed() {
        let script = "read a; true & wait; echo; read a";
        let mut shell = std::process::Command::new("sh")
            .args(["-c", &format!("echo; {script}")])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = shell.id() as i32;
        let depth = namespace_depth(pid).unwrap();
        let mut process = Process::open(pid, pid, depth).unwrap();
        let mut lines = io::BufReader::new(shell.stdout.take().unwrap()).lines();
        lines.next().unwrap().unwrap();
        assert!(!process.reaped_no_child().unwrap());
        assert!(process.reaped_no_child().unwrap());
        let mut stdin = shell.stdin.take().unwrap();
        writeln!(stdin).unwrap();
        lines.next().unwrap().unwrap();
        assert!(!process.reaped_no_child().unwrap());
        assert!(process.reaped_no_child().unwrap());
        drop(stdin);
        shell.wait().unwrap();
    }

    #[test]
    fn process_that_ignores_sigchld_has_no_count_of_faults() {
        assert!(
            children_faults(std::process::id() as i32)
                .unwrap()
                .is_some()
        );
        let mut cat = std::process::Command::new("env")
            .args(["--ignore-signal=CHLD", "cat"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let (mut stdin, stdout) = (cat.stdin.take().unwrap(), cat.stdout.take().unwrap());
        writeln!(stdin).unwrap();
        io::BufReader::new(stdout).lines().next().unwrap().unwrap();
        assert_eq!(children_faults(cat.id() as i32).unwrap(), None);
        drop(stdin);
        cat.wait().unwrap();
    }

    #[test]
    fn own_process_can_be_opened() {
        let pid = std::process::id() as i32;
        let depth = namespace_depth(pid).unwrap();
        let process = Process::open(pid, pid, depth).unwrap();
        assert!(process.is_alive());
        assert!(process.vpid > 0);
    }
}
