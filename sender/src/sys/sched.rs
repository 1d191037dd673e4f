//! Scheduling: while a tree is stopped, whoever holds it must not wait for the processor.

use super::check;

/// While it lives, the calling thread runs before all ordinary ones. Best effort: without
/// `CAP_SYS_NICE` nothing changes, and a stop on a busy machine may last a time slice longer.
#[derive(Debug)]
#[must_use]
pub struct RealtimePriority(());

impl RealtimePriority {
    /// From now on.
    pub fn raise() -> Self {
        set_policy(libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 1);
        Self(())
    }
}

impl Drop for RealtimePriority {
    fn drop(&mut self) {
        set_policy(libc::SCHED_OTHER, 0);
    }
}

fn set_policy(policy: libc::c_int, sched_priority: libc::c_int) {
    let parameters = libc::sched_param { sched_priority };
    // SAFETY: pid 0 is the calling thread; the parameters are only read, from a live struct.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if let Err(error) = check(result.into()) {
        tracing::trace!(%error, policy, "scheduling stays as it is");
    }
}
