//! Parts that the sender and the receiver share: typed addresses, sets of pages, buffers, the wire protocol,
//! the interface to CRIU, parsers of `/proc`, and the behaviour of the command line.
//!
//! Nothing here accesses a target or writes an image. Dependencies point one way: `sender` → `common` ←
//! `receiver`.

#![deny(unsafe_code)]
// Faults of peers, /proc and files are errors; `expect` says why an invariant of our own holds.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod cli;
pub mod criu;
pub mod digest;
pub mod needed_files;
pub mod proc;
#[allow(unsafe_code)]
pub mod sys;
pub mod tls;
pub mod wire;

mod ids;
mod memory;

pub use ids::{Claim, ImageId, MemfdName, MigrationId, ReceiverId, StateName, Token};
pub use memory::{
    BadRange, BufferPool, CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE, PageBuf, PageRange, PageSet,
};

/// Returns an error and its causes in one line.
#[must_use]
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}
