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

pub(crate) use pageferry_common::with_causes;
