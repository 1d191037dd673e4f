//! The receiving side of Pageferry: receives rounds of memory from the network and writes them as CRIU image
//! files. A round becomes visible only when it is complete.

#![deny(unsafe_code)]
// Faults of peers, /proc and files are errors; `expect` says why an invariant of our own holds.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod cli;
pub mod file_error;
pub mod image;
pub mod quota;
pub mod refusal;
pub mod restore;
pub mod run;
pub mod server;
pub mod session;
pub mod storage;
#[allow(unsafe_code)]
pub mod sys;
pub mod tools;

pub(crate) use pageferry_common::with_causes;
