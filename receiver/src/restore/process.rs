//! CRIU restoring a process: up to the moment before it would run, and the rest once the sender has
//! committed.

use crate::image::catalog::Catalog;
use crate::refusal::Refusal;
use crate::restore::filler::handle::FillerProcess;
use crate::restore::outcome::Outcome;
use crate::restore::segment_server::SegmentServer;
use crate::restore::segments::Prefilled;
use crate::with_causes;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_common::criu::preload;
use pageferry_common::criu::{Criu, CriuSession, Event, Options, Reply, last_errors};
use pageferry_common::proc::process::{ProcessId, children, threads};
use pageferry_common::wire::RefuseCode;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc as blocking;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Number of attempts to restore a committed migration again before it is left to the next receiver.
const MAX_ATTEMPTS: u32 = 10;

/// Delay between these attempts.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// Interval of checks whether an earlier CRIU has exited.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

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
    Restored {
        /// The CRIU that holds it back.
        criu: Option<ProcessId>,
        /// Root of the restored tree.
        root: Option<ProcessId>,
    },
    /// The process runs.
    Running,
    /// The restore failed, and nothing of it is left.
    Failed(String),
}

/// A restore under way. Dropped before [`Restoring::resume`], it is undone.
#[derive(Debug)]
pub struct Restoring {
    progress_rx: mpsc::UnboundedReceiver<Progress>,
    /// `None` once the process may run.
    resume_tx: Option<blocking::Sender<()>>,
    /// CRIU's PID.
    criu: i32,
}

impl Restoring {
    /// Begins a restore from a directory of images, by a CRIU that [`Restorer::start_criu`] has started.
    ///
    /// # Errors
    /// The kernel's, if there are too many threads.
    pub fn start(
        criu: Criu,
        session: CriuSession,
        images: Images,
        options: Options,
    ) -> io::Result<Self> {
        let (progress_tx, progress_rx) = mpsc::unbounded_channel();
        let (resume_tx, resume_rx) = blocking::channel();
        let pid = session.pid();
        let restore = Restore {
            criu,
            images,
            options,
            progress_tx,
            resume_rx,
            segment_server: None,
            root: None,
        };
        std::thread::Builder::new()
            .name("restore".into())
            .spawn(move || restore.run(session))?;
        Ok(Self {
            progress_rx,
            resume_tx: Some(resume_tx),
            criu: pid,
        })
    }

    /// Waits for the next step. Call it until it returns [`Progress::Running`] or [`Progress::Failed`].
    pub async fn next(&mut self) -> Progress {
        let next = self.progress_rx.recv().await;
        next.unwrap_or_else(|| Progress::Failed("the restore thread panicked".to_owned()))
    }

    /// Lets the process run.
    pub fn resume(&mut self) {
        if let Some(resume_tx) = self.resume_tx.take() {
            // This fails if the restore has failed meanwhile, which `next` reports.
            let _ = resume_tx.send(());
        }
    }

    /// Kills CRIU and all that it has restored so far: the restore then fails.
    pub fn kill(&self) {
        kill_tree(self.criu);
    }

    /// Undoes the restore. Returns its last step: [`Progress::Running`] if it was too late.
    pub async fn abort(mut self) -> Progress {
        self.resume_tx = None;
        loop {
            match self.next().await {
                Progress::Restored { .. } => {}
                last => return last,
            }
        }
    }
}

/// A restore, on the thread that drives CRIU.
struct Restore {
    criu: Criu,
    images: Images,
    options: Options,
    progress_tx: mpsc::UnboundedSender<Progress>,
    resume_rx: blocking::Receiver<()>,
    segment_server: Option<SegmentServer>,
    /// Root of the tree, once it is restored.
    root: Option<ProcessId>,
}

impl Restore {
    /// Restores, reports every step, and waits until the memory of a lazily restored process is complete.
    fn run(mut self, session: CriuSession) {
        let (last, filler) = match self.restore(session) {
            Ok(filler) => (Progress::Running, filler),
            Err(error) => {
                let why = with_causes(&error);
                let errors = last_errors(&self.images.dir.join("restore.log"));
                let why = format!("CRIU cannot restore the process: {why}: {errors}");
                (Progress::Failed(why), None)
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

    /// Restores. Returns the filler process that a lazily restored process still depends on.
    fn restore(&mut self, mut session: CriuSession) -> io::Result<Option<FillerProcess>> {
        let mut filler = match &self.images.pages {
            Some((round, catalog)) => Some(FillerProcess::start(round, catalog, &self.images.dir)?),
            None => None,
        };
        let result = self.drive(&mut session, filler.as_ref());
        // CRIU undoes what it has restored and not resumed, and exits.
        drop(session);
        let Err(error) = result else {
            return Ok(filler);
        };
        // If CRIU was killed, it is unknown how far it came, and nothing may be left.
        if let Some(root) = self.root.filter(|root| root.is_alive()) {
            kill_tree(root.pid);
        }
        filler.iter_mut().for_each(FillerProcess::kill);
        Err(error)
    }

    /// Has CRIU restore, hold the tree back until it may run, and resume it.
    fn drive(
        &mut self,
        session: &mut CriuSession,
        filler: Option<&FillerProcess>,
    ) -> io::Result<()> {
        if !self.images.segments.is_empty() {
            let server = SegmentServer::start(&self.images.segments, &self.images.dir)?;
            self.segment_server = Some(server);
        }
        let dir = File::open(&self.images.dir)?;
        self.criu
            .restore(session, dir.as_fd(), &self.options, filler.is_some())?;
        loop {
            let event = session.event()?;
            tracing::debug!(event = "criu_event", criu = ?event, "event from CRIU");
            match event {
                // All is restored; aborting now undoes all of it.
                Event::Stage { name, pid } if name == "post-restore" => {
                    self.root = pid.and_then(ProcessId::find);
                    self.check_segments()?;
                    // Fills memory while the tree is held back.
                    filler.iter().for_each(|filler| filler.fill_all());
                    let _ = self.progress_tx.send(Progress::Restored {
                        criu: ProcessId::find(session.pid()),
                        root: self.root,
                    });
                    session.reply(match self.resume_rx.recv() {
                        Ok(()) => Reply::Continue,
                        Err(_) => Reply::Abort,
                    })?;
                }
                Event::Stage { .. } => session.reply(Reply::Continue)?,
                Event::Done => return Ok(()),
                Event::Failed(why) => return Err(io::Error::other(why)),
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

/// Waits until the filler process exits, and logs whether the memory of the process is complete.
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
            "lazy restore failed: the memory of the process is incomplete"
        ),
    }
}

/// Kills a process and all its descendants. Each is stopped before its children are listed, so that it forks
/// no more.
fn kill_tree(root: i32) {
    let _ = kill(Pid::from_raw(root), Signal::SIGSTOP);
    for tid in threads(root) {
        children(root, tid).into_iter().for_each(kill_tree);
    }
    let _ = kill(Pid::from_raw(root), Signal::SIGKILL);
}

/// Makes a committed migration run if it does not: restores it again from `images`. Returns when it runs.
///
/// # Errors
/// The reason why it cannot run.
pub async fn complete(
    criu: &Criu,
    home: &Path,
    images: &Path,
    outcome: Outcome,
) -> Result<(), String> {
    let mut restore_options = Options::default();
    if let Outcome::Committed {
        criu,
        root,
        options,
    } = outcome
    {
        restore_options = Options::from_bits(options).unwrap_or_default();
        // The receiver that restored it is dead. Its CRIU then undoes what it has not resumed, and exits.
        while criu.is_some_and(ProcessId::is_alive) {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        if root.is_some_and(ProcessId::is_alive) {
            return Outcome::Running.write(home).map_err(|e| with_causes(&e));
        }
    }
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
    // Retried, for the earlier copy may be in the way for a moment: its PIDs are taken until its new parent
    // has waited for it.
    let mut attempt = 1;
    while let Err(why) = restore_eagerly(criu, &images, restore_options).await {
        if attempt == MAX_ATTEMPTS {
            return Err(why);
        }
        tracing::warn!(
            event = "restore_retry",
            attempt,
            why,
            "cannot restore yet: retrying"
        );
        attempt += 1;
        tokio::time::sleep(RETRY_DELAY).await;
    }
    Outcome::Running.write(home).map_err(|e| with_causes(&e))
}

/// Restores, memory first, and lets the process run.
async fn restore_eagerly(criu: &Criu, images: &Images, options: Options) -> Result<(), String> {
    let restoring = criu
        .start(None)
        .and_then(|session| Restoring::start(criu.clone(), session, images.clone(), options));
    let mut restoring = restoring.map_err(|error| error.to_string())?;
    restoring.resume();
    loop {
        match restoring.next().await {
            Progress::Restored { .. } => {}
            Progress::Running => return Ok(()),
            Progress::Failed(why) => return Err(why),
        }
    }
}
