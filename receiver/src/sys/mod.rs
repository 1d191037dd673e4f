//! The system calls that no library wraps safely: one small safe function each.

pub mod uffd;
pub mod writeback;
