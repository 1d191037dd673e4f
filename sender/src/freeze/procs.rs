//! State of threads and processes, from `/proc`.

use super::FrozenProcess;
use pageferry_common::proc::process::{children, threads};
use pageferry_common::proc::stat::Stat;
use pageferry_common::proc::{read_lossy, status};
use pageferry_common::{PAGE_SIZE, PageRange};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Why a process tree cannot be stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum TreeError {
    /// The root process does not exist, or has exited.
    #[error("there is no process {0}")]
    NoProcess(i32),
    /// Another tracer, such as a debugger, is attached.
    #[error("process {pid} is already traced by {tracer} ({name})")]
    Traced {
        /// PID of the traced process.
        pid: i32,
        /// PID of the tracer.
        tracer: i32,
        /// Name of the tracer.
        name: String,
    },
    /// The kernel does not permit tracing the process.
    #[error("not permitted to trace process {0}")]
    NotPermitted(i32),
    /// The kernel does not permit sending signals to the process, so it can be neither stopped nor killed.
    #[error("not permitted to signal process {0}")]
    MayNotSignal(i32),
    /// The tree contains the sender.
    #[error("the tree under process {0} contains this program")]
    OwnTree(i32),
    /// A process is in a frozen cgroup, for example that of a paused container.
    #[error("process {pid} is paused: cgroup {cgroup} is frozen")]
    Paused {
        /// PID of the process.
        pid: i32,
        /// Path of its cgroup.
        cgroup: String,
    },
    /// A thread did not stop in time.
    #[error("thread {tid} of process {pid} is in an uninterruptible wait and does not stop")]
    Stuck {
        /// PID of the process.
        pid: i32,
        /// TID of the thread.
        tid: i32,
    },
    /// A system call failed for another reason.
    #[error("cannot stop process {pid}: {error}")]
    Io {
        /// PID of the process.
        pid: i32,
        /// Error from the kernel.
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

/// Lists the threads of a process; empty if it is gone.
///
/// # Errors
/// [`TreeError::NotPermitted`] if `/proc` hides it, or [`TreeError::Io`].
pub(super) fn list_threads(pid: i32) -> Result<Vec<i32>, TreeError> {
    let list = || -> io::Result<Vec<i32>> {
        let names = fs::read_dir(format!("/proc/{pid}/task"))?;
        let names = names.map(|entry| Ok(entry?.file_name()));
        let names = names.collect::<io::Result<Vec<_>>>()?;
        let tids = names.iter().filter_map(|name| name.to_str()?.parse().ok());
        Ok(tids.collect())
    };
    match list() {
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(TreeError::NotPermitted(pid))
        }
        other => other.map_err(|error| TreeError::io(pid, &error)),
    }
}

/// Lists the child processes that one thread created; empty if the thread is gone.
///
/// # Errors
/// [`TreeError::Io`], also if the kernel does not list children (`CONFIG_PROC_CHILDREN`).
pub(super) fn list_children(pid: i32, tid: i32) -> Result<Vec<i32>, TreeError> {
    let thread = format!("/proc/{pid}/task/{tid}");
    children_in(Path::new(&thread)).map_err(|error| TreeError::io(pid, &error))
}

/// Lists the children of the thread with this directory in `/proc`.
fn children_in(thread: &Path) -> io::Result<Vec<i32>> {
    match fs::read_to_string(thread.join("children")) {
        Ok(list) => {
            let pids = list.split_ascii_whitespace();
            Ok(pids.filter_map(|pid| pid.parse().ok()).collect())
        }
        Err(error) if is_gone(&error) => match thread.exists() {
            true => Err(io::Error::other("the kernel does not list children")),
            false => Ok(Vec::new()),
        },
        Err(error) => Err(error),
    }
}

/// Returns whether the error means that the process or thread does not exist.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Returns the processes of a tree that another program keeps stopped, the root first. Leaves out processes
/// that have exited.
#[must_use]
pub fn process_list(root: i32) -> Vec<FrozenProcess> {
    let (mut pids, mut next) = (vec![root], 0);
    let mut processes = Vec::new();
    while let Some(&pid) = pids.get(next) {
        next += 1;
        let alive = |tid: &i32| !matches!(state(pid, *tid), None | Some('Z' | 'X'));
        let tids = threads(pid);
        if let Some(&tid) = tids.iter().find(|tid| alive(tid)) {
            processes.push(FrozenProcess { pid, tid });
        }
        pids.extend(tids.iter().flat_map(|&tid| children(pid, tid)));
    }
    processes
}

/// Returns whether every thread of these processes is stopped by a tracer or has exited.
#[must_use]
pub fn are_trace_stopped(processes: &[FrozenProcess]) -> bool {
    let is_stopped = |pid, tid| matches!(state(pid, tid), None | Some('t' | 'Z' | 'X'));
    let mut all = processes.iter();
    all.all(|process| {
        threads(process.pid)
            .into_iter()
            .all(|tid| is_stopped(process.pid, tid))
    })
}

/// Returns whether a process has a thread that has not exited. `tid` is the thread to try first.
#[must_use]
pub fn has_live_thread(pid: i32, tid: i32) -> bool {
    let is_live = |tid| !matches!(state(pid, tid), None | Some('Z' | 'X'));
    is_live(tid) || threads(pid).into_iter().any(is_live)
}

/// Checks that this program may send signals to a process. Succeeds if the process has exited.
///
/// # Errors
/// [`TreeError::MayNotSignal`].
pub fn check_signal_permission(pid: i32) -> Result<(), TreeError> {
    match nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None) {
        Err(nix::Error::EPERM) => Err(TreeError::MayNotSignal(pid)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Returns the state letter of a thread (see `man 5 proc`); `None` if the thread does not exist.
pub(super) fn state(pid: i32, tid: i32) -> Option<char> {
    let content = fs::read(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    Stat::parse(&content).map(Stat::state)
}

/// Returns a numeric field of `/proc/PID/status`.
pub(super) fn status_number(pid: i32, field: &str) -> Option<i32> {
    status::number(&fs::read(format!("/proc/{pid}/status")).ok()?, field)
}

/// Returns whether a thread waits for a vfork child to exit or to call exec. Such a wait cannot be
/// interrupted.
pub(super) fn waits_for_vfork(pid: i32, tid: i32) -> bool {
    if state(pid, tid) != Some('D') {
        return false;
    }
    is_vfork(&read_lossy(format!("/proc/{pid}/task/{tid}/syscall")).unwrap_or_default())
}

/// Returns whether the system call in `/proc/PID/syscall` may be one that waits for a vfork child.
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
    // A plain fork may also take long (reclaim, swap), but it does not wait for the child.
    let flags = syscall.split_ascii_whitespace().nth(1);
    let flags = flags.and_then(|flags| i64::from_str_radix(flags.strip_prefix("0x")?, 16).ok());
    let is_plain_fork = number == Some(libc::SYS_clone)
        && flags.is_some_and(|flags| flags & i64::from(libc::CLONE_VFORK) == 0);
    !is_plain_fork && number.is_some_and(|number| MAY_VFORK.contains(&number))
}

/// Returns why the kernel does not permit tracing a thread; `None` if the thread has exited.
pub(super) fn untraceable_reason(pid: i32, tid: i32) -> Option<TreeError> {
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

/// Copies a prefix of `range` of the memory of a thread to the front of a file. Returns its length in bytes.
pub(super) fn copy_memory(tid: i32, range: PageRange, file: &File) -> io::Result<usize> {
    let memory = File::open(format!("/proc/{tid}/mem"))?;
    let mut page = [0; PAGE_SIZE as usize];
    let mut bytes = 0;
    while bytes < range.bytes() as usize {
        let read = memory.read_exact_at(&mut page, range.start() + bytes as u64);
        if read.is_err() {
            break;
        }
        file.write_all_at(&page, bytes as u64)?;
        bytes += page.len();
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_and_threads_of_this_process_are_read() {
        let pid = std::process::id() as i32;
        assert!(threads(pid).contains(&pid));
        assert!(matches!(state(pid, pid), Some('R' | 'S')));
        assert_eq!(status_number(pid, "Tgid"), Some(pid));
        assert!(!waits_for_vfork(pid, pid));
        assert_eq!(state(pid, 1 << 30), None);
    }

    #[test]
    fn kernel_without_lists_of_children_is_an_error() {
        let (pid, tid) = (std::process::id() as i32, 1 << 30);
        assert!(list_threads(pid).unwrap().contains(&pid));
        assert!(list_children(pid, pid).unwrap().is_empty());
        assert!(list_threads(tid).unwrap().is_empty());
        assert!(list_children(pid, tid).unwrap().is_empty());
        // This directory has no such file.
        assert!(children_in(Path::new("/proc/self/fdinfo")).is_err());
    }

    #[test]
    fn process_with_invalid_utf8_name_is_listed() {
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
        let (is_stopped, parent) = (are_trace_stopped(&list), status_number(pid, "PPid"));
        drop(shell.stdin.take());
        shell.wait().unwrap();
        assert_eq!(list, [FrozenProcess { pid, tid: pid }]);
        assert!(!is_stopped);
        assert_eq!(parent, Some(std::process::id().cast_signed()));
    }
}
