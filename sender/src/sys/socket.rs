//! Unsent data of a socket.

use super::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Returns the bytes written to a TCP socket that the peer has not acknowledged yet.
///
/// # Errors
/// `EINVAL` for a listening socket, `ENOTTY` for a descriptor that is not a socket.
pub fn unacknowledged_bytes(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which is TIOCOUTQ, writes one int to the address given, a live int.
    check(libc::c_long::from(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes)
    }))?;
    Ok(u64::try_from(bytes).unwrap_or_default())
}
