//! A migration, from top to bottom: plans a round, runs it, records it, until the target is copied or moved.

use crate::converge::{self, Limits, Next, Why};
use crate::copy::stream::StreamError;
use crate::copy::{CollectError, Pass, SendError};
use crate::freeze::{FreezeError, Then, check_signal_permission, process_list};
use crate::handover::{Handover, HandoverError};
use crate::recorder::{Recorder, Round};
use crate::report::{Kind, Report};
use crate::sink::{PageSink, Receipt, SinkError};
use crate::sys::sched::RealtimePriority;
use crate::target::guards::first_with_guards;
use pageferry_common::proc::uptime;
use pageferry_common::wire::RoundKind;
use pageferry_common::with_causes;
use std::io;
use std::time::Instant;

pub use crate::parts::Parts;
use crate::parts::exited_process;

/// How often a hand-over may lose its connection before the migration fails.
const MAX_LOST_HANDOVERS: u32 = 5;

/// Why a migration failed. Unless it is [`HandoverError::InDoubt`], the target runs.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The target could not be frozen.
    #[error("cannot stop the target")]
    Freeze(#[from] FreezeError),
    /// The mappings of the target could not be listed, or its writes not tracked.
    #[error("cannot list the target's memory")]
    Collect(#[from] CollectError),
    /// The memory of the target could not be read or sent.
    #[error("cannot copy the target's memory")]
    Send(#[from] SendError),
    /// The receiver or the connection to it failed.
    #[error("cannot send to the receiver")]
    Sink(#[from] SinkError),
    /// A process of the target exited: the root, or any process while the target was frozen.
    #[error("process {0} exited")]
    TargetGone(i32),
    /// The target could not be handed over.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The connection was lost in every hand-over.
    #[error("the connection was lost in {0} hand-overs")]
    HandoversLost(u32),
    /// The target has guard regions, and CRIU is too old to keep them.
    #[error("process {0} has guard regions, which CRIU before 4.2 loses")]
    Guards(i32),
    /// The target could not be searched for guard regions.
    #[error("cannot look for guard regions")]
    NoGuards(#[source] io::Error),
    /// The uptime of the host could not be read.
    #[error("cannot read /proc/uptime")]
    Uptime(#[source] io::Error),
}

impl MigrateError {
    /// Returns the sink's error if the connection was lost and nothing else is wrong.
    ///
    /// # Errors
    /// `self`, if it is anything else.
    fn lost_connection(self) -> Result<SinkError, Self> {
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

/// Target of a migration, and when to stop.
#[derive(Debug)]
pub struct Plan {
    /// PID of the root of the target.
    pub root: i32,
    /// When to stop pre-copying.
    pub limits: Limits,
    /// Fate of the target after the final round.
    pub then: Then,
    /// How to hand the target over; `None` if only its memory is copied.
    pub handover: Option<Handover>,
}

/// Copies or moves the target in rounds.
///
/// Each round freezes the target, lists its mappings and ends the tracker's epoch. A pre-dump round thaws the
/// target before it reads any memory; a final round thaws it when the receiver has acked the round. If the
/// target moves, its final round is part of the hand-over. A round whose connection is lost is sent again.
/// Completed rounds are added to `report`.
///
/// # Errors
/// [`MigrateError`]. The target runs then, except after [`HandoverError::InDoubt`], and the receiver keeps the
/// rounds that it has acked.
pub fn migrate(plan: &Plan, parts: Parts<'_>, report: &mut Report) -> Result<(), MigrateError> {
    let began = Instant::now();
    if let Some(handover) = &plan.handover {
        handover.check_pipes(plan.root)?;
        handover.check_files(plan.root, parts.sink)?;
        check_guards(plan.root, handover)?;
    }
    let recorder = Recorder::new(report, parts.progress);
    let mut migration = Migration {
        plan,
        parts,
        recorder,
        catch_up: false,
        lost_handovers: 0,
    };
    migration.run_rounds()?;
    finish(migration.parts.sink)?;
    let size = migration.parts.copier.size();
    migration.recorder.finish(size, began.elapsed());
    Ok(())
}

/// The next thing to do.
#[derive(Debug, Clone, Copy)]
enum Step<'a> {
    /// A round while the target runs.
    PreDump,
    /// The last round, while the target is frozen.
    Final(Why),
    /// The last round and the target itself.
    HandOver(Why, &'a Handover),
}

impl Step<'_> {
    fn kind(self) -> Kind {
        match self {
            Self::PreDump => Kind::PreDump,
            Self::Final(_) | Self::HandOver(..) => Kind::Final,
        }
    }
}

/// How a step succeeded.
#[derive(Debug)]
enum Success {
    /// The receiver has acked the round.
    Acked(Receipt),
    /// The target runs at the receiver.
    HandedOver,
}

/// When the ack of a round arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ack {
    /// On the connection that sent the round, before the target was thawed.
    InTime,
    /// On a later connection. The target has run meanwhile.
    Late,
}

/// A migration under way.
struct Migration<'a, 'p> {
    plan: &'a Plan,
    parts: Parts<'p>,
    recorder: Recorder<'a>,
    /// Whether the target ran while the connection was lost: more memory is dirty than the history shows.
    catch_up: bool,
    lost_handovers: u32,
}

impl<'a> Migration<'a, '_> {
    fn run_rounds(&mut self) -> Result<(), MigrateError> {
        while let Some(step) = self.next_step() {
            self.announce(step);
            let mut round = Round::new(self.recorder.next_round(), step.kind());
            let done = match step {
                Step::PreDump => self.pre_dump(&mut round),
                Step::Final(_) => self.final_round(&mut round),
                Step::HandOver(_, handover) => self.hand_over(handover, round.number),
            };
            round.took = round.began.elapsed();
            let ack = match done {
                Ok(Success::HandedOver) => break,
                Ok(Success::Acked(receipt)) => {
                    round.receipt = receipt;
                    Ack::InTime
                }
                Err(error) => match self.reconnect(error, step)? {
                    Some(receipt) => {
                        round.receipt = receipt;
                        // A hand-over may have recorded a round before the one in flight.
                        round.number = self.recorder.next_round();
                        Ack::Late
                    }
                    None => continue,
                },
            };
            self.parts.copier.acked();
            self.recorder.record(&round);
            if self.is_last(step, ack) {
                break;
            }
            self.observe(&round)?;
        }
        Ok(())
    }

    /// Returns the next step; `None` if all rounds that were asked for are done.
    fn next_step(&mut self) -> Option<Step<'a>> {
        let plan = self.plan;
        let next = converge::decide(self.recorder.history(), &plan.limits);
        let catch_up = std::mem::take(&mut self.catch_up) && plan.limits.max_rounds > 0;
        match (next, &plan.handover) {
            (Next::Done, _) => None,
            (Next::PreDump, _) => Some(Step::PreDump),
            (Next::Final(_), _) if catch_up => Some(Step::PreDump),
            (Next::Final(why), None) => Some(Step::Final(why)),
            (Next::Final(why), Some(handover)) => Some(Step::HandOver(why, handover)),
        }
    }

    fn announce(&mut self, step: Step<'_>) {
        match step {
            Step::PreDump => {}
            Step::Final(why) | Step::HandOver(why, _) => {
                self.recorder.end_pre_copy(why, &self.plan.limits);
            }
        }
        self.recorder.begin(step.kind());
    }

    /// Sends a round while the target runs.
    fn pre_dump(&mut self, round: &mut Round) -> Result<Success, MigrateError> {
        let Parts {
            freezer,
            copier,
            tracker,
            sink,
            pool,
            ..
        } = &mut self.parts;
        sink.prepare()?;
        copier.survey_host();
        let priority = RealtimePriority::raise();
        let mut frozen = freezer.freeze(self.plan.root)?;
        let uptime = uptime::read().map_err(MigrateError::Uptime)?;
        copier.collect(&mut frozen, *tracker)?;
        round.frozen = frozen.thaw(Then::Run)?;
        drop(priority);
        self.recorder.show_frozen(round.frozen);
        sink.begin(round.number, RoundKind::PreDump, uptime)?;
        copier.survey_descriptors()?;
        round.scanned = copier.send(Pass::PreCopy, *tracker, *sink, pool)?;
        Ok(Success::Acked(sink.commit()?))
    }

    /// Sends the last round while the target is frozen.
    fn final_round(&mut self, round: &mut Round) -> Result<Success, MigrateError> {
        let Plan { root, then, .. } = *self.plan;
        self.parts.sink.prepare()?;
        self.parts.copier.survey_host();
        self.parts
            .with_frozen_timeout(|parts| send_final(parts, root, then, round))
    }

    /// Hands the target over, with the rounds that are sent while it is frozen.
    fn hand_over(&mut self, handover: &Handover, first: u32) -> Result<Success, MigrateError> {
        let root = self.plan.root;
        check_guards(root, handover)?;
        self.parts.sink.prepare()?;
        self.parts.copier.survey_host();
        let done = self
            .parts
            .with_frozen_timeout(|parts| handover.run(root, first, parts));
        self.recorder.record_handover(first, &done);
        let downtime = done.result?;
        self.recorder.handed_over(downtime);
        Ok(Success::HandedOver)
    }

    /// Reconnects after a step that lost its connection. Returns the receipt of the round in flight if the
    /// receiver has it after all.
    fn reconnect(
        &mut self,
        error: MigrateError,
        step: Step<'_>,
    ) -> Result<Option<Receipt>, MigrateError> {
        let receipt = self.parts.sink.reconnect(error.lost_connection()?)?;
        self.recorder.reconnected();
        self.catch_up = true;
        if let Step::HandOver(..) = step {
            self.lost_handovers += 1;
            if self.lost_handovers == MAX_LOST_HANDOVERS {
                return Err(MigrateError::HandoversLost(MAX_LOST_HANDOVERS));
            }
        }
        if receipt.is_none() {
            self.parts.copier.lost(self.parts.tracker);
        }
        Ok(receipt)
    }

    /// Returns whether a step whose round is acked was the last. If the target has run since the final round
    /// although it should be stopped or killed, another final round is needed.
    fn is_last(&self, step: Step<'_>, ack: Ack) -> bool {
        match step {
            Step::PreDump | Step::HandOver(..) => false,
            Step::Final(_) => ack == Ack::InTime || self.plan.then == Then::Run,
        }
    }

    /// Adds what a round showed to the history that the next step is decided from.
    fn observe(&mut self, round: &Round) -> Result<(), MigrateError> {
        let Parts {
            copier, tracker, ..
        } = &mut self.parts;
        if !copier.root_alive() {
            return Err(MigrateError::TargetGone(self.plan.root));
        }
        self.recorder.observe(round, copier.pending_pages(*tracker));
        Ok(())
    }
}

/// Checks that CRIU keeps the guard regions of the target, if it has any.
fn check_guards(root: i32, handover: &Handover) -> Result<(), MigrateError> {
    if handover.criu.keeps_guards() {
        return Ok(());
    }
    let pids = process_list(root).into_iter().map(|process| process.pid);
    match first_with_guards(pids).map_err(MigrateError::NoGuards)? {
        Some(pid) => Err(MigrateError::Guards(pid)),
        None => Ok(()),
    }
}

/// Freezes the target, sends the last round, and does with the target what the user asked for.
fn send_final(
    parts: &mut Parts<'_>,
    root: i32,
    then: Then,
    round: &mut Round,
) -> Result<Success, MigrateError> {
    let Parts {
        freezer,
        copier,
        tracker,
        sink,
        pool,
        ..
    } = parts;
    let priority = RealtimePriority::raise();
    let mut frozen = freezer.freeze(root)?;
    match then {
        Then::Run => {}
        Then::Stop => frozen.sigstop()?,
        Then::Kill => {
            let mut processes = frozen.processes().iter();
            let may = processes.try_for_each(|process| check_signal_permission(process.pid));
            may.map_err(FreezeError::from)?;
        }
    }
    let uptime = uptime::read().map_err(MigrateError::Uptime)?;
    copier.collect(&mut frozen, *tracker)?;
    // Reading and sending take long; other programs must not be starved meanwhile.
    drop(priority);
    sink.begin(round.number, RoundKind::Final, uptime)?;
    copier.survey_descriptors()?;
    let sent = copier.send_frozen(&mut frozen, *tracker, *sink, pool);
    if let Some(pid) = exited_process(copier, sent.as_ref().err()) {
        return Err(MigrateError::TargetGone(pid));
    }
    round.scanned = sent?;
    let receipt = sink.commit()?;
    round.frozen = frozen.thaw(then)?;
    Ok(Success::Acked(receipt))
}

fn finish(sink: &mut dyn PageSink) -> Result<(), SinkError> {
    match sink.finish() {
        // All rounds are acked already.
        Err(error) if error.is_broken_connection() => {
            tracing::warn!(
                event = "finish_unconfirmed",
                why = with_causes(&error),
                "the connection was lost after the last round"
            );
            Ok(())
        }
        finished => finished,
    }
}
