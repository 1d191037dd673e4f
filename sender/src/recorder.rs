//! Turns a finished round into a report entry, a log line, and the history that decides when to stop.

use crate::converge::{self, Limits, Observed, Why};
use crate::copy::{Pass, Scanned};
use crate::handover::HandoverReport;
use crate::progress::Progress;
use crate::report::{Downtime, Kind, Report, RoundReport};
use crate::sink::Receipt;
use pageferry_common::PAGE_SIZE;
use std::time::{Duration, Instant};

/// A round, filled in while it is sent.
#[derive(Debug)]
pub(crate) struct Round {
    /// Number of the round, from 1.
    pub number: u32,
    /// Kind of the round.
    pub kind: Kind,
    /// When the round began.
    pub began: Instant,
    /// Time for which the target was frozen.
    pub frozen: Duration,
    /// Totals of what was scanned.
    pub scanned: Scanned,
    /// Totals of what was sent.
    pub receipt: Receipt,
    /// Time from the start of the round to its ack.
    pub took: Duration,
}

impl Round {
    /// Returns a round that begins now.
    pub(crate) fn new(number: u32, kind: Kind) -> Self {
        Self {
            number,
            kind,
            began: Instant::now(),
            frozen: Duration::ZERO,
            scanned: Scanned::default(),
            receipt: Receipt::default(),
            took: Duration::ZERO,
        }
    }
}

/// Records the rounds of a migration.
pub(crate) struct Recorder<'a> {
    report: &'a mut Report,
    progress: &'a Progress,
    history: Vec<Observed>,
}

impl<'a> Recorder<'a> {
    pub(crate) fn new(report: &'a mut Report, progress: &'a Progress) -> Self {
        Self {
            report,
            progress,
            history: Vec::new(),
        }
    }

    /// Returns the number of the next round.
    pub(crate) fn next_round(&self) -> u32 {
        self.report.totals.rounds + 1
    }

    /// Returns what the rounds so far have shown, the oldest first. Rounds of a hand-over are left out.
    pub(crate) fn history(&self) -> &[Observed] {
        &self.history
    }

    /// Shows the round that begins on the progress line.
    pub(crate) fn begin(&self, kind: Kind) {
        let round = self.next_round();
        self.progress
            .update(|status| (status.round, status.kind) = (round, kind.as_str()));
    }

    /// Shows on the progress line for how long the target was frozen.
    pub(crate) fn show_frozen(&self, frozen: Duration) {
        self.progress
            .update(|status| status.frozen_ms = milliseconds(frozen));
    }

    /// Records why pre-copying ends: only a final round follows.
    pub(crate) fn end_pre_copy(&mut self, why: Why, limits: &Limits) {
        self.report.ended = Some(why);
        let estimate_ms = converge::downtime(&self.history).map(milliseconds);
        let estimate_ms = estimate_ms.map(rounded);
        let allowed_ms = rounded(milliseconds(limits.max_downtime));
        let message = match why {
            Why::Converged => {
                tracing::info!(
                    event = "converged",
                    estimate_ms,
                    "little memory is dirty: sending the final round"
                );
                return;
            }
            Why::Diverging => {
                "the target dirties memory faster than the sender can send it: more rounds would not help"
            }
            Why::Plateau => {
                "rounds no longer reduce the amount of dirty memory: more rounds would not help"
            }
            Why::MaxRounds => "--max-rounds is reached",
        };
        tracing::warn!(
            event = "not_converged",
            estimate_ms,
            allowed_ms,
            "{message}"
        );
    }

    /// Records a round that the receiver has.
    pub(crate) fn record(&mut self, round: &Round) {
        let totals = &round.receipt.totals;
        let entry = RoundReport {
            round: round.number,
            kind: round.kind,
            frozen_ms: milliseconds(round.frozen),
            scanned_pages: round.scanned.pages,
            sent_pages: totals.data_pages,
            unchanged_pages: totals.parent_pages,
            zero_pages: totals.zero_pages,
            bytes_raw: totals.data_pages * PAGE_SIZE,
            bytes_wire: round.receipt.bytes_wire,
            seconds: round.took.as_secs_f64(),
        };
        tracing::info!(
            event = "round_done",
            round = round.number,
            kind = round.kind.as_str(),
            frozen_ms = rounded(entry.frozen_ms),
            sent_pages = entry.sent_pages,
            unchanged_pages = entry.unchanged_pages,
            zero_pages = entry.zero_pages,
            bytes_wire = entry.bytes_wire,
            scan_ms = rounded(milliseconds(round.scanned.scan_time)),
            seconds = rounded(entry.seconds),
            "round complete"
        );
        self.report.add(entry);
    }

    /// Records the rounds of a hand-over, which may have failed after them.
    pub(crate) fn record_handover(&mut self, first: u32, handover: &HandoverReport) {
        for (number, sent) in (first..).zip(&handover.rounds) {
            // The target stays frozen from the first of these rounds to the last, which is charged for it all.
            let (kind, frozen) = match sent.pass {
                Pass::Final | Pass::AfterDump => (Kind::Final, handover.frozen),
                Pass::PreCopy | Pass::DuringDump => (Kind::DuringDump, Duration::ZERO),
            };
            self.record(&Round {
                frozen,
                scanned: sent.scanned,
                receipt: sent.receipt,
                took: sent.took,
                ..Round::new(number, kind)
            });
        }
    }

    /// Records that the target runs at the receiver.
    pub(crate) fn handed_over(&mut self, downtime: Downtime) {
        tracing::info!(
            event = "handed_over",
            downtime_ms = rounded(downtime.total_ms()),
            state_ms = rounded(downtime.state_ms),
            pages_ms = rounded(downtime.pages_ms),
            restore_ms = rounded(downtime.restore_ms),
            resume_ms = rounded(downtime.resume_ms),
            "the target runs at the receiver"
        );
        self.report.handover = Some(downtime);
    }

    /// Records that a lost connection was made again.
    pub(crate) fn reconnected(&mut self) {
        self.report.totals.reconnects += 1;
    }

    /// Adds a round to the history. `dirty_pages` is the number of pages that were dirty after it.
    pub(crate) fn observe(&mut self, round: &Round, dirty_pages: u64) {
        let dirty_after = dirty_pages * PAGE_SIZE;
        let dirty_rate = dirty_after as f64 / round.took.as_secs_f64();
        self.progress
            .update(|status| status.dirty_rate = dirty_rate);
        self.history.push(Observed {
            sent: round.receipt.totals.data_pages * PAGE_SIZE,
            took: round.took,
            overhead: round.frozen + round.scanned.scan_time,
            dirty_after,
        });
    }

    /// Completes the report: with the number of processes and segments, and the total time.
    pub(crate) fn finish(&mut self, size: (usize, usize), took: Duration) {
        (self.report.processes, self.report.segments) = size;
        self.report.totals.seconds = took.as_secs_f64();
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Rounds to the two decimals that log lines show.
fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_show_two_decimals() {
        assert_eq!(rounded(2.068_432).to_string(), "2.07");
        assert_eq!(rounded(1234.0).to_string(), "1234");
    }

    #[test]
    fn rounds_of_a_failed_handover_are_reported_and_numbered() {
        let mut report = Report::new(1, "hash");
        let progress = Progress::start(std::sync::Arc::default());
        let mut recorder = Recorder::new(&mut report, &progress);
        recorder.record(&Round::new(1, Kind::PreDump));
        let sent = |pass| crate::handover::HandoverRound {
            pass,
            receipt: Receipt::default(),
            scanned: Scanned::default(),
            took: Duration::from_millis(1),
        };
        let handover = HandoverReport {
            rounds: vec![sent(Pass::DuringDump), sent(Pass::AfterDump)],
            frozen: Duration::from_millis(7),
            result: Err(crate::handover::HandoverError::TargetGone(1)),
        };
        recorder.record_handover(recorder.next_round(), &handover);
        assert_eq!(recorder.next_round(), 4);
        assert!(recorder.history().is_empty());
        let rounds: Vec<_> = report.rounds.iter().map(|it| (it.round, it.kind)).collect();
        let expected = [(1, Kind::PreDump), (2, Kind::DuringDump), (3, Kind::Final)];
        assert_eq!(rounds, expected);
        assert_eq!(report.totals.downtime_ms, Some(7.0));
        assert_eq!(report.totals.max_pre_dump_frozen_ms, 0.0);
    }
}
