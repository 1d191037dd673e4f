//! What both ends of Pageferry share: typed addresses, the page-set algebra, image names, the
//! pool of fixed buffers, and the wire protocol.
//!
//! Nothing here touches a target or an image; the two programs do. Dependencies point one way:
//! `sender` → `common` ← `receiver`.

#![deny(unsafe_code)]
// Faults of peers, /proc and files are errors; `expect` says why an invariant of our own holds.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod cli;
pub mod criu;
pub mod digest;
pub mod ids;
pub mod memory;
pub mod needed_files;
pub mod proc;
#[allow(unsafe_code)]
pub mod sys;
pub mod tls;
pub mod wire;

pub use ids::{Claim, ImageId, MemfdName, MigrationId, StateName, Token};
pub use memory::{BufferPool, CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE, PageBuf, PageRange, PageSet};

/// An error and what caused it, in one line.
#[must_use]
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}
