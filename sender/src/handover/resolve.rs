//! `send --resolve`: ends a hand-over whose outcome the sender did not learn.

use super::{InDoubt, Record, RecordError};
use crate::freeze::{TreeError, check_signal_permission};
use crate::sink::Outcome;
use nix::sys::signal::Signal;
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::Duration;

/// Where the target runs after [`resolve`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved {
    /// At the receiver with this address; the copy here was killed.
    Moved {
        /// Address of the receiver.
        to: String,
    },
    /// Here; the receiver with this address will never run it.
    Kept {
        /// Address of the receiver.
        to: String,
    },
}

/// Why a hand-over could not be resolved. The copy here stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The record cannot be read, or does not exist.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The record names no migration.
    #[error("the record of process {0} is damaged")]
    Damaged(i32),
    /// The sender may not signal the target.
    #[error(transparent)]
    MayNotSignal(#[from] TreeError),
    /// The receiver could not be asked.
    #[error(transparent)]
    InDoubt(#[from] InDoubt),
}

/// Asks the receiver whether it runs the target with this root, for at most `patience`; then resumes or kills
/// the copy here and removes the record.
///
/// # Errors
/// [`ResolveError`].
pub fn resolve(
    root: i32,
    patience: Duration,
    tls: Option<Arc<ClientConfig>>,
) -> Result<Resolved, ResolveError> {
    let record = Record::read(root)?;
    let claim = record.claim().ok_or(ResolveError::Damaged(root))?;
    check_signal_permission(root)?;
    let to = record.to.clone();
    let outcome = crate::sink::resolve(to.clone(), claim, patience, tls)
        .map_err(|source| InDoubt { root, source })?;
    let resolved = match outcome {
        Outcome::Running => {
            record.signal(Signal::SIGKILL);
            record.await_exit();
            Resolved::Moved { to }
        }
        Outcome::Aborted => {
            record.release();
            Resolved::Kept { to }
        }
    };
    Record::remove(root)?;
    Ok(resolved)
}
