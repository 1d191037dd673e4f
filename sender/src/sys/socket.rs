//! What a socket still has to send.

use super::check;
use std::io;
use std::os::fd::RawFd;

/// Bytes that were written to a TCP socket and are not acknowledged yet. Of a descriptor that is none, or is
/// another's by now, it is an error or the number is of no use: nothing worse.
///
/// # Errors
/// The kernel's.
pub fn unsent(socket: RawFd) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (TIOCOUTQ) writes one int.
    check(libc::c_long::from(unsafe {
        libc::ioctl(socket, libc::TIOCOUTQ, &raw mut bytes)
    }))?;
    Ok(u64::try_from(bytes).unwrap_or_default())
}
