//! The copy of a process tree that CRIU restores: whether it was released yet, and ending it.

use nix::sys::signal::Signal;
use pageferry_common::criu::images::{Mm, records};
use pageferry_common::proc::process::{ProcessId, children, threads};
use pageferry_common::proc::stat::Stat;
use pageferry_common::proc::status::{mask, nested_pids};
use pageferry_common::sys::pidfd;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Interval at which processes of which this program is not the parent are looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// How long a process must wait in the restorer to count as waiting. CRIU may have woken it just before CRIU
/// was killed; then it leaves within microseconds.
const SETTLING: Duration = Duration::from_millis(50);

/// Longest time to wait until a process that was killed has exited.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time that CRIU may take to come to its next stage.
const STAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// A copy, and the CRIU that restores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredCopy {
    /// CRIU, which may have exited.
    pub criu: ProcessId,
    /// Root of the tree.
    pub root: ProcessId,
}

/// How far a copy has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CopyState {
    /// A process waits in CRIU's restorer: none has run yet.
    Waiting,
    /// All processes have left the restorer. They run, unless CRIU still traces them.
    Left,
    /// The root is gone.
    Gone,
}

impl RestoredCopy {
    /// Stops CRIU where it waits for permission to continue, so that it takes no further step. It may have
    /// exited. Between two such points it makes system calls in the processes of the copy, which would not
    /// survive its death there.
    ///
    /// # Errors
    /// `TimedOut` if it does not come to such a point.
    pub(super) fn stop_criu(self) -> io::Result<()> {
        let began = Instant::now();
        while self.criu.is_alive() && !awaits_reply(self.criu.pid) {
            if began.elapsed() > STAGE_TIMEOUT {
                let what = format!("CRIU (process {}) does not finish a step", self.criu.pid);
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            }
            sleep(POLL_INTERVAL);
        }
        stop(self.criu);
        Ok(())
    }

    /// Returns how far the copy has come; `images` is the directory that it was restored from. CRIU must have
    /// exited or be stopped, else the answer may be outdated.
    pub(super) fn state(self, images: &Path) -> CopyState {
        let mut waiting_since = None;
        loop {
            if !self.root.is_alive() {
                return CopyState::Gone;
            }
            if !tree(self.root.pid)
                .iter()
                .any(|&pid| is_in_restorer(pid, images))
            {
                return CopyState::Left;
            }
            let since = *waiting_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= SETTLING {
                return CopyState::Waiting;
            }
            sleep(POLL_INTERVAL);
        }
    }

    /// Kills CRIU, and nothing else: what has left the restorer runs.
    ///
    /// # Errors
    /// `TimedOut` if it does not exit, and those of sending a signal.
    pub(super) fn kill_criu(self) -> io::Result<()> {
        send_signal(self.criu, Signal::SIGKILL)?;
        await_exit(self.criu)
    }

    /// Ends the copy and its CRIU, and waits until both are gone.
    ///
    /// # Errors
    /// As for [`end_restore`].
    pub(super) fn end(self) -> io::Result<()> {
        end_restore(self.criu, Some(self.root))
    }
}

/// Ends a restore: kills what CRIU has restored and then CRIU, and waits until both are gone. CRIU is stopped
/// first, because a process that it traces runs when CRIU exits.
///
/// # Errors
/// `TimedOut` if one of them does not exit, and those of sending a signal.
pub(super) fn end_restore(criu: ProcessId, root: Option<ProcessId>) -> io::Result<()> {
    stop(criu);
    let mut killed = Vec::new();
    if criu.is_alive() {
        for tid in threads(criu.pid) {
            for child in children(criu.pid, tid) {
                kill_tree(child, &mut killed);
            }
        }
    }
    if let Some(root) = root {
        kill_copy(root, &mut killed);
    }
    send_signal(criu, Signal::SIGKILL)?;
    killed.push(criu);
    killed.into_iter().try_for_each(await_exit)
}

/// Kills the copy with this root if the root has not exited. Adds the killed processes to `killed`.
pub(super) fn kill_copy(root: ProcessId, killed: &mut Vec<ProcessId>) {
    if root.is_alive() {
        kill_tree(root.pid, killed);
    }
}

/// Kills a process and all its descendants. Each is stopped before its children are listed, so that it forks no
/// more. Adds them to `killed`.
fn kill_tree(pid: i32, killed: &mut Vec<ProcessId>) {
    let Some(process) = ProcessId::find(pid) else {
        return;
    };
    // An error means that it has exited, or that it is not ours to signal: its children are not then, either.
    let _ = send_signal(process, Signal::SIGSTOP);
    for tid in threads(pid) {
        for child in children(pid, tid) {
            kill_tree(child, killed);
        }
    }
    let _ = send_signal(process, Signal::SIGKILL);
    killed.push(process);
}

/// Sends a signal to a process if it has not exited.
fn send_signal(process: ProcessId, signal: Signal) -> io::Result<()> {
    let pidfd = match pidfd::open(process.pid) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        pidfd => pidfd?,
    };
    // The descriptor refers to this process, and not to one that got its PID.
    if !process.is_alive() {
        return Ok(());
    }
    match pidfd::signal(pidfd.as_fd(), signal as i32) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        result => result,
    }
}

/// Stops a process, and returns when it has stopped or exited.
fn stop(process: ProcessId) {
    if send_signal(process, Signal::SIGSTOP).is_err() {
        return;
    }
    let began = Instant::now();
    while process.is_alive() && began.elapsed() < EXIT_TIMEOUT {
        let stat = fs::read(format!("/proc/{}/stat", process.pid)).unwrap_or_default();
        if Stat::parse(&stat).is_none_or(|stat| matches!(stat.state(), 'T' | 't')) {
            return;
        }
        sleep(POLL_INTERVAL);
    }
}

fn await_exit(process: ProcessId) -> io::Result<()> {
    let began = Instant::now();
    while process.is_alive() {
        if began.elapsed() > EXIT_TIMEOUT {
            let what = format!("process {} was killed and does not exit", process.pid);
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        sleep(POLL_INTERVAL);
    }
    Ok(())
}

/// Lists a process and all its descendants.
fn tree(root: i32) -> Vec<i32> {
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(&pid) = tree.get(next) {
        for tid in threads(pid) {
            tree.extend(children(pid, tid));
        }
        next += 1;
    }
    tree
}

/// Returns whether CRIU waits for a reply to the stage that it has reported.
fn awaits_reply(criu: i32) -> bool {
    let call = fs::read_to_string(format!("/proc/{criu}/syscall")).unwrap_or_default();
    call.split(' ')
        .next()
        .and_then(|number| number.parse().ok())
        == Some(libc::SYS_recvfrom)
}

/// Returns whether a process waits in CRIU's restorer: it has all signals blocked, and its main thread waits for
/// a futex, both of whose code and address lie in memory that the process did not have when it was dumped. No
/// single sign would do: the process may have mapped code since, or wait with all signals blocked.
fn is_in_restorer(pid: i32, images: &Path) -> bool {
    let look = || {
        let status = fs::read(format!("/proc/{pid}/status")).ok()?;
        let all_blocked = mask(&status, "SigBlk")? | UNBLOCKABLE == u64::MAX;
        let call = fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?;
        let (futex, code) = futex_wait(&call)?;
        let number = *nested_pids(&status).last()?;
        let mm: Vec<Mm> = records(&images.join(format!("mm-{number}.img"))).ok()?;
        let dumped = |address| {
            let vmas = mm.first().map_or(&[][..], |mm| &mm.vmas);
            vmas.iter()
                .any(|vma| (vma.start..vma.end).contains(&address))
        };
        Some(all_blocked && !dumped(futex) && !dumped(code))
    };
    look().unwrap_or(false)
}

/// The signals that cannot be blocked: SIGKILL and SIGSTOP.
const UNBLOCKABLE: u64 = 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1);

/// Parses `/proc/PID/syscall`. If the thread waits for a futex, returns the address of the futex and that of
/// the next instruction.
fn futex_wait(call: &str) -> Option<(u64, u64)> {
    let mut fields = call.split_ascii_whitespace();
    if fields.next()?.parse() != Ok(libc::SYS_futex) {
        return None;
    }
    let hex = |field: &str| u64::from_str_radix(field.strip_prefix("0x")?, 16).ok();
    Some((hex(fields.next()?)?, hex(fields.next_back()?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_futex_call_is_a_wait_for_a_futex() {
        let wait = "202 0x7f10 0x0 0x1 0x0 0x0 0x0 0x7ffd5000 0x7f22aa\n";
        assert_eq!(futex_wait(wait), Some((0x7f10, 0x7f22aa)));
        for other in ["running\n", "-1 0x7ffd5000 0x7f22aa\n", "", "0 0x1 0x2\n"] {
            assert_eq!(futex_wait(other), None, "{other}");
        }
    }

    #[test]
    fn restore_is_ended_with_all_processes() {
        let mut shell = std::process::Command::new("sh")
            .args(["-c", "sleep 1000 & sleep 1000 & echo; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut line).unwrap();
        let root = ProcessId::find(shell.id().cast_signed()).unwrap();
        let all: Vec<_> = tree(root.pid)
            .into_iter()
            .filter_map(ProcessId::find)
            .collect();
        assert_eq!(all.len(), 3);
        end_restore(root, None).unwrap();
        assert!(!all.into_iter().any(ProcessId::is_alive));
        shell.wait().unwrap();
        end_restore(root, Some(root)).unwrap();
    }
}
