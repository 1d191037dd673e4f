//! Conversations with peers, one module for each protocol spoken on the port.

pub mod admission;
pub mod criu;
pub mod native;
pub mod page_client;

use crate::quota::Bounds;
use crate::refusal::Failure;
use crate::restore::Restorer;
use crate::storage::store::Store;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;

/// What all conversations of a server share.
#[derive(Debug)]
pub struct ServerContext {
    /// The directory of `--dir`.
    pub store: Store,
    /// Limits of each connection.
    pub limits: Limits,
    /// Restores processes for senders that ask for it; `None` without `--restore`.
    pub restorer: Option<Restorer>,
    /// Which dumps by CRIU get a parent.
    pub dump_parents: DumpParents,
}

/// Limits of one connection.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest time without progress (`--timeout`).
    pub stall: Duration,
    /// Longest time until the peer has authenticated itself and sent what it wants (`--handshake-timeout`).
    pub handshake: Duration,
    /// Number of buffers of 4 MiB.
    pub buffers: usize,
    /// Share of the disk that its migration may take.
    pub bounds: Bounds,
}

/// Whether a dump by CRIU refers to an earlier one for unchanged pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DumpParents {
    /// Each dump is complete in itself.
    None,
    /// The parent is the newest dump of the same process (`--chain-dumps`).
    Newest,
}

/// How far a migration has come.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Migration {
    /// Its directory; empty until the peer was accepted.
    pub directory: PathBuf,
    /// Number of complete rounds.
    pub rounds: u32,
    /// Whether the last of them was a final round.
    pub finished_frozen: bool,
    /// Whether the process was restored and runs here.
    pub restored: bool,
    /// Number of pages received with content.
    pub data_pages: u64,
    /// Number of bytes received on the wire.
    pub bytes_wire: u64,
}

impl Migration {
    /// Returns whether the peer was accepted as the sender of a migration.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        !self.directory.as_os_str().is_empty()
    }
}

/// How a conversation ended.
#[derive(Debug)]
pub struct SessionEnd {
    /// Progress of its migration, however it ended.
    pub migration: Migration,
    /// Why it ended early, if it did.
    pub result: Result<(), Failure>,
}
