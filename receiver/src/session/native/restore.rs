//! The native protocol's last part: the process itself moves here.
//!
//! Whatever goes wrong before the sender's commit is on the disk, nothing runs here, and the sender
//! lets its copy go on. From then on it runs here, whatever happens to the connection.

use super::{Session, WORKING_INTERVAL, owned};
use crate::image::DirName;
use crate::image::chain::newest_round;
use crate::image::durable::{sync, sync_all};
use crate::refusal::{Failure, Refusal};
use crate::restore::cache::RestoreCache;
use crate::restore::lazy::Prepared;
use crate::restore::{Images, Outcome, Progress, Restorer, Restoring, complete};
use crate::storage::lease::Disconnect;
use crate::storage::store::Store;
use crate::with_causes;
use pageferry_common::Claim;
use pageferry_common::criu::session::{Criu, CriuSession, Options};
use pageferry_common::wire::{Message, RefuseCode, WireError};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Session<R, W> {
    /// Restores what is in the last round of the migration at `home`: up to the moment before it would
    /// run, and when the sender says so, the rest. `ready` is a CRIU that waits for it.
    pub(super) async fn take_over(
        &mut self,
        restorer: &Restorer,
        ready: CriuSession,
        home: &Path,
        round: u32,
        kept: Option<&Mutex<RestoreCache>>,
        options: Options,
    ) -> Result<(), Failure> {
        let round_dir = home.join(DirName::Round(round).to_string());
        tracing::debug!("restore");
        let ahead = match kept {
            Some(kept) => {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.prepare(home).map_err(Refusal::from)?
            }
            None => None,
        };
        tracing::debug!("the images are prepared");
        let images = match ahead {
            Some((Prepared { dir, segments }, catalog)) => Images {
                dir,
                pages: Some((round_dir.clone(), Arc::new(catalog))),
                segments: Arc::new(segments),
            },
            None => Images {
                dir: round_dir.clone(),
                pages: None,
                segments: Arc::default(),
            },
        };
        // Nothing is decided until the commit; who dies before has not decided.
        // It may have to be restored again from here.
        let above = home.to_owned();
        let durable = spawn_blocking(move || sync_all(&round_dir).and_then(|()| sync(&above)));
        let restoring = Restoring::start(restorer.criu.clone(), ready, images, options);
        let mut restoring = restoring.map_err(|error| refusal(error.to_string()))?;
        let (criu, root) = match self.restored(&mut restoring, restorer.timeout).await {
            Ok(Progress::Restored { criu, root }) => (criu, root),
            Ok(Progress::Running) => unreachable!("it runs when it may"),
            Ok(Progress::Failed(why)) => return Err(aborted(home, refusal(why).into())),
            Err(gone) => return self.undo(restoring, home, gone).await,
        };
        let commit = match self.writer.send(&Message::Restored).await {
            Ok(()) => self.message().await,
            Err(error) => Err(error.into()),
        };
        match commit {
            Ok(Message::Commit) => {}
            Ok(other) => {
                let failure = super::not_mine(&other).into();
                return self.undo(restoring, home, failure).await;
            }
            Err(failure) => return self.undo(restoring, home, failure).await,
        }
        tracing::debug!("committed");
        if let Err(error) = durable.await.expect("making it durable does not panic") {
            return self.undo(restoring, home, error.into()).await;
        }
        let options = options.bits();
        let committed = Outcome::Committed {
            criu,
            root,
            options,
        };
        if let Err(error) = committed.write(home) {
            return self
                .undo(restoring, home, Refusal::from(error).into())
                .await;
        }
        tracing::debug!("written down");
        restoring.resume();
        loop {
            // The sender may be gone: it runs here all the same.
            match self.wait_for(&mut restoring).await {
                Progress::Restored { .. } => {}
                Progress::Running => break,
                Progress::Failed(why) => return Err(aborted(home, refusal(why).into())),
            }
        }
        tracing::info!(event = "restored", home = %home.display(), "restored: it runs here now");
        // It runs, written down or not: a refusal now would let the other copy run as well. Who reads
        // "committed" later finds the process alive.
        let written = {
            let home = home.to_owned();
            spawn_blocking(move || Outcome::Running.write(&home))
        };
        let said = self.writer.send(&Message::Running).await;
        if let Err(error) = written.await.expect("writing it down does not panic") {
            tracing::error!(
                why = with_causes(&error),
                "that it runs is not written down"
            );
        }
        said?;
        Ok(())
    }

    /// Waits until all is restored, while the sender is told that we live. Its process waits: a CRIU that hangs
    /// is killed.
    async fn restored(
        &mut self,
        restoring: &mut Restoring,
        within: Duration,
    ) -> Result<Progress, Failure> {
        let began = Instant::now();
        let mut hangs = false;
        loop {
            if let Ok(progress) = timeout(WORKING_INTERVAL.min(within), restoring.next()).await {
                return Ok(match progress {
                    Progress::Failed(why) if hangs => Progress::Failed(format!(
                        "not restored within {within:?} (--restore-timeout): {why}"
                    )),
                    other => other,
                });
            }
            if !hangs && began.elapsed() >= within {
                hangs = true;
                restoring.kill();
            }
            self.writer.send(&Message::Working).await?;
        }
    }

    /// What happens next, whether or not there is a sender to be told that we live.
    async fn wait_for(&mut self, restoring: &mut Restoring) -> Progress {
        loop {
            if let Ok(progress) = timeout(WORKING_INTERVAL, restoring.next()).await {
                return progress;
            }
            let _ = self.writer.send(&Message::Working).await;
        }
    }

    /// Leaves nothing of a restore that may not run.
    async fn undo(
        &mut self,
        restoring: Restoring,
        home: &Path,
        why: Failure,
    ) -> Result<(), Failure> {
        restoring.abort().await;
        Err(aborted(home, why))
    }

    /// Tells a sender that has lost sight of a migration what became of it. What has not been decided
    /// is decided: it will not run here.
    pub(super) async fn resolve(
        &mut self,
        store: &Store,
        criu: Option<&Criu>,
        cut: &Disconnect,
        claim: &Claim,
    ) -> Result<(), Failure> {
        owned(store, claim)?;
        let home = store.home(claim);
        // Whoever works on it comes to an end: the connection that it works for is lost.
        let taken = self.take(store, &home, cut).await?;
        let running = match Outcome::read(&home)? {
            Some(Outcome::Running) => true,
            Some(committed @ Outcome::Committed { .. }) => {
                let Some(criu) = criu else {
                    let what = "it is to run here: start the receiver with --restore";
                    return Err(Refusal::new(RefuseCode::Restore, what).into());
                };
                finish(criu, &home, committed).await?;
                true
            }
            Some(Outcome::Aborted) => false,
            None => {
                if home.is_dir() {
                    Outcome::Aborted.write(&home)?;
                }
                false
            }
        };
        drop(taken);
        self.writer.send(&Message::Outcome { running }).await?;
        Ok(())
    }
}

/// Writes down that a migration will not run here. If that fails, the sender must not be told so: the
/// commit may be on the disk, so it has to ask again.
fn aborted(home: &Path, why: Failure) -> Failure {
    match Outcome::Aborted.write(home) {
        Ok(()) => why,
        Err(error) => {
            tracing::error!(
                why = with_causes(&error),
                "that it will not run is not written down"
            );
            WireError::Closed.into()
        }
    }
}

/// Has a committed migration run.
///
/// # Errors
/// Why it cannot.
pub async fn finish(criu: &Criu, home: &Path, committed: Outcome) -> Result<(), Refusal> {
    let images = newest_round(home)?;
    complete(criu, home, &images, committed)
        .await
        .map_err(refusal)
}

fn refusal(why: String) -> Refusal {
    Refusal::new(RefuseCode::Restore, why)
}

/// Has every migration run that an earlier receiver has committed and not lived to let run.
pub async fn finish_all(criu: &Criu, store: &Store) {
    let homes = store.migrations().unwrap_or_default();
    for home in homes {
        match Outcome::read(&home) {
            Ok(Some(committed @ Outcome::Committed { .. })) => {
                if let Err(error) = finish(criu, &home, committed).await {
                    let why = with_causes(&error);
                    tracing::error!(home = %home.display(), why, "it is to run here, and does not");
                }
            }
            Ok(_) => {}
            Err(error) => tracing::error!(why = with_causes(&error), "skipped"),
        }
    }
}
