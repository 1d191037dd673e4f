//! The migration, from top to bottom.

use crate::converge::{self, Limits, Next, Observed, Why};
use crate::copy::stream::StreamError;
use crate::copy::{CollectError, Copier, Pass, Scanned, SendError};
use crate::dirty::DirtyTracker;
use crate::freeze::{FreezeError, Freezer, Then, check_signal_permission};
use crate::handover::{self, Handover, HandoverError};
use crate::progress::Progress;
use crate::report::{Report, RoundReport};
use crate::sink::{PageSink, Receipt, SinkError, TargetState};
use crate::sys::sched::RealtimePriority;
use pageferry_common::proc::uptime;
use pageferry_common::wire::RoundKind;
use pageferry_common::{BufferPool, PAGE_SIZE, with_causes};
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
    Tree(#[from] CollectError),
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
    /// The connection was lost in every hand-over.
    #[error("the connection was lost in {0} hand-overs")]
    HandoversLost(u32),
    /// The host's uptime is not to be had.
    #[error("cannot read /proc/uptime")]
    Uptime(#[source] io::Error),
}

impl MigrateError {
    /// What the sink says of a connection that is lost.
    ///
    /// # Errors
    /// The error itself, if it is something else.
    fn broken_connection(self) -> Result<SinkError, Self> {
        match self {
            Self::Sink(sink)
            | Self::Send(SendError::Stream(StreamError::Sink(sink)))
            | Self::Handover(
                HandoverError::Sink(sink)
                | HandoverError::Send(SendError::Stream(StreamError::Sink(sink))),
            ) if sink.is_broken_connection() => Ok(sink),
            other => Err(other),
        }
    }
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

/// How often a hand-over may lose its connection.
const HANDOVERS_LOST: u32 = 5;

/// What is known of a round before the receiver has it.
#[derive(Debug, Default)]
struct Attempt {
    stopped: Duration,
    scanned: Scanned,
}

/// Copies or moves a process tree, in rounds. Each round stops the tree, lists its mappings, ends the
/// trackers' epoch and begins the next; a pre-dump round lets the tree run before it reads
/// anything, a final round after the receiver has acked it; if the process itself follows its memory,
/// the final round is part of the hand-over. A round whose connection is lost is sent again. The rounds done
/// are added to `report`.
///
/// # Errors
/// [`MigrateError`]. Whatever it is, the tree runs then (but for [`HandoverError::InDoubt`]), and the
/// receiver has the rounds acked before.
pub fn migrate(
    plan: &Plan,
    tree: &mut Copier,
    mut parts: Parts<'_>,
    report: &mut Report,
) -> Result<(), MigrateError> {
    let began = Instant::now();
    if let Some(handover) = &plan.handover {
        handover.check_files(plan.root, parts.sink)?;
    }
    let mut history = Vec::new();
    let (mut round, mut handovers_lost) = (1, 0);
    // While the connection was lost, the tree has gone on.
    let mut catch_up = false;
    loop {
        let mut next = converge::decide(&history, &plan.limits);
        if std::mem::take(&mut catch_up) && plan.limits.max_rounds > 0 && next != Next::Done {
            next = Next::PreDump;
        }
        let name = match next {
            Next::Done => break,
            Next::PreDump => "pre-dump",
            Next::Final(why) => {
                announce_end(why, &history, plan);
                report.ended = Some(why);
                "final"
            }
        };
        let progress = parts.progress;
        progress.update(|status| (status.round, status.kind) = (round, name));

        let start = Instant::now();
        let mut attempt = Attempt::default();
        let sent = match (next, &plan.handover) {
            (Next::Final(_), Some(handover)) => {
                match hand_over(plan, handover, &mut round, tree, &mut parts, report) {
                    Ok(()) => break,
                    Err(error) => Err(error),
                }
            }
            (Next::Final(_), None) => last_round(plan, round, tree, &mut parts, &mut attempt),
            (Next::PreDump | Next::Done, _) => {
                pre_dump(plan, round, tree, &mut parts, &mut attempt)
            }
        };
        let took = start.elapsed();
        let (receipt, went_on) = match sent {
            Ok(receipt) => (receipt, false),
            Err(error) => {
                let receipt = parts.sink.reconnect(error.broken_connection()?)?;
                report.totals.reconnects += 1;
                catch_up = true;
                if plan.handover.is_some() && matches!(next, Next::Final(_)) {
                    handovers_lost += 1;
                    if handovers_lost == HANDOVERS_LOST {
                        return Err(MigrateError::HandoversLost(HANDOVERS_LOST));
                    }
                }
                match receipt {
                    Some(receipt) => (receipt, true),
                    None => {
                        tree.lost(parts.tracker);
                        continue;
                    }
                }
            }
        };
        tree.acked();
        let done = round_report(
            round,
            name,
            &receipt,
            attempt.stopped,
            took,
            attempt.scanned.pages,
        );
        tracing::info!(
            event = "round_done",
            round,
            kind = name,
            frozen_ms = done.frozen_ms,
            sent_pages = done.sent_pages,
            unchanged_pages = done.unchanged_pages,
            zero_pages = done.zero_pages,
            bytes_wire = done.bytes_wire,
            scan_ms = attempt.scanned.scan_time.as_secs_f64() * 1e3,
            seconds = done.seconds,
            "round done"
        );
        round += 1;
        let sent = done.bytes_raw;
        report.add(done);
        // It is the last only if the tree is as it says.
        let stays = plan.handover.is_none() && (plan.then == Then::Run || !went_on);
        if matches!(next, Next::Final(_)) && stays {
            break;
        }

        if !tree.root_alive() {
            return Err(MigrateError::TargetGone(plan.root));
        }
        let dirty_after = tree.pending_pages(parts.tracker) * PAGE_SIZE;
        progress.update(|status| status.dirty_rate = dirty_after as f64 / took.as_secs_f64());
        history.push(Observed {
            sent,
            took,
            overhead: attempt.stopped + attempt.scanned.scan_time,
            dirty_after,
        });
    }
    match parts.sink.finish() {
        // Everything is acked already.
        Err(error) if error.is_broken_connection() => {
            tracing::warn!(
                why = with_causes(&error),
                "the receiver's goodbye was not heard"
            );
        }
        goodbye => goodbye?,
    }
    (report.processes, report.segments) = tree.size();
    report.totals.seconds = began.elapsed().as_secs_f64();
    Ok(())
}

/// A round while the tree runs.
fn pre_dump(
    plan: &Plan,
    round: u32,
    tree: &mut Copier,
    parts: &mut Parts<'_>,
    attempt: &mut Attempt,
) -> Result<Receipt, MigrateError> {
    let Parts { tracker, sink, .. } = parts;
    sink.prepare()?;
    let urgent = RealtimePriority::raise();
    let mut frozen = parts.freezer.freeze(plan.root)?;
    let uptime = uptime::read().map_err(MigrateError::Uptime)?;
    tree.collect(&mut frozen, *tracker)?;
    attempt.stopped = frozen.thaw(Then::Run)?;
    drop(urgent);
    let frozen_ms = attempt.stopped.as_secs_f64() * 1e3;
    parts.progress.update(|status| status.frozen_ms = frozen_ms);
    sink.begin(round, RoundKind::PreDump, uptime)?;
    tree.survey_descriptors()?;
    attempt.scanned = tree.send(Pass::PreCopy, *tracker, *sink, parts.pool)?;
    Ok(sink.commit()?)
}

/// The last round, of a frozen tree.
fn last_round(
    plan: &Plan,
    round: u32,
    tree: &mut Copier,
    parts: &mut Parts<'_>,
    attempt: &mut Attempt,
) -> Result<Receipt, MigrateError> {
    let Parts { tracker, sink, .. } = parts;
    sink.prepare()?;
    sink.set_target_state(TargetState::Frozen);
    let urgent = RealtimePriority::raise();
    let mut frozen = parts.freezer.freeze(plan.root)?;
    match plan.then {
        Then::Run => {}
        Then::Stop => frozen.sigstop()?,
        Then::Kill => {
            let mut processes = frozen.processes().iter();
            let may = processes.try_for_each(|process| check_signal_permission(process.pid));
            may.map_err(FreezeError::from)?;
        }
    }
    let uptime = uptime::read().map_err(MigrateError::Uptime)?;
    tree.collect(&mut frozen, *tracker)?;
    // Reading and sending takes longer than anybody may be kept waiting.
    drop(urgent);
    sink.begin(round, RoundKind::Final, uptime)?;
    tree.survey_descriptors()?;
    attempt.scanned = tree.send(Pass::Final, *tracker, *sink, parts.pool)?;
    // Killed while frozen (by the OOM killer, say): no image of it is whole.
    if let Some(pid) = tree.first_exited() {
        return Err(MigrateError::TargetGone(pid));
    }
    let receipt = sink.commit()?;
    attempt.stopped = frozen.thaw(plan.then)?;
    sink.set_target_state(TargetState::Running);
    Ok(receipt)
}

/// The last rounds, and the process itself.
fn hand_over(
    plan: &Plan,
    handover: &Handover,
    round: &mut u32,
    tree: &mut Copier,
    parts: &mut Parts<'_>,
    report: &mut Report,
) -> Result<(), MigrateError> {
    parts.sink.prepare()?;
    parts.sink.set_target_state(TargetState::Frozen);
    let first = *round;
    let done = handover.run(
        plan.root,
        round,
        handover::Parts {
            tree,
            tracker: &mut *parts.tracker,
            sink: &mut *parts.sink,
            pool: parts.pool,
        },
    )?;
    parts.sink.set_target_state(TargetState::Running);
    let stopped = Duration::from_secs_f64(done.downtime.total_ms() / 1e3);
    let last = done.rounds.len() - 1;
    for (index, sent) in done.rounds.iter().enumerate() {
        // The tree does not run between them.
        let (name, stopped) = match index == last {
            true => ("final", stopped),
            false => ("during-dump", Duration::ZERO),
        };
        let scanned = sent.scanned.pages;
        report.add(round_report(
            first + index as u32,
            name,
            &sent.receipt,
            stopped,
            sent.took,
            scanned,
        ));
    }
    tracing::info!(event = "handed_over", downtime = ?done.downtime, "handed over: it runs at the receiver");
    report.handover = Some(done.downtime);
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
