//! The migration, from top to bottom.

use crate::converge::{self, Limits, Next, Observed, Why};
use crate::dirty::DirtyTracker;
use crate::freeze::{FreezeError, Freezer, Then, may_signal};
use crate::handover::{self, Handover, HandoverError};
use crate::progress::Progress;
use crate::report::{Report, RoundReport};
use crate::sink::{PageSink, Receipt, SinkError};
use crate::sys::sched::Urgent;
use crate::tree::{Look, SendError, Tree, TreeFault};
use pageferry_common::wire::RoundKind;
use pageferry_common::{BufferPool, PAGE_SIZE};
use std::io;
use std::time::{Duration, Instant};

/// Why a migration ended early. The target runs.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The tree could not be stopped.
    #[error("cannot stop the target")]
    Freeze(#[from] FreezeError),
    /// Its mappings could not be listed.
    #[error("cannot list the target's memory")]
    Tree(#[from] TreeFault),
    /// Its memory could not be read, or not be sent.
    #[error("cannot copy the target's memory")]
    Send(#[from] SendError),
    /// The receiver.
    #[error("cannot hand over a round")]
    Sink(#[from] SinkError),
    /// The root process ended.
    #[error("process {0} ended")]
    TargetGone(i32),
    /// The process could not follow its memory.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The host's uptime is not to be had.
    #[error("cannot read /proc/uptime")]
    Uptime(#[source] io::Error),
}

/// What moves, and until when.
#[derive(Debug)]
pub struct Plan {
    /// The tree's root.
    pub root: i32,
    /// When to stop.
    pub limits: Limits,
    /// What becomes of the tree after a final round.
    pub then: Then,
    /// The process itself follows with the last round.
    pub handover: Option<Handover>,
}

/// The machinery a migration runs on, all of it set up before the first freeze.
pub struct Parts<'a> {
    /// Stops the tree.
    pub freezer: &'a mut Freezer,
    /// Finds what was written.
    pub tracker: &'a mut dyn DirtyTracker,
    /// Takes the rounds.
    pub sink: &'a mut dyn PageSink,
    /// Buffers between reading and sending.
    pub pool: &'a BufferPool,
    /// What the user sees meanwhile.
    pub progress: &'a Progress,
}

/// Copies or moves a process tree, in rounds. Each round stops the tree, lists its mappings, ends the
/// trackers' epoch and begins the next; a pre-dump round lets the tree run before it reads
/// anything, a final round after the receiver has acked it; if the process itself follows its memory,
/// the final round is part of the hand-over. The rounds done are added to `report`.
///
/// # Errors
/// [`MigrateError`]. Whatever it is, the tree runs then (but for [`HandoverError::InDoubt`]), and the
/// receiver has the rounds acked before.
pub fn migrate(
    plan: &Plan,
    tree: &mut Tree,
    parts: Parts<'_>,
    report: &mut Report,
) -> Result<(), MigrateError> {
    let Parts {
        freezer,
        tracker,
        sink,
        pool,
        progress,
    } = parts;
    let began = Instant::now();
    if let Some(handover) = &plan.handover {
        handover.check_files(plan.root, sink)?;
    }
    let mut history = Vec::new();
    loop {
        let round = history.len() as u32 + 1;
        let next = converge::decide(&history, &plan.limits);
        let (kind, name) = match next {
            Next::Done => break,
            Next::PreDump => (RoundKind::PreDump, "pre-dump"),
            Next::Final(why) => {
                announce_end(why, &history, plan);
                report.ended = Some(why);
                (RoundKind::Final, "final")
            }
        };
        progress.update(|status| (status.round, status.kind) = (round, name));

        sink.prepare()?;
        let start = Instant::now();
        if let (Next::Final(_), Some(handover)) = (next, &plan.handover) {
            let parts = handover::Parts {
                tree,
                tracker,
                sink,
                pool,
            };
            let done = handover.run(plan.root, round, parts)?;
            let stopped = Duration::from_secs_f64(done.downtime.total_ms() / 1e3);
            let last = done.rounds.len() - 1;
            for (index, sent) in done.rounds.iter().enumerate() {
                // The tree does not run between them.
                let (name, stopped) = match index == last {
                    true => ("final", stopped),
                    false => ("during-dump", Duration::ZERO),
                };
                let round = round + index as u32;
                let scanned = sent.scanned.pages;
                report.add(round_report(
                    round,
                    name,
                    &sent.receipt,
                    stopped,
                    sent.took,
                    scanned,
                ));
            }
            tracing::info!(downtime = ?done.downtime, "handed over: it runs at the receiver");
            report.handover = Some(done.downtime);
            break;
        }
        let urgent = Urgent::begin();
        let mut frozen = freezer.freeze(plan.root)?;
        if kind == RoundKind::Final && plan.then == Then::Stop {
            frozen.settle()?;
        }
        if kind == RoundKind::Final && plan.then == Then::Kill {
            let mut processes = frozen.processes().iter();
            let may = processes.try_for_each(|process| may_signal(process.pid));
            may.map_err(FreezeError::from)?;
        }
        let uptime = uptime_us().map_err(MigrateError::Uptime)?;
        tree.collect(&mut frozen, tracker)?;
        let (receipt, stopped, collected) = match kind {
            RoundKind::PreDump => {
                let stopped = frozen.thaw(Then::Run)?;
                drop(urgent);
                progress.update(|status| status.frozen_ms = stopped.as_secs_f64() * 1e3);
                sink.begin(round, kind, uptime)?;
                tree.survey_descriptors()?;
                let scanned = tree.send(Look::Running, tracker, sink, pool)?;
                (sink.commit()?, stopped, scanned)
            }
            RoundKind::Final => {
                // Reading and sending takes longer than anybody may be kept waiting.
                drop(urgent);
                sink.begin(round, kind, uptime)?;
                tree.survey_descriptors()?;
                let scanned = tree.send(Look::Stopped, tracker, sink, pool)?;
                // Killed while frozen (by the OOM killer, say): no image of it is whole.
                if let Some(pid) = tree.one_that_ended() {
                    return Err(MigrateError::TargetGone(pid));
                }
                let receipt = sink.commit()?;
                (receipt, frozen.thaw(plan.then)?, scanned)
            }
        };
        let took = start.elapsed();
        let done = round_report(round, name, &receipt, stopped, took, collected.pages);
        tracing::info!(
            round,
            kind = name,
            frozen_ms = done.frozen_ms,
            sent_pages = done.sent_pages,
            unchanged_pages = done.unchanged_pages,
            zero_pages = done.zero_pages,
            bytes_wire = done.bytes_wire,
            scan_ms = collected.scan_time.as_secs_f64() * 1e3,
            seconds = done.seconds,
            "round done"
        );
        let sent = done.bytes_raw;
        report.add(done);
        if kind == RoundKind::Final {
            break;
        }

        if !tree.root_alive() {
            return Err(MigrateError::TargetGone(plan.root));
        }
        let dirty_after = tree.pending_pages(tracker) * PAGE_SIZE;
        progress.update(|status| status.dirty_rate = dirty_after as f64 / took.as_secs_f64());
        history.push(Observed {
            sent,
            took,
            overhead: stopped + collected.scan_time,
            dirty_after,
        });
    }
    sink.finish()?;
    (report.processes, report.segments) = tree.size();
    report.totals.seconds = began.elapsed().as_secs_f64();
    Ok(())
}

fn announce_end(why: Why, history: &[Observed], plan: &Plan) {
    let estimate = converge::downtime(history).unwrap_or_default();
    match why {
        Why::Converged => tracing::info!(?estimate, "little enough is dirty: the last round"),
        Why::Diverging => tracing::warn!(
            ?estimate, allowed = ?plan.limits.max_downtime,
            "the target dirties memory faster than it can be sent: more rounds would not help"
        ),
        Why::Plateau => tracing::warn!(
            ?estimate, allowed = ?plan.limits.max_downtime,
            "rounds no longer leave less dirty: more would not help"
        ),
        Why::MaxRounds => tracing::warn!(
            ?estimate, allowed = ?plan.limits.max_downtime,
            "--max-rounds is used up"
        ),
    }
}

fn round_report(
    round: u32,
    kind: &'static str,
    receipt: &Receipt,
    stopped: Duration,
    took: Duration,
    scanned_pages: u64,
) -> RoundReport {
    RoundReport {
        round,
        kind,
        frozen_ms: stopped.as_secs_f64() * 1e3,
        scanned_pages,
        sent_pages: receipt.totals.data_pages,
        unchanged_pages: receipt.totals.parent_pages,
        zero_pages: receipt.totals.zero_pages,
        bytes_raw: receipt.totals.data_pages * PAGE_SIZE,
        bytes_wire: receipt.bytes_wire,
        seconds: took.as_secs_f64(),
    }
}

/// Time since boot in µs, as CRIU records it to recognise reused PIDs.
pub(crate) fn uptime_us() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/uptime")?;
    let seconds = text.split(' ').next().and_then(|s| s.parse::<f64>().ok());
    seconds
        .map(|seconds| (seconds * 1e6) as u64)
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}
