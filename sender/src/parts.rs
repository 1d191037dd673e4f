//! What a migration works with.

use crate::copy::Copier;
use crate::dirty::DirtyTracker;
use crate::freeze::Freezer;
use crate::progress::Progress;
use crate::sink::{PageSink, TargetState};
use pageferry_common::BufferPool;

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
