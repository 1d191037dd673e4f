//! What a migration did, as `--json` prints it.

use crate::converge::Why;
use serde::Serialize;

/// One round.
#[derive(Debug, Clone, Serialize)]
pub struct RoundReport {
    /// Counts from 1.
    pub round: u32,
    /// `pre-dump` or `final`.
    pub kind: &'static str,
    /// How long the tree was stopped, ms.
    pub frozen_ms: f64,
    /// Populated pages looked at.
    pub scanned_pages: u64,
    /// Pages whose content was sent.
    pub sent_pages: u64,
    /// Pages the receiver had already.
    pub unchanged_pages: u64,
    /// Pages announced as zero.
    pub zero_pages: u64,
    /// Bytes of page content sent, before compression.
    pub bytes_raw: u64,
    /// Bytes on the wire, framing and all.
    pub bytes_wire: u64,
    /// From the freeze to the ack, s.
    pub seconds: f64,
}

/// Sums over all rounds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Totals {
    /// Number of rounds.
    pub rounds: u32,
    /// Longest stop of a pre-dump round, ms.
    pub max_pre_dump_frozen_ms: f64,
    /// Stop of the final round, ms; absent without one.
    pub downtime_ms: Option<f64>,
    /// As in the rounds.
    pub sent_pages: u64,
    /// As in the rounds.
    pub bytes_raw: u64,
    /// As in the rounds.
    pub bytes_wire: u64,
    /// From the first freeze to the end, s.
    pub seconds: f64,
}

/// The whole migration.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The root's PID.
    pub pid: i32,
    /// Processes in the last round.
    pub processes: usize,
    /// Shared segments in the last round.
    pub segments: usize,
    /// Random id of the migration.
    pub migration: String,
    /// Where the receiver put it.
    pub directory: String,
    /// The dirty tracker used.
    pub tracker: &'static str,
    /// Why pre-copying ended; absent if no final round was asked for.
    pub ended: Option<Why>,
    /// The rounds, the first first.
    pub rounds: Vec<RoundReport>,
    /// Their sums.
    pub totals: Totals,
}

impl Report {
    /// Of a migration that has done nothing yet.
    #[must_use]
    pub fn new(pid: i32, tracker: &'static str) -> Self {
        Self {
            pid,
            processes: 0,
            segments: 0,
            migration: String::new(),
            directory: String::new(),
            tracker,
            ended: None,
            rounds: Vec::new(),
            totals: Totals::default(),
        }
    }

    /// Adds a round to the list and the sums.
    pub fn add(&mut self, round: RoundReport) {
        let totals = &mut self.totals;
        totals.rounds += 1;
        match round.kind {
            "final" => totals.downtime_ms = Some(round.frozen_ms),
            _ => {
                totals.max_pre_dump_frozen_ms = totals.max_pre_dump_frozen_ms.max(round.frozen_ms);
            }
        }
        totals.sent_pages += round.sent_pages;
        totals.bytes_raw += round.bytes_raw;
        totals.bytes_wire += round.bytes_wire;
        self.rounds.push(round);
    }
}
