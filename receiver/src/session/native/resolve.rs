//! Interrupted migrations: what became of them. Those that are committed are brought to their end; what is left of
//! a restore that was not committed is ended.

use super::connection::Connection;
use super::greeting::check_owner;
use crate::file_error::FileError;
use crate::image::chain::newest_round;
use crate::refusal::{Failure, Refusal};
use crate::restore::{Gone, NotSettled, Outcome, end_leftovers, settle};
use crate::session::ServerContext;
use crate::storage::lease::Disconnect;
use crate::with_causes;
use pageferry_common::Claim;
use pageferry_common::wire::{Message, RefuseCode};
use std::path::Path;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_blocking;

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
    let receiver = store.id();
    connection
        .send(&Message::Outcome { running, receiver })
        .await?;
    Ok(())
}

/// Brings a migration to its outcome. Returns whether the process runs here.
async fn decide(context: &ServerContext, home: &Path) -> Result<bool, Failure> {
    match Outcome::settled(home)? {
        Some(Outcome::Running) => Ok(true),
        Some(Outcome::Committed(_)) => {
            finish(context, home)
                .await
                .map_err(|why| Refusal::new(RefuseCode::Restore, with_causes(&why)))?;
            Ok(true)
        }
        None => {
            end_leftovers_of(home).await?;
            Outcome::Aborted.write(home)?;
            Ok(false)
        }
        Some(Outcome::Aborted) => {
            end_leftovers_of(home).await?;
            Ok(false)
        }
    }
}

/// Brings a committed migration to its end; returns when its process runs.
async fn finish(context: &ServerContext, home: &Path) -> Result<(), NotSettled> {
    let criu = context.restorer.as_ref().map(|restorer| &restorer.criu);
    let images = newest_round(home)?;
    settle(criu, home, &images, Gone::HasRun).await
}

/// Ends what an earlier receiver left of a restore that was not committed.
pub(super) async fn end_leftovers_of(home: &Path) -> Result<(), FileError> {
    let home = home.to_owned();
    let ending = spawn_blocking(move || end_leftovers(&home));
    ending.await.expect("ending a restore does not panic")
}

/// Brings every migration to its end that an earlier receiver has left: completes what was committed, and ends what
/// was not. Failures are logged; the next receiver tries again.
pub async fn finish_all(context: &ServerContext) {
    for home in context.store.migrations().unwrap_or_default() {
        let result = match Outcome::read(&home) {
            Ok(Some(Outcome::Committed(_))) => finish(context, &home).await,
            Ok(None | Some(Outcome::Aborted)) => end_leftovers_of(&home).await.map_err(Into::into),
            Ok(Some(Outcome::Running)) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = result {
            let why = with_causes(&error);
            tracing::error!(
                event = "migration_not_settled",
                home = %home.display(),
                why,
                "cannot bring a migration of an earlier receiver to its end"
            );
        }
    }
}

/// Ends all restores that are not committed, when the receiver exits: CRIU would hold their copies back for ever.
pub fn end_undecided(context: &ServerContext) {
    for home in context.store.migrations().unwrap_or_default() {
        if let Ok(None | Some(Outcome::Aborted)) = Outcome::read(&home)
            && let Err(error) = end_leftovers(&home)
        {
            tracing::error!(
                event = "restore_not_ended",
                why = with_causes(&error),
                "cannot end a restore that was not committed"
            );
        }
    }
}
