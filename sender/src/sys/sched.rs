//! Scheduling priority: while the target is frozen, the sender must not wait for a processor.

use super::check;

/// Guard that keeps the calling thread at real-time priority, before all ordinary threads. Best effort:
/// without `CAP_SYS_NICE` nothing changes, and a freeze on a busy machine may take a time slice longer.
#[derive(Debug)]
#[must_use]
pub struct RealtimePriority(());

impl RealtimePriority {
    /// Raises the priority of the calling thread.
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
    // SAFETY: the kernel reads one sched_param, which is alive. PID 0 stands for the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if let Err(error) = check(result.into()) {
        tracing::trace!(%error, policy, "cannot change the scheduling policy");
    }
}
