//! Safe wrappers for system calls that no library wraps, one small function each.
//!
//! The sender has no `unsafe` code outside this directory.

pub mod bpf;
pub mod cgroup;
pub mod mapping;
pub mod pagemap;
pub mod ptrace;
pub mod removed_pages;
pub mod sched;
pub mod signals;
pub mod socket;
pub mod uffd;

use std::io;

/// Converts the result of a libc call that returns -1 and sets `errno` on failure.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
