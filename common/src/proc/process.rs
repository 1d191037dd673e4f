//! Processes that are known for longer than they may live, and what `/proc` says of any.

use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::Path;

/// The text of a file in `/proc`, or one that tells of it. A name in it may be any bytes, and often is half a
/// character at its end, for the kernel cuts it at the 15th: what is no UTF-8 is replaced, and nothing else is
/// lost.
///
/// # Errors
/// Those of reading it.
pub fn text(path: impl AsRef<Path>) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

/// When the process or thread of this `/proc/PID/stat` started, clock ticks since boot; `None` if it has ended.
#[must_use]
pub fn start_time(stat: &str) -> Option<u64> {
    // Of the fields behind the name and the state, counted from 0 (`man 5 proc`).
    const START_TIME: usize = 18;
    // The name before them may contain anything, even ") Z".
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(fields.next(), None | Some("Z" | "X")) {
        return None;
    }
    fields.nth(START_TIME)?.parse().ok()
}

/// A process, and when it started: PIDs are used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its PID.
    pub pid: i32,
    /// Clock ticks since boot.
    started: u64,
}

impl ProcessId {
    /// The process that has this PID now, if there is one that has not ended.
    #[must_use]
    pub fn find(pid: i32) -> Option<Self> {
        let started = start_time(&text(format!("/proc/{pid}/stat")).ok()?)?;
        Some(Self { pid, started })
    }

    /// Whether it has not ended.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::find(self.pid) == Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_the_next_with_its_number() {
        let own = ProcessId::find(std::process::id().cast_signed()).unwrap();
        assert!(own.is_alive());
        let other = ProcessId {
            started: own.started + 1,
            ..own
        };
        assert!(!other.is_alive());
        assert_eq!(ProcessId::find(i32::MAX), None);
    }

    #[test]
    fn a_process_lives_whatever_it_is_called() {
        let mut shell = std::process::Command::new("sh")
            .args(["-c", r"printf '\377) Z' > /proc/$$/comm; echo; read line"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut line).unwrap();
        let found = ProcessId::find(shell.id().cast_signed());
        let is_alive = found.is_some_and(ProcessId::is_alive);
        drop(shell.stdin.take());
        shell.wait().unwrap();
        assert!(is_alive);
        assert!(!found.unwrap().is_alive());
    }
}
