//! The report of a migration, as `--json` prints it.

use crate::converge::Why;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Kind of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Sent while the target ran.
    PreDump,
    /// Sent while CRIU dumped the state of a target that moves.
    DuringDump,
    /// Sent last, while the target was frozen.
    Final,
}

impl Kind {
    /// Returns the name in reports and log lines.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PreDump => "pre-dump",
            Self::DuringDump => "during-dump",
            Self::Final => "final",
        }
    }
}

/// One round.
#[derive(Debug, Clone, Serialize)]
pub struct RoundReport {
    /// Number of the round, from 1.
    pub round: u32,
    /// Kind of the round.
    pub kind: Kind,
    /// Time for which the target was frozen, ms. The final round includes all of a hand-over.
    pub frozen_ms: f64,
    /// Number of populated pages scanned.
    pub scanned_pages: u64,
    /// Number of pages sent with content.
    pub sent_pages: u64,
    /// Number of pages that the receiver had already.
    pub unchanged_pages: u64,
    /// Number of pages announced as zero.
    pub zero_pages: u64,
    /// Bytes of page content sent, before compression.
    pub bytes_raw: u64,
    /// Bytes on the wire, framing included.
    pub bytes_wire: u64,
    /// Time from the freeze to the ack, s.
    pub seconds: f64,
}

/// Sums over all rounds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Totals {
    /// Number of rounds.
    pub rounds: u32,
    /// Longest freeze of a pre-dump round, ms.
    pub max_pre_dump_frozen_ms: f64,
    /// Freeze of the final round, ms; absent without a final round.
    pub downtime_ms: Option<f64>,
    /// Number of pages sent with content.
    pub sent_pages: u64,
    /// Bytes of page content sent, before compression.
    pub bytes_raw: u64,
    /// Bytes on the wire, framing included.
    pub bytes_wire: u64,
    /// Time from the start of the migration to its end, s.
    pub seconds: f64,
    /// How often the connection was lost and made again.
    pub reconnects: u32,
}

/// Time for which no copy ran, by phase, ms.
#[derive(Debug, Clone, Serialize)]
pub struct Downtime {
    /// Freezing the target, and dumping everything except memory.
    pub state_ms: f64,
    /// Reading and sending the last pages, until the receiver has acked them.
    pub pages_ms: f64,
    /// Sending CRIU's images, and restoring.
    pub restore_ms: f64,
    /// Committing, and resuming the copy.
    pub resume_ms: f64,
    #[serde(skip)]
    began: Instant,
    /// End of the last complete phase.
    #[serde(skip)]
    last: Instant,
}

impl Downtime {
    /// Returns a downtime that begins now: the target is about to be frozen.
    #[must_use]
    pub fn begin() -> Self {
        let now = Instant::now();
        Self {
            state_ms: 0.0,
            pages_ms: 0.0,
            restore_ms: 0.0,
            resume_ms: 0.0,
            began: now,
            last: now,
        }
    }

    /// Ends the first phase: at `at`, everything except memory was dumped.
    pub fn state_dumped(&mut self, at: Instant) {
        self.state_ms = self.lap(at);
    }

    /// Ends the second phase: the receiver has the last pages.
    pub fn last_pages_sent(&mut self) {
        self.pages_ms = self.lap(Instant::now());
    }

    /// Ends the third phase: the copy is ready to run.
    pub fn restored(&mut self) {
        self.restore_ms = self.lap(Instant::now());
    }

    /// Ends the last phase: the copy runs.
    pub fn running(&mut self) {
        self.resume_ms = self.lap(Instant::now());
    }

    /// Returns the sum of all phases, ms.
    #[must_use]
    pub fn total_ms(&self) -> f64 {
        self.state_ms + self.pages_ms + self.restore_ms + self.resume_ms
    }

    /// Returns the time from the start to the end of the last phase, or to now if phases are missing.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        match self.resume_ms > 0.0 {
            true => self.last - self.began,
            false => self.began.elapsed(),
        }
    }

    fn lap(&mut self, now: Instant) -> f64 {
        let before = std::mem::replace(&mut self.last, now);
        (now - before).as_secs_f64() * 1e3
    }
}

/// The whole migration.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// PID of the root.
    pub pid: i32,
    /// Number of processes in the last round.
    pub processes: usize,
    /// Number of shared segments in the last round.
    pub segments: usize,
    /// Random id of the migration.
    pub migration: String,
    /// Directory of the receiver for this migration.
    pub directory: String,
    /// Name of the dirty tracker.
    pub tracker: &'static str,
    /// Downtime by phase, if the target moved.
    pub handover: Option<Downtime>,
    /// Why pre-copying ended; absent if no final round was asked for.
    pub ended: Option<Why>,
    /// The rounds, in order.
    pub rounds: Vec<RoundReport>,
    /// Sums over the rounds.
    pub totals: Totals,
}

impl Report {
    /// Returns the report of a migration without any rounds yet.
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
            Kind::Final => totals.downtime_ms = Some(round.frozen_ms),
            Kind::PreDump | Kind::DuringDump => {
                totals.max_pre_dump_frozen_ms = totals.max_pre_dump_frozen_ms.max(round.frozen_ms);
            }
        }
        totals.sent_pages += round.sent_pages;
        totals.bytes_raw += round.bytes_raw;
        totals.bytes_wire += round.bytes_wire;
        self.rounds.push(round);
    }
}
