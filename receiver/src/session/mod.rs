//! The protocols spoken on the port, told apart by their first bytes.

pub mod criu;
pub mod native;
pub mod page_client;

use crate::image::FileError;
use crate::image::writer::WriteError;
use crate::quota::{Bounds, QuotaError};
use crate::with_causes;
use pageferry_common::wire::{RefuseCode, WireError};
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

/// A reason to end a connection that is not the peer's protocol.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// Its class.
    pub code: RefuseCode,
    /// In words, for the peer if its protocol has any.
    pub reason: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(code: RefuseCode, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Self { code, reason }
    }
}

impl From<FileError> for Refusal {
    fn from(error: FileError) -> Self {
        Self::new(RefuseCode::Storage, with_causes(&error))
    }
}

impl From<QuotaError> for Refusal {
    fn from(error: QuotaError) -> Self {
        match error {
            QuotaError::File(file) => file.into(),
            limit => Self::new(RefuseCode::Limit, limit.to_string()),
        }
    }
}

impl From<WriteError> for Refusal {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Storage(file) => file.into(),
            WriteError::Quota(quota) => quota.into(),
            WriteError::Protocol(what) => Self::new(RefuseCode::Protocol, what),
        }
    }
}

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The connection, or the peer on it.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Something else.
    #[error(transparent)]
    Refusal(#[from] Refusal),
}

impl Failure {
    /// Whether the connection is lost, and nothing else is wrong.
    #[must_use]
    pub fn is_broken_connection(&self) -> bool {
        matches!(
            self,
            Self::Wire(WireError::Io(_) | WireError::Closed | WireError::Stalled(_))
        )
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        Refusal::from(error).into()
    }
}

impl From<QuotaError> for Failure {
    fn from(error: QuotaError) -> Self {
        Refusal::from(error).into()
    }
}
