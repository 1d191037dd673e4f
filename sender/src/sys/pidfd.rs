//! pidfds: a process that stays the one it was, whatever happens to its number.

use super::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Opens a pidfd of a process.
///
/// # Errors
/// `ESRCH` if there is no such process.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes no pointers; the descriptor it returns is new and ours alone.
    unsafe {
        let fd = check(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Whether the process is still there (a zombie is not).
#[must_use]
pub fn is_alive(pidfd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd {
        fd: pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one live pollfd, and the count says one; a zero timeout does not block.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 0 }
}

/// Sends a signal to exactly this process.
///
/// # Errors
/// `ESRCH` if it is gone, `EPERM` if it is not ours.
pub fn signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed and means "as kill() would".
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            no_info,
            0,
        )
    })
    .map(drop)
}

/// A duplicate, in this process, of another process's descriptor.
///
/// # Errors
/// `EBADF` if it has no such descriptor, `EPERM` if it is not ours to trace.
pub fn get_fd(pidfd: BorrowedFd<'_>, target_fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes no pointers; the descriptor it returns is new and ours alone.
    unsafe {
        let fd = check(libc::syscall(
            libc::SYS_pidfd_getfd,
            pidfd.as_raw_fd(),
            target_fd,
            0,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}
