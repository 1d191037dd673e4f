//! Why the receiver ends a connection: errors with a class and a reason that the peer can be sent.

use crate::file_error::FileError;
use crate::quota::QuotaError;
use crate::with_causes;
use pageferry_common::wire::{RefuseCode, WireError};

/// A reason to end a connection, which is sent to the peer if its protocol has a message for it.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// Class of the reason.
    pub code: RefuseCode,
    /// Reason in words.
    pub reason: String,
}

impl Refusal {
    /// Returns a refusal with this code and reason.
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

/// Why a conversation ended before it was complete.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The connection failed, or the peer violated the protocol or gave up.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The receiver refused.
    #[error(transparent)]
    Refusal(#[from] Refusal),
}

impl Failure {
    /// Returns whether the connection was lost and nothing else is wrong.
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
