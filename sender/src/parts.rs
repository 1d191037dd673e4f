//! What a migration works with.

use crate::copy::stream::StreamError;
use crate::copy::{Copier, SendError};
use crate::dirty::DirtyTracker;
use crate::freeze::Freezer;
use crate::progress::Progress;
use crate::sink::{PageSink, TargetState};
use pageferry_common::BufferPool;
use std::time::{Duration, Instant};

/// How long to wait for the end of an exit that is under way.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// How often to check for it.
const EXIT_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// The components of a migration, all of them set up before the first freeze.
pub struct Parts<'a> {
    /// Freezes the target.
    pub freezer: &'a mut Freezer,
    /// Lists and sends the memory of the target.
    pub copier: &'a mut Copier,
    /// Finds dirty pages.
    pub tracker: &'a mut dyn DirtyTracker,
    /// Connection to the receiver.
    pub sink: &'a mut dyn PageSink,
    /// Buffers between reading and sending.
    pub pool: &'a BufferPool,
    /// Progress line on the terminal.
    pub progress: &'a Progress,
}

impl Parts<'_> {
    /// Runs `action`, which freezes the target and thaws it again, with the shorter timeout that applies to
    /// the receiver meanwhile (`--max-frozen`).
    pub(crate) fn with_frozen_timeout<T>(&mut self, action: impl FnOnce(&mut Self) -> T) -> T {
        self.sink.set_target_state(TargetState::Frozen);
        let result = action(self);
        self.sink.set_target_state(TargetState::Running);
        result
    }
}

/// Returns the PID of a process that exited while the target was frozen: killed by the OOM killer, for example.
/// No image of it is complete. `failure` is the error of the round, if it failed.
pub(crate) fn exited_process(copier: &Copier, failure: Option<&SendError>) -> Option<i32> {
    // The kernel releases the memory of a process some time before it reports the exit.
    let memory_is_gone = matches!(
        failure,
        Some(SendError::Stream(StreamError::Source(error))) if error.raw_os_error() == Some(libc::ESRCH)
    );
    let deadline = Instant::now() + EXIT_TIMEOUT;
    loop {
        let exited = copier.first_exited();
        if exited.is_some() || !memory_is_gone || Instant::now() >= deadline {
            return exited;
        }
        std::thread::sleep(EXIT_POLL_INTERVAL);
    }
}
