//! One pass over the target's memory: scans a process or a segment, and sends its image.

use crate::baseline::Baseline;
use crate::copy::populated::Populated;
use crate::copy::source::{Access, PageSource, ProcessSource, SegmentSource};
use crate::copy::stream::{Comparison, ImageStream, Outcome, ScanKind, StreamError};
use crate::dirty::{DirtyTracker, Run};
use crate::freeze::Frozen;
use crate::sink::PageSink;
use crate::target::is_gone;
use crate::target::process::Process;
use crate::target::segment::{Segment, SegmentKey};
use crate::target::sharing::Sharing;
use crate::target::vma::{Class, Part, Vma};
use pageferry_common::wire::{EntryKind, RoundKind};
use pageferry_common::{BufferPool, ImageId, PAGE_SIZE, PageRange, PageSet};
use std::io;
use std::time::{Duration, Instant};

/// Number of pages scanned at once: bounds the list of runs, whatever the size of the mapping. A multiple of
/// every huge page size, because a hugetlb page is protected as a whole or not at all.
const SCAN_WINDOW_PAGES: u64 = (1 << 30) / PAGE_SIZE;

/// Which memory a round scans. The rest is announced as unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// All memory, while the target runs: pages that this pass misses are found by the next round.
    PreCopy,
    /// All memory of the stopped target: no page may be missed. The same holds for the passes below.
    Final,
    /// Memory that CRIU leaves alone while it dumps the stopped processes. CRIU temporarily puts instructions
    /// of its own into executable mappings, and devices may still be about to write.
    DuringDump,
    /// The memory that [`Pass::DuringDump`] left out.
    AfterDump,
}

impl Pass {
    /// The kind of such a round.
    #[must_use]
    pub fn kind(self) -> RoundKind {
        match self {
            Self::PreCopy | Self::DuringDump => RoundKind::PreDump,
            Self::Final | Self::AfterDump => RoundKind::Final,
        }
    }

    /// Whether the pass scans this memory.
    pub(super) fn includes(self, memory: UnderDump) -> bool {
        match self {
            Self::PreCopy | Self::Final => true,
            Self::DuringDump => memory == UnderDump::Stable,
            Self::AfterDump => memory == UnderDump::Unstable,
        }
    }
}

/// Whether memory may change, or become doubtful, while CRIU dumps the stopped target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UnderDump {
    Stable,
    Unstable,
}

impl UnderDump {
    pub(super) fn unstable_if(may_change: bool) -> Self {
        match may_change {
            true => Self::Unstable,
            false => Self::Stable,
        }
    }
}

/// What a round scanned.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scanned {
    /// Number of populated pages.
    pub pages: u64,
    /// Number of pages that were read only to find out whether they changed.
    pub compared: u64,
    /// Time spent on scans and on comparing contents.
    pub scan_time: Duration,
}

impl Scanned {
    fn add(&mut self, outcome: &Outcome) {
        self.pages += outcome.scanned_pages;
        self.compared += outcome.compared_pages;
        self.scan_time += outcome.compare_time;
    }
}

/// Sends the images of one round.
pub(super) struct ImageSender<'a, 'f> {
    pub(super) scan: Scan<'a>,
    pub(super) sink: &'a mut dyn PageSink,
    pub(super) pool: &'a BufferPool,
    /// Which processes may share private pages.
    pub(super) sharing: &'a mut Sharing,
    /// The freezer's guard, if the freezer keeps the target stopped.
    pub(super) frozen: Option<&'a mut Frozen<'f>>,
    /// What was scanned of the images that were sent completely, apart from [`Scan::time`].
    pub(super) scanned: Scanned,
}

impl ImageSender<'_, '_> {
    /// Sends the image of one process. Returns the number of dirty pages among those whose writes are not
    /// tracked.
    ///
    /// # Errors
    /// [`StreamError`]. In a pre-dump round, a process that exits is not an error.
    pub(super) fn process(
        &mut self,
        process: &Process,
        baseline: &mut Baseline,
    ) -> Result<u64, StreamError> {
        self.sink.open(process.image())?;
        self.scan.runs.clear();
        let scan_kind = match process.direct_io || self.scan.tracker.untracked(process.pid) {
            // Every page counts as written in each round, and is compared.
            true => ScanKind::Repeatable,
            false => ScanKind::Destructive,
        };
        let copy = self.sink.supports_copy().then_some(EntryKind::Copy);
        let access = match (self.scan.pass, &mut self.frozen) {
            (Pass::PreCopy, _) => Access::Running,
            (Pass::Final | Pass::DuringDump | Pass::AfterDump, Some(frozen)) => {
                Access::Traced(frozen)
            }
            (Pass::Final | Pass::DuringDump | Pass::AfterDump, None) => Access::Stopped,
        };
        let mut source = ProcessSource::new(process, self.sharing, access);
        let mut stream =
            ImageStream::new(&mut *self.sink, self.pool, &mut source, baseline, scan_kind);
        let result = self.scan.process(process, copy, &mut stream);
        let result = result.and_then(|()| stream.flush());
        let mut outcome = stream.into_outcome();
        let unreadable_pages = source.unreadable_pages();
        if unreadable_pages > 0 {
            tracing::warn!(
                event = "pages_unreadable",
                process.pid,
                unreadable_pages,
                "pages that this kernel lets only a tracer read: only a final round sends them"
            );
        }
        match result {
            Ok(()) => {
                self.scanned.add(&outcome);
                baseline.sent(outcome.announced, outcome.changed);
                Ok(outcome.untracked_pages)
            }
            // It exited, or called exec: its image ends here, and none of its pages becomes an in-parent
            // entry.
            Err(StreamError::Source(error))
                if is_gone(&error) && self.scan.pass.kind() == RoundKind::PreDump =>
            {
                tracing::debug!(process.pid, %error, "process exited in the middle of its image");
                let changed = baseline.pages().clone();
                baseline.sent(PageSet::new(), changed);
                Ok(0)
            }
            Err(error) => {
                // The stream may not have taken all runs of the last scan.
                if scan_kind == ScanKind::Destructive {
                    let written = self.scan.runs.iter().filter(|run| run.written);
                    let written = written.map(|run| run.range).collect();
                    outcome.changed = outcome.changed.union(&written);
                }
                baseline.send_failed(&outcome.changed);
                Err(error)
            }
        }
    }

    /// Sends the image of one shared segment. Only the pages in `written` may have changed; `None` if that is
    /// unknown. Returns the number of pages that were dirty.
    ///
    /// # Errors
    /// [`StreamError`].
    pub(super) fn segment(
        &mut self,
        key: SegmentKey,
        segment: &mut Segment,
        baseline: &mut Baseline,
        written: Option<PageSet>,
    ) -> Result<u64, StreamError> {
        self.sink.open(ImageId::Shmem(key.inode))?;
        if let Some(name) = &segment.memfd {
            self.sink.memfd_name(name)?;
        }
        let file = segment.file.try_clone().map_err(StreamError::Source)?;
        let size = file.metadata().map_err(StreamError::Source)?.len();
        let all = PageRange::from_bounds(0, size.next_multiple_of(PAGE_SIZE));
        list_segment_runs(self.scan.runs, all, baseline.pages(), written.as_ref());
        let mut source = SegmentSource { file: &file };
        let mut stream = ImageStream::new(
            &mut *self.sink,
            self.pool,
            &mut source,
            baseline,
            ScanKind::Repeatable,
        );
        stream.assume_changed(written.unwrap_or_default());
        let result = send_segment_runs(self.scan.runs, segment, Populated::new(&file), &mut stream);
        let result = result.and_then(|()| stream.flush());
        let outcome = stream.into_outcome();
        if let Err(error) = result {
            baseline.send_failed(&outcome.changed);
            return Err(error);
        }
        self.scanned.add(&outcome);
        baseline.sent(outcome.announced, outcome.changed);
        Ok(outcome.sent_pages)
    }
}

/// Lists the pages of a segment that are `held` or `written`; `all` of them if it is unknown which were written.
fn list_segment_runs(
    runs: &mut Vec<Run>,
    all: Option<PageRange>,
    held: &PageSet,
    written: Option<&PageSet>,
) {
    runs.clear();
    match written {
        Some(written) => {
            for range in held.union(written).iter() {
                written.split(range, |range, written| runs.push(Run { range, written }));
            }
        }
        None => runs.extend(all.map(|range| Run {
            range,
            written: true,
        })),
    }
}

/// Adds the populated pages of these runs of a segment to its image.
fn send_segment_runs(
    runs: &[Run],
    segment: &mut Segment,
    mut populated: Populated<'_>,
    stream: &mut ImageStream<'_>,
) -> Result<(), StreamError> {
    let kept = Some(EntryKind::Parent);
    for &run in runs {
        if !run.written {
            stream.run(run, kept)?;
            continue;
        }
        // Reading a page that does not exist would create it.
        let mut rest = Some(run.range);
        while let Some(wanted) = rest {
            let found = populated.at(wanted, segment.removed_pages.as_ref());
            let Some(found) = found.map_err(StreamError::Source)? else {
                break;
            };
            if let Some(range) = found.intersect(wanted) {
                segment.watch(range);
                stream.run(Run { range, ..run }, kept)?;
            }
            rest = PageRange::from_bounds(found.end().max(wanted.start()), wanted.end());
        }
    }
    Ok(())
}

/// Scans the private memory of processes.
pub(super) struct Scan<'a> {
    pub(super) pass: Pass,
    pub(super) tracker: &'a mut dyn DirtyTracker,
    /// Runs of the last scan; scratch space.
    pub(super) runs: &'a mut Vec<Run>,
    /// Time spent on scans.
    pub(super) time: Duration,
}

impl Scan<'_> {
    /// Adds all pages of a process to its image. `copy` is the entry kind for pages that the receiver stores
    /// again, if it can.
    fn process(
        &mut self,
        process: &Process,
        copy: Option<EntryKind>,
        stream: &mut ImageStream<'_>,
    ) -> Result<(), StreamError> {
        for vma in &process.vmas {
            let kept = match (vma.class, self.pass.kind()) {
                (Class::Foreign | Class::Segment, _) => continue,
                // Restore reads hugetlb pages from the newest directory only.
                (Class::Private { hugetlb: true }, RoundKind::Final) => copy,
                (Class::Private { .. } | Class::Whole, _) => Some(EntryKind::Parent),
            };
            let memory = UnderDump::unstable_if(process.may_change_during_dump(vma));
            if !self.pass.includes(memory) {
                let mut held = Vec::new();
                let pages = stream.held();
                pages.split(vma.range, |range, is_held| {
                    held.extend(is_held.then_some(range));
                });
                for range in held {
                    let written = false;
                    stream.run(Run { range, written }, kept)?;
                }
            } else if vma.class == Class::Whole {
                let (range, written) = (vma.range, true);
                stream.run(Run { range, written }, kept)?;
            } else {
                self.mapping(process, vma, kept, stream)?;
            }
        }
        Ok(())
    }

    /// Scans a private mapping and adds its pages.
    fn mapping(
        &mut self,
        process: &Process,
        vma: &Vma,
        kept: Option<EntryKind>,
        stream: &mut ImageStream<'_>,
    ) -> Result<(), StreamError> {
        // While the target runs, a doubt resolves itself: the next round sees the write that is under way.
        let untracked = self.tracker.untracked_mappings(process.pid);
        stream.compare(match untracked.binary_search(&vma.range) {
            Ok(_) => Comparison::Always,
            Err(_) => Comparison::OfDoubtful,
        })?;
        let last = self.pass != Pass::PreCopy;
        let suspect = process.direct_io || last && vma.is_doubtful();
        let mut rest = Some(vma.range);
        while let Some(range) = rest {
            let (part, later) = range.split_at(SCAN_WINDOW_PAGES);
            rest = later;
            self.runs.clear();
            let begun = Instant::now();
            let part = Part {
                range: part.expect("a range is not empty"),
                ..vma.part()
            };
            let scanned = self.tracker.scan(process, part, self.runs);
            scanned.map_err(StreamError::Source)?;
            if last && vma.class == (Class::Private { hugetlb: true }) {
                let suspected = suspect_new_huge_pages(stream.source(), self.runs);
                suspected.map_err(StreamError::Source)?;
            }
            self.time += begun.elapsed();
            for run in &*self.runs {
                let written = run.written || suspect;
                stream.run(Run { written, ..*run }, kept)?;
            }
        }
        Ok(())
    }
}

/// Marks hugetlb pages as written that look clean but may be new (see [`Vma::is_doubtful`]). A new page is
/// all zero, and so are its first 4 KiB; the rest need not be read.
fn suspect_new_huge_pages(source: &mut dyn PageSource, runs: &mut Vec<Run>) -> io::Result<()> {
    /// The smallest huge page whose writes can be tracked.
    const HUGE_PAGE: u64 = (2 << 20) / PAGE_SIZE;
    let mut head = [0; PAGE_SIZE as usize];
    for run in std::mem::take(runs) {
        let mut rest = Some(run.range).filter(|_| !run.written);
        runs.extend(rest.is_none().then_some(run));
        while let Some(range) = rest {
            let (huge, later) = range.split_at(HUGE_PAGE);
            rest = later;
            let range = huge.expect("a range is not empty");
            head.fill(0);
            source.read(range.split_at(1).0.as_slice(), &mut head, &mut Vec::new())?;
            let written = head == [0; PAGE_SIZE as usize];
            runs.push(Run { range, written });
        }
    }
    Ok(())
}
