//! Resources used by a program.

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
