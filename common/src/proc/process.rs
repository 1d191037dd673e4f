//! Identity of a process, its threads and its children.

use super::stat::Stat;
use serde::{Deserialize, Serialize};
use std::fs;

/// Identity of a process: PIDs are reused, so it includes the start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// PID, in the PID namespace of this program.
    pub pid: i32,
    /// Start time, in clock ticks since boot.
    #[serde(rename = "started")]
    start_time: u64,
}

impl ProcessId {
    /// Returns the identity of the process that has this PID now; `None` if it has exited.
    #[must_use]
    pub fn find(pid: i32) -> Option<Self> {
        let content = fs::read(format!("/proc/{pid}/stat")).ok()?;
        let stat = Stat::parse(&content).filter(|stat| !stat.has_exited())?;
        let start_time = stat.start_time()?;
        Some(Self { pid, start_time })
    }

    /// Returns the start time, in clock ticks since boot.
    #[must_use]
    pub fn start_time(self) -> u64 {
        self.start_time
    }

    /// Returns whether the process has not exited yet.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::find(self.pid) == Some(self)
    }
}

/// Lists the threads of a process; empty if it is gone.
#[must_use]
pub fn threads(pid: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

/// Lists the child processes that one thread created, including those that have exited and were not waited
/// for; empty if the thread is gone.
#[must_use]
pub fn children(pid: i32, tid: i32) -> Vec<i32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
    list.split_ascii_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_process_with_the_same_pid_is_another_one() {
        let own = ProcessId::find(std::process::id().cast_signed()).unwrap();
        assert!(own.is_alive());
        let other = ProcessId {
            start_time: own.start_time + 1,
            ..own
        };
        assert!(!other.is_alive());
        assert_eq!(ProcessId::find(i32::MAX), None);
    }

    #[test]
    fn a_process_is_alive_whatever_its_name() {
        let mut shell = std::process::Command::new("sh")
            .args(["-c", r"printf '\377) Z' > /proc/$$/comm; echo; read line"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        std::io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut line).unwrap();
        let found = ProcessId::find(shell.id().cast_signed());
        let is_alive = found.is_some_and(ProcessId::is_alive);
        drop(shell.stdin.take());
        shell.wait().unwrap();
        assert!(is_alive);
        assert!(!found.unwrap().is_alive());
    }
}
