//! The system calls that no library wraps safely: one small safe function each.
//!
//! This directory is the only place in the project where `unsafe` stands.

pub mod bpf;
pub mod pagemap;
pub mod pidfd;
pub mod ptrace;
pub mod sched;
pub mod signals;
pub mod uffd;
pub mod witness;

use std::io;

/// The result of a libc call that says "failed" with -1.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
