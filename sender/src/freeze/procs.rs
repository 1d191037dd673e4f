//! What `/proc` says of threads, children and tracers.

use super::FrozenProcess;
use pageferry_common::proc::process::{children, threads};
use pageferry_common::proc::stat::Stat;
use pageferry_common::proc::{read_lossy, status};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;

/// Why a process tree cannot be stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum TreeError {
    /// It is not there (any more).
    #[error("there is no process {0}")]
    NoProcess(i32),
    /// A debugger has it.
    #[error("process {pid} is traced already, by {tracer} ({name})")]
    Traced {
        /// The process that is traced.
        pid: i32,
        /// Who traces it.
        tracer: i32,
        /// The tracer's name.
        name: String,
    },
    /// The kernel forbids it.
    #[error("not permitted to trace process {0}")]
    NotPermitted(i32),
    /// The kernel forbids to stop or end it for good.
    #[error("not permitted to signal process {0}")]
    MayNotSignal(i32),
    /// The target's tree contains the sender.
    #[error("the tree under process {0} contains this program")]
    OwnTree(i32),
    /// A thread does not stop.
    #[error("thread {tid} of process {pid} is in an uninterruptible wait and does not stop")]
    Stuck {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
    },
    /// Something else.
    #[error("cannot stop process {pid}: {error}")]
    Io {
        /// The process.
        pid: i32,
        /// What the kernel said.
        error: String,
    },
}

impl TreeError {
    pub(super) fn io(pid: i32, error: &io::Error) -> Self {
        Self::Io {
            pid,
            error: error.to_string(),
        }
    }
}

/// The processes of a tree that somebody keeps stopped, the root first, but for those that have ended.
#[must_use]
pub fn process_list(root: i32) -> Vec<FrozenProcess> {
    let (mut pids, mut next) = (vec![root], 0);
    let mut list = Vec::new();
    while let Some(&pid) = pids.get(next) {
        next += 1;
        let alive = |tid: &i32| !matches!(state(pid, *tid), None | Some('Z' | 'X'));
        let tids = threads(pid);
        if let Some(&tid) = tids.iter().find(|tid| alive(tid)) {
            list.push(FrozenProcess { pid, tid });
        }
        pids.extend(tids.iter().flat_map(|&tid| children(pid, tid)));
    }
    list
}

/// Whether no thread of these processes runs: each is held by a tracer, or has ended.
#[must_use]
pub fn are_trace_stopped(processes: &[FrozenProcess]) -> bool {
    let held = |pid, tid| matches!(state(pid, tid), None | Some('t' | 'Z' | 'X'));
    let mut all = processes.iter();
    all.all(|process| {
        threads(process.pid)
            .into_iter()
            .all(|tid| held(process.pid, tid))
    })
}

/// Claims that a process may be sent signals; one that is gone needs none.
///
/// # Errors
/// [`TreeError::MayNotSignal`].
pub fn check_signal_permission(pid: i32) -> Result<(), TreeError> {
    match nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None) {
        Err(nix::Error::EPERM) => Err(TreeError::MayNotSignal(pid)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The state letter of a thread (`man 5 proc`); `None` if it is gone.
pub(super) fn state(pid: i32, tid: i32) -> Option<char> {
    let content = fs::read(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    Stat::parse(&content).map(Stat::state)
}

/// A field of `/proc/PID/status` that holds a number.
pub(super) fn status_number(pid: i32, field: &str) -> Option<i32> {
    status::number(&fs::read(format!("/proc/{pid}/status")).ok()?, field)
}

/// Whether a thread waits for a vfork child to exec or exit. Such a wait cannot be interrupted,
/// and ends only when the child runs.
pub(super) fn waits_for_vfork(pid: i32, tid: i32) -> bool {
    if state(pid, tid) != Some('D') {
        return false;
    }
    is_vfork(&read_lossy(format!("/proc/{pid}/task/{tid}/syscall")).unwrap_or_default())
}

/// Whether the system call in `/proc/PID/syscall` may be one that waits for a vfork child.
#[must_use]
pub fn is_vfork(syscall: &str) -> bool {
    let number = syscall
        .split_ascii_whitespace()
        .next()
        .and_then(|number| number.parse::<libc::c_long>().ok());
    #[cfg(target_arch = "x86_64")]
    const MAY_VFORK: &[libc::c_long] = &[libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3];
    #[cfg(not(target_arch = "x86_64"))]
    const MAY_VFORK: &[libc::c_long] = &[libc::SYS_clone, libc::SYS_clone3];
    // A plain fork may take long as well (reclaim, swap), and is no such wait.
    let flags = syscall.split_ascii_whitespace().nth(1);
    let flags = flags.and_then(|flags| i64::from_str_radix(flags.strip_prefix("0x")?, 16).ok());
    let plain = number == Some(libc::SYS_clone)
        && flags.is_some_and(|flags| flags & i64::from(libc::CLONE_VFORK) == 0);
    !plain && number.is_some_and(|number| MAY_VFORK.contains(&number))
}

/// Why the kernel refused to let us trace a thread; `None` if there is nothing left to trace.
pub(super) fn why_not_traceable(pid: i32, tid: i32) -> Option<TreeError> {
    match state(pid, tid) {
        None | Some('Z' | 'X') => return None,
        Some(_) => {}
    }
    let tracer = status_number(tid, "TracerPid")?;
    Some(if tracer == 0 {
        TreeError::NotPermitted(pid)
    } else {
        let name = read_lossy(format!("/proc/{tracer}/comm")).unwrap_or_default();
        TreeError::Traced {
            pid,
            tracer,
            name: name.trim().to_owned(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_knows_this_process() {
        let pid = std::process::id() as i32;
        assert!(threads(pid).contains(&pid));
        assert!(matches!(state(pid, pid), Some('R' | 'S')));
        assert_eq!(status_number(pid, "Tgid"), Some(pid));
        assert!(!waits_for_vfork(pid, pid));
        assert_eq!(state(pid, 1 << 30), None);
    }

    #[test]
    fn a_process_is_there_whatever_it_is_called() {
        let mut shell = std::process::Command::new("sh")
            .args(["-c", r"printf 'k\303' > /proc/$$/comm; echo; read line"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut line).unwrap();
        let pid = shell.id().cast_signed();
        let list = process_list(pid);
        let (held, parent) = (are_trace_stopped(&list), status_number(pid, "PPid"));
        drop(shell.stdin.take());
        shell.wait().unwrap();
        assert_eq!(list, [FrozenProcess { pid, tid: pid }]);
        assert!(!held);
        assert_eq!(parent, Some(std::process::id().cast_signed()));
    }
}
