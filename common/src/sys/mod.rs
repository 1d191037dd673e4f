//! The system calls that no library wraps safely and both programs make: one small safe function each.

pub mod fdpass;
pub mod perf;
pub mod rlimit;
pub mod uffd;
