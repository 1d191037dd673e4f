//! The report of a migration, as `--json` prints it.

use crate::converge::Why;
use crate::handover::record::Listed;
use serde::Serialize;
use std::fmt;
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
/// An interrupted move, as `--resolve --list` prints it.
#[derive(Debug, Clone, Serialize)]
pub struct Interrupted {
    /// PID of the root.
    pub pid: i32,
    /// Name of the root's program.
    pub command: String,
    /// Address of the receiver.
    pub receiver: String,
    /// When it was about to be committed, in UTC.
    pub since: String,
    /// Number of its processes.
    pub processes: usize,
    /// Number of its processes that still exist here.
    pub alive: usize,
    /// PID of the program that handles it, if there is one.
    pub handled_by: Option<String>,
}

impl Interrupted {
    /// Returns what is to be printed of a record.
    #[must_use]
    pub fn new(listed: &Listed) -> Self {
        let record = &listed.record;
        Self {
            pid: record.root.pid,
            command: record.command.clone(),
            receiver: record.to.clone(),
            since: humantime::format_rfc3339_seconds(record.since()).to_string(),
            processes: record.processes(),
            alive: record.alive().count(),
            handled_by: listed.holder.clone(),
        }
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            pid,
            command,
            receiver,
            since,
            processes,
            alive,
            handled_by,
        } = self;
        write!(
            f,
            "process {pid} ({command}) to {receiver} since {since}: {alive} of {processes} processes exist here, "
        )?;
        match handled_by {
            Some(holder) => write!(f, "process {holder} is handling it"),
            None => write!(f, "no program is handling it"),
        }
    }
}
