//! CRIU's log files.

use crate::proc::read_lossy;
use std::path::Path;

/// Number of errors that are reported.
const REPORTED_ERRORS: usize = 2;

/// Returns the last errors in one of CRIU's logs, in one line; empty if there are none. They have more detail
/// than the responses over the RPC.
#[must_use]
pub fn last_errors(log: &Path) -> String {
    let log = read_lossy(log).unwrap_or_default();
    let errors: Vec<_> = log.lines().filter(|line| line.contains("Error")).collect();
    errors[errors.len().saturating_sub(REPORTED_ERRORS)..].join("; ")
}
