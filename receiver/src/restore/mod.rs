//! Restoring what has arrived, with CRIU: everything up to the moment before it would run, and the
//! rest only when the sender has said so.
//!
//! What was decided is on the disk before it is done ([`Outcome`]), so that it is known whatever
//! dies. A migration that is committed will run here, if need be restored once more; one that is
//! aborted never will.

pub mod filler;
pub mod lazy;
pub mod segments;

use crate::image::index::Catalog;
use crate::image::{FileError, failed};
use crate::restore::segments::Prefilled;
use crate::session::Refusal;
use crate::with_causes;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_common::criu::preload;
use pageferry_common::criu::session::{Criu, CriuSession, Event, Options, Reply, last_errors};
use pageferry_common::proc::process::ProcessId;
use pageferry_common::wire::RefuseCode;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc as blocking;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// The file in a migration's directory that has its [`Outcome`]. It always has as many bytes, so that another
/// outcome only changes what is in one sector of the disk: at once or not at all, and durable without waiting
/// for anything of the file system's.
const OUTCOME: &str = "outcome.json";

/// Length of that file, bytes: a sector. What is not used is blank.
const OUTCOME_LEN: usize = 512;

/// How often a committed migration is restored again before it is left to the next receiver.
const ATTEMPTS: u32 = 10;

/// How long to wait before that.
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(500);

/// What became of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It will run here, and never again where it came from.
    Committed {
        /// The CRIU that holds it back or has just let it go.
        criu: Option<ProcessId>,
        /// The restored root.
        root: Option<ProcessId>,
        /// How it is to be restored, [`Options::bits`].
        options: u32,
    },
    /// It runs here, or did.
    Running,
    /// It will never run here.
    Aborted,
}

impl Outcome {
    /// Reads what became of a migration; `None` if nothing has been decided.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn read(home: &Path) -> Result<Option<Self>, FileError> {
        let path = home.join(OUTCOME);
        match fs::read(&path) {
            Ok(text) if text.trim_ascii().is_empty() => Ok(None),
            Ok(text) => {
                let outcome = serde_json::from_slice(&text).map_err(io::Error::from);
                Ok(Some(outcome.map_err(failed("understand", &path))?))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// Makes room for an outcome, durably, so that [`Outcome::record`] is fast.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn make_room(home: &Path) -> Result<(), FileError> {
        write_new(home, &[b' '; OUTCOME_LEN]).map_err(failed("write", &home.join(OUTCOME)))
    }

    /// Takes the room away again if nothing has been decided.
    pub fn give_back_room(home: &Path) {
        if matches!(Self::read(home), Ok(None)) {
            // There may be none.
            let _ = fs::remove_file(home.join(OUTCOME));
        }
    }

    /// Writes it down, durably.
    ///
    /// # Errors
    /// [`FileError`]; it may or may not be written then.
    pub fn record(self, home: &Path) -> Result<(), FileError> {
        let path = home.join(OUTCOME);
        let mut text = serde_json::to_vec(&self).expect("it is plain data");
        assert!(text.len() <= OUTCOME_LEN, "it is short");
        text.resize(OUTCOME_LEN, b' ');
        let write = || match OpenOptions::new().write(true).open(&path) {
            Ok(file) if file.metadata()?.len() == OUTCOME_LEN as u64 => {
                file.write_all_at(&text, 0)?;
                file.sync_data()
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(_) | Err(_) => write_new(home, &text),
        };
        write().map_err(failed("write", &path))
    }
}

/// Puts an outcome in the place of what there was.
fn write_new(home: &Path, text: &[u8]) -> io::Result<()> {
    let (path, tmp) = (home.join(OUTCOME), home.join(".outcome.tmp"));
    let mut file = File::create(&tmp)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&tmp, &path)?;
    File::open(home)?.sync_all()
}

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

/// The process that fills the memory of what runs ahead of it ([`crate::restore::filler`]). It outlives us.
#[derive(Debug)]
struct Filler {
    process: Child,
    /// Tells it to fill also what nobody waits for.
    go: blocking::Sender<()>,
}

impl Filler {
    /// Starts it; returns when CRIU may connect to it.
    fn start(round: &Path, catalog: &Arc<Catalog>, restored: &Path) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(filler::ARG).arg(round).arg(restored);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn()?;
        let stdin = process.stdin.take().expect("it is a pipe");
        let stdout = process.stdout.take().expect("it is a pipe");
        let (go, may_go) = blocking::channel();
        let mut filler = Self { process, go };
        let start = || {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line)?;
            if line.is_empty() {
                return Err(io::Error::other("cannot prepare to fill memory"));
            }
            let mut out = BufWriter::new(stdin);
            let catalog = Arc::clone(catalog);
            // CRIU need not wait until it has all of it.
            let mut tell = move || {
                catalog.write(&mut out)?;
                out.flush()?;
                // The end of it follows at once, so that the byte shows wherever it is read.
                may_go.recv().map_or(Ok(()), |()| out.write_all(&[0]))
            };
            let thread = std::thread::Builder::new().name("index".into());
            // One that has failed says so itself.
            thread.spawn(move || drop::<io::Result<()>>(tell()))?;
            Ok(())
        };
        match start() {
            Ok(()) => Ok(filler),
            Err(error) => {
                filler.kill();
                Err(error)
            }
        }
    }

    /// Has it fill also what nobody waits for.
    fn go(&mut self) {
        // It goes by itself when CRIU is done.
        let _ = self.go.send(());
    }

    fn kill(&mut self) {
        // One that has ended needs none.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Waits until all memory is there. Returns whether it is.
    fn finish(&mut self) -> io::Result<bool> {
        Ok(self.process.wait()?.success())
    }
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
    let mut children = Vec::new();
    for task in fs::read_dir(format!("/proc/{root}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        children.extend(
            text.split_ascii_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
    }
    children.into_iter().for_each(kill_tree);
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
