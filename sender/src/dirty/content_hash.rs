//! Content hashes: what needs nothing of the kernel. Every populated page is read every round and
//! compared by a cryptographic hash with what the receiver holds.

use super::pages::Scanner;
use super::{DirtyTracker, Run, TrackError};
use crate::freeze::Frozen;
use crate::target::process::Process;
use crate::target::vma::{Part, Vma};
use std::io;

/// The tracker: every populated page may have been written.
#[derive(Debug)]
pub struct ContentHash(Scanner);

impl ContentHash {
    /// Works everywhere.
    pub fn probe() -> io::Result<Self> {
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

    fn scan(&mut self, task: &Process, part: Part, runs: &mut Vec<Run>) -> io::Result<()> {
        self.0.own_pages(&task.pagemap, part, 0, false, |range, _| {
            runs.push(Run {
                range,
                written: true,
            });
        })
    }

    fn pending(&mut self, _: &Process, _: &Vma) -> io::Result<Option<u64>> {
        Ok(None)
    }

    fn forget(&mut self, _: i32) {}
}
