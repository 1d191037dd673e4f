//! pidfds: references to a process that stay valid when its PID is reused.

use nix::errno::Errno;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Opens a pidfd of a process.
///
/// # Errors
/// `ESRCH` if the process does not exist.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes no pointers. It returns a new descriptor, which nothing else owns.
    unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Returns whether the process has not exited. A zombie has exited.
#[must_use]
pub fn is_alive(pidfd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd {
        fd: pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: poll reads and writes one pollfd, the count given, which is alive.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 0 }
}

/// Sends a signal to this process.
///
/// # Errors
/// `ESRCH` if it has exited, `EPERM` if sending signals to it is not permitted.
pub fn signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is valid, and makes the call behave like kill.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            no_info,
            0,
        )
    })?;
    Ok(())
}

/// Duplicates a descriptor of another process into this process.
///
/// # Errors
/// `EBADF` if the process has no such descriptor, `EPERM` if tracing it is not permitted.
pub fn get_fd(pidfd: BorrowedFd<'_>, target_fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes no pointers. It returns a new descriptor, which nothing else owns.
    unsafe {
        let fd = Errno::result(libc::syscall(
            libc::SYS_pidfd_getfd,
            pidfd.as_raw_fd(),
            target_fd,
            0,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}
