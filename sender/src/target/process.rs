//! One process of the tree, as remembered from round to round.

use crate::sys::pidfd;
use crate::target::vma::{Class, Vma};
use pageferry_common::proc::stat::Stat;
use pageferry_common::proc::status;
use pageferry_common::{ImageId, PageRange};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// One process of the tree.
#[derive(Debug)]
pub struct Process {
    /// Its PID, as this program's PID namespace counts.
    pub pid: i32,
    /// A thread of it that lives: its leader may have ended before the rest, and then the PID names
    /// no memory and no descriptors any more.
    pub tid: i32,
    /// Its PID, as the tree's own PID namespace counts: the one in image names.
    pub vpid: u32,
    /// Its mappings at the last freeze, ascending.
    pub vmas: Vec<Vma>,
    /// Where it maps segments whose writes are to be tracked, ascending.
    pub shared: Vec<PageRange>,
    /// Page faults of its children that it has waited for, at the last freeze; `None` if it need not wait
    /// for them.
    pub children_faults: Option<u64>,
    /// Its page table, opened at the last freeze: stays with that memory even if it execs.
    pub pagemap: File,
    /// Its memory, opened at the last freeze: reads what it may not read itself.
    pub memory: File,
    /// Devices may write its memory behind every write-protection's back.
    pub direct_io: bool,
    pidfd: OwnedFd,
}

impl Process {
    /// A process met for the first time.
    ///
    /// # Errors
    /// Those of `/proc`; `NotFound` or `ESRCH` if it is gone.
    pub fn open(pid: i32, tid: i32, namespace_depth: usize) -> io::Result<Self> {
        Ok(Self {
            pid,
            tid,
            vpid: pid_in_namespace(tid, namespace_depth)?,
            vmas: Vec::new(),
            shared: Vec::new(),
            children_faults: None,
            pagemap: open_pagemap(tid)?,
            memory: open_memory(tid)?,
            direct_io: false,
            pidfd: pidfd::open(pid)?,
        })
    }

    /// Opens what belongs to the memory the process has now.
    ///
    /// # Errors
    /// As [`Process::open`].
    pub fn reopen(&mut self, tid: i32) -> io::Result<()> {
        self.tid = tid;
        self.pagemap = open_pagemap(tid)?;
        self.memory = open_memory(tid)?;
        Ok(())
    }

    /// Looks at what tells of children that it had: any child has page faults, which are added up here when
    /// the parent has waited for it. Returns whether there was none to tell of since the last time.
    ///
    /// # Errors
    /// As [`Process::open`].
    pub fn reaped_no_child(&mut self) -> io::Result<bool> {
        let now = children_faults(self.pid)?;
        let before = std::mem::replace(&mut self.children_faults, now);
        Ok(now.is_some() && now == before)
    }

    /// Whether it still is the process it was (not a later one of the same number).
    #[must_use]
    pub fn alive(&self) -> bool {
        pidfd::is_alive(self.pidfd.as_fd())
    }

    /// Whether one of its own mappings may change while CRIU dumps it ([`crate::target::tree::Pass::DuringDump`]).
    #[must_use]
    pub fn may_change_during_dump(&self, vma: &Vma) -> bool {
        self.direct_io || vma.executable || vma.class == Class::Whole
    }

    /// Its image.
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

/// See [`Process::reaped_no_child`].
fn children_faults(pid: i32) -> io::Result<Option<u64>> {
    let status = fs::read(format!("/proc/{pid}/status"))?;
    children_faults_in(&status, &fs::read(format!("/proc/{pid}/stat"))?)
}

/// The page faults of children that a process has waited for, by its `status` and `stat` in `/proc`; `None` if
/// it need not wait for them.
///
/// # Errors
/// `InvalidData` if that is not in them.
pub fn children_faults_in(status: &[u8], stat: &[u8]) -> io::Result<Option<u64>> {
    let bad =
        |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("no {what} in /proc"));
    let ignored = status::mask(status, "SigIgn").ok_or_else(|| bad("SigIgn"))?;
    // Who ignores the signal is not told of its children, and need not wait for them.
    if ignored >> (libc::SIGCHLD - 1) & 1 != 0 {
        return Ok(None);
    }
    // Only whether it changes matters.
    let faults = Stat::parse(stat).and_then(Stat::child_faults);
    faults.map(Some).ok_or_else(|| bad("cminflt"))
}

/// The PIDs of a process in the nested PID namespaces from ours inwards, at least one.
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

/// How many PID namespaces deep a process is, from ours at 1.
///
/// # Errors
/// Those of `/proc`.
pub fn namespace_depth(tid: i32) -> io::Result<usize> {
    Ok(nested_pids(tid)?.len())
}

/// The PID of a process in the PID namespace so deep.
///
/// # Errors
/// Those of `/proc`.
pub fn pid_in_namespace(tid: i32, depth: usize) -> io::Result<u32> {
    let pids = nested_pids(tid)?;
    // A process of the tree cannot be outside the root's namespace, only deeper.
    Ok(pids[(depth - 1).min(pids.len() - 1)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, Write};

    #[test]
    fn a_child_that_came_and_went_shows() {
        let script = "read a; true & wait; echo; read a";
        let mut shell = std::process::Command::new("sh")
            .args(["-c", &format!("echo; {script}")])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = shell.id() as i32;
        let depth = namespace_depth(pid).unwrap();
        let mut task = Process::open(pid, pid, depth).unwrap();
        let mut lines = std::io::BufReader::new(shell.stdout.take().unwrap()).lines();
        lines.next().unwrap().unwrap();
        assert!(!task.reaped_no_child().unwrap());
        assert!(task.reaped_no_child().unwrap());
        let mut stdin = shell.stdin.take().unwrap();
        writeln!(stdin).unwrap();
        lines.next().unwrap().unwrap();
        assert!(!task.reaped_no_child().unwrap());
        assert!(task.reaped_no_child().unwrap());
        drop(stdin);
        shell.wait().unwrap();
    }

    #[test]
    fn who_ignores_its_children_need_not_tell_of_them() {
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
        std::io::BufReader::new(stdout)
            .lines()
            .next()
            .unwrap()
            .unwrap();
        assert_eq!(children_faults(cat.id() as i32).unwrap(), None);
        drop(stdin);
        cat.wait().unwrap();
    }

    #[test]
    fn this_process_can_be_met() {
        let pid = std::process::id() as i32;
        let depth = namespace_depth(pid).unwrap();
        let task = Process::open(pid, pid, depth).unwrap();
        assert!(task.alive());
        assert!(task.vpid > 0);
    }
}
