//! System calls that both programs need and that no library wraps safely: one small safe function for each.

pub mod fdpass;
pub mod perf;
pub mod pidfd;
pub mod rlimit;
pub mod uffd;
