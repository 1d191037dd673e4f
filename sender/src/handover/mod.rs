//! The hand-over: the process follows its memory, and exactly one copy of it ever runs.
//!
//! CRIU freezes the tree once and for all, and dumps what is not memory, while we read and send what is
//! dirty; we are also the page server that it believes to fill. When it says that all is sent, the tree
//! is still frozen and its own code out of it: now the last round is sent, with what that code may have
//! touched. When it says that the dump is over, its images follow, and the receiver restores, held back.
//! Up to here, whatever fails (or dies) makes CRIU let the tree run as if nothing had happened.
//!
//! Then it is decided. The tree gets a SIGSTOP, so that not even CRIU's own undoing lets it run, and
//! the receiver is told to commit. It answers that the copy runs, and CRIU kills ours; or that it
//! does not, and ours goes on. If it does not answer, it is asked again, now or later
//! (`send --resolve`), and until it does the tree stays stopped.

use crate::copy::{CollectError, Copier, Pass, Scanned, SendError};
use crate::dirty::DirtyTracker;
use crate::freeze::{FrozenProcess, are_trace_stopped, process_list};
use crate::report::Downtime;
use crate::sink::{CommitError, Destination, Outcome, PageSink, Receipt, SinkError};
use crate::target::files::needed_files;
use crate::target::smaps::VmFlags;
use nix::sys::signal::Signal;
use pageferry_common::criu::images::{children_are_waited_for, stopped};
use pageferry_common::criu::page_server::UnknownCommand;
use pageferry_common::criu::preload;
use pageferry_common::criu::session::{Criu, CriuSession, Event, Options, Reply, last_errors};
use pageferry_common::proc::uptime;
use pageferry_common::sys::{fdpass, perf};
use pageferry_common::{BufferPool, Claim, MigrationId, StateName};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

mod discard;
mod dump;
pub mod record;

use discard::Endpoint;
use dump::{CHECK, Dump, Next};
pub use record::{Record, RecordError};

/// Pages that CRIU sends all the same, for each process: its vDSO, asynchronous I/O rings.
const SPECIAL_PAGES: u64 = 64;

/// How often CRIU may try to stop the tree.
const ATTEMPTS: u32 = 5;

/// Where the library in CRIU says that the tree has stopped (`common/preload/dump.rs`), in the directory of
/// images.
const STOPPED: &str = "stopped.socket";

/// How CRIU is kept from spending time on memory while the tree is frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum StateDump {
    /// A library loaded into CRIU shows it no memory; without effect, it is `plain`.
    Preload,
    /// CRIU sends all memory, which is thrown away: slower, and CRIU as it is.
    Plain,
}

/// Why a hand-over failed.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// CRIU could not stop a thread. It waits in vain for one whose stop a signal has used up.
    #[error("CRIU cannot stop the target: {0}")]
    Stop(String),
    /// CRIU, before anything was decided.
    #[error("CRIU cannot dump the target: {0}")]
    Dump(String),
    /// CRIU's RPC, or our own files.
    #[error("cannot work with CRIU")]
    Io(#[from] io::Error),
    /// What CRIU sends is no page-server message.
    #[error("cannot understand CRIU")]
    Pages(#[from] UnknownCommand),
    /// The last round.
    #[error("cannot copy the target's memory")]
    Send(#[from] SendError),
    /// The mappings.
    #[error("cannot list the target's memory")]
    Tree(#[from] CollectError),
    /// The receiver.
    #[error("cannot hand over")]
    Sink(#[from] SinkError),
    /// Files are not there, or others.
    #[error("the receiver's host lacks what process {root} needs: {}", .lacks.join(", "))]
    Files {
        /// The root.
        root: i32,
        /// What is wrong with which.
        lacks: Vec<String>,
    },
    /// The record of what is decided.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A process of the tree that could run here although it runs there.
    #[error("not permitted to stop process {0}")]
    MayNotStop(i32),
    /// It was told to commit, and has not answered since.
    #[error(
        "the receiver does not say whether process {root} runs there; here it stays stopped. \
         When the receiver can be reached again: send --resolve {root}"
    )]
    InDoubt {
        /// The root.
        root: i32,
        /// Why it could not be asked.
        source: SinkError,
    },
}

/// What a hand-over takes.
#[derive(Debug)]
pub struct Handover {
    /// Dumps.
    pub criu: Criu,
    /// Of the dump and the restore.
    pub options: Options,
    /// How.
    pub state_dump: StateDump,
    /// Where the receiver listens, as given.
    pub to: String,
    /// Which migration it is.
    pub claim: Claim,
}

/// One of the rounds of a hand-over.
#[derive(Debug)]
pub struct LastRound {
    /// What was sent.
    pub receipt: Receipt,
    /// What was scanned for it.
    pub scanned: Scanned,
    /// From its beginning to its ack.
    pub took: Duration,
}

/// What was handed over.
#[derive(Debug)]
pub struct HandedOver {
    /// The rounds: perhaps one while CRIU dumped the state, and the last.
    pub rounds: Vec<LastRound>,
    /// For how long nothing ran, by phase.
    pub downtime: Downtime,
}

/// The last rounds' parts of a migration.
pub struct Parts<'a> {
    /// The tree.
    pub tree: &'a mut Copier,
    /// Its tracker.
    pub tracker: &'a mut dyn DirtyTracker,
    /// The receiver.
    pub sink: &'a mut dyn PageSink,
    /// Buffers.
    pub pool: &'a BufferPool,
}

impl Handover {
    /// Asks the receiver whether its host has the executables and libraries of the tree under `root`.
    ///
    /// # Errors
    /// [`HandoverError::Files`] names all that it lacks.
    pub fn check_files(&self, root: i32, sink: &mut dyn PageSink) -> Result<(), HandoverError> {
        let pids = process_list(root).into_iter().map(|process| process.pid);
        let lacks = destination(sink)?.check_files(needed_files(pids))?;
        match lacks.is_empty() {
            true => Ok(()),
            false => Err(HandoverError::Files { root, lacks }),
        }
    }

    /// Hands over the tree under `root` with its last rounds, from number `round` on, which is then that of the
    /// round after them. Afterwards it runs at the receiver, and nothing of it is left here.
    ///
    /// # Errors
    /// [`HandoverError`]. The tree runs on here then, except if it is [`HandoverError::InDoubt`].
    pub fn run(
        &self,
        root: i32,
        round: &mut u32,
        mut parts: Parts<'_>,
    ) -> Result<HandedOver, HandoverError> {
        for _ in 1..ATTEMPTS {
            match self.attempt(root, round, &mut parts) {
                Err(HandoverError::Stop(why)) => tracing::warn!(why, "trying again"),
                result => return result,
            }
        }
        self.attempt(root, round, &mut parts)
    }

    fn attempt(
        &self,
        root: i32,
        round: &mut u32,
        parts: &mut Parts<'_>,
    ) -> Result<HandedOver, HandoverError> {
        let images = tempdir(self.claim.id)?;
        let mut dump = self.dump(root, &images)?;
        // What the first hardware breakpoint costs, CRIU's would cost the frozen tree.
        let _warm = perf::TaskEvents::keep();
        let mut downtime = Downtime::begin();

        let mut during = None;
        let mut last = None;
        let mut seen = None;
        loop {
            let next = match seen.take() {
                Some(next) => next,
                None => dump.next(&mut || Ok(parts.sink.check()?))?,
            };
            tracing::debug!(?next, "CRIU");
            match next {
                Next::Stopped(criu) => {
                    let processes = process_list(root);
                    if !are_trace_stopped(&processes) {
                        tracing::warn!("CRIU has not stopped the tree as expected: waiting for it");
                        continue;
                    }
                    self.collect(&processes, parts)?;
                    dump.leave_smaps(&processes, images.path())?;
                    drop(criu);
                    let (sent, next) = self.round_during(&mut dump, round, parts);
                    during = Some(sent?);
                    seen = Some(next?);
                }
                // CRIU ends so, too, when it could not stop the tree; it says so next.
                Next::PagesEnd { .. } if !dump.endpoint.opened => dump.endpoint.status(-1)?,
                Next::PagesEnd { at } => {
                    downtime.state_dumped(at);
                    match self.last_round(root, &images, round, during.is_some(), parts) {
                        Ok(sent) => {
                            last = Some(sent);
                            downtime.last_pages_sent();
                            dump.endpoint.status(0)?;
                        }
                        Err(error) => {
                            // CRIU undoes everything, and its failure says less than ours.
                            dump.endpoint.status(-1)?;
                            let _ = undo(&mut dump.work);
                            return Err(error);
                        }
                    }
                }
                Next::Criu(Event::Stage { name, .. }) if name == "post-dump" => break,
                Next::Criu(Event::Stage { name, .. }) => {
                    // The last thing before it freezes the tree.
                    if name == "pre-dump" {
                        downtime = Downtime::begin();
                    }
                    dump.work.reply(Reply::Continue)?;
                }
                Next::Criu(Event::Done) => {
                    return Err(HandoverError::Dump("it ended before we let it".to_owned()));
                }
                Next::Criu(Event::Failed(why)) => {
                    let said = last_errors(&images.path().join("dump.log"));
                    return Err(match said.contains("Unseizable") {
                        true => HandoverError::Stop(said),
                        false => HandoverError::Dump(format!("{why}: {said}")),
                    });
                }
            }
        }
        let Dump {
            endpoint, mut work, ..
        } = dump;
        let Some(last) = last else {
            // Without our pages there is nothing to commit.
            refuse(&mut work)?;
            return Err(HandoverError::Dump(
                "it asked for no page server".to_owned(),
            ));
        };
        let shown_none = self.state_dump == StateDump::Preload;
        if shown_none && endpoint.pages > SPECIAL_PAGES * parts.tree.size().0 as u64 {
            tracing::warn!(
                pages = endpoint.pages,
                "CRIU read memory all the same: the library loaded into it had no effect"
            );
        }

        let restored = self.send_state(images.path(), parts.sink);
        if let Err(error) = restored {
            refuse(&mut work)?;
            return Err(error);
        }
        downtime.restored();
        let stopped = stopped(images.path())?;
        self.decide(root, &stopped, &mut work, parts.sink)?;
        downtime.running();
        // CRIU kills the tree on this answer. If it is dead, we do.
        let killed = work.reply(Reply::Continue).and_then(|()| work.event());
        drop(work);
        let record = Record::read(root)?;
        if !matches!(killed, Ok(Event::Done)) {
            tracing::warn!(?killed, "CRIU did not end the copy here: killing it");
        }
        record.signal(Signal::SIGKILL);
        record.await_end();
        Record::remove(root)?;
        let rounds = during.into_iter().chain([last]).collect();
        Ok(HandedOver { rounds, downtime })
    }

    /// Begins the dump.
    fn dump(&self, root: i32, images: &Dir) -> Result<Dump, HandoverError> {
        let (mut shim, mut stopped, mut flags) = (None, None, None);
        if self.state_dump == StateDump::Preload {
            shim = Some(preload::write(preload::DUMP, images.path())?);
            stopped = Some(fdpass::listen(&images.path().join(STOPPED))?);
            let probed = VmFlags::probe().inspect_err(|why| {
                tracing::info!(%why, "CRIU has to read smaps, whose making grows with memory");
            });
            flags = probed.ok();
        }
        let (ours, theirs) = UnixStream::pair()?;
        let dir = File::open(images.path())?;
        let work = self.criu.dump(
            root,
            dir.as_fd(),
            theirs.as_fd(),
            shim.as_deref(),
            &self.options,
        )?;
        Ok(Dump {
            endpoint: Endpoint::new(ours),
            stopped,
            flags,
            work,
            _dir: dir,
        })
    }

    /// Lists what there is to send of a tree that CRIU keeps stopped.
    fn collect(
        &self,
        processes: &[FrozenProcess],
        parts: &mut Parts<'_>,
    ) -> Result<(), HandoverError> {
        parts.tree.collect_stopped(processes, parts.tracker)?;
        Ok(parts.tree.survey_descriptors()?)
    }

    /// Sends a round while CRIU goes on with its dump. Returns that, and what CRIU does next.
    fn round_during(
        &self,
        dump: &mut Dump,
        round: &mut u32,
        parts: &mut Parts<'_>,
    ) -> (
        Result<LastRound, HandoverError>,
        Result<Next, HandoverError>,
    ) {
        let unwanted = AtomicBool::new(false);
        let (tell, told) = mpsc::channel();
        thread::scope(|scope| {
            let unwanted = &unwanted;
            let follow = move || {
                // Somebody waits for it below.
                let _ = tell.send(dump.until_end(unwanted));
            };
            let follower = thread::Builder::new().name("criu".into());
            if let Err(error) = follower.spawn_scoped(scope, follow) {
                let nobody = HandoverError::Dump("nobody follows it".to_owned());
                return (Err(error.into()), Err(nobody));
            }
            let mut sent = self.round(round, Pass::DuringDump, parts);
            loop {
                unwanted.store(sent.is_err(), Ordering::Relaxed);
                match told.recv_timeout(CHECK) {
                    Ok(next) => break (sent, next),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => panic!("following CRIU panicked"),
                }
                if let (Ok(_), Err(error)) = (&sent, parts.sink.check()) {
                    sent = Err(error.into());
                }
            }
        })
    }

    /// The last round, of a tree that CRIU keeps frozen and has left. `more` if there was one already since
    /// it froze it.
    fn last_round(
        &self,
        root: i32,
        images: &Dir,
        round: &mut u32,
        more: bool,
        parts: &mut Parts<'_>,
    ) -> Result<LastRound, HandoverError> {
        if !more {
            self.collect(&process_list(root), parts)?;
        }
        // Only CRIU knows, by code in each process.
        if !children_are_waited_for(images.path())? {
            parts.tree.assume_untracked_children();
        }
        let sent = match more {
            true => self.round(round, Pass::AfterDump, parts),
            false => self.round(round, Pass::Final, parts),
        };
        match parts.tree.first_exited() {
            Some(pid) => Err(HandoverError::Dump(format!("process {pid} ended"))),
            None => sent,
        }
    }

    fn round(
        &self,
        round: &mut u32,
        look: Pass,
        parts: &mut Parts<'_>,
    ) -> Result<LastRound, HandoverError> {
        let Parts {
            tree,
            tracker,
            sink,
            pool,
        } = parts;
        let began = Instant::now();
        sink.begin(*round, look.kind(), uptime::read()?)?;
        let scanned = tree.send(look, *tracker, *sink, pool)?;
        let receipt = sink.commit()?;
        tree.acked();
        *round += 1;
        let took = began.elapsed();
        tracing::debug!(round, ?took, ?scanned, "sent");
        Ok(LastRound {
            receipt,
            scanned,
            took,
        })
    }

    /// Sends CRIU's images, and has the receiver restore.
    fn send_state(&self, images: &Path, sink: &mut dyn PageSink) -> Result<(), HandoverError> {
        let receiver = destination(sink)?;
        let mut names: Vec<_> = fs::read_dir(images)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| StateName::new(&name))
            .collect();
        names.sort_unstable();
        tracing::debug!(images = names.len(), "sending the state");
        for name in names {
            let mut file = File::open(images.join(name.as_str()))?;
            receiver.put_state(&name, &mut file)?;
        }
        tracing::debug!("restore");
        receiver.restore(self.options)?;
        Ok(())
    }

    /// Tells the receiver to commit, and finds out whether it did. Ends well if it runs there; else
    /// the tree here has been let go, or is in doubt.
    fn decide(
        &self,
        root: i32,
        stopped: &[u32],
        work: &mut CriuSession,
        sink: &mut dyn PageSink,
    ) -> Result<(), HandoverError> {
        let record = Record::new(&self.to, self.claim, root, stopped);
        record.write()?;
        // From here on it cannot run here, whoever dies.
        if let Some(pid) = record.signal(Signal::SIGSTOP) {
            record.let_go();
            Record::remove(root)?;
            refuse(work)?;
            return Err(HandoverError::MayNotStop(pid));
        }
        let receiver = destination(sink)?;
        let refused = match receiver.commit() {
            Ok(()) => return Ok(()),
            Err(CommitError::Refused(error)) => error,
            Err(CommitError::InDoubt(error)) => {
                tracing::warn!(why = %error, "the receiver's answer is lost: asking again");
                match receiver.query_outcome() {
                    Ok(Outcome::Running) => return Ok(()),
                    Ok(Outcome::Aborted) => error,
                    Err(source) => return Err(HandoverError::InDoubt { root, source }),
                }
            }
        };
        // It will never run there.
        record.let_go();
        Record::remove(root)?;
        refuse(work)?;
        Err(refused.into())
    }
}

fn destination(sink: &mut dyn PageSink) -> Result<&mut dyn Destination, SinkError> {
    sink.destination().ok_or(SinkError::NoRestore)
}

/// Makes CRIU, which waits for our word or is about to, take everything back.
fn undo(work: &mut CriuSession) -> io::Result<()> {
    loop {
        match work.event_or_refuse()? {
            Event::Stage { .. } => {}
            Event::Done | Event::Failed(_) => return Ok(()),
        }
    }
}

/// Answers no to what CRIU asks now, and waits until it has taken everything back.
fn refuse(work: &mut CriuSession) -> io::Result<()> {
    work.reply(Reply::Abort)?;
    undo(work)
}

/// A directory that only we can read, and that is gone when dropped.
struct Dir(PathBuf);

impl Dir {
    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // Best effort: it is in a place for temporary things.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn tempdir(id: MigrationId) -> io::Result<Dir> {
    let path = std::env::temp_dir().join(format!("pageferry-{id}"));
    DirBuilder::new().mode(0o700).create(&path)?;
    Ok(Dir(path))
}
