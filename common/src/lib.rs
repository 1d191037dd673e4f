//! What both ends of Pageferry share: typed addresses, the page-set algebra, image names, the
//! pool of fixed buffers, and the wire protocol.
//!
//! Nothing here touches a target or an image; the two programs do. Dependencies point one way:
//! `sender` → `common` ← `receiver`.

#![deny(unsafe_code)]

pub mod addr;
pub mod buffer;
pub mod capability;
pub mod criu;
pub mod digest;
pub mod ids;
pub mod limits;
pub mod needed;
pub mod page_set;
pub mod process;
pub mod psi;
pub mod shim;
pub mod state;
#[allow(unsafe_code)]
pub mod sys;
pub mod tls;
pub mod wire;

pub use addr::{PAGE_SIZE, PageRange};
pub use buffer::{BufferPool, CHUNK_PAGES, CHUNK_SIZE, PageBuf};
pub use ids::{Claim, ImageId, MemfdName, MigrationId, StateName, Token};
pub use page_set::PageSet;

/// An error and what caused it, in one line.
#[must_use]
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}
