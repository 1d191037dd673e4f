//! What a program took of the machine.

use std::io;
use std::process::{Child, ExitStatus};
use wait4::Wait4;

/// Of a program that is over, and of its children for which it has waited.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Time on processors, seconds.
    pub cpu: f64,
    /// Most memory that one of its processes had at once, bytes.
    pub peak_rss: u64,
}

/// Waits until a child is over.
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
