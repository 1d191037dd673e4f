//! The last phase: restoring the process, and deciding where it runs.
//!
//! ```text
//! Restoring ──► Uncommitted ──Commit, outcome recorded──► Committed ──► running
//!                    └── any failure ──► aborted
//! ```
//!
//! Before the outcome "committed" is on disk, any failure aborts the restore, and the sender's copy resumes.
//! From then on the process runs here, whatever happens to the connection.

use super::connection::{Connection, WORKING_INTERVAL, unexpected_message};
use crate::file_error::FileError;
use crate::image::durable::{sync, sync_all};
use crate::refusal::{Failure, Refusal};
use crate::restore::cache::RestoreCache;
use crate::restore::lazy::Prepared;
use crate::restore::{self, Images, Outcome, Progress, Restorer};
use crate::with_causes;
use pageferry_common::criu::{CriuSession, Options};
use pageferry_common::wire::{Message, RefuseCode, WireError};
use std::path::{Path, PathBuf};
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
        let durable = make_durable(home.clone(), round_dir);
        let criu = plan.restorer.criu.clone();
        let process = restore::Restoring::start(criu, plan.criu, images, options)
            .map_err(|error| refusal(error.to_string()))?;
        let uncommitted = Uncommitted {
            connection,
            home: &home,
            process,
            timeout: plan.restorer.timeout,
            options,
            durable,
        };
        uncommitted.commit().await?.resume().await
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
    process: restore::Restoring,
    /// Longest time until the process is restored.
    timeout: Duration,
    options: Options,
    /// Makes the images durable meanwhile.
    durable: JoinHandle<Result<(), FileError>>,
}

impl<'a, R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Uncommitted<'a, R, W> {
    /// Waits for the restore and the sender's `Commit`, and records the outcome. Any failure aborts.
    async fn commit(mut self) -> Result<Committed<'a, R, W>, Failure> {
        match self.try_commit().await {
            Ok(()) => Ok(Committed {
                connection: self.connection,
                home: self.home,
                process: self.process,
            }),
            Err(failure) => {
                self.process.abort().await;
                Err(record_aborted(self.home, failure))
            }
        }
    }

    async fn try_commit(&mut self) -> Result<(), Failure> {
        let outcome = self.wait_until_restored().await?;
        self.connection.send(&Message::Restored).await?;
        match self.connection.recv().await? {
            Message::Commit => {}
            other => return Err(unexpected_message(&other).into()),
        }
        tracing::debug!("sender committed");
        let durable = (&mut self.durable).await;
        durable.expect("syncing files does not panic")?;
        outcome.write(self.home)?;
        tracing::debug!("commit recorded");
        Ok(())
    }

    /// Waits until CRIU has restored everything, and returns the outcome to record. The sender's process
    /// is frozen meanwhile, so a CRIU that takes too long is killed.
    async fn wait_until_restored(&mut self) -> Result<Outcome, Failure> {
        let began = Instant::now();
        let mut killed = false;
        loop {
            let wait = WORKING_INTERVAL.min(self.timeout);
            match timeout(wait, self.process.next()).await {
                Ok(Progress::Restored { criu, root }) => {
                    return Ok(Outcome::Committed {
                        criu,
                        root,
                        options: self.options.bits(),
                    });
                }
                Ok(Progress::Running) => {
                    unreachable!("the process is resumed only after the commit")
                }
                Ok(Progress::Failed(why)) => {
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
struct Committed<'a, R, W> {
    connection: &'a mut Connection<R, W>,
    home: &'a Path,
    process: restore::Restoring,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Committed<'_, R, W> {
    /// Resumes the process, records that it runs, and reports it to the sender.
    async fn resume(mut self) -> Result<(), Failure> {
        self.process.resume();
        loop {
            match self.next_progress().await {
                Progress::Restored { .. } => {}
                Progress::Running => break,
                Progress::Failed(why) => {
                    return Err(record_aborted(self.home, refusal(why).into()));
                }
            }
        }
        tracing::info!(event = "restored", home = %self.home.display(), "process restored and running");
        // Recorded or not, the process runs: a refusal now would resume the sender's copy, too. A receiver
        // that reads "committed" later finds the process alive.
        let home = self.home.to_owned();
        let recording = spawn_blocking(move || Outcome::Running.write(&home));
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

    /// Waits for the next step of the restore. A lost connection does not matter any more.
    async fn next_progress(&mut self) -> Progress {
        loop {
            if let Ok(progress) = timeout(WORKING_INTERVAL, self.process.next()).await {
                return progress;
            }
            let _ = self.connection.send(&Message::Working).await;
        }
    }
}

/// Records that a migration will not run here, and returns the failure to report. If recording fails, the
/// sender must not receive a refusal, because the commit may be on disk: it has to ask again.
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
