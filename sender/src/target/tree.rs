//! The tree's memory as remembered from round to round: processes and shared segments.

use crate::baseline::{Baseline, ContentHashes};
use crate::copy::populated::Populated;
use crate::copy::source::{PageSource, ProcessSource, SegmentSource};
use crate::copy::stream::{ImageStream, Sent, StreamError};
use crate::dirty::{DirtyTracker, Run, TrackError};
use crate::freeze::{Frozen, FrozenProcess};
use crate::sink::PageSink;
use crate::target::descriptors::descriptors;
use crate::target::process::{Process, namespace_depth};
use crate::target::segment::{Mapping, Segment, SegmentKey};
use crate::target::vma::{Class, KernelMounts, Part, list};
use pageferry_common::proc::meminfo::MemInfo;
use pageferry_common::proc::process::{children, threads};
use pageferry_common::wire::{EntryKind, RoundKind};
use pageferry_common::{BufferPool, ImageId, PAGE_SIZE, PageRange, PageSet};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::time::{Duration, Instant};

/// Pages scanned at once: bounds the list of runs, whatever the mapping's size. A multiple of
/// every huge page size, for a hugetlb page is protected whole or not at all.
const SCAN_WINDOW_PAGES: u64 = (1 << 30) / PAGE_SIZE;

/// Why the memory of the target could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// A process's files in `/proc`.
    #[error("cannot read what /proc says of process {pid}")]
    Proc {
        /// The process.
        pid: i32,
        /// What the kernel said.
        source: io::Error,
    },
    /// A shared segment.
    #[error("cannot open shared segment {inode} of process {pid}")]
    Segment {
        /// A process that maps it.
        pid: i32,
        /// Its inode number.
        inode: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why a round could not begin: the memory of the target could not be listed, or its writes not be tracked.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The listing.
    #[error(transparent)]
    List(#[from] ListError),
    /// The tracker.
    #[error(transparent)]
    Track(#[from] TrackError),
}

/// What of the tree a round looks at. Of the rest it says that it is as the receiver has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// All of it, while it runs: what is missed shows in the next round.
    PreCopy,
    /// All of it, while it is stopped for good: nothing may be missed. So for those below.
    Final,
    /// What CRIU leaves alone while it dumps the stopped processes. For a while, it has instructions of
    /// its own in their executable mappings; and devices may still be about to write.
    DuringDump,
    /// What [`Pass::DuringDump`] left out.
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

    /// Whether it looks at memory that CRIU `disturbs`, or does not.
    fn includes(self, disturbs: bool) -> bool {
        match self {
            Self::PreCopy | Self::Final => true,
            Self::DuringDump => !disturbs,
            Self::AfterDump => disturbs,
        }
    }
}

/// What sending a round looked at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scanned {
    /// Populated pages.
    pub pages: u64,
    /// Pages that were read only to see whether they changed.
    pub compared: u64,
    /// Time spent asking the kernel for them, and comparing contents.
    pub scan_time: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct Copier {
    mounts: KernelMounts,
    /// Compare written pages by content even where writes are tracked.
    skip_unchanged: bool,
    root: i32,
    /// How many PID namespaces deep the root is.
    depth: Option<usize>,
    tasks: BTreeMap<i32, Process>,
    segments: BTreeMap<SegmentKey, Segment>,
    /// Segments that some process mapped at the last freeze.
    mapped: BTreeSet<SegmentKey>,
    /// Whether it is known that no process has itself not told of its children's ends. Those that come
    /// and go would not be noticed.
    children_told: bool,
    /// Processes that had ended at the last freeze, and were not waited for.
    ended: BTreeSet<i32>,
    /// Pages sent in the last round of images whose writes are not tracked: the best guess at what
    /// they will have dirty next time.
    untracked_sent: u64,
    maps_text: Vec<u8>,
    runs: Vec<Run>,
}

impl Copier {
    /// Of the tree under `root` nothing is known yet.
    ///
    /// # Errors
    /// The kernel's, if it has no memfd.
    pub fn new(root: i32, skip_unchanged: bool) -> io::Result<Self> {
        Ok(Self {
            mounts: KernelMounts::probe()?,
            skip_unchanged,
            root,
            depth: None,
            tasks: BTreeMap::new(),
            segments: BTreeMap::new(),
            mapped: BTreeSet::new(),
            children_told: false,
            ended: BTreeSet::new(),
            untracked_sent: 0,
            maps_text: Vec::with_capacity(1 << 20),
            runs: Vec::with_capacity(1 << 16),
        })
    }

    /// Lists the mappings of the whole tree and ends the trackers' epoch, while it is stopped.
    /// Nothing here costs more for more memory (but with soft-dirty, whose page tables are walked).
    ///
    /// # Errors
    /// [`CollectError`]; a process that is gone is none.
    pub fn collect(
        &mut self,
        frozen: &mut Frozen<'_>,
        tracker: &mut dyn DirtyTracker,
    ) -> Result<(), CollectError> {
        let processes = frozen.processes().to_vec();
        self.collect_with(processes, tracker, |tracker, task| {
            tracker.rearm(frozen, task)
        })
    }

    /// The same for the last rounds, of a tree that somebody else keeps stopped. No process of it is taken
    /// to have asked not to be told of its children's ends ([`Copier::assume_untracked_children`]).
    ///
    /// # Errors
    /// [`CollectError`]; a process that is gone is none.
    pub fn collect_stopped(
        &mut self,
        processes: &[FrozenProcess],
        tracker: &mut dyn DirtyTracker,
    ) -> Result<(), CollectError> {
        self.children_told = true;
        self.collect_with(processes.to_vec(), tracker, |tracker, task| {
            tracker.conclude(task)
        })
    }

    /// A process may have asked not to be told of its children's ends (`SA_NOCLDWAIT`): then some may have
    /// come and gone, and have written to shared memory.
    pub fn assume_untracked_children(&mut self) {
        self.children_told = false;
    }

    fn collect_with(
        &mut self,
        processes: Vec<FrozenProcess>,
        tracker: &mut dyn DirtyTracker,
        mut end_epoch: impl FnMut(&mut dyn DirtyTracker, &Process) -> Result<(), TrackError>,
    ) -> Result<(), CollectError> {
        let before = self.tasks.len();
        self.forget_the_gone(&processes, tracker);
        let mut same_processes = self.tasks.len() == before;
        let mut mappings: BTreeMap<SegmentKey, Vec<Mapping>> = BTreeMap::new();
        let mut executable = BTreeSet::new();
        // A page table of 4 KiB for 2 MiB, that the target may not have needed.
        let mut tables_left = MemInfo::read().unwrap_or_default().available.unwrap_or(0) / 8;
        for process in processes {
            let pid = process.pid;
            let known = self.tasks.contains_key(&pid);
            match self.look_at(process) {
                Ok(()) => same_processes &= known,
                Err(error) if is_gone(&error) => {
                    same_processes = false;
                    self.tasks.remove(&pid);
                    tracker.forget(pid);
                    continue;
                }
                Err(source) => return Err(ListError::Proc { pid, source }.into()),
            }
            let task = self.tasks.get_mut(&pid).expect("just looked at");
            for vma in task.vmas.iter().filter(|vma| vma.class == Class::Segment) {
                let key = SegmentKey::of(vma);
                if vma.executable {
                    executable.insert(key);
                }
                mappings.entry(key).or_default().push(Mapping {
                    pid,
                    range: vma.range,
                    offset: vma.offset,
                });
                if let Entry::Vacant(unknown) = self.segments.entry(key) {
                    match Segment::open_mapped(process.tid, vma) {
                        Ok(file) => drop(unknown.insert(Segment::new(file))),
                        Err(error) if is_gone(&error) => {}
                        Err(source) => {
                            let inode = vma.inode;
                            return Err(ListError::Segment { pid, inode, source }.into());
                        }
                    }
                }
                let tables = vma.range.pages() * 8;
                let segment = self.segments.get(&key);
                if segment.is_some_and(Segment::trackable) && tables <= tables_left {
                    tables_left -= tables;
                    task.shared.push(vma.range);
                }
            }
            end_epoch(tracker, task)?;
            if self.skip_unchanged || task.direct_io || tracker.untracked(pid) {
                task.hashes.compare_everything();
            } else {
                let doubtful = task.vmas.iter().filter(|vma| vma.is_doubtful());
                task.hashes.compare_only(doubtful.map(|vma| vma.range));
            }
        }
        if self.segments.values().any(Segment::trackable) {
            same_processes &= self.no_child_ended();
        }
        self.mapped = mappings.keys().copied().collect();
        for (key, segment) in &mut self.segments {
            let mappings = mappings.remove(key).unwrap_or_default();
            segment.look(mappings, same_processes);
            segment.executable = executable.contains(key);
            let tracked = segment.tracked;
            tracing::debug!(segment = key.inode, tracked, same_processes, "shared");
        }
        Ok(())
    }

    /// Whether no child of any process has ended since the last time, as far as is told.
    fn no_child_ended(&mut self) -> bool {
        let mut same = true;
        let mut ended = BTreeSet::new();
        for (&pid, task) in &mut self.tasks {
            same &= task.look_at_children().unwrap_or(false);
            let children = threads(pid).into_iter().flat_map(|tid| children(pid, tid));
            ended.extend(children);
        }
        // Those that nobody has waited for yet have no memory any more, and so are no tasks.
        ended.retain(|pid| !self.tasks.contains_key(pid));
        same &= ended.is_subset(&self.ended);
        self.ended = ended;
        same
    }

    fn forget_the_gone(&mut self, now: &[FrozenProcess], tracker: &mut dyn DirtyTracker) {
        let still: BTreeSet<i32> = now.iter().map(|process| process.pid).collect();
        self.tasks.retain(|pid, task| {
            let stays = still.contains(pid) && task.alive();
            if !stays {
                tracker.forget(*pid);
            }
            stays
        });
    }

    fn look_at(&mut self, process: FrozenProcess) -> io::Result<()> {
        let FrozenProcess { pid, tid } = process;
        let depth = match self.depth {
            Some(depth) => depth,
            None => namespace_depth(tid)?,
        };
        self.depth = Some(depth);
        let vmas = list(tid, &self.mounts, &mut self.maps_text)?;
        match self.tasks.get_mut(&pid) {
            Some(task) => {
                task.reopen(tid)?;
                task.vmas = vmas;
                task.shared.clear();
            }
            None => {
                let mut task = Process::open(pid, tid, depth)?;
                task.vmas = vmas;
                self.tasks.insert(pid, task);
            }
        }
        Ok(())
    }

    /// Looks through the descriptors of every process for segments that nobody maps, and for ways
    /// in which devices write memory. Segments that nobody has any more are forgotten. In a pre-dump
    /// round the tree runs meanwhile.
    ///
    /// # Errors
    /// [`CollectError`]; a process that is gone is none.
    pub fn survey_descriptors(&mut self) -> Result<(), CollectError> {
        let mut held = std::mem::take(&mut self.mapped);
        for task in self.tasks.values_mut() {
            let found = match descriptors(task.tid, &self.mounts) {
                Ok(found) => found,
                Err(error) if is_gone(&error) => continue,
                Err(source) => {
                    let pid = task.pid;
                    return Err(ListError::Proc { pid, source }.into());
                }
            };
            for (key, file) in found.segments {
                held.insert(key);
                let segment = self.segments.entry(key);
                segment.or_insert_with(|| Segment::new(file)).opened = true;
            }
            if found.direct_io && !task.direct_io {
                tracing::info!(
                    task.pid,
                    "it does direct I/O, which write-protection does not see: comparing contents"
                );
                task.direct_io = true;
                task.hashes.compare_everything();
            }
        }
        self.segments.retain(|key, _| held.contains(key));
        Ok(())
    }

    /// Sends every image of the round.
    ///
    /// # Errors
    /// [`StreamError`]; a process that is gone, wholly or halfway, is none.
    pub fn send(
        &mut self,
        pass: Pass,
        tracker: &mut dyn DirtyTracker,
        sink: &mut dyn PageSink,
        pool: &BufferPool,
    ) -> Result<Scanned, SendError> {
        let mut scanned = Scanned::default();
        self.untracked_sent = 0;
        for task in self.tasks.values_mut() {
            let sent = send_task(
                task,
                pass,
                tracker,
                sink,
                pool,
                &mut self.runs,
                &mut scanned,
            )?;
            if task.hashes.has_everything() {
                self.untracked_sent += sent;
            }
        }
        if pass == Pass::PreCopy {
            self.look_outside();
        }
        let mut ids = BTreeSet::new();
        for (key, segment) in &mut self.segments {
            if !ids.insert(key.inode) {
                return Err(SendError::Ambiguous(key.inode));
            }
            let asked = Instant::now();
            let running = pass == Pass::PreCopy;
            let believed = segment.tracked && (self.children_told || running);
            let doubted = segment.tracked && !believed;
            let direct_io = |mapping: &Mapping| {
                self.tasks
                    .get(&mapping.pid)
                    .is_some_and(|task| task.direct_io)
            };
            let disturbed = segment.executable || segment.mappings.iter().any(direct_io);
            let written = if !pass.includes(disturbed || doubted) {
                Some(PageSet::new())
            } else if believed {
                written(segment, &self.tasks, tracker)
            } else if running && segment.trackable() {
                // Asked for all the same, for the next round.
                written(segment, &self.tasks, tracker).and(None)
            } else {
                None
            };
            tracing::debug!(
                segment = key.inode,
                written = written.as_ref().map(PageSet::pages),
                seconds = asked.elapsed().as_secs_f64(),
                "asked what was written"
            );
            scanned.scan_time += asked.elapsed();
            self.untracked_sent += send_segment(*key, segment, written, sink, pool, &mut scanned)?;
        }
        Ok(scanned)
    }

    /// The receiver has the round that was sent last.
    pub fn acked(&mut self) {
        let tasks = self.tasks.values_mut().map(|task| &mut task.baseline);
        let segments = self.segments.values_mut().map(|it| &mut it.baseline);
        tasks.chain(segments).for_each(Baseline::acked);
    }

    /// The receiver has not got the round that was sent last, or only in part, and will not have it. What
    /// that knew to have changed is sent by the next.
    pub fn lost(&mut self, tracker: &mut dyn DirtyTracker) {
        for task in self.tasks.values_mut() {
            task.baseline.lost();
        }
        self.segments.values_mut().for_each(Segment::lost);
        tracker.lost();
    }

    /// Finds out which segments processes map that are not of the tree, where that is not known.
    fn look_outside(&mut self) {
        let unknown =
            |segment: &Segment| segment.trackable() && segment.shared_outside != Some(false);
        if !self.segments.values().any(unknown) {
            return;
        }
        let outside = mapped_outside(&self.tasks, &self.mounts, &mut self.maps_text);
        for (key, segment) in &mut self.segments {
            if unknown(segment) {
                let outside = outside.as_ref();
                segment.shared_outside = Some(!outside.is_ok_and(|keys| !keys.contains(key)));
            }
        }
    }

    /// How many pages would have to be sent now: what the trackers tell, and for the rest what the
    /// last round had to send.
    #[must_use]
    pub fn pending_pages(&self, tracker: &mut dyn DirtyTracker) -> u64 {
        let mut pages = self.untracked_sent;
        let tracked = |task: &&Process| !task.hashes.has_everything();
        for task in self.tasks.values().filter(tracked) {
            for vma in task.vmas.iter().filter(|vma| vma.is_private()) {
                // Memory that is gone has nothing dirty.
                pages += tracker.pending(task, vma).ok().flatten().unwrap_or(0);
            }
        }
        pages
    }

    /// A process that ended since it was listed, if one did.
    #[must_use]
    pub fn first_exited(&self) -> Option<i32> {
        let ended = self.tasks.values().find(|task| !task.alive());
        ended.map(|task| task.pid)
    }

    /// The root's PID.
    #[must_use]
    pub fn root(&self) -> i32 {
        self.root
    }

    /// Whether the root still is there.
    #[must_use]
    pub fn root_alive(&self) -> bool {
        self.tasks.get(&self.root).is_some_and(Process::alive)
    }

    /// Processes and segments in the last round.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        (self.tasks.len(), self.segments.len())
    }
}

/// Either kind of failure of [`Copier::send`].
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Reading or sending.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Two segments on different mounts share an inode number, and so an image name.
    #[error("two shared segments have inode number {0}; CRIU's images cannot tell them apart")]
    Ambiguous(u64),
}

/// Sends one process's image. Returns how many pages were dirty.
fn send_task(
    task: &mut Process,
    pass: Pass,
    tracker: &mut dyn DirtyTracker,
    sink: &mut dyn PageSink,
    pool: &BufferPool,
    runs: &mut Vec<Run>,
    scanned: &mut Scanned,
) -> Result<u64, StreamError> {
    sink.open(task.image()).map_err(StreamError::Sink)?;
    runs.clear();
    // Else everything counts as written in each round, and is compared.
    let told_once = !task.direct_io && !tracker.untracked(task.pid);
    let mut changed = PageSet::new();
    let mut hashes = std::mem::replace(&mut task.hashes, ContentHashes::of_nothing());
    let result = (|| {
        let task = &*task;
        let parent = task.baseline.pages();
        let mut source = ProcessSource::new(task);
        let copy = sink.supports_copy().then_some(EntryKind::Copy);
        let mut stream = ImageStream::new(sink, pool, parent, &mut hashes, &mut changed, told_once);
        for vma in &task.vmas {
            let kept = match (vma.class, pass.kind()) {
                (Class::Foreign | Class::Segment, _) => continue,
                // Restore reads hugetlb pages from the newest directory only.
                (Class::Private { hugetlb: true }, RoundKind::Final) => copy,
                (Class::Private { .. } | Class::Whole, _) => Some(EntryKind::Parent),
            };
            if !pass.includes(task.disturbs(vma)) {
                let mut known = Vec::new();
                parent.split(vma.range, |range, is| known.extend(is.then_some(range)));
                for range in known {
                    let written = false;
                    stream.run(&mut source, Run { range, written }, kept)?;
                }
                continue;
            }
            if vma.class == Class::Whole {
                let (range, written) = (vma.range, true);
                stream.run(&mut source, Run { range, written }, kept)?;
                continue;
            }
            // In a running round a doubt resolves itself: the write that is under way shows later.
            let last = pass != Pass::PreCopy;
            let suspect = task.direct_io || last && vma.is_doubtful();
            let mut rest = Some(vma.range);
            while let Some(range) = rest {
                let (part, later) = range.split_at(SCAN_WINDOW_PAGES);
                rest = later;
                runs.clear();
                let asked = Instant::now();
                let part = Part {
                    range: part.expect("a range is not empty"),
                    ..vma.part()
                };
                tracker
                    .scan(task, part, runs)
                    .map_err(StreamError::Source)?;
                if last && vma.class == (Class::Private { hugetlb: true }) {
                    suspect_new_huge_pages(&mut source, runs).map_err(StreamError::Source)?;
                }
                scanned.scan_time += asked.elapsed();
                for run in &*runs {
                    let written = run.written || suspect;
                    stream.run(&mut source, Run { written, ..*run }, kept)?;
                }
            }
        }
        stream.finish(&mut source)
    })();
    task.hashes = hashes;
    match result {
        Ok(Sent {
            announced,
            scanned_pages,
            changed_pages,
            compared_pages,
            compare_time,
        }) => {
            scanned.scan_time += compare_time;
            scanned.compared += compared_pages;
            task.baseline.sent(announced, changed);
            scanned.pages += scanned_pages;
            Ok(changed_pages)
        }
        // It exited, or called exec: its image stays as far as it got, and nothing of it will be
        // an in-parent entry.
        Err(StreamError::Source(error)) if is_gone(&error) && pass.kind() == RoundKind::PreDump => {
            tracing::debug!(task.pid, %error, "gone in the middle of its image");
            task.baseline
                .sent(PageSet::new(), task.baseline.pages().clone());
            Ok(0)
        }
        Err(error) => {
            // What was asked for last was not handed to the stream to its end, perhaps.
            if told_once {
                let written = runs.iter().filter(|run| run.written);
                changed = changed.union(&written.map(|run| run.range).collect());
            }
            task.baseline.send_failed(&changed);
            Err(error)
        }
    }
}

/// Of [`Vma::is_doubtful`]'s doubt for huge pages that are set aside: the page that looks clean and is
/// new is all zero, so its first 4 KiB are, and it is not necessary to read the others to tell.
fn suspect_new_huge_pages(source: &mut ProcessSource<'_>, runs: &mut Vec<Run>) -> io::Result<()> {
    /// The smallest huge page where write-protection can be tracked.
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

/// What was written of a segment through its mappings since the tracker's last rearm; `None` if that cannot
/// be told. Asking begins the next epoch.
fn written(
    segment: &Segment,
    tasks: &BTreeMap<i32, Process>,
    tracker: &mut dyn DirtyTracker,
) -> Option<PageSet> {
    let (mut asked, mut known) = (Vec::new(), true);
    for mapping in &segment.mappings {
        let task = tasks.get(&mapping.pid);
        let tracked =
            |task: &&Process| !task.direct_io && task.shared.binary_search(&mapping.range).is_ok();
        known &= task.as_ref().is_some_and(tracked);
        asked.extend(task.map(|task| (task, mapping.range)));
    }
    let found = tracker.scan_shared(&asked).ok().filter(|_| known)?;
    let mut ranges = Vec::new();
    for (mapping, found) in segment.mappings.iter().zip(found) {
        for range in found {
            ranges.push(mapping.offsets(range)?);
        }
    }
    ranges.extend(segment.taken_away());
    ranges.sort_unstable();
    let mut written = PageSet::new();
    ranges.into_iter().for_each(|range| written.insert(range));
    Some(written)
}

/// The segments that processes outside of the tree map.
fn mapped_outside(
    tasks: &BTreeMap<i32, Process>,
    mounts: &KernelMounts,
    text: &mut Vec<u8>,
) -> io::Result<BTreeSet<SegmentKey>> {
    let mut keys = BTreeSet::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.parse().ok());
        // (We do, to see what is taken away.)
        let own = std::process::id().cast_signed();
        let Some(pid) = pid.filter(|pid| *pid != own && !tasks.contains_key(pid)) else {
            continue;
        };
        match list(pid, mounts, text) {
            Ok(vmas) => {
                let segments = vmas.iter().filter(|vma| vma.class == Class::Segment);
                keys.extend(segments.map(SegmentKey::of));
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => {
                // Who we may not pass at is not of the tree's kind: what they share ends with the move.
                tracing::debug!(pid, %error, "it is not known what it maps");
            }
        }
    }
    Ok(keys)
}

/// Sends one shared segment's image; only what was `written`, if that is known, may have changed. Returns how
/// many pages had.
fn send_segment(
    key: SegmentKey,
    segment: &mut Segment,
    written: Option<PageSet>,
    sink: &mut dyn PageSink,
    pool: &BufferPool,
    scanned: &mut Scanned,
) -> Result<u64, StreamError> {
    sink.open(ImageId::Shmem(key.inode))?;
    if let Some(name) = &segment.memfd {
        sink.memfd_name(name)?;
    }
    let file = segment.file.try_clone().map_err(StreamError::Source)?;
    let size = file.metadata().map_err(StreamError::Source)?.len();
    let all = PageRange::from_bounds(0, size.next_multiple_of(PAGE_SIZE));
    let mut runs = Vec::new();
    let mut changed = PageSet::new();
    match written {
        Some(written) => {
            for range in segment.baseline.pages().union(&written).iter() {
                written.split(range, |range, written| runs.push(Run { range, written }));
            }
            changed = written;
        }
        None => runs.extend(all.map(|range| Run {
            range,
            written: true,
        })),
    }
    let kept = Some(EntryKind::Parent);
    let mut hashes = std::mem::replace(&mut segment.hashes, ContentHashes::of_everything());
    let baseline = std::mem::take(&mut segment.baseline);
    let result = (|| {
        let mut source = SegmentSource { file: &file };
        let mut data = Populated::new(&file);
        let parent = baseline.pages();
        let mut stream = ImageStream::new(sink, pool, parent, &mut hashes, &mut changed, false);
        for run in runs {
            if !run.written {
                stream.run(&mut source, run, kept)?;
                continue;
            }
            // What is not there must not be made by looking at it.
            let mut rest = Some(run.range);
            while let Some(wanted) = rest {
                let found = data.at(wanted, segment.removed_pages.as_ref());
                let Some(found) = found.map_err(StreamError::Source)? else {
                    break;
                };
                if let Some(range) = found.intersect(wanted) {
                    segment.watch(range);
                    stream.run(&mut source, Run { range, ..run }, kept)?;
                }
                rest = PageRange::from_bounds(found.end().max(wanted.start()), wanted.end());
            }
        }
        stream.finish(&mut source)
    })();
    segment.hashes = hashes;
    segment.baseline = baseline;
    let sent = result.inspect_err(|_| segment.baseline.send_failed(&changed))?;
    segment.baseline.sent(sent.announced, changed);
    scanned.pages += sent.scanned_pages;
    scanned.compared += sent.compared_pages;
    scanned.scan_time += sent.compare_time;
    Ok(sent.changed_pages)
}

/// Whether the kernel says that a process is no more.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
