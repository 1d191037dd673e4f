//! Which pages were written since the last round: three ways behind one trait, probed once.
//!
//! [`DirtyTracker::rearm`] ends one epoch and begins the next in one call, so nobody can collect
//! and forget to arm. What an epoch's bits say is destroyed by reading them; that a page which
//! could not be read is sent later all the same needs no list of its own: it was not announced,
//! and only what was announced in the last round can be an in-parent entry.

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

/// The way to find dirty pages, as asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TrackerChoice {
    /// The first that this kernel has of: uffd, soft-dirty, hash.
    Auto,
    /// userfaultfd write-protection and PAGEMAP_SCAN (Linux 6.7).
    Uffd,
    /// Soft-dirty bits (CONFIG_MEM_SOFT_DIRTY; never on arm64).
    SoftDirty,
    /// Compare a hash of every page: needs nothing of the kernel, reads all memory every round.
    Hash,
}

/// A run of populated pages that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The pages.
    pub range: PageRange,
    /// Whether they were written in the epoch that the last rearm ended (or may have been).
    pub written: bool,
}

/// Why a tracker cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The freezer process failed.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The kernel said no.
    #[error("cannot track the writes of process {pid}")]
    Io {
        /// The process.
        pid: i32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// One way to find dirty pages.
pub trait DirtyTracker {
    /// Its name, as on the command line.
    fn name(&self) -> &'static str;

    /// Whether this process's written pages cannot be told apart (everything counts as written),
    /// so that contents must be compared. Known after its first rearm.
    fn untracked(&self, pid: i32) -> bool;

    /// Ends an epoch and begins the next for one process of a stopped tree.
    ///
    /// # Errors
    /// [`TrackError`]. A process that is gone is not an error.
    fn rearm(&mut self, frozen: &mut Frozen<'_>, task: &Process) -> Result<(), TrackError>;

    /// Ends the last epoch of one process of a tree that somebody else keeps stopped; none begins.
    /// What a scan lists as written was, or may have been, written since the last rearm.
    ///
    /// # Errors
    /// [`TrackError`]. A process that is gone is not an error.
    fn conclude(&mut self, task: &Process) -> Result<(), TrackError>;

    /// Lists the populated pages of a part of a private mapping, ascending; the tree may run.
    ///
    /// # Errors
    /// `ESRCH` if that memory is gone.
    fn scan(&mut self, task: &Process, part: Part, runs: &mut Vec<Run>) -> io::Result<()>;

    /// For each of these mappings of shared segments ([`Process::shared`]), lists the parts through which its
    /// process may have written, ascending; the tree may run.
    ///
    /// # Errors
    /// `ESRCH` if the memory of one is gone.
    fn scan_shared(
        &mut self,
        mappings: &[(&Process, PageRange)],
    ) -> io::Result<Vec<Vec<PageRange>>> {
        Ok(mappings.iter().map(|&(_, range)| vec![range]).collect())
    }

    /// How many pages of a mapping were written so far in the current epoch, if that can be told
    /// without ending it.
    ///
    /// # Errors
    /// `ESRCH` if that memory is gone.
    fn pending(&mut self, task: &Process, vma: &Vma) -> io::Result<Option<u64>>;

    /// The round of the last epoch did not arrive, perhaps before every process was scanned. What a scan tells
    /// once and only once, whoever scanned remembers.
    fn lost(&mut self) {}

    /// The process is gone.
    fn forget(&mut self, pid: i32);
}

/// Why there is no tracker as asked for.
#[derive(Debug, thiserror::Error)]
#[error("this kernel has no {tracker} tracking: {why}")]
pub struct NoTracker {
    tracker: &'static str,
    why: String,
}

/// Finds out once what this kernel can.
///
/// # Errors
/// [`NoTracker`] if the one asked for is not there.
pub fn probe(choice: TrackerChoice) -> Result<Box<dyn DirtyTracker>, NoTracker> {
    let uffd = || {
        uffd_wp::UffdWp::probe().map_err(|error| NoTracker {
            tracker: "userfaultfd",
            why: format!("{error}; it takes Linux 6.7 or later, on x86-64"),
        })
    };
    let soft_dirty = || {
        soft_dirty::SoftDirty::probe().map_err(|error| NoTracker {
            tracker: "soft-dirty",
            why: format!("{error}; it takes CONFIG_MEM_SOFT_DIRTY"),
        })
    };
    let hash = || -> Result<Box<dyn DirtyTracker>, NoTracker> {
        match content_hash::ContentHash::probe() {
            Ok(tracker) => Ok(Box::new(tracker)),
            Err(error) => Err(NoTracker {
                tracker: "hash",
                why: format!("{error}; it takes /proc/PID/pagemap"),
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
                    %no_uffd, %no_soft_dirty,
                    "comparing contents: every round reads all memory, and costs 4 MiB of ours a GiB"
                );
                hash()
            }
        },
    }
}
