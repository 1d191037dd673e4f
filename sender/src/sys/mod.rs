//! The system calls that no library wraps safely: one small safe function each.
//!
//! This directory is the only place in the project where `unsafe` stands.

pub mod bpf;
pub mod pagemap;
pub mod pidfd;
pub mod ptrace;
pub mod removed_pages;
pub mod sched;
pub mod signals;
pub mod socket;
pub mod uffd;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

/// The result of a libc call that says "failed" with -1.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Maps new memory at a place that the kernel chooses: a file's, or of its own.
fn map(
    bytes: usize,
    protection: libc::c_int,
    flags: libc::c_int,
    file: Option<&File>,
) -> io::Result<*mut libc::c_void> {
    let fd = file.map_or(-1, File::as_raw_fd);
    // SAFETY: a new mapping at a place that the kernel chooses takes nothing from anybody.
    match unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, fd, 0) } {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        at => Ok(at),
    }
}
