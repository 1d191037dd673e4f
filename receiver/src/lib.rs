//! The receiving side of Pageferry: takes rounds of memory from the network and writes them as CRIU
//! image files, each round complete or not at all.

#![deny(unsafe_code)]

pub mod certs;
pub mod cli;
pub mod dialect;
pub mod disk;
pub mod door;
pub mod fill;
pub mod image;
pub mod quota;
pub mod restore;
pub mod run;
pub mod secure;
pub mod segments;
pub mod server;
pub mod store;
#[allow(unsafe_code)]
pub mod sys;

/// An error and what caused it, in one line.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}
