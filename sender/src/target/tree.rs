//! The processes and shared segments of the target, as listed at the last freeze.

use crate::freeze::{FrozenProcess, has_live_thread};
use crate::target::descriptors::descriptors;
use crate::target::is_gone;
use crate::target::process::{Process, namespace_depth};
use crate::target::segment::{Mapping, Segment, SegmentKey};
use crate::target::vma::{Class, KernelMounts, Vma, list};
use pageferry_common::proc::meminfo::MemInfo;
use pageferry_common::proc::process::{children, threads};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;

/// Why the memory of the target could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The files of a process in `/proc` could not be read.
    #[error("cannot read /proc/{pid}")]
    Proc {
        /// PID of the process.
        pid: i32,
        /// Error of the kernel.
        source: io::Error,
    },
    /// A shared segment could not be opened.
    #[error("cannot open shared segment {inode} of process {pid}")]
    Segment {
        /// PID of a process that maps it.
        pid: i32,
        /// Inode number of the segment.
        inode: u64,
        /// Error of the kernel.
        source: io::Error,
    },
}

/// The process tree under a root process.
#[derive(Debug)]
pub(crate) struct Tree {
    mounts: KernelMounts,
    root: i32,
    /// Number of PID namespaces that the root is in, counted from ours at 1.
    namespace_depth: Option<usize>,
    /// Processes by PID.
    pub(crate) processes: BTreeMap<i32, Process>,
    /// Segments that a process maps or has open.
    pub(crate) segments: BTreeMap<SegmentKey, Segment>,
    /// Whether every process is known to wait for its children. The children of one that does not can come
    /// and go unnoticed.
    pub(crate) children_are_waited_for: bool,
    /// Segments that some process mapped at the last freeze.
    mapped: BTreeSet<SegmentKey>,
    /// Processes that had exited at the last freeze, and whose parents had not waited for them.
    zombies: BTreeSet<i32>,
    /// Scratch space for `/proc/PID/maps`.
    maps_text: Vec<u8>,
}

/// The mappings of segments found while all processes are listed.
struct FoundMappings {
    mappings: BTreeMap<SegmentKey, Vec<Mapping>>,
    executable: BTreeSet<SegmentKey>,
    /// Memory for page tables that tracking may still make the target take, in bytes.
    tables_left: u64,
}

impl Tree {
    /// Creates the tree under `root`, which has not been listed yet.
    ///
    /// # Errors
    /// Errors of the kernel, if it has no memfd.
    pub(crate) fn new(root: i32) -> io::Result<Self> {
        Ok(Self {
            mounts: KernelMounts::probe()?,
            root,
            namespace_depth: None,
            processes: BTreeMap::new(),
            segments: BTreeMap::new(),
            children_are_waited_for: false,
            mapped: BTreeSet::new(),
            zombies: BTreeSet::new(),
            maps_text: Vec::with_capacity(1 << 20),
        })
    }

    /// Lists the mappings of all processes of the stopped target. Returns the PIDs of processes that were
    /// listed before and are gone; a PID among them may belong to a new process of the tree.
    ///
    /// # Errors
    /// [`ListError`]. A process that exited is not an error.
    pub(crate) fn list(&mut self, frozen: &[FrozenProcess]) -> Result<Vec<i32>, ListError> {
        let mut gone = self.remove_exited(frozen);
        let mut same_processes = gone.is_empty();
        let mut found = FoundMappings {
            mappings: BTreeMap::new(),
            executable: BTreeSet::new(),
            tables_left: MemInfo::read().unwrap_or_default().available.unwrap_or(0) / 8,
        };
        for &process in frozen {
            let pid = process.pid;
            same_processes &= self.processes.contains_key(&pid);
            match self.list_process(process) {
                Ok(()) => {
                    let process = self.processes.get_mut(&pid);
                    let process = process.expect("it was listed just now");
                    list_segments(process, &mut self.segments, &mut found)?;
                }
                Err(error) if is_gone(&error) => {
                    same_processes = false;
                    self.processes.remove(&pid);
                    gone.push(pid);
                }
                Err(source) => return Err(ListError::Proc { pid, source }),
            }
        }
        if self.segments.values().any(Segment::trackable) {
            same_processes &= self.no_child_exited();
        }
        let FoundMappings {
            mut mappings,
            executable,
            ..
        } = found;
        self.mapped = mappings.keys().copied().collect();
        for (key, segment) in &mut self.segments {
            let mappings = mappings.remove(key).unwrap_or_default();
            segment.update(mappings, same_processes);
            segment.executable = executable.contains(key);
            let tracked = segment.tracked;
            tracing::debug!(
                segment = key.inode,
                tracked,
                same_processes,
                "segment listed"
            );
        }
        Ok(gone)
    }

    /// Removes processes that are not in the list any more, or whose PID another process has. Returns their
    /// PIDs.
    fn remove_exited(&mut self, frozen: &[FrozenProcess]) -> Vec<i32> {
        let still: BTreeSet<i32> = frozen.iter().map(|process| process.pid).collect();
        let mut gone = Vec::new();
        self.processes.retain(|pid, process| {
            let stays = still.contains(pid) && process.is_alive();
            if !stays {
                gone.push(*pid);
            }
            stays
        });
        gone
    }

    fn list_process(&mut self, process: FrozenProcess) -> io::Result<()> {
        let FrozenProcess { pid, tid } = process;
        let depth = match self.namespace_depth {
            Some(depth) => depth,
            None => namespace_depth(tid)?,
        };
        self.namespace_depth = Some(depth);
        let vmas = list(tid, &self.mounts, &mut self.maps_text)?;
        let process = match self.processes.entry(pid) {
            Entry::Occupied(known) => {
                let process = known.into_mut();
                process.reopen(tid)?;
                process
            }
            Entry::Vacant(unknown) => unknown.insert(Process::open(pid, tid, depth)?),
        };
        process.vmas = vmas;
        process.shared.clear();
        Ok(())
    }

    /// Whether no child of any process has exited since the last call, as far as that is known.
    fn no_child_exited(&mut self) -> bool {
        let mut none = true;
        let mut zombies = BTreeSet::new();
        for (&pid, process) in &mut self.processes {
            none &= process.reaped_no_child().unwrap_or(false);
            let children = threads(pid).into_iter().flat_map(|tid| children(pid, tid));
            zombies.extend(children);
        }
        // A child that has exited has no memory, and is not among the processes.
        zombies.retain(|pid| !self.processes.contains_key(pid));
        none &= zombies.is_subset(&self.zombies);
        self.zombies = zombies;
        none
    }

    /// Looks through the descriptors of every process for segments that no process maps, and for ways in
    /// which devices write memory. Forgets segments that no process has any more.
    ///
    /// # Errors
    /// [`ListError`]. A process that exited is not an error.
    pub(crate) fn survey_descriptors(&mut self) -> Result<(), ListError> {
        let mut in_use = std::mem::take(&mut self.mapped);
        for process in self.processes.values_mut() {
            let found = match descriptors(process.tid, &self.mounts) {
                Ok(found) => found,
                Err(error) if is_gone(&error) => continue,
                Err(source) => {
                    let pid = process.pid;
                    return Err(ListError::Proc { pid, source });
                }
            };
            for (key, file) in found.segments {
                in_use.insert(key);
                let segment = self.segments.entry(key);
                segment.or_insert_with(|| Segment::new(file)).opened = true;
            }
            if found.direct_io && !process.direct_io {
                tracing::info!(
                    event = "direct_io_found",
                    process.pid,
                    "the process does direct I/O, which bypasses write-protection: comparing contents"
                );
                process.direct_io = true;
            }
        }
        self.segments.retain(|key, _| in_use.contains(key));
        Ok(())
    }

    /// Finds out which trackable segments are mapped by processes outside of the tree, where that is unknown.
    pub(crate) fn check_outside_mappings(&mut self) {
        let unknown =
            |segment: &Segment| segment.trackable() && segment.shared_outside != Some(false);
        if !self.segments.values().any(unknown) {
            return;
        }
        let outside = self.mapped_outside();
        for (key, segment) in &mut self.segments {
            if unknown(segment) {
                let outside = outside.as_ref();
                segment.shared_outside = Some(!outside.is_ok_and(|keys| !keys.contains(key)));
            }
        }
    }

    /// Returns the segments that processes outside of the tree map.
    fn mapped_outside(&mut self) -> io::Result<BTreeSet<SegmentKey>> {
        let mut keys = BTreeSet::new();
        // This program maps segments itself, to detect removed pages.
        let own = std::process::id().cast_signed();
        for entry in fs::read_dir("/proc")?.flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.parse().ok());
            let is_outside = |pid: &i32| *pid != own && !self.processes.contains_key(pid);
            let Some(pid) = pid.filter(is_outside) else {
                continue;
            };
            match list(pid, &self.mounts, &mut self.maps_text) {
                Ok(vmas) => {
                    let segments = vmas.iter().filter(|vma| vma.class == Class::Segment);
                    keys.extend(segments.map(SegmentKey::new));
                }
                Err(error) if is_gone(&error) => {}
                Err(error) => {
                    // A process that we may not inspect is unrelated to the tree: memory that it shares with
                    // it ends with the migration.
                    tracing::debug!(pid, %error, "mappings of an outside process are unknown");
                }
            }
        }
        Ok(keys)
    }

    /// Makes the next round compare all segments by content.
    pub(crate) fn distrust_page_tables_of_segments(&mut self) {
        for segment in self.segments.values_mut() {
            segment.shared_outside = None;
        }
    }

    /// Returns the PID of a process that exited since it was listed, if there is one. Other than
    /// [`Process::is_alive`], this detects a process that was killed while it was traced: its threads stay zombies
    /// until the tracer has waited for them.
    pub(crate) fn first_exited(&self) -> Option<i32> {
        let exited =
            |process: &&Process| !process.is_alive() || !has_live_thread(process.pid, process.tid);
        self.processes.values().find(exited).map(|it| it.pid)
    }

    /// Whether the root process is alive.
    pub(crate) fn root_alive(&self) -> bool {
        self.processes
            .get(&self.root)
            .is_some_and(Process::is_alive)
    }
}

/// Returns whether a process still has a mapping at these addresses.
fn maps(tid: i32, vma: &Vma) -> bool {
    let text = fs::read(format!("/proc/{tid}/maps")).unwrap_or_default();
    let range = format!("{:08x}-{:08x} ", vma.range.start(), vma.range.end());
    text.split(|&byte| byte == b'\n')
        .any(|line| line.starts_with(range.as_bytes()))
}

/// Records where a process maps segments, and opens those that are new.
fn list_segments(
    process: &mut Process,
    segments: &mut BTreeMap<SegmentKey, Segment>,
    found: &mut FoundMappings,
) -> Result<(), ListError> {
    let pid = process.pid;
    for vma in process
        .vmas
        .iter()
        .filter(|vma| vma.class == Class::Segment)
    {
        let key = SegmentKey::new(vma);
        if vma.executable {
            found.executable.insert(key);
        }
        found.mappings.entry(key).or_default().push(Mapping {
            pid,
            range: vma.range,
            offset: vma.offset,
        });
        if let Entry::Vacant(unknown) = segments.entry(key) {
            match Segment::open_mapped(process.tid, vma) {
                Ok(file) => drop(unknown.insert(Segment::new(file))),
                // The kernel reports the same for a mapping that it cannot open.
                Err(error) if is_gone(&error) && !maps(process.tid, vma) => {}
                Err(source) => {
                    let inode = vma.inode;
                    return Err(ListError::Segment { pid, inode, source });
                }
            }
        }
        // Protecting pages that the process has not touched gives it a page table of 4 KiB for each 2 MiB.
        let tables = vma.range.pages() * 8;
        let segment = segments.get(&key);
        if segment.is_some_and(Segment::trackable) && tables <= found.tables_left {
            found.tables_left -= tables;
            process.shared.push(vma.range);
        }
    }
    Ok(())
}
