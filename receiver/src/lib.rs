//! The receiving side of Pageferry: takes rounds of memory from the network and writes them as CRIU
//! image files, each round complete or not at all.

#![forbid(unsafe_code)]

pub mod cli;
pub mod dialect;
pub mod image;
pub mod run;
pub mod server;
pub mod store;
