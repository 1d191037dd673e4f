//! Reads the memory of a frozen tree: which pages its images must contain, and their bytes.
//!
//! The rules are those of a CRIU dump. Everything is read from `/proc`, with no code of the sender.

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Whence, lseek};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// Longest run, in bytes: the unit of comparisons and reports.
const RUN: usize = 1024 * PAGE;

// Bits of /proc/PID/pagemap.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;
const GUARD: u64 = 1 << 58;
const FRAME: u64 = (1 << 55) - 1;
/// Bit of /proc/kpageflags: the kernel's zero page.
const KPF_ZERO_PAGE: u64 = 1 << 24;

/// Whether an image must contain a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The image must contain the page, with these bytes.
    Required,
    /// The image may contain the page, with these bytes: the zero page, or an unmodified page of a file.
    Optional,
}

/// Adjacent pages with the same need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Address of the first page; in a segment, its byte offset.
    pub start: u64,
    /// Whether an image must contain them.
    pub need: Need,
    /// Their contents.
    pub bytes: Vec<u8>,
}

/// Expected content of one image: private memory of a process, or a shared segment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Space {
    /// Pages with content, in ascending order.
    pub runs: Vec<Run>,
    /// Ranges in which the image may have pages, in ascending order. A page outside `runs` must be zeros.
    pub allowed: Vec<Range<u64>>,
}

impl Space {
    fn push(&mut self, start: u64, need: Need, page: &[u8]) {
        match self.runs.last_mut() {
            Some(run)
                if run.need == need
                    && run.start + run.bytes.len() as u64 == start
                    && run.bytes.len() < RUN =>
            {
                run.bytes.extend_from_slice(page);
            }
            _ => self.runs.push(Run {
                start,
                need,
                bytes: page.to_vec(),
            }),
        }
    }

    /// Returns the required content of a page, if it has any.
    #[must_use]
    pub fn page(&self, address: u64) -> Option<&[u8]> {
        let next = self.runs.partition_point(|run| run.start <= address);
        let run = &self.runs[next.checked_sub(1)?];
        let offset = usize::try_from(address - run.start).ok()?;
        run.bytes.get(offset..offset + PAGE)
    }

    /// Returns whether the image may have a page at this address.
    #[must_use]
    pub fn allows(&self, address: u64) -> bool {
        let next = self.allowed.partition_point(|range| range.start <= address);
        next > 0 && self.allowed[next - 1].contains(&address)
    }
}

/// The memory of a tree at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Private memory of each living process, by the PID that image names contain: the one in the PID
    /// namespace of the root.
    pub processes: BTreeMap<u32, Space>,
    /// Shared segments, by inode number.
    pub segments: BTreeMap<u64, Space>,
}

/// A tree whose threads are all stopped.
#[derive(Debug, Default)]
pub struct Frozen {
    pids: Vec<i32>,
    /// Processes that this guard stopped and will resume.
    ours: Vec<i32>,
}

impl Frozen {
    /// Stops a tree with SIGSTOP; dropping the guard resumes it.
    ///
    /// # Errors
    /// `TimedOut` if a thread does not stop.
    pub fn stop(root: i32) -> io::Result<Self> {
        for _ in 0..40 {
            let mut frozen = Self::default();
            if frozen.stop_tree(root, Instant::now() + Duration::from_millis(500)) {
                return Ok(frozen);
            }
            // A parent in vfork waits for its child, which is stopped: resume both, and try again.
        }
        let what = format!("the tree of {root} does not stop");
        Err(io::Error::new(io::ErrorKind::TimedOut, what))
    }

    /// Stops parents first: a stopped process creates no more children.
    fn stop_tree(&mut self, pid: i32, deadline: Instant) -> bool {
        if !lives(pid) {
            return true;
        }
        if !is_stopped(pid) {
            self.ours.push(pid);
            // It may exit before it stops, which the loop below detects.
            let _ = kill(Pid::from_raw(pid), Signal::SIGSTOP);
        }
        while !is_stopped(pid) {
            if !lives(pid) {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(Duration::from_micros(100));
        }
        self.pids.push(pid);
        let children = children(pid);
        children
            .into_iter()
            .all(|child| self.stop_tree(child, deadline))
    }

    /// Accepts a tree that is stopped already, and leaves it stopped.
    ///
    /// # Errors
    /// `WouldBlock` names a process that runs.
    pub fn from_stopped(root: i32) -> io::Result<Self> {
        let pids: Vec<i32> = tree(root).into_iter().filter(|&pid| lives(pid)).collect();
        match pids.iter().find(|&&pid| !is_stopped(pid)) {
            Some(pid) => {
                let what = format!("process {pid} is not stopped");
                Err(io::Error::new(io::ErrorKind::WouldBlock, what))
            }
            None => Ok(Self {
                pids,
                ours: Vec::new(),
            }),
        }
    }

    /// Returns the living processes, the root first.
    #[must_use]
    pub fn pids(&self) -> &[i32] {
        &self.pids
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for &pid in self.ours.iter().rev() {
            // It may have been killed meanwhile.
            let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
        }
    }
}

impl Snapshot {
    /// Reads the memory of a frozen tree.
    ///
    /// # Errors
    /// Errors of `/proc`; shared segments require root or `CAP_CHECKPOINT_RESTORE`.
    pub fn take(frozen: &Frozen) -> io::Result<Self> {
        let mut snapshot = Self::default();
        // Depth of the root's PID namespace.
        let depth = match frozen.pids.first() {
            Some(&root) => namespaced_pids(root)?.len() - 1,
            None => return Err(io::Error::new(io::ErrorKind::NotFound, "no process lives")),
        };
        for &pid in &frozen.pids {
            let process = Process::open(pid)?;
            let vpid = namespaced_pids(pid)?.get(depth).copied();
            let vpid = vpid.ok_or_else(|| malformed(pid, "NSpid"))?;
            let mut space = Space::default();
            for mapping in mappings(pid)? {
                match mapping.kind {
                    Kind::Private => process.read_private(&mapping, &mut space)?,
                    Kind::Whole => process.read_whole(&mapping, &mut space)?,
                    Kind::Segment => {
                        let Range { start, end } = mapping.range;
                        let path = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
                        snapshot.add_segment(&path)?;
                    }
                    Kind::Foreign => {}
                }
            }
            snapshot.processes.insert(vpid, space);
            // A memfd may be open without being mapped.
            for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
                let path = entry?.path();
                let target = fs::read_link(&path)?;
                if target
                    .to_str()
                    .is_some_and(|name| name.starts_with("/memfd:"))
                {
                    snapshot.add_segment(&path.to_string_lossy())?;
                }
            }
        }
        Ok(snapshot)
    }

    fn add_segment(&mut self, path: &str) -> io::Result<()> {
        let file = File::open(path)
            .map_err(|e| io::Error::new(e.kind(), format!("cannot open segment {path}: {e}")))?;
        let metadata = file.metadata()?;
        if self.segments.contains_key(&metadata.ino()) {
            return Ok(());
        }
        let size = metadata.size().next_multiple_of(PAGE as u64);
        let mut space = Space::default();
        space.allowed.push(0..size);
        let mut page = [0; PAGE];
        let mut at = 0;
        while let Ok(data) = lseek(&file, at, Whence::SeekData) {
            let hole = lseek(&file, data, Whence::SeekHole)?;
            for start in (data.cast_unsigned()..hole.cast_unsigned()).step_by(PAGE) {
                page.fill(0);
                read_up_to(&file, &mut page, start)?;
                // hugetlbfs reports every range as data.
                let hugetlb = metadata.blksize() > PAGE as u64;
                let optional = hugetlb && page == [0; PAGE];
                let need = if optional {
                    Need::Optional
                } else {
                    Need::Required
                };
                space.push(start, need, &page);
            }
            at = hole;
        }
        self.segments.insert(metadata.ino(), space);
        Ok(())
    }
}

struct Process {
    pid: i32,
    memory: File,
    pagemap: File,
    /// Readable by root only.
    kpageflags: Option<File>,
}

impl Process {
    fn open(pid: i32) -> io::Result<Self> {
        Ok(Self {
            pid,
            memory: File::open(format!("/proc/{pid}/mem"))?,
            pagemap: File::open(format!("/proc/{pid}/pagemap"))?,
            kpageflags: File::open("/proc/kpageflags").ok(),
        })
    }

    fn read_whole(&self, mapping: &Mapping, space: &mut Space) -> io::Result<()> {
        space.allowed.push(mapping.range.clone());
        let mut page = [0; PAGE];
        for start in mapping.range.clone().step_by(PAGE) {
            self.memory.read_exact_at(&mut page, start)?;
            space.push(start, Need::Required, &page);
        }
        Ok(())
    }

    fn read_private(&self, mapping: &Mapping, space: &mut Space) -> io::Result<()> {
        space.allowed.push(mapping.range.clone());
        let mut entries = vec![0; 8 * 65536];
        let mut page = [0; PAGE];
        let mut at = mapping.range.start;
        while at < mapping.range.end {
            let pages = ((mapping.range.end - at) / PAGE as u64).min(65536);
            let entries = &mut entries[..8 * usize::try_from(pages).expect("at most 65536")];
            self.pagemap.read_exact_at(entries, at / PAGE as u64 * 8)?;
            for entry in entries.chunks_exact(8) {
                let entry = u64::from_le_bytes(entry.try_into().expect("chunks of 8"));
                self.read_page(mapping, at, entry, &mut page, space)?;
                at += PAGE as u64;
            }
        }
        Ok(())
    }

    fn read_page(
        &self,
        mapping: &Mapping,
        at: u64,
        entry: u64,
        page: &mut [u8; PAGE],
        space: &mut Space,
    ) -> io::Result<()> {
        let populated = entry & (PRESENT | SWAPPED) != 0;
        if entry & GUARD != 0 || !(populated || mapping.of_file) {
            return Ok(());
        }
        match self.memory.read_exact_at(page, at) {
            Ok(()) => {}
            // A swap entry may be a marker without a page; a file may be shorter than its mapping.
            Err(_) if entry & PRESENT == 0 => return Ok(()),
            Err(e) => {
                let what = format!("cannot read {at:#x} of process {}: {e}", self.pid);
                return Err(io::Error::new(e.kind(), what));
            }
        }
        let own = entry & FILE_OR_SHARED == 0 && populated;
        let nothing = *page == [0; PAGE] && self.may_be_zero_page(entry);
        let need = match own && !nothing {
            true => Need::Required,
            false => Need::Optional,
        };
        space.push(at, need, page);
        Ok(())
    }

    /// Returns whether a page of zeros may be the kernel's zero page. It may be if the page flags cannot be
    /// read, or if the page is not present: a marker looks like swap.
    fn may_be_zero_page(&self, entry: u64) -> bool {
        let frame = entry & FRAME;
        let mut flags = [0; 8];
        match &self.kpageflags {
            Some(file) if entry & PRESENT != 0 && frame != 0 => {
                file.read_exact_at(&mut flags, frame * 8).is_err()
                    || u64::from_le_bytes(flags) & KPF_ZERO_PAGE != 0
            }
            _ => true,
        }
    }
}

enum Kind {
    /// Private pages go into the image of the process.
    Private,
    /// Every page goes into the image, whatever the page table says.
    Whole,
    /// Part of a shared segment.
    Segment,
    /// Not dumped: memory of the kernel, or of an ordinary file.
    Foreign,
}

struct Mapping {
    range: Range<u64>,
    kind: Kind,
    /// Maps a file: pages that are not private have content as well.
    of_file: bool,
}

fn mappings(pid: i32) -> io::Result<Vec<Mapping>> {
    let text = String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/maps"))?).into_owned();
    let lines = text.lines().filter(|line| !line.ends_with("[vsyscall]"));
    lines
        .map(|line| mapping(line).ok_or_else(|| malformed(pid, line)))
        .collect()
}

fn mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let shared = fields.next()?.ends_with('s');
    let inode = fields.nth(2)?;
    let name = fields.next().unwrap_or_default().trim_start();
    let segment = ["/dev/zero (deleted)", "/SYSV", "/memfd:", "/anon_hugepage"];
    let kind = match name {
        "[vdso]" => Kind::Whole,
        "[vvar]" | "[vvar_vclock]" | "[uprobes]" => Kind::Foreign,
        _ if name.starts_with("/[aio]") => Kind::Whole,
        _ if !shared => Kind::Private,
        _ if segment.iter().any(|prefix| name.starts_with(prefix)) => Kind::Segment,
        _ => Kind::Foreign,
    };
    Some(Mapping {
        range: u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?,
        kind,
        of_file: inode != "0",
    })
}

fn malformed(pid: i32, what: &str) -> io::Error {
    let what = format!("cannot make sense of {what:?} of process {pid}");
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Fills the buffer up to the end of the file.
fn read_up_to(file: &File, mut buffer: &mut [u8], mut at: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        let n = file.read_at(buffer, at)?;
        if n == 0 {
            break;
        }
        buffer = &mut buffer[n..];
        at += n as u64;
    }
    Ok(())
}

/// Returns the PIDs of a process, from the outermost visible PID namespace to its own.
///
/// # Errors
/// If the process does not exist.
pub fn namespaced_pids(pid: i32) -> io::Result<Vec<u32>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let pids = line.and_then(|line| {
        let words = line.split_whitespace();
        words
            .map(|word| word.parse().ok())
            .collect::<Option<Vec<_>>>()
    });
    pids.filter(|pids| !pids.is_empty())
        .ok_or_else(|| malformed(pid, "NSpid"))
}

pub(crate) fn threads(pid: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

/// Returns the children of a process.
#[must_use]
pub fn children(pid: i32) -> Vec<i32> {
    let lists = threads(pid)
        .into_iter()
        .filter_map(|tid| fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")).ok());
    lists
        .flat_map(|list| {
            list.split(' ')
                .filter_map(|word| word.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Returns the state letter of a thread.
fn state(pid: i32, tid: i32) -> Option<char> {
    let stat = fs::read(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    // The name may contain any byte; the last parenthesis ends it.
    let after_name = stat.iter().rposition(|&byte| byte == b')')? + 2;
    stat.get(after_name).map(|&byte| char::from(byte))
}

/// Returns whether a process has not exited; a zombie has.
#[must_use]
pub fn lives(pid: i32) -> bool {
    threads(pid)
        .into_iter()
        .any(|tid| state(pid, tid).is_some_and(|state| !matches!(state, 'Z' | 'X')))
}

/// Waits up to 10 seconds until none of these processes lives; returns whether that happened. Polls `/proc`,
/// the only source of information about processes that are not children.
#[must_use]
pub fn await_end(pids: &[i32]) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while pids.iter().any(|&pid| lives(pid)) {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Returns whether every living thread is stopped, by a signal or a tracer.
#[must_use]
pub fn is_stopped(pid: i32) -> bool {
    let states: Vec<char> = threads(pid)
        .into_iter()
        .filter_map(|tid| state(pid, tid))
        .filter(|state| !matches!(state, 'Z' | 'X'))
        .collect();
    !states.is_empty() && states.iter().all(|state| matches!(state, 'T' | 't'))
}

/// Returns the directory of the cgroup (v2) of a process.
///
/// # Panics
/// If the cgroup v2 hierarchy is not mounted.
#[must_use]
pub fn cgroup(pid: i32) -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut mounts = mounts.lines().map(|line| line.split(' '));
    let mount = mounts.find_map(|mut fields| {
        let point = fields.nth(1)?;
        (fields.next() == Some("cgroup2")).then_some(point)
    });
    let mount = mount.expect("cgroup v2 is mounted");
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
    format!("{mount}{}", cgroup.unwrap_or("/")).into()
}

/// Returns whether a process is in a frozen cgroup (v2).
///
/// # Panics
/// As [`cgroup`].
#[must_use]
pub fn is_frozen(pid: i32) -> bool {
    let events = fs::read_to_string(cgroup(pid).join("cgroup.events"));
    events.is_ok_and(|events| events.lines().any(|line| line == "frozen 1"))
}

/// Returns the time for which the threads of a process have run, in nanoseconds.
#[must_use]
pub fn run_time(pid: i32) -> u64 {
    let times = threads(pid).into_iter().filter_map(|tid| {
        let times = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).ok()?;
        times.split(' ').next()?.parse::<u64>().ok()
    });
    times.sum()
}

/// Asserts that processes are frozen and execute nothing for a while.
///
/// # Panics
/// If one does.
pub fn assert_held(pids: &[i32]) {
    let times = || pids.iter().map(|&pid| run_time(pid)).collect::<Vec<_>>();
    assert!(pids.iter().all(|&pid| is_frozen(pid)), "{pids:?}");
    let before = times();
    thread::sleep(Duration::from_millis(200));
    assert!(
        pids.iter().all(|&pid| lives(pid) && is_frozen(pid)),
        "{pids:?}"
    );
    assert_eq!(times(), before, "{pids:?}");
}

/// Returns a process and all its descendants, each parent before its children.
#[must_use]
pub fn tree(root: i32) -> Vec<i32> {
    let mut pids = vec![root];
    let mut next = 0;
    while let Some(&pid) = pids.get(next) {
        pids.extend(children(pid));
        next += 1;
    }
    pids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_merge_only_with_neighbours_of_the_same_need() {
        let mut space = Space::default();
        space.allowed.push(0x1000..0x9000);
        for (start, need, byte) in [
            (0x1000, Need::Required, 1),
            (0x2000, Need::Required, 2),
            (0x3000, Need::Optional, 3),
            (0x5000, Need::Optional, 5),
        ] {
            space.push(start, need, &[byte; PAGE]);
        }
        assert_eq!(space.runs.len(), 3);
        for (address, byte) in [
            (0x1000, Some(1)),
            (0x2000, Some(2)),
            (0x4000, None),
            (0x5000, Some(5)),
        ] {
            assert_eq!(space.page(address).map(|page| page[0]), byte);
        }
        assert_eq!(space.page(0), None);
        assert!(space.allows(0x8000) && !space.allows(0x9000) && !space.allows(0));
    }

    #[test]
    fn mapping_kind_matches_a_dump() {
        let kind = |line| mapping(line).unwrap().kind;
        assert!(matches!(kind("1000-2000 rw-p 0 00:00 0 "), Kind::Private));
        assert!(matches!(
            kind("1000-2000 r-xp 0 00:00 0 [vdso]"),
            Kind::Whole
        ));
        assert!(matches!(
            kind("1000-2000 rw-s 0 00:01 7 /dev/zero (deleted)"),
            Kind::Segment
        ));
        assert!(matches!(
            kind("1000-2000 rw-s 0 fe:00 7 /a b"),
            Kind::Foreign
        ));
        assert!(matches!(
            kind("1000-2000 rw-p 0 00:01 7 /memfd:x (deleted)"),
            Kind::Private
        ));
        assert!(matches!(
            kind("1000-2000 r--p 0 00:00 0 [vvar]"),
            Kind::Foreign
        ));
    }
}
