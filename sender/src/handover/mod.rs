//! The hand-over: the target itself follows its memory, and exactly one copy of it ever runs.
//!
//! 1. CRIU freezes the target and dumps everything except memory. Meanwhile the sender sends most dirty
//!    pages, and discards the pages that CRIU sends ([`discard`]).
//! 2. CRIU reports the end of its pages. Its code has left the target, which is still frozen. The sender
//!    sends the last round: what CRIU's code may have touched.
//! 3. CRIU reports the end of the dump. The sender sends CRIU's images, and the receiver restores the target
//!    and holds it back.
//! 4. The sender writes a record ([`record`]), freezes the target in a cgroup ([`hold`]), verifies that CRIU has
//!    kept it stopped until then, and asks the receiver to commit ([`commit`]).
//! 5. The receiver reports that the target runs there. CRIU kills the target here.
//!
//! Up to step 3, any failure or death makes CRIU undo the dump, and the target runs on here. From the
//! freeze on, the target stays frozen here until the receiver's decision is known. If its answer is lost, the
//! sender asks again: at once on new connections, or later (`send --resolve`).

mod commit;
mod discard;
mod dump;
mod error;
pub mod hold;
pub mod record;
mod resolve;

pub use error::{HandoverError, InDoubt};
pub use record::{Record, RecordError, Records};
pub use resolve::{Found, ResolveError, Resolved, Verdict, resolve};

use crate::copy::stream::StreamError;
use crate::copy::{Pass, Scanned, SendError};
use crate::freeze::{
    FrozenProcess, are_trace_stopped, check_not_paused, has_live_thread, process_list,
};
use crate::parts::{Parts, exited_process};
use crate::report::Downtime;
use crate::sink::{Destination, PageSink, Receipt, SinkError};
use crate::target::files::needed_files;
use crate::target::pipes::outside_pipes;
use commit::Restored;
use dump::{CANCEL_POLL_INTERVAL, Dump, Next};
use hold::Hierarchy;
use pageferry_common::criu::images::children_are_waited_for;
use pageferry_common::criu::{Criu, Event, Options};
use pageferry_common::proc::uptime;
use pageferry_common::sys::perf;
use pageferry_common::{Claim, StateName};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Number of pages that CRIU sends for each process even if memory is hidden from it: the vDSO and asynchronous
/// I/O rings.
const SPECIAL_PAGES: u64 = 64;

/// How often CRIU may try to freeze the target.
const MAX_FREEZE_ATTEMPTS: u32 = 5;

/// How CRIU is kept from spending time on memory while the target is frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum StateDump {
    /// Load a library into CRIU that hides memory from it; same as `plain` if that has no effect
    Preload,
    /// Let CRIU send all memory and discard it: slower, but CRIU is unmodified
    Plain,
}

/// What to do about pipes that processes outside of the target use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pipes {
    /// Refuse to move the target.
    Refuse,
    /// Move it; its end of the pipe is broken then.
    Break,
}

/// Parameters of a hand-over.
#[derive(Debug)]
pub struct Handover {
    /// The CRIU that dumps.
    pub criu: Criu,
    /// Options for the dump and the restore.
    pub options: Options,
    /// What to do about pipes that processes outside of the target use.
    pub pipes: Pipes,
    /// How memory is kept out of CRIU's dump.
    pub state_dump: StateDump,
    /// Address of the receiver, as given by the user.
    pub to: String,
    /// Identity of the migration.
    pub claim: Claim,
    /// The cgroups of this host, in which the target is held.
    pub hierarchy: Hierarchy,
    /// The records of this host.
    pub records: Records,
}

/// A round of a hand-over that the receiver has acked.
#[derive(Debug)]
pub struct HandoverRound {
    /// Which memory it covers.
    pub pass: Pass,
    /// Totals of what was sent.
    pub receipt: Receipt,
    /// Totals of what was scanned.
    pub scanned: Scanned,
    /// Time from the start of the round to its ack.
    pub took: Duration,
}

/// Rounds and result of a hand-over.
#[derive(Debug)]
pub struct HandoverReport {
    /// Rounds that the receiver has acked, even if the hand-over failed later: with [`StateDump::Preload`] one during the
    /// dump, and the last.
    pub rounds: Vec<HandoverRound>,
    /// Time for which the target was frozen.
    pub frozen: Duration,
    /// Downtime by phase, if the target runs at the receiver now.
    pub result: Result<Downtime, HandoverError>,
}

impl Handover {
    /// Checks that no process outside of the tree under `root` uses a pipe of it.
    ///
    /// # Errors
    /// [`HandoverError::Pipes`] lists all such pipes.
    pub fn check_pipes(&self, root: i32) -> Result<(), HandoverError> {
        if self.pipes == Pipes::Break {
            return Ok(());
        }
        let tree = process_list(root).into_iter().map(|process| process.pid);
        let pipes = outside_pipes(&tree.collect::<Vec<_>>());
        match pipes.is_empty() {
            true => Ok(()),
            false => Err(HandoverError::Pipes(pipes)),
        }
    }

    /// Asks the receiver whether its host has the executables and libraries of the tree under `root`.
    ///
    /// # Errors
    /// [`HandoverError::Files`] lists all that are missing or differ.
    pub fn check_files(&self, root: i32, sink: &mut dyn PageSink) -> Result<(), HandoverError> {
        let pids = process_list(root).into_iter().map(|process| process.pid);
        let lacks = destination(sink)?.check_files(needed_files(pids))?;
        match lacks.is_empty() {
            true => Ok(()),
            false => Err(HandoverError::Files { root, lacks }),
        }
    }

    /// Hands over the tree under `root`, with its last rounds, which are numbered from `first_round`. If it
    /// succeeds, the target runs at the receiver, and no process of it is left here. If it fails, the target
    /// runs here, except after [`HandoverError::InDoubt`].
    pub fn run(&self, root: i32, first_round: u32, parts: &mut Parts<'_>) -> HandoverReport {
        let mut attempt = Attempt {
            handover: self,
            root,
            first_round,
            parts,
            rounds: Vec::new(),
            downtime: Downtime::begin(),
        };
        let mut result = attempt.run();
        for _ in 1..MAX_FREEZE_ATTEMPTS {
            match &result {
                Err(HandoverError::CannotFreeze(why)) if attempt.rounds.is_empty() => {
                    tracing::warn!(
                        event = "criu_retry",
                        why,
                        "CRIU cannot freeze the target: retrying"
                    );
                    result = attempt.run();
                }
                Ok(()) | Err(_) => break,
            }
        }
        HandoverReport {
            frozen: attempt.downtime.elapsed(),
            result: match result {
                Ok(()) => Ok(attempt.downtime),
                Err(error) => Err(attribute_to_exit(error, root)),
            },
            rounds: attempt.rounds,
        }
    }
}

/// Replaces what CRIU or the kernel reports of a target whose root has exited.
fn attribute_to_exit(error: HandoverError, root: i32) -> HandoverError {
    let may_follow_exit = matches!(
        error,
        HandoverError::CannotFreeze(_)
            | HandoverError::CriuFailed(_)
            | HandoverError::CriuExited(_)
            | HandoverError::Collect(_)
            | HandoverError::Send(SendError::Stream(StreamError::Source(_)))
            | HandoverError::Io(_)
    );
    if may_follow_exit && !has_live_thread(root, root) {
        tracing::debug!(%error, "the root has exited");
        return HandoverError::TargetGone(root);
    }
    error
}

fn destination(sink: &mut dyn PageSink) -> Result<&mut dyn Destination, SinkError> {
    sink.destination().ok_or(SinkError::NoRestore)
}

/// A hand-over under way.
struct Attempt<'a, 'b> {
    handover: &'a Handover,
    root: i32,
    first_round: u32,
    parts: &'a mut Parts<'b>,
    /// Rounds that the receiver has acked.
    rounds: Vec<HandoverRound>,
    downtime: Downtime,
}

impl Attempt<'_, '_> {
    fn run(&mut self) -> Result<(), HandoverError> {
        let images = image_dir()?;
        // CRIU would wait for a paused process for ever.
        check_not_paused(self.root)?;
        let mut dump = Dump::start(self.handover, self.root, images.path())?;
        // The first hardware breakpoint on a machine is slow. CRIU sets breakpoints while the target is frozen.
        let _warm = perf::TaskEvents::keep();
        if let Err(error) = self.copy_memory(&mut dump) {
            dump.abort();
            return Err(error);
        }
        self.warn_if_criu_read_memory(&dump);
        if let Err(error) = self.restore(dump.images()) {
            dump.abort();
            return Err(error);
        }
        self.downtime.restored();
        let receiver = destination(self.parts.sink)?;
        let recorded = Restored::new(self.root, dump).record(self.handover, receiver.id())?;
        let held = recorded.hold(receiver)?;
        let killing = held.commit(receiver)?;
        self.downtime.running();
        killing.kill_source()
    }

    /// Sends all memory while CRIU dumps the rest. Returns when CRIU has completed the dump, and waits for the
    /// permission to kill the target.
    fn copy_memory(&mut self, dump: &mut Dump) -> Result<(), HandoverError> {
        self.downtime = Downtime::begin();
        let mut next = self.next(dump)?;
        loop {
            next = match next {
                Next::TargetStopped(held) => self.copy_during_dump(dump, held)?,
                Next::PagesComplete { at } => {
                    self.copy_after_dump(dump, at)?;
                    self.next(dump)?
                }
                Next::Criu(Event::Stage { name, .. }) if name == "post-dump" => break,
                Next::Criu(Event::Stage { name, .. }) => {
                    // The last stage before CRIU freezes the target.
                    if name == "pre-dump" {
                        self.downtime = Downtime::begin();
                    }
                    dump.reply_continue()?;
                    self.next(dump)?
                }
                Next::Criu(Event::Done) => return Err(HandoverError::CriuFinishedEarly),
                Next::Criu(Event::Failed(reason)) => return Err(dump.failure(&reason)),
            };
        }
        match self.rounds.last().map(|round| round.pass) {
            Some(Pass::Final | Pass::AfterDump) => Ok(()),
            Some(Pass::PreCopy | Pass::DuringDump) | None => Err(HandoverError::NoPageServer),
        }
    }

    fn next(&mut self, dump: &mut Dump) -> Result<Next, HandoverError> {
        let next = dump.next(&mut || Ok(self.parts.sink.check()?))?;
        tracing::debug!(?next, "CRIU");
        Ok(next)
    }

    /// Sends a round while CRIU dumps. CRIU waits until `held` is dropped. Returns the event that ends this phase:
    /// CRIU has sent all pages, or failed.
    fn copy_during_dump(&mut self, dump: &mut Dump, held: OwnedFd) -> Result<Next, HandoverError> {
        let processes = process_list(self.root);
        if !are_trace_stopped(&processes) {
            tracing::warn!(
                event = "target_not_held",
                "CRIU has not frozen the target yet: sending no round during the dump"
            );
            drop(held);
            return self.next(dump);
        }
        self.collect(&processes)?;
        dump.write_smaps_stub(&processes)?;
        drop(held);

        let cancelled = AtomicBool::new(false);
        thread::scope(|scope| {
            let (running_tx, running_rx) = mpsc::channel::<()>();
            let follow = || {
                let _running = running_tx;
                dump.follow(&cancelled)
            };
            let follower = thread::Builder::new()
                .name("criu".into())
                .spawn_scoped(scope, follow)
                .map_err(HandoverError::FollowerThread)?;
            let mut sent = self.send_round(Pass::DuringDump);
            loop {
                cancelled.store(sent.is_err(), Ordering::Relaxed);
                match running_rx.recv_timeout(CANCEL_POLL_INTERVAL) {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
                }
                if sent.is_ok() {
                    sent = self.parts.sink.check().map_err(HandoverError::from);
                }
            }
            let next = follower.join().unwrap_or_else(|panic| resume_unwind(panic));
            sent?;
            next
        })
    }

    /// Sends the last round of the target, which CRIU keeps frozen and has left, and confirms CRIU's pages.
    fn copy_after_dump(&mut self, dump: &mut Dump, at: Instant) -> Result<(), HandoverError> {
        if !dump.pages().has_images() {
            // CRIU could not freeze the target, and reports that next.
            return Ok(dump.reject_pages()?);
        }
        self.downtime.state_dumped(at);
        let pass = match self.rounds.is_empty() {
            true => {
                self.collect(&process_list(self.root))?;
                Pass::Final
            }
            false => Pass::AfterDump,
        };
        // Only CRIU's images show SA_NOCLDWAIT, which CRIU reads by code in each process.
        if !children_are_waited_for(dump.images())? {
            self.parts.copier.assume_untracked_children();
        }
        let sent = self.send_round(pass);
        let failure = match &sent {
            Err(HandoverError::Send(failure)) => Some(failure),
            Ok(()) | Err(_) => None,
        };
        if let Some(pid) = exited_process(self.parts.copier, failure) {
            return Err(HandoverError::TargetGone(pid));
        }
        sent?;
        self.downtime.last_pages_sent();
        Ok(dump.confirm_pages()?)
    }

    /// Lists the memory of the target, which CRIU keeps stopped.
    fn collect(&mut self, processes: &[FrozenProcess]) -> Result<(), HandoverError> {
        let Parts {
            copier, tracker, ..
        } = self.parts;
        copier.collect_stopped(processes, *tracker)?;
        Ok(copier.survey_descriptors()?)
    }

    /// Sends a round and waits for its ack.
    fn send_round(&mut self, pass: Pass) -> Result<(), HandoverError> {
        let round = self.first_round + self.rounds.len() as u32;
        let Parts {
            copier,
            tracker,
            sink,
            pool,
            ..
        } = self.parts;
        let began = Instant::now();
        sink.begin(round, pass.kind(), uptime::read()?)?;
        let scanned = copier.send(pass, *tracker, *sink, pool)?;
        let receipt = sink.commit()?;
        copier.acked();
        let took = began.elapsed();
        tracing::debug!(round, ?took, ?scanned, "round acked");
        self.rounds.push(HandoverRound {
            pass,
            receipt,
            scanned,
            took,
        });
        Ok(())
    }

    fn warn_if_criu_read_memory(&self, dump: &Dump) {
        let pages = dump.pages().discarded();
        let (processes, _) = self.parts.copier.size();
        if self.handover.state_dump == StateDump::Preload
            && pages > SPECIAL_PAGES * processes as u64
        {
            tracing::warn!(
                event = "preload_without_effect",
                pages,
                "CRIU read memory: the library loaded into it had no effect"
            );
        }
    }

    /// Sends CRIU's images, and lets the receiver restore the target from them.
    fn restore(&mut self, images: &Path) -> Result<(), HandoverError> {
        let receiver = destination(self.parts.sink)?;
        let mut names: Vec<_> = fs::read_dir(images)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| StateName::new(&name))
            .collect();
        names.sort_unstable();
        tracing::debug!(images = names.len(), "sending CRIU's images");
        for name in names {
            let mut file = File::open(images.join(name.as_str()))?;
            receiver.put_state(&name, &mut file)?;
        }
        tracing::debug!("restore requested");
        Ok(receiver.restore(self.handover.options)?)
    }
}

/// Creates a directory for CRIU's images, which only the sender's user can read. Dropping it removes it.
fn image_dir() -> io::Result<TempDir> {
    tempfile::Builder::new()
        .prefix("pageferry-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir()
}
