//! Resources used by a program.

use crate::memory;
use std::fs;
use std::io;
use std::process::{Child, ExitStatus};
use wait4::Wait4;

/// Resources of a program that has exited, and of the children it has waited for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Processor time, in seconds.
    pub cpu: f64,
    /// Largest peak memory of one of its processes, in bytes.
    pub peak_rss: u64,
}

/// Waits until a child exits.
///
/// # Errors
/// `ECHILD` if it was waited for before.
pub fn wait(child: &mut Child) -> io::Result<(ExitStatus, Usage)> {
    let ended = child.wait4()?;
    let usage = Usage {
        cpu: (ended.rusage.utime + ended.rusage.stime).as_secs_f64(),
        peak_rss: ended.rusage.maxrss,
    };
    Ok((ended.status, usage))
}

/// Returns the memory of a process tree, in KiB: the sum of Pss, to which a page that several processes share
/// contributes in parts. A process that exits meanwhile is left out.
#[must_use]
pub fn memory_of_tree(root: i32) -> u64 {
    let pss = |pid: i32| -> Option<u64> {
        let totals = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let pss = totals.lines().find_map(|line| line.strip_prefix("Pss:"))?;
        pss.split_ascii_whitespace().next()?.parse().ok()
    };
    memory::tree(root).into_iter().filter_map(pss).sum()
}
