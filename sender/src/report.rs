//! What a migration did, as `--json` prints it.

use crate::converge::Why;
use serde::Serialize;
use std::time::Instant;

/// One round.
#[derive(Debug, Clone, Serialize)]
pub struct RoundReport {
    /// Counts from 1.
    pub round: u32,
    /// `pre-dump`, `final`, or `during-dump`: sent while CRIU dumped the state of a tree that moves.
    pub kind: &'static str,
    /// How long the tree was stopped, ms; of a hand-over, all of it is the final round's.
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
    /// How often the connection was lost, and made again.
    pub reconnects: u32,
}

/// How long nothing ran, by phase, ms.
#[derive(Debug, Clone, Serialize)]
pub struct Downtime {
    /// Freezing the tree, and dumping what is not memory.
    pub state_ms: f64,
    /// Reading and sending the last pages, until they are durable.
    pub pages_ms: f64,
    /// Sending CRIU's images, and restoring.
    pub restore_ms: f64,
    /// Deciding, and letting the copy run.
    pub resume_ms: f64,
    #[serde(skip)]
    last: Instant,
}

impl Downtime {
    /// The tree is about to be frozen.
    #[must_use]
    pub fn begin() -> Self {
        Self {
            state_ms: 0.0,
            pages_ms: 0.0,
            restore_ms: 0.0,
            resume_ms: 0.0,
            last: Instant::now(),
        }
    }

    /// All but memory was dumped.
    pub fn state_dumped(&mut self, at: Instant) {
        self.state_ms = self.lap(at);
    }

    /// The receiver has the last pages.
    pub fn last_pages_sent(&mut self) {
        self.pages_ms = self.lap(Instant::now());
    }

    /// It could run at the receiver.
    pub fn restored(&mut self) {
        self.restore_ms = self.lap(Instant::now());
    }

    /// It runs there.
    pub fn running(&mut self) {
        self.resume_ms = self.lap(Instant::now());
    }

    /// All of it, ms.
    #[must_use]
    pub fn total_ms(&self) -> f64 {
        self.state_ms + self.pages_ms + self.restore_ms + self.resume_ms
    }

    fn lap(&mut self, now: Instant) -> f64 {
        let before = std::mem::replace(&mut self.last, now);
        (now - before).as_secs_f64() * 1e3
    }
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
    /// Of the hand-over, if the process itself moved.
    pub handover: Option<Downtime>,
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
            handover: None,
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
