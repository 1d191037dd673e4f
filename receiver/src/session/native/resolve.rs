//! Interrupted migrations: what became of them, and what happens to those that are committed.

use super::connection::Connection;
use super::greeting::check_owner;
use crate::file_error::FileError;
use crate::image::chain::newest_round;
use crate::refusal::{Failure, Refusal};
use crate::restore::{Outcome, complete};
use crate::session::ServerContext;
use crate::storage::lease::Disconnect;
use crate::with_causes;
use pageferry_common::Claim;
use pageferry_common::criu::Criu;
use pageferry_common::wire::{Message, RefuseCode};
use std::path::Path;
use tokio::io::{AsyncRead, AsyncWrite};

/// What the store records about a migration.
enum Recorded {
    /// The store has no such migration.
    Unknown,
    /// Rounds may have been received; nothing is decided.
    Undecided,
    /// The process must run here, and may not yet.
    Committed(Outcome),
    /// The process runs here, or did.
    Running,
    /// The process will never run here.
    Aborted,
}

impl Recorded {
    fn read(home: &Path) -> Result<Self, FileError> {
        Ok(match Outcome::read(home)? {
            None if home.is_dir() => Self::Undecided,
            None => Self::Unknown,
            Some(committed @ Outcome::Committed { .. }) => Self::Committed(committed),
            Some(Outcome::Running) => Self::Running,
            Some(Outcome::Aborted) => Self::Aborted,
        })
    }
}

/// Answers a sender that lost its connection during the hand-over: does the process run here? A migration
/// that is undecided is aborted first, so that the answer holds.
pub(super) async fn answer<R, W>(
    connection: &mut Connection<R, W>,
    context: &ServerContext,
    disconnect: &Disconnect,
    claim: &Claim,
) -> Result<(), Failure>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let store = &context.store;
    check_owner(store, claim)?;
    let home = store.home(claim);
    // Taking the lease ends the conversation of the lost connection, which may be about to decide.
    let lease = connection.lease(store, &home, disconnect).await?;
    let running = decide(context, &home).await?;
    drop(lease);
    connection.send(&Message::Outcome { running }).await?;
    Ok(())
}

/// Brings a migration to its outcome. Returns whether the process runs here.
async fn decide(context: &ServerContext, home: &Path) -> Result<bool, Failure> {
    match Recorded::read(home)? {
        Recorded::Running => Ok(true),
        Recorded::Committed(committed) => {
            let Some(restorer) = &context.restorer else {
                let reason = "the process must be restored here: start the receiver with --restore";
                return Err(Refusal::new(RefuseCode::Restore, reason).into());
            };
            finish(&restorer.criu, home, committed).await?;
            Ok(true)
        }
        Recorded::Undecided => {
            Outcome::Aborted.write(home)?;
            Ok(false)
        }
        Recorded::Aborted | Recorded::Unknown => Ok(false),
    }
}

/// Completes a committed migration; returns when its process runs.
async fn finish(criu: &Criu, home: &Path, committed: Outcome) -> Result<(), Refusal> {
    let images = newest_round(home)?;
    complete(criu, home, &images, committed)
        .await
        .map_err(|reason| Refusal::new(RefuseCode::Restore, reason))
}

/// Completes every migration that an earlier receiver committed without living to resume its process.
/// Failures are logged; the next receiver tries again.
pub async fn finish_all(context: &ServerContext) {
    let Some(restorer) = &context.restorer else {
        return;
    };
    for home in context.store.migrations().unwrap_or_default() {
        match Recorded::read(&home) {
            Ok(Recorded::Committed(committed)) => {
                if let Err(error) = finish(&restorer.criu, &home, committed).await {
                    let why = with_causes(&error);
                    tracing::error!(
                        event = "committed_not_running",
                        home = %home.display(),
                        why,
                        "cannot restore a committed migration"
                    );
                }
            }
            Ok(Recorded::Unknown | Recorded::Undecided | Recorded::Running | Recorded::Aborted) => {
            }
            Err(error) => {
                let why = with_causes(&error);
                tracing::error!(
                    event = "outcome_unreadable",
                    why,
                    "cannot read the outcome of a migration: skipping it"
                );
            }
        }
    }
}
