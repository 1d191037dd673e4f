//! CRIU restoring a process: up to the moment before it would run, and the rest once the sender has
//! committed.

use crate::image::catalog::Catalog;
use crate::refusal::Refusal;
use crate::restore::attempt::Attempt;
use crate::restore::copy::{RestoredCopy, end_restore};
use crate::restore::filler::handle::FillerProcess;
use crate::restore::segment_server::SegmentServer;
use crate::restore::segments::Prefilled;
use crate::with_causes;
use pageferry_common::criu::preload;
use pageferry_common::criu::{Criu, CriuSession, Event, Options, Reply, last_errors};
use pageferry_common::proc::process::ProcessId;
use pageferry_common::wire::RefuseCode;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc as blocking;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How this receiver restores processes.
#[derive(Debug, Clone)]
pub struct Restorer {
    /// CRIU to restore with.
    pub criu: Criu,
    /// Whether a process is resumed before its memory is filled.
    pub lazy: bool,
    /// Longest time from the beginning of a restore until the process could run.
    pub timeout: Duration,
}

impl Restorer {
    /// Starts a CRIU for the migration in `home`. Called early, for starting CRIU takes longer than restoring
    /// a small process.
    ///
    /// # Errors
    /// A refusal if CRIU cannot be started.
    pub fn start_criu(&self, home: &Path) -> Result<CriuSession, Refusal> {
        self.try_start_criu(home).map_err(|error| {
            Refusal::new(RefuseCode::Restore, format!("cannot start CRIU: {error}"))
        })
    }

    fn try_start_criu(&self, home: &Path) -> io::Result<CriuSession> {
        let library = match self.lazy {
            true => Some(preload::write(preload::RESTORE, home)?),
            false => None,
        };
        self.criu.start(library.as_deref())
    }
}

/// Images that a process is restored from.
#[derive(Debug, Clone)]
pub struct Images {
    /// Directory with CRIU's images of state, and pagemaps.
    pub dir: PathBuf,
    /// In a lazy restore: the round that holds the pages which are filled in once the process runs, and where
    /// in its chain they are.
    pub pages: Option<(PathBuf, Arc<Catalog>)>,
    /// Shared segments that CRIU does not read from the images.
    pub segments: Arc<Prefilled>,
}

/// Progress of a restore.
#[derive(Debug)]
pub enum Progress {
    /// The tree is restored, and held back.
    Restored(RestoredCopy),
    /// The process runs.
    Running,
    /// The restore failed.
    Failed(Failed),
}

/// How a restore failed.
#[derive(Debug)]
pub struct Failed {
    /// Reason in words.
    pub why: String,
    /// Whether the copy had left CRIU's restorer: then it runs. If it had not, and was not to be resumed yet,
    /// nothing of it is left; after [`Restoring::resume`] it is to be judged ([`settle`](super::settle())).
    pub released: bool,
}

/// What becomes of a restored tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    /// It runs.
    Resume,
    /// It stays as it is: CRIU holds it back, and this program takes no part in it any more.
    Leave,
}

/// A restore under way. Dropped before [`Restoring::resume`], it is undone.
#[derive(Debug)]
pub struct Restoring {
    progress_rx: mpsc::UnboundedReceiver<Progress>,
    /// `None` once the process may run.
    decision_tx: Option<blocking::Sender<Decision>>,
    criu: ProcessId,
}

impl Restoring {
    /// Begins a restore of the migration in `home` from a directory of images, by a CRIU that
    /// [`Restorer::start_criu`] has started.
    ///
    /// # Errors
    /// The kernel's, if there are too many threads or CRIU has exited.
    pub fn start(
        criu: Criu,
        session: CriuSession,
        home: PathBuf,
        images: Images,
        options: Options,
    ) -> io::Result<Self> {
        let (progress_tx, progress_rx) = mpsc::unbounded_channel();
        let (decision_tx, decision_rx) = blocking::channel();
        let id = ProcessId::find(session.pid()).ok_or(io::ErrorKind::NotFound)?;
        let restore = Restore {
            criu,
            home,
            images,
            options,
            progress_tx,
            decision_rx,
            segment_server: None,
            resumed: false,
            released: false,
        };
        std::thread::Builder::new()
            .name("restore".into())
            .spawn(move || restore.run(session, id))?;
        Ok(Self {
            progress_rx,
            decision_tx: Some(decision_tx),
            criu: id,
        })
    }

    /// Waits for the next step. Call it until it returns [`Progress::Running`] or [`Progress::Failed`].
    pub async fn next(&mut self) -> Progress {
        let next = self.progress_rx.recv().await;
        next.unwrap_or_else(|| {
            Progress::Failed(Failed {
                why: "the restore thread panicked".to_owned(),
                released: false,
            })
        })
    }

    /// Lets the process run.
    pub fn resume(&mut self) {
        self.decide(Decision::Resume);
    }

    /// Leaves the restored tree as it is, held back by CRIU, for a later judgement.
    pub fn leave(mut self) {
        self.decide(Decision::Leave);
    }

    fn decide(&mut self, decision: Decision) {
        if let Some(decision_tx) = self.decision_tx.take() {
            // This fails if the restore has failed meanwhile, which `next` reports.
            let _ = decision_tx.send(decision);
        }
    }

    /// Kills CRIU and all that it has restored so far: the restore then fails.
    pub fn kill(&self) {
        let criu = self.criu;
        // On a thread, for it waits until all have exited. The restore fails in any case.
        let _ = std::thread::Builder::new().spawn(move || end_restore(criu, None));
    }

    /// Undoes the restore, and returns when nothing of it is left.
    pub async fn abort(mut self) {
        self.decision_tx = None;
        while let Progress::Restored(_) = self.next().await {}
    }
}

/// A restore, on the thread that drives CRIU.
struct Restore {
    criu: Criu,
    /// Directory of the migration.
    home: PathBuf,
    images: Images,
    options: Options,
    progress_tx: mpsc::UnboundedSender<Progress>,
    decision_rx: blocking::Receiver<Decision>,
    segment_server: Option<SegmentServer>,
    /// Whether the tree may run.
    resumed: bool,
    /// Whether the tree has left CRIU's restorer: it runs, whatever becomes of CRIU.
    released: bool,
}

impl Restore {
    /// Restores, reports every step, and waits until the memory of a lazily restored process is complete.
    fn run(mut self, session: CriuSession, criu: ProcessId) {
        let (result, filler) = self.restore(session, criu);
        let last = match result {
            Ok(()) => Progress::Running,
            Err(error) => {
                let why = with_causes(&error);
                let errors = last_errors(&self.images.dir.join("restore.log"));
                Progress::Failed(Failed {
                    why: format!("CRIU cannot restore the process: {why}: {errors}"),
                    released: self.released,
                })
            }
        };
        let began = Instant::now();
        // This fails if the connection is over, and with it the interest in the restore.
        let _ = self.progress_tx.send(last);
        drop(self);
        if let Some(filler) = filler {
            report_filler(filler, began);
        }
    }

    /// Restores. Also returns the filler process if a lazily restored process may still depend on it.
    fn restore(
        &mut self,
        session: CriuSession,
        criu: ProcessId,
    ) -> (io::Result<()>, Option<FillerProcess>) {
        let mut filler = match &self.images.pages {
            Some((round, catalog)) => {
                match FillerProcess::start(round, catalog, &self.images.dir) {
                    Ok(filler) => Some(filler),
                    Err(error) => return (Err(error), None),
                }
            }
            None => None,
        };
        let attempt = Attempt::begin(&self.home, criu).map_err(io::Error::other);
        let mut attempt = match attempt {
            Ok(attempt) => attempt,
            Err(error) => {
                filler.into_iter().for_each(FillerProcess::kill);
                return (Err(error), None);
            }
        };
        let result = self.drive(session, filler.as_mut(), &mut attempt);
        if result.is_err() && !self.resumed {
            // If CRIU was killed, it is unknown how far it came, and nothing may be left.
            if let Err(error) = attempt.end() {
                tracing::error!(
                    event = "restore_not_ended",
                    why = with_causes(&error),
                    "cannot end a restore that failed"
                );
            }
            filler.take().into_iter().for_each(FillerProcess::kill);
        }
        (result, filler)
    }

    /// Has CRIU restore, hold the tree back until it is decided what becomes of it, and resume it.
    fn drive(
        &mut self,
        mut session: CriuSession,
        mut filler: Option<&mut FillerProcess>,
        attempt: &mut Attempt,
    ) -> io::Result<()> {
        if !self.images.segments.is_empty() {
            let server = SegmentServer::start(&self.images.segments, &self.images.dir)?;
            self.segment_server = Some(server);
        }
        let dir = File::open(&self.images.dir)?;
        self.criu
            .restore(&mut session, dir.as_fd(), &self.options, filler.is_some())?;
        loop {
            let event = session.event()?;
            tracing::debug!(event = "criu_event", criu = ?event, "event from CRIU");
            let name = match event {
                Event::Stage { name, pid } => {
                    if let Some(root) = pid.and_then(ProcessId::find)
                        && attempt.root() != Some(root)
                    {
                        attempt.set_root(root).map_err(io::Error::other)?;
                    }
                    name
                }
                Event::Done => return Ok(()),
                Event::Failed(why) => return Err(io::Error::other(why)),
            };
            match &*name {
                // All is restored; aborting now undoes all of it.
                "post-restore" => {
                    self.check_segments()?;
                    // Fills memory while the tree is held back.
                    if let Some(filler) = &mut filler {
                        filler.fill_all(attempt.root())?;
                    }
                    if !self.hold_back(&mut session, attempt)? {
                        session.detach();
                        return Ok(());
                    }
                }
                // All processes have left the restorer, and only CRIU's tracing keeps them from running.
                "pre-resume" => {
                    self.released = true;
                    session.reply(Reply::Continue)?;
                }
                _ => session.reply(Reply::Continue)?,
            }
        }
    }

    /// Reports that the tree is restored, and waits for the decision. Returns whether CRIU goes on.
    fn hold_back(&mut self, session: &mut CriuSession, attempt: &Attempt) -> io::Result<bool> {
        let root = attempt.root().filter(|root| root.is_alive());
        let root = root.ok_or_else(|| io::Error::other("the root of the tree is gone"))?;
        let criu = attempt.criu();
        let restored = Progress::Restored(RestoredCopy { criu, root });
        // This fails if nothing awaits it: then the decision is to abort.
        let _ = self.progress_tx.send(restored);
        match self.decision_rx.recv() {
            Ok(Decision::Resume) => {
                self.resumed = true;
                session.reply(Reply::Continue)?;
                Ok(true)
            }
            Ok(Decision::Leave) => Ok(false),
            Err(_) => {
                session.reply(Reply::Abort)?;
                Ok(true)
            }
        }
    }

    /// Fails if CRIU has restored a shared segment empty.
    fn check_segments(&self) -> io::Result<()> {
        match &self.segment_server {
            Some(server) if !server.all_fetched() => Err(io::Error::other(
                "the library preloaded into CRIU had no effect, and shared memory needs it: \
                 receive --restore=eager does without",
            )),
            _ => Ok(()),
        }
    }
}

/// Waits until filling has ended, and logs whether the memory of the process is complete.
fn report_filler(mut filler: FillerProcess, began: Instant) {
    match filler.wait() {
        Ok(true) => {
            let seconds = (began.elapsed().as_secs_f64() * 100.0).round() / 100.0;
            tracing::info!(
                event = "memory_filled",
                seconds,
                "lazy restore complete: all memory of the process is filled"
            );
        }
        result => tracing::error!(
            event = "lazy_restore_failed",
            ?result,
            "lazy restore failed: the memory of the process is incomplete, and it was killed"
        ),
    }
}
