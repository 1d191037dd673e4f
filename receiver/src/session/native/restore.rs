//! The last phase: restoring the process, and deciding where it runs.
//!
//! ```text
//! Restoring ──► Uncommitted ──Commit, outcome recorded──► Unreleased ──► running
//!                    │ └── the outcome cannot be recorded ──► left as it is, no answer
//!                    └──── any other failure ──► aborted
//! ```
//!
//! Before the outcome "committed" is on disk, any failure aborts the restore, and the sender's copy resumes.
//! From then on the process runs here, whatever happens to the connection and to CRIU. If it is not known what
//! is on the disk, nothing is answered and nothing is killed: the outcome is read again when it is next needed.

use super::connection::{Connection, WORKING_INTERVAL, unexpected_message};
use crate::file_error::FileError;
use crate::image::durable::{sync, sync_all};
use crate::refusal::{Failure, Refusal};
use crate::restore::cache::RestoreCache;
use crate::restore::lazy::Prepared;
use crate::restore::{
    self, Committed, Gone, Images, Outcome, Progress, RestoredCopy, Restorer, forget, settle,
};
use crate::with_causes;
use pageferry_common::criu::{Criu, CriuSession, Options};
use pageferry_common::wire::{Message, RefuseCode, WireError};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

/// What a restore needs, prepared before and while the rounds arrive.
pub(super) struct RestorePlan<'a> {
    pub restorer: &'a Restorer,
    /// A CRIU that waits for its request.
    pub criu: CriuSession,
    /// `None` for an eager restore.
    pub cache: Option<Arc<Mutex<RestoreCache>>>,
}

/// A migration whose process is to be restored from its last round.
pub(super) struct Restoring<'a, R, W> {
    pub connection: &'a mut Connection<R, W>,
    pub plan: RestorePlan<'a>,
    /// Directory of the migration.
    pub home: PathBuf,
    /// Directory of the last round.
    pub round_dir: PathBuf,
    pub options: Options,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Restoring<'_, R, W> {
    /// Restores the process and, when the sender commits, resumes it.
    ///
    /// # Errors
    /// [`Failure`]; the process runs here only if it was committed.
    pub(super) async fn run(self) -> Result<(), Failure> {
        let Self {
            connection,
            plan,
            home,
            round_dir,
            options,
        } = self;
        tracing::debug!("restoring");
        let images = choose_images(plan.cache.as_deref(), &home, &round_dir)?;
        tracing::debug!("images prepared");
        // A committed migration may have to be restored again from these images. Until the commit, a receiver
        // that dies has decided nothing.
        let durable = make_durable(home.clone(), round_dir.clone());
        let criu = plan.restorer.criu.clone();
        let process =
            restore::Restoring::start(criu.clone(), plan.criu, home.clone(), images, options)
                .map_err(|error| refusal(error.to_string()))?;
        let uncommitted = Uncommitted {
            connection,
            home: &home,
            round_dir,
            criu,
            process,
            timeout: plan.restorer.timeout,
            options,
            durable,
        };
        uncommitted.commit().await?.release().await
    }
}

/// Chooses the images to restore from: a directory for a lazy restore if there is a cache that allows it,
/// else the last round itself.
fn choose_images(
    cache: Option<&Mutex<RestoreCache>>,
    home: &Path,
    round_dir: &Path,
) -> Result<Images, Refusal> {
    let lazy = match cache {
        Some(cache) => {
            let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
            cache.prepare(home)?
        }
        None => None,
    };
    Ok(match lazy {
        Some((Prepared { dir, segments }, catalog)) => Images {
            dir,
            pages: Some((round_dir.to_owned(), Arc::new(catalog))),
            segments: Arc::new(segments),
        },
        None => Images {
            dir: round_dir.to_owned(),
            pages: None,
            segments: Arc::default(),
        },
    })
}

fn make_durable(home: PathBuf, round_dir: PathBuf) -> JoinHandle<Result<(), FileError>> {
    spawn_blocking(move || sync_all(&round_dir).and_then(|()| sync(&home)))
}

/// A restore that can still be aborted.
struct Uncommitted<'a, R, W> {
    connection: &'a mut Connection<R, W>,
    /// Directory of the migration.
    home: &'a Path,
    /// Directory of the last round.
    round_dir: PathBuf,
    criu: Criu,
    process: restore::Restoring,
    /// Longest time until the process is restored.
    timeout: Duration,
    options: Options,
    /// Makes the images durable meanwhile.
    durable: JoinHandle<Result<(), FileError>>,
}

/// Why a restore was not committed.
enum NotCommitted {
    /// It never will be.
    Failed(Failure),
    /// The outcome could not be written: it is not known what is on the disk.
    NotRecorded(FileError),
}

impl<E: Into<Failure>> From<E> for NotCommitted {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl<'a, R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Uncommitted<'a, R, W> {
    /// Waits for the restore and the sender's `Commit`, and records the outcome.
    async fn commit(mut self) -> Result<Unreleased<'a, R, W>, Failure> {
        match self.try_commit().await {
            Ok(()) => Ok(Unreleased {
                connection: self.connection,
                home: self.home,
                round_dir: self.round_dir,
                criu: self.criu,
                process: self.process,
            }),
            Err(NotCommitted::Failed(failure)) => {
                self.process.abort().await;
                Err(record_aborted(self.home, failure))
            }
            Err(NotCommitted::NotRecorded(error)) => {
                tracing::error!(
                    event = "outcome_not_recorded",
                    why = with_causes(&error),
                    "cannot record that the migration is committed: nothing is decided"
                );
                self.process.leave();
                Err(WireError::Closed.into())
            }
        }
    }

    async fn try_commit(&mut self) -> Result<(), NotCommitted> {
        let copy = self.wait_until_restored().await?;
        self.connection.send(&Message::Restored).await?;
        match self.connection.recv().await? {
            Message::Commit => {}
            other => return Err(unexpected_message(&other).into()),
        }
        tracing::debug!("sender committed");
        let durable = (&mut self.durable).await;
        durable.expect("syncing files does not panic")?;
        let committed = Committed::new(copy, self.options.bits());
        let recorded = Outcome::Committed(committed).write(self.home);
        recorded.map_err(NotCommitted::NotRecorded)?;
        tracing::debug!("commit recorded");
        Ok(())
    }

    /// Waits until CRIU has restored everything. The sender's process is frozen meanwhile, so a CRIU that takes
    /// too long is killed.
    async fn wait_until_restored(&mut self) -> Result<RestoredCopy, Failure> {
        let began = Instant::now();
        let mut killed = false;
        loop {
            let wait = WORKING_INTERVAL.min(self.timeout);
            match timeout(wait, self.process.next()).await {
                Ok(Progress::Restored(copy)) => return Ok(copy),
                Ok(Progress::Running) => {
                    unreachable!("the process is resumed only after the commit")
                }
                Ok(Progress::Failed(restore::Failed { why, .. })) => {
                    let limit = self.timeout;
                    return Err(refusal(match killed {
                        true => format!("not restored within {limit:?} (--restore-timeout): {why}"),
                        false => why,
                    })
                    .into());
                }
                Err(_) => {
                    if !killed && began.elapsed() >= self.timeout {
                        killed = true;
                        self.process.kill();
                    }
                    self.connection.send(&Message::Working).await?;
                }
            }
        }
    }
}

/// A restore whose outcome is recorded: the process must run here.
struct Unreleased<'a, R, W> {
    connection: &'a mut Connection<R, W>,
    home: &'a Path,
    round_dir: PathBuf,
    criu: Criu,
    process: restore::Restoring,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Unreleased<'_, R, W> {
    /// Resumes the process, records that it runs, and reports it to the sender.
    async fn release(mut self) -> Result<(), Failure> {
        self.process.resume();
        match self.last_progress().await {
            Progress::Running | Progress::Restored(_) => {}
            Progress::Failed(failed) => {
                let (why, released) = (failed.why, failed.released);
                tracing::warn!(
                    event = "criu_died_after_commit",
                    why,
                    released,
                    "CRIU failed after the commit"
                );
                if !released {
                    self.settle().await?;
                }
            }
        }
        tracing::info!(event = "restored", home = %self.home.display(), "process restored and running");
        // Recorded or not, the process runs: a refusal now would resume the sender's copy, too. A receiver
        // that reads "committed" later finds out that it has run.
        let home = self.home.to_owned();
        let recording =
            spawn_blocking(move || Outcome::Running.write(&home).and_then(|()| forget(&home)));
        let sent = self.connection.send(&Message::Running).await;
        if let Err(error) = recording.await.expect("recording does not panic") {
            let why = with_causes(&error);
            tracing::error!(
                event = "outcome_not_recorded",
                why,
                "cannot record that the process runs"
            );
        }
        sent?;
        Ok(())
    }

    /// Waits for the end of the restore. A lost connection does not matter any more.
    async fn last_progress(&mut self) -> Progress {
        loop {
            if let Ok(progress) = timeout(WORKING_INTERVAL, self.process.next()).await {
                return progress;
            }
            let _ = self.connection.send(&Message::Working).await;
        }
    }

    /// Finds out whether the process runs although CRIU has failed, and restores it again if it does not.
    async fn settle(&mut self) -> Result<(), Failure> {
        let Self {
            connection,
            home,
            round_dir,
            criu,
            ..
        } = self;
        let mut settling = pin!(settle(Some(criu), home, round_dir, Gone::NeverRan));
        loop {
            match timeout(WORKING_INTERVAL, &mut settling).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => {
                    tracing::error!(
                        event = "committed_not_running",
                        home = %home.display(),
                        why = with_causes(&error),
                        "cannot restore a committed migration"
                    );
                    // Not a refusal: the next receiver tries again.
                    return Err(WireError::Closed.into());
                }
                Err(_) => {
                    let _ = connection.send(&Message::Working).await;
                }
            }
        }
    }
}

/// Records that a migration will not run here, and returns the failure to report. If recording fails, nothing is
/// answered: the sender asks again.
fn record_aborted(home: &Path, failure: Failure) -> Failure {
    match Outcome::Aborted.write(home) {
        Ok(()) => failure,
        Err(error) => {
            let why = with_causes(&error);
            tracing::error!(
                event = "outcome_not_recorded",
                why,
                "cannot record that the migration is aborted"
            );
            WireError::Closed.into()
        }
    }
}

fn refusal(reason: String) -> Refusal {
    Refusal::new(RefuseCode::Restore, reason)
}
