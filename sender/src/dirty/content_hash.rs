//! Tracking without support by the kernel: every populated page counts as written, so that every round reads
//! all pages and compares their hashes with those of the pages that the receiver holds.

use super::pages::{ScanMode, Scanner};
use super::{DirtyTracker, Run, TrackError};
use crate::freeze::Frozen;
use crate::target::process::Process;
use crate::target::vma::{Part, Vma};
use std::io;

/// Tracker for which every populated page may have been written.
#[derive(Debug)]
pub(super) struct ContentHash(Scanner);

impl ContentHash {
    /// Creates the tracker.
    ///
    /// # Errors
    /// Errors of opening `/proc/self/pagemap`.
    pub(super) fn probe() -> io::Result<Self> {
        Scanner::probe().map(Self)
    }
}

impl DirtyTracker for ContentHash {
    fn name(&self) -> &'static str {
        "hash"
    }

    fn untracked(&self, _: i32) -> bool {
        true
    }

    fn rearm(&mut self, _: &mut Frozen<'_>, _: &Process) -> Result<(), TrackError> {
        Ok(())
    }

    fn conclude(&mut self, _: &Process) -> Result<(), TrackError> {
        Ok(())
    }

    fn scan(&mut self, process: &Process, part: Part, runs: &mut Vec<Run>) -> io::Result<()> {
        let add = |range, _| {
            runs.push(Run {
                range,
                written: true,
            });
        };
        self.0
            .own_pages(&process.pagemap, part, 0, ScanMode::Report, add)
    }

    fn pending(&mut self, _: &Process, _: &Vma) -> io::Result<Option<u64>> {
        Ok(None)
    }

    fn forget(&mut self, _: i32) {}
}
