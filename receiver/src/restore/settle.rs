//! Bringing a committed migration to its end: the copy that was committed has run, or it is restored again. What
//! can be seen decides ([`CopyState`]); `docs/design/commit-protocol.md` has the table.

use crate::file_error::FileError;
use crate::restore::attempt::{end_leftovers, forget};
use crate::restore::copy::{CopyState, RestoredCopy};
use crate::restore::outcome::{Committed, Outcome};
use crate::restore::process::{Images, Progress, Restoring};
use pageferry_common::criu::{Criu, Options};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::spawn_blocking;

/// Number of attempts to restore a committed migration again before it is left to the next receiver.
const MAX_ATTEMPTS: u32 = 10;

/// Delay between these attempts.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// What it means that the root of a committed copy is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// It ran and ended.
    HasRun,
    /// CRIU reported that it failed before the copy left the restorer, and killed it.
    NeverRan,
}

/// Why a committed process does not run. The outcome stays "committed".
#[derive(Debug, thiserror::Error)]
pub enum NotSettled {
    /// This host has been rebooted since.
    #[error(
        "the process was committed to this host, which has been rebooted since: it may have run here, and is lost"
    )]
    Rebooted,
    /// This receiver cannot restore.
    #[error("the process must be restored here: start the receiver with --restore")]
    NoRestore,
    /// CRIU cannot restore it.
    #[error("{0}")]
    Restore(String),
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// An earlier copy cannot be ended.
    #[error("cannot end an earlier copy")]
    NotEnded(#[from] io::Error),
}

/// Brings the committed migration in `home` to the outcome "running": finds out whether its copy has run, and
/// restores it again, from `images`, if it has not. Returns when the process runs, or has run.
///
/// # Errors
/// [`NotSettled`].
pub async fn settle(
    criu: Option<&Criu>,
    home: &Path,
    images: &Path,
    gone: Gone,
) -> Result<(), NotSettled> {
    let mut gone = gone;
    let mut attempt = 1;
    loop {
        let committed = match Outcome::settled(home)? {
            Some(Outcome::Committed(committed)) => committed,
            _ => return Ok(()),
        };
        if committed.is_of_another_boot() {
            return Err(NotSettled::Rebooted);
        }
        let (at, of) = (home.to_owned(), images.to_owned());
        let options = committed.options;
        let judging = spawn_blocking(move || has_run(&at, &of, &committed, gone));
        if judging.await.expect("judging does not panic")? {
            return Ok(());
        }
        let criu = criu.ok_or(NotSettled::NoRestore)?;
        match restore_again(criu, home, images, options).await {
            Ok(()) => return finish(home),
            Err(why) if attempt == MAX_ATTEMPTS => return Err(NotSettled::Restore(why)),
            // The earlier copy may be in the way for a moment: its PIDs are taken until its new parent has
            // waited for it.
            Err(why) => {
                tracing::warn!(
                    event = "restore_retry",
                    attempt,
                    why,
                    "cannot restore yet: retrying"
                );
            }
        }
        // This program has followed that restore.
        gone = Gone::NeverRan;
        attempt += 1;
        tokio::time::sleep(RETRY_DELAY).await;
    }
}

/// Records that the process runs, and that its restore is complete.
fn finish(home: &Path) -> Result<(), NotSettled> {
    Outcome::Running.write(home)?;
    Ok(forget(home)?)
}

/// Finds out whether the committed copy has run. If it has, records that, and ends CRIU. If it has not, records
/// that, and ends what is left of it.
fn has_run(
    home: &Path,
    images: &Path,
    committed: &Committed,
    gone: Gone,
) -> Result<bool, NotSettled> {
    if let Some(copy) = committed.copy {
        copy.stop_criu()?;
        let state = copy.state(images);
        tracing::info!(
            event = "committed_copy_found",
            home = %home.display(),
            ?state,
            "judging a copy that was committed"
        );
        match (state, gone) {
            (CopyState::Left, _) | (CopyState::Gone, Gone::HasRun) => {
                // Recorded first: what CRIU traces runs when CRIU is killed.
                Outcome::Running.write(home)?;
                copy.kill_criu()?;
                forget(home)?;
                return Ok(true);
            }
            (CopyState::Waiting, _) | (CopyState::Gone, Gone::NeverRan) => {
                // Before the copy is ended: one that is gone counts as having run.
                Outcome::Committed(committed.unreleased()).write(home)?;
                copy.end()?;
            }
        }
    }
    end_leftovers(home)?;
    Ok(false)
}

/// Restores, memory first, and lets the process run.
async fn restore_again(
    criu: &Criu,
    home: &Path,
    images: &Path,
    options: u32,
) -> Result<(), String> {
    tracing::warn!(
        event = "restoring_again",
        home = %home.display(),
        "committed, but not running: restoring again"
    );
    let images = Images {
        dir: images.to_owned(),
        pages: None,
        segments: Arc::default(),
    };
    let session = criu.start(None).map_err(|error| error.to_string())?;
    let parsed = Options::from_bits(options).unwrap_or_default();
    let restoring = Restoring::start(criu.clone(), session, home.to_owned(), images, parsed);
    let mut restoring = restoring.map_err(|error| error.to_string())?;
    loop {
        match restoring.next().await {
            Progress::Restored(copy) => {
                if let Err(error) = record_copy(home, copy, options) {
                    // It may be on the disk: a copy that is gone would then count as having run.
                    restoring.leave();
                    return Err(error.to_string());
                }
                restoring.resume();
            }
            Progress::Running => return Ok(()),
            Progress::Failed(failed) if failed.released => return Ok(()),
            Progress::Failed(failed) => return Err(failed.why),
        }
    }
}

fn record_copy(home: &Path, copy: RestoredCopy, options: u32) -> Result<(), FileError> {
    Outcome::Committed(Committed::new(copy, options)).write(home)
}
