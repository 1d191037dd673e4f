//! The protocols spoken on the port, told apart by their first bytes.

pub mod admission;
pub mod criu;
pub mod native;
pub mod page_client;

use crate::quota::Bounds;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;

/// Limits of one connection.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest silence.
    pub stall: Duration,
    /// Longest time until the peer has said who it is, and what it speaks.
    pub handshake: Duration,
    /// Buffers of 4 MiB.
    pub buffers: usize,
    /// What its migration may take of the disk.
    pub bounds: Bounds,
}

/// How a migration went.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Migration {
    /// Its directory.
    pub directory: PathBuf,
    /// Complete rounds.
    pub rounds: u32,
    /// Whether the last of them was a final one.
    pub finished_frozen: bool,
    /// Whether the process runs here now.
    pub restored: bool,
    /// Pages received with content.
    pub data_pages: u64,
    /// Bytes received on the wire.
    pub bytes_wire: u64,
}
