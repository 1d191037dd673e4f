//! System calls without a safe wrapper in a library: one small safe function each.

pub mod shared;
pub mod uffd;
pub mod writeback;
