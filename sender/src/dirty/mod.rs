//! Finds the pages that were written since the last round: three trackers behind one trait, chosen once.
//!
//! [`DirtyTracker::rearm`] ends one epoch and begins the next in one call, so that no caller can collect
//! written pages and forget to arm. A scan may destroy the record of an epoch's writes. A page that a scan
//! lists but that cannot be read still needs no list of its own: it is not announced, and only a page that
//! the last round announced can become an in-parent entry.

mod content_hash;
mod pages;
mod segment;
mod soft_dirty;
mod uffd_wp;

pub use segment::written_to_segment;

use crate::freeze::{FreezeError, Frozen};
use crate::target::process::Process;
use crate::target::vma::{Part, Vma};
use pageferry_common::PageRange;
use std::io;

/// The tracker to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TrackerChoice {
    /// The first that this kernel supports of uffd, soft-dirty and hash.
    Auto,
    /// userfaultfd write-protection and PAGEMAP_SCAN (Linux 6.7).
    Uffd,
    /// Soft-dirty bits (CONFIG_MEM_SOFT_DIRTY; never on arm64).
    SoftDirty,
    /// A hash of every page: works on every kernel, but reads all memory in every round.
    Hash,
}

/// A run of populated pages of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The pages.
    pub range: PageRange,
    /// Whether they were, or may have been, written in the epoch that the last rearm ended.
    pub written: bool,
}

/// Why the writes of a process cannot be tracked.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The freezer process failed.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// A system call failed.
    #[error("cannot track the writes of process {pid}")]
    Io {
        /// PID of the process.
        pid: i32,
        /// Error of the kernel.
        source: io::Error,
    },
}

/// Finds dirty pages.
pub trait DirtyTracker {
    /// Returns the name of the tracker, as on the command line.
    fn name(&self) -> &'static str;

    /// Returns whether all pages of the process count as written, so that contents must be compared. Valid
    /// after the first rearm of the process.
    fn untracked(&self, pid: i32) -> bool;

    /// Returns those mappings of a tracked process whose pages all count as written, so that contents must be
    /// compared, in ascending order. Valid after the first rearm of the process.
    fn untracked_mappings(&self, _pid: i32) -> &[PageRange] {
        &[]
    }

    /// Ends an epoch and begins the next for one process of the frozen target.
    ///
    /// # Errors
    /// [`TrackError`]. A process that exited is not an error.
    fn rearm(&mut self, frozen: &mut Frozen<'_>, process: &Process) -> Result<(), TrackError>;

    /// Ends the last epoch for one process of a target that something else keeps stopped; no other begins.
    /// Pages that a scan lists as written afterwards were, or may have been, written since the last rearm.
    ///
    /// # Errors
    /// [`TrackError`]. A process that exited is not an error.
    fn conclude(&mut self, process: &Process) -> Result<(), TrackError>;

    /// Appends the populated pages of a part of a private mapping to `runs`, in ascending order. The target
    /// may run.
    ///
    /// # Errors
    /// `ESRCH` if that memory is gone.
    fn scan(&mut self, process: &Process, part: Part, runs: &mut Vec<Run>) -> io::Result<()>;

    /// Returns, for each of these mappings of shared segments ([`Process::shared`]), the ranges through which
    /// its process may have written, in ascending order. The target may run.
    ///
    /// # Errors
    /// `ESRCH` if the memory of one is gone.
    fn scan_shared(
        &mut self,
        mappings: &[(&Process, PageRange)],
    ) -> io::Result<Vec<Vec<PageRange>>> {
        Ok(mappings.iter().map(|&(_, range)| vec![range]).collect())
    }

    /// Returns the number of pages of a mapping that were written so far in the current epoch; `None` if its
    /// writes are not tracked.
    ///
    /// # Errors
    /// `ESRCH` if that memory is gone.
    fn pending(&mut self, process: &Process, vma: &Vma) -> io::Result<Option<u64>>;

    /// Records that the round of the last epoch was lost, possibly before every process was scanned. Writes
    /// that a scan has reported are not reported again: the caller keeps them.
    fn lost(&mut self) {}

    /// Drops the state of a process that exited.
    fn forget(&mut self, pid: i32);
}

/// Why the chosen tracker is unavailable.
#[derive(Debug, thiserror::Error)]
#[error("this kernel does not support {tracker} tracking: {why}")]
pub struct NoTracker {
    tracker: &'static str,
    why: String,
}

/// Creates a tracker, and checks that this kernel supports it.
///
/// # Errors
/// [`NoTracker`] if the chosen tracker is unavailable.
pub fn probe(choice: TrackerChoice) -> Result<Box<dyn DirtyTracker>, NoTracker> {
    let uffd = || {
        uffd_wp::UffdWp::probe().map_err(|error| NoTracker {
            tracker: "userfaultfd",
            why: format!("{error}; it requires Linux 6.7 or later on x86-64"),
        })
    };
    let soft_dirty = || {
        soft_dirty::SoftDirty::probe().map_err(|error| NoTracker {
            tracker: "soft-dirty",
            why: format!("{error}; it requires CONFIG_MEM_SOFT_DIRTY"),
        })
    };
    let hash = || -> Result<Box<dyn DirtyTracker>, NoTracker> {
        match content_hash::ContentHash::probe() {
            Ok(tracker) => Ok(Box::new(tracker)),
            Err(error) => Err(NoTracker {
                tracker: "hash",
                why: format!("{error}; it requires /proc/PID/pagemap"),
            }),
        }
    };
    match choice {
        TrackerChoice::Uffd => Ok(Box::new(uffd()?)),
        TrackerChoice::SoftDirty => Ok(Box::new(soft_dirty()?)),
        TrackerChoice::Hash => hash(),
        TrackerChoice::Auto => match (uffd(), soft_dirty()) {
            (Ok(tracker), _) => Ok(Box::new(tracker)),
            (Err(_), Ok(tracker)) => Ok(Box::new(tracker)),
            (Err(no_uffd), Err(no_soft_dirty)) => {
                tracing::warn!(
                    event = "writes_untracked",
                    %no_uffd, %no_soft_dirty,
                    "writes cannot be tracked: every round reads all memory; hashes take 4 MiB per GiB"
                );
                hash()
            }
        },
    }
}
