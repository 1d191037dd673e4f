//! Restoring a process with CRIU.

use crate::image::index::Catalog;
use crate::refusal::Refusal;
use crate::restore::filler::handle::Filler;
use crate::restore::outcome::Outcome;
use crate::restore::segments::Prefilled;
use crate::with_causes;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_common::criu::preload;
use pageferry_common::criu::session::{Criu, CriuSession, Event, Options, Reply, last_errors};
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

/// How often a committed migration is restored again before it is left to the next receiver.
const ATTEMPTS: u32 = 10;

/// How long to wait before that.
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(500);

/// What restores.
#[derive(Debug, Clone)]
pub struct Restorer {
    /// CRIU.
    pub criu: Criu,
    /// A process runs before its memory is in its place, which takes longer the more it has.
    pub lazy: bool,
    /// How long a restore may take, until the process could run.
    pub within: Duration,
}

impl Restorer {
    /// Starts a CRIU for a migration in `home`, which takes time that is better spent on something else.
    ///
    /// # Errors
    /// Why it cannot be started.
    pub fn ready(&self, home: &Path) -> Result<CriuSession, Refusal> {
        let start = || {
            let library = self.lazy.then(|| preload::write(preload::RESTORE, home));
            self.criu.start(library.transpose()?.as_deref())
        };
        start().map_err(|error| {
            Refusal::new(RefuseCode::Restore, format!("cannot start CRIU: {error}"))
        })
    }
}

/// Where a process is restored from.
#[derive(Debug, Clone)]
pub struct Images {
    /// CRIU's images of state, and pagemaps.
    pub dir: PathBuf,
    /// The round whose pages are filled in once it runs, if they are, and where they are.
    pub pages: Option<(PathBuf, Arc<Catalog>)>,
    /// Shared segments that are not read from the images.
    pub segments: Arc<Prefilled>,
}

/// How a restore goes.
#[derive(Debug)]
pub enum Progress {
    /// Everything is there, held back; the CRIU that does so, and the restored root.
    Restored {
        /// CRIU.
        criu: Option<ProcessId>,
        /// The root.
        root: Option<ProcessId>,
    },
    /// It runs.
    Running,
    /// It failed, and nothing of it is left.
    Failed(String),
}

/// A restore under way. Dropped before [`Restoring::go`], it leaves nothing.
#[derive(Debug)]
pub struct Restoring {
    progress: mpsc::UnboundedReceiver<Progress>,
    /// `None` once it may run.
    go: Option<blocking::Sender<()>>,
    /// CRIU's PID.
    criu: i32,
}

impl Restoring {
    /// Begins to restore from a directory of images, with a CRIU that waits for that.
    ///
    /// # Errors
    /// The kernel's, if there are too many threads.
    pub fn start(
        criu: Criu,
        ready: CriuSession,
        images: Images,
        options: Options,
    ) -> io::Result<Self> {
        let (tell, progress) = mpsc::unbounded_channel();
        let (go, may_go) = blocking::channel();
        let pid = ready.pid();
        std::thread::Builder::new()
            .name("restore".into())
            .spawn(move || {
                let (last, filler) = match restore(&criu, ready, &images, options, &tell, &may_go) {
                    Ok(filler) => (Progress::Running, filler),
                    Err(error) => {
                        let (why, log) = (with_causes(&error), images.dir.join("restore.log"));
                        let said = last_errors(&log);
                        let why = format!("CRIU cannot restore it: {why}: {said}");
                        (Progress::Failed(why), None)
                    }
                };
                let began = Instant::now();
                // Nobody is there to hear it only if the connection is over.
                let _ = tell.send(last);
                drop(tell);
                let Some(mut filler) = filler else {
                    return;
                };
                match filler.finish() {
                    Ok(true) => {
                        let seconds = began.elapsed().as_secs_f64();
                        tracing::info!(
                            event = "memory_filled",
                            seconds,
                            "all of its memory is in its place"
                        );
                    }
                    result => tracing::error!(
                        event = "lazy_restore_failed",
                        ?result,
                        "its memory did not come to its place: the process is damaged"
                    ),
                }
            })?;
        Ok(Self {
            progress,
            go: Some(go),
            criu: pid,
        })
    }

    /// What happens next. To be asked until it is [`Progress::Running`] or [`Progress::Failed`].
    pub async fn next(&mut self) -> Progress {
        let next = self.progress.recv().await;
        next.unwrap_or_else(|| Progress::Failed("the restoring thread panicked".to_owned()))
    }

    /// Lets it run.
    pub fn go(&mut self) {
        if let Some(go) = self.go.take() {
            // It has failed meanwhile if nobody is there; it says so next.
            let _ = go.send(());
        }
    }

    /// Kills CRIU with all that it has restored so far: it then has failed.
    pub fn kill(&self) {
        kill_tree(self.criu);
    }

    /// Undoes it; returns when nothing of it is left, or if it runs all the same.
    pub async fn abort(mut self) -> Progress {
        self.go = None;
        loop {
            match self.next().await {
                Progress::Restored { .. } => {}
                last => return last,
            }
        }
    }
}

/// Restores; returns what the process still depends on.
fn restore(
    criu: &Criu,
    mut work: CriuSession,
    images: &Images,
    options: Options,
    tell: &mpsc::UnboundedSender<Progress>,
    may_go: &blocking::Receiver<()>,
) -> io::Result<Option<Filler>> {
    let dir = File::open(&images.dir)?;
    let filler = images.pages.as_ref();
    let filler = filler.map(|(round, catalog)| Filler::start(round, catalog, &images.dir));
    let mut filler = filler.transpose()?;
    let mut start = || {
        let mut server = None;
        if !images.segments.is_empty() {
            server = Some(images.segments.serve(&images.dir)?);
        }
        criu.restore(&mut work, dir.as_fd(), &options, filler.is_some())?;
        Ok(server)
    };
    let server = start().inspect_err(|_: &io::Error| {
        // Nobody would ever connect to it.
        filler.iter_mut().for_each(Filler::kill);
    })?;
    let mut restored = None;
    let result = (|| {
        loop {
            let event = work.event()?;
            tracing::debug!(?event, "CRIU");
            match event {
                // Everything is in its place; a no now takes all of it away again.
                Event::Stage { name, pid } if name == "post-restore" => {
                    restored = pid.and_then(ProcessId::find);
                    if server.as_ref().is_some_and(|server| !server.all_fetched()) {
                        let what = "the library loaded into CRIU had no effect, which shared memory \
                                    needs; receive --restore eager does without";
                        return Err(io::Error::other(what));
                    }
                    // The time that it is held back is well used.
                    filler.iter_mut().for_each(Filler::go);
                    let _ = tell.send(Progress::Restored {
                        criu: ProcessId::find(work.pid()),
                        root: restored,
                    });
                    work.reply(match may_go.recv() {
                        Ok(()) => Reply::Continue,
                        Err(_) => Reply::Abort,
                    })?;
                }
                Event::Stage { .. } => work.reply(Reply::Continue)?,
                Event::Done => return Ok(()),
                Event::Failed(why) => return Err(io::Error::other(why)),
            }
        }
    })();
    drop(work);
    // CRIU takes away what it has not let go, unless it was killed itself: then nobody knows how far
    // it came, and what is there must not be.
    if let (Err(_), Some(root)) = (&result, restored.filter(|root| root.is_alive())) {
        kill_tree(root.pid);
    }
    match result {
        Ok(()) => Ok(filler),
        Err(error) => {
            filler.iter_mut().for_each(Filler::kill);
            Err(error)
        }
    }
}

/// Kills a process and all its descendants, each parent before its children, so that it makes no
/// more.
fn kill_tree(root: i32) {
    let _ = kill(Pid::from_raw(root), Signal::SIGSTOP);
    for tid in threads(root) {
        children(root, tid).into_iter().for_each(kill_tree);
    }
    let _ = kill(Pid::from_raw(root), Signal::SIGKILL);
}

/// Sees to it that a migration that is committed runs: it does already, or is restored again.
/// Returns when it runs.
///
/// # Errors
/// Why it does not.
pub async fn complete(
    criu: &Criu,
    home: &Path,
    images: &Path,
    outcome: Outcome,
) -> Result<(), String> {
    let mut again = Options::default();
    if let Outcome::Committed {
        criu,
        root,
        options,
    } = outcome
    {
        again = Options::from_bits(options).unwrap_or_default();
        // Whoever restored it is dead; its CRIU then undoes what it has not let go.
        while criu.is_some_and(ProcessId::is_alive) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if root.is_some_and(ProcessId::is_alive) {
            return Outcome::Running.record(home).map_err(|e| with_causes(&e));
        }
    }
    tracing::warn!(event = "restoring_again", home = %home.display(), "committed, but not running: restoring it again");
    let images = Images {
        dir: images.to_owned(),
        pages: None,
        segments: Arc::default(),
    };
    // It has to run. What is left of the copy before may be in the way for a moment: a PID is taken until
    // whoever has inherited the process has waited for it.
    let mut attempt = 1;
    while let Err(why) = restore_again(criu, &images, again).await {
        if attempt == ATTEMPTS {
            return Err(why);
        }
        tracing::warn!(attempt, why, "trying again");
        attempt += 1;
        tokio::time::sleep(BETWEEN_ATTEMPTS).await;
    }
    Outcome::Running.record(home).map_err(|e| with_causes(&e))
}

/// Restores, all memory first, and lets run.
async fn restore_again(criu: &Criu, images: &Images, options: Options) -> Result<(), String> {
    let restoring = criu
        .start(None)
        .and_then(|ready| Restoring::start(criu.clone(), ready, images.clone(), options));
    let mut restoring = restoring.map_err(|error| error.to_string())?;
    restoring.go();
    loop {
        match restoring.next().await {
            Progress::Restored { .. } => {}
            Progress::Running => return Ok(()),
            Progress::Failed(why) => return Err(why),
        }
    }
}
