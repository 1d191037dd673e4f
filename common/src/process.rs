//! Processes that are known for longer than they may live.

use serde::{Deserialize, Serialize};
use std::fs;

/// A process, and when it started: PIDs are used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its PID.
    pub pid: i32,
    /// Clock ticks since boot.
    started: u64,
}

impl Process {
    /// The process that has this PID now, if there is one that has not ended.
    #[must_use]
    pub fn find(pid: i32) -> Option<Self> {
        // Of the fields behind the name and the state, counted from 0 (`man 5 proc`).
        const START_TIME: usize = 18;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before them may contain anything, even ") Z".
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        if matches!(fields.next(), None | Some("Z" | "X")) {
            return None;
        }
        let started = fields.nth(START_TIME)?.parse().ok()?;
        Some(Self { pid, started })
    }

    /// Whether it has not ended.
    #[must_use]
    pub fn lives(self) -> bool {
        Self::find(self.pid) == Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_the_next_with_its_number() {
        let own = Process::find(std::process::id().cast_signed()).unwrap();
        assert!(own.lives());
        let other = Process {
            started: own.started + 1,
            ..own
        };
        assert!(!other.lives());
        assert_eq!(Process::find(i32::MAX), None);
    }
}
