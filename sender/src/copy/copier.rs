//! Copies the memory of the target, round by round: what is known of the target together with what the
//! receiver holds of it.

use crate::baseline::{Baseline, ContentHashes};
use crate::copy::pass::{ImageSender, Pass, Scan, Scanned, UnderDump};
use crate::copy::stream::StreamError;
use crate::dirty::{DirtyTracker, Run, TrackError, written_to_segment};
use crate::freeze::{Frozen, FrozenProcess};
use crate::sink::PageSink;
use crate::target::process::Process;
use crate::target::segment::{Segment, SegmentKey};
use crate::target::sharing::Sharing;
use crate::target::tree::{ListError, Tree};
use crate::target::vma::Vma;
use pageferry_common::{BufferPool, PageSet};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

/// Why the memory of the target could not be listed, or its writes could not be tracked.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// Listing it failed.
    #[error(transparent)]
    List(#[from] ListError),
    /// The tracker failed.
    #[error(transparent)]
    Track(#[from] TrackError),
}

/// Why the images of a round could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Reading or sending pages failed.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Two segments on different mounts have the same inode number, and so the same image name.
    #[error("two shared segments have inode number {0}; CRIU's images cannot distinguish them")]
    Ambiguous(u64),
}

/// Whether to compare pages by content that a tracker reports as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WrittenPages {
    /// Pages whose writes are tracked are sent whenever they are written.
    Send,
    /// All written pages are compared, and sent only if their content changed.
    Compare,
}

/// Copies the memory of one target.
#[derive(Debug)]
pub struct Copier {
    written_pages: WrittenPages,
    tree: Tree,
    /// Which processes may share private pages.
    sharing: Sharing,
    /// Baselines of the processes in `tree`, by PID.
    processes: BTreeMap<i32, Baseline>,
    /// Baselines of the segments in `tree`.
    segments: BTreeMap<SegmentKey, Baseline>,
    /// Number of pages sent in the last round whose writes are not tracked: the best estimate of how many of
    /// them will be dirty in the next.
    untracked_sent: u64,
    /// Scratch space for scans.
    runs: Vec<Run>,
}

impl Copier {
    /// Creates a copier for the process tree under `root`, which has not been listed yet.
    ///
    /// # Errors
    /// Errors of the kernel, if it has no memfd.
    pub fn new(root: i32, written_pages: WrittenPages) -> io::Result<Self> {
        Ok(Self {
            written_pages,
            tree: Tree::new(root)?,
            sharing: Sharing::default(),
            processes: BTreeMap::new(),
            segments: BTreeMap::new(),
            untracked_sent: 0,
            runs: Vec::with_capacity(1 << 16),
        })
    }

    /// Looks through all processes of the host for those that may share private memory with the target. Called
    /// before each freeze, because it takes a few microseconds for each process.
    pub fn survey_host(&mut self) {
        self.sharing.survey();
    }

    /// Lists the mappings of the frozen target, ends the tracker's epoch and begins the next. The cost does
    /// not depend on the amount of memory, except with soft-dirty bits, which take a walk of the page tables.
    ///
    /// # Errors
    /// [`CollectError`]. A process that exited is not an error.
    pub fn collect(
        &mut self,
        frozen: &mut Frozen<'_>,
        tracker: &mut dyn DirtyTracker,
    ) -> Result<(), CollectError> {
        self.list(frozen.processes(), tracker)?;
        for process in self.tree.processes.values() {
            tracker.rearm(frozen, process)?;
        }
        self.choose_comparisons(tracker);
        Ok(())
    }

    /// Lists the mappings of a target that something else keeps stopped, and ends the tracker's epoch; no
    /// other begins. Until [`Copier::assume_untracked_children`] is called, every process is assumed to wait
    /// for its children.
    ///
    /// # Errors
    /// [`CollectError`]. A process that exited is not an error.
    pub fn collect_stopped(
        &mut self,
        processes: &[FrozenProcess],
        tracker: &mut dyn DirtyTracker,
    ) -> Result<(), CollectError> {
        self.tree.children_are_waited_for = true;
        self.list(processes, tracker)?;
        for process in self.tree.processes.values() {
            tracker.conclude(process)?;
        }
        self.choose_comparisons(tracker);
        Ok(())
    }

    /// Assumes that a process does not wait for its children (`SA_NOCLDWAIT`), so that some may have come and
    /// gone unnoticed and have written to shared memory.
    pub fn assume_untracked_children(&mut self) {
        self.tree.children_are_waited_for = false;
    }

    fn list(
        &mut self,
        processes: &[FrozenProcess],
        tracker: &mut dyn DirtyTracker,
    ) -> Result<(), ListError> {
        for pid in self.tree.list(processes)? {
            self.processes.remove(&pid);
            tracker.forget(pid);
        }
        Ok(())
    }

    /// Decides for each process which of its pages are compared by content, now that the tracker has seen it.
    fn choose_comparisons(&mut self, tracker: &dyn DirtyTracker) {
        for (&pid, process) in &self.tree.processes {
            let baseline = self.processes.entry(pid);
            let baseline = baseline.or_insert_with(|| Baseline::new(ContentHashes::nowhere()));
            let compare_all = self.written_pages == WrittenPages::Compare
                || process.direct_io
                || tracker.untracked(pid);
            let hashes = baseline.hashes_mut();
            if compare_all {
                hashes.compare_everything();
            } else {
                let doubtful = process.vmas.iter().filter(|vma| vma.is_doubtful());
                let untracked = tracker.untracked_mappings(pid).iter().copied();
                hashes.compare_only(doubtful.map(|vma| vma.range).chain(untracked));
            }
        }
    }

    /// Looks through the descriptors of every process for segments that no process maps, and for ways in
    /// which devices write memory. Forgets segments that no process has any more. In a pre-dump round the
    /// target runs meanwhile.
    ///
    /// # Errors
    /// [`CollectError::List`]. A process that exited is not an error.
    pub fn survey_descriptors(&mut self) -> Result<(), CollectError> {
        self.tree.survey_descriptors()?;
        for (pid, baseline) in &mut self.processes {
            if self.tree.processes.get(pid).is_some_and(|it| it.direct_io) {
                baseline.hashes_mut().compare_everything();
            }
        }
        let segments = &self.tree.segments;
        self.segments.retain(|key, _| segments.contains_key(key));
        Ok(())
    }

    /// Sends every image of the round.
    ///
    /// # Errors
    /// [`SendError`]. In a pre-dump round, a process that exits is not an error, and neither is a page that
    /// cannot be read.
    pub fn send(
        &mut self,
        pass: Pass,
        tracker: &mut dyn DirtyTracker,
        sink: &mut dyn PageSink,
        pool: &BufferPool,
    ) -> Result<Scanned, SendError> {
        self.send_images(pass, None, tracker, sink, pool)
    }

    /// Sends every image of the final round, while the freezer keeps the target frozen.
    ///
    /// # Errors
    /// [`SendError`].
    pub fn send_frozen(
        &mut self,
        frozen: &mut Frozen<'_>,
        tracker: &mut dyn DirtyTracker,
        sink: &mut dyn PageSink,
        pool: &BufferPool,
    ) -> Result<Scanned, SendError> {
        self.send_images(Pass::Final, Some(frozen), tracker, sink, pool)
    }

    fn send_images(
        &mut self,
        pass: Pass,
        frozen: Option<&mut Frozen<'_>>,
        tracker: &mut dyn DirtyTracker,
        sink: &mut dyn PageSink,
        pool: &BufferPool,
    ) -> Result<Scanned, SendError> {
        self.untracked_sent = 0;
        let mut images = ImageSender {
            scan: Scan {
                pass,
                tracker,
                runs: &mut self.runs,
                time: Duration::ZERO,
            },
            sink,
            pool,
            sharing: &mut self.sharing,
            frozen,
            scanned: Scanned::default(),
        };
        for (pid, process) in &self.tree.processes {
            let baseline = self.processes.get_mut(pid);
            let baseline = baseline.expect("every listed process has a baseline");
            self.untracked_sent += images.process(process, baseline)?;
        }
        if pass == Pass::PreCopy {
            self.tree.check_outside_mappings();
        }
        let children_are_waited_for = self.tree.children_are_waited_for;
        let mut inodes = BTreeSet::new();
        for (&key, segment) in &mut self.tree.segments {
            if !inodes.insert(key.inode) {
                return Err(SendError::Ambiguous(key.inode));
            }
            let baseline = self.segments.entry(key);
            let baseline = baseline.or_insert_with(|| Baseline::new(ContentHashes::everywhere()));
            let begun = Instant::now();
            let segment_scan = SegmentScan {
                processes: &self.tree.processes,
                children_are_waited_for,
                held: baseline.pages(),
            };
            let written = segment_scan.written(segment, pass, &mut *images.scan.tracker);
            let took = begun.elapsed();
            tracing::debug!(
                segment = key.inode,
                written_pages = written.as_ref().map(PageSet::pages),
                seconds = took.as_secs_f64(),
                "segment scanned"
            );
            images.scan.time += took;
            self.untracked_sent += images.segment(key, segment, baseline, written)?;
        }
        let mut scanned = images.scanned;
        scanned.scan_time += images.scan.time;
        Ok(scanned)
    }

    /// Records that the receiver acked the last round.
    pub fn acked(&mut self) {
        let baselines = self
            .processes
            .values_mut()
            .chain(self.segments.values_mut());
        baselines.for_each(Baseline::acked);
    }

    /// Records that the last round was lost: the receiver does not store it. The next round resends the pages
    /// that this one found changed.
    pub fn lost(&mut self, tracker: &mut dyn DirtyTracker) {
        let baselines = self
            .processes
            .values_mut()
            .chain(self.segments.values_mut());
        baselines.for_each(Baseline::lost);
        // The lost round may not have scanned all of them, and their writes are not reported again.
        self.tree.distrust_page_tables_of_segments();
        tracker.lost();
    }

    /// Returns the number of pages that would have to be sent now: those that the tracker reports, and for
    /// untracked memory as many as the last round sent.
    #[must_use]
    pub fn pending_pages(&self, tracker: &mut dyn DirtyTracker) -> u64 {
        let mut pages = self.untracked_sent;
        for (pid, process) in &self.tree.processes {
            let baseline = self.processes.get(pid);
            if baseline.is_some_and(|baseline| baseline.hashes().compares_everything()) {
                continue;
            }
            for vma in process.vmas.iter().filter(|vma: &&Vma| vma.is_private()) {
                // Memory that is gone has no dirty pages.
                pages += tracker.pending(process, vma).ok().flatten().unwrap_or(0);
            }
        }
        pages
    }

    /// Returns the PID of a process that exited since it was listed, if there is one.
    #[must_use]
    pub fn first_exited(&self) -> Option<i32> {
        self.tree.first_exited()
    }

    /// Whether the root process is alive.
    #[must_use]
    pub fn root_alive(&self) -> bool {
        self.tree.root_alive()
    }

    /// Returns the numbers of processes and segments in the last round.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        (self.tree.processes.len(), self.tree.segments.len())
    }
}

/// What it takes to find out which pages of a segment were written.
struct SegmentScan<'a> {
    processes: &'a BTreeMap<i32, Process>,
    children_are_waited_for: bool,
    /// Pages of the segment that the receiver holds.
    held: &'a PageSet,
}

impl SegmentScan<'_> {
    /// Returns the pages that may have been written since the last round, none if the pass leaves the segment
    /// out, or `None` if that is unknown and all pages must be compared.
    fn written(
        &self,
        segment: &Segment,
        pass: Pass,
        tracker: &mut dyn DirtyTracker,
    ) -> Option<PageSet> {
        let running = pass == Pass::PreCopy;
        let trusted = segment.tracked && (self.children_are_waited_for || running);
        // CRIU's dump shows whether processes wait for their children: what it disproves is scanned
        // afterwards.
        let doubted = segment.tracked && !trusted;
        let direct_io = |pid| self.processes.get(pid).is_some_and(|it| it.direct_io);
        let changes = segment.executable || segment.mappings.iter().any(|it| direct_io(&it.pid));
        if !pass.includes(UnderDump::unstable_if(changes || doubted)) {
            Some(PageSet::new())
        } else if trusted {
            written_to_segment(segment, self.processes, self.held, tracker)
        } else if running && segment.trackable() {
            // The result is incomplete, but the scan begins the epoch of the next round.
            written_to_segment(segment, self.processes, self.held, tracker).and(None)
        } else {
            None
        }
    }
}
