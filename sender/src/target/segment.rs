//! Shared segments of the target: anonymous shared memory, memfds, System V shared memory.
//!
//! Each is sent once for the whole tree, by offset. If nothing else can have written to it
//! ([`Segment::update`]), the page tables of all processes that map it show what was written, and a mapping
//! of our own shows which pages were removed ([`RemovedPages`]). Otherwise its content is compared.

use crate::sys::removed_pages::RemovedPages;
use crate::target::vma::{Device, Vma};
use pageferry_common::{MemfdName, PAGE_SIZE, PageRange, PageSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// Identifies a shared segment: inode numbers are unique only on their device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentKey {
    /// Device of the kernel's mount.
    pub device: Device,
    /// Inode number on that device.
    pub inode: u64,
}

impl SegmentKey {
    /// Returns the key of the object that a mapping maps.
    #[must_use]
    pub fn new(vma: &Vma) -> Self {
        Self {
            device: vma.device,
            inode: vma.inode,
        }
    }
}

/// Where a process maps a part of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// PID of the process.
    pub pid: i32,
    /// Addresses in the process.
    pub range: PageRange,
    /// Offset in the segment, in bytes.
    pub offset: u64,
}

impl Mapping {
    /// Returns the offsets of the segment that are mapped at `range`; `None` if they overflow.
    #[must_use]
    pub fn offsets(&self, range: PageRange) -> Option<PageRange> {
        let start = self
            .offset
            .checked_add(range.start() - self.range.start())?;
        PageRange::new(start, range.pages()).ok()
    }
}

/// One shared segment.
#[derive(Debug)]
pub struct Segment {
    /// The object itself.
    pub file: File,
    /// Name of the memfd that the segment is, or that CRIU makes of it; `None` if it becomes no memfd.
    pub memfd: Option<MemfdName>,
    /// Where processes of the tree map it, at the last freeze.
    pub mappings: Vec<Mapping>,
    /// Whether the page tables of [`Segment::mappings`] show everything that was written between the last two
    /// freezes.
    pub tracked: bool,
    /// Whether a process could execute it, at the last freeze.
    pub executable: bool,
    /// Whether a process was seen with a descriptor of it.
    pub opened: bool,
    /// Whether a process outside of the tree maps it, if that is known.
    pub shared_outside: Option<bool>,
    /// Detects removed pages, if writes are tracked.
    pub removed_pages: Option<RemovedPages>,
}

impl Segment {
    /// A segment that was not known before.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self {
            memfd: memfd_name(&file),
            file,
            mappings: Vec::new(),
            tracked: false,
            executable: false,
            opened: false,
            shared_outside: None,
            removed_pages: None,
        }
    }

    /// Opens the object behind a mapping.
    ///
    /// # Errors
    /// `EPERM` without `CAP_CHECKPOINT_RESTORE` (or `CAP_SYS_ADMIN`), `NotFound` if unmapped.
    pub fn open_mapped(pid: i32, vma: &Vma) -> io::Result<File> {
        let (start, end) = (vma.range.start(), vma.range.end());
        File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}"))
    }

    /// Whether writes to the segment can be tracked. That holds only for anonymous shared memory (once CRIU
    /// has restored it, for a memfd without descriptors): memfds are written to through descriptors, which
    /// come and go, and any process that has the key can attach a System V segment.
    #[must_use]
    pub fn trackable(&self) -> bool {
        let anonymous = |name: &MemfdName| name.as_str() == ANONYMOUS;
        !self.opened && self.memfd.as_ref().is_some_and(anonymous)
    }

    /// Updates where the segment is mapped, while the target is stopped. `same_processes`: since the last
    /// update no process was added, exited, or did both.
    ///
    /// The page tables show all writes since then only if the same processes map it at the same places, and
    /// no process outside of the tree maps it.
    pub fn update(&mut self, mappings: Vec<Mapping>, same_processes: bool) {
        if !same_processes {
            self.shared_outside = None;
        }
        let only_inside = self.trackable() && self.shared_outside == Some(false);
        self.tracked = only_inside && same_processes && self.mappings == mappings;
        self.mappings = mappings;
    }

    /// Returns those of the pages in `held` that were removed since they were last watched; all of them where
    /// that is unknown.
    #[must_use]
    pub fn removed(&self, held: &PageSet) -> Vec<PageRange> {
        let mut removed = Vec::new();
        for range in held.iter() {
            let found = self
                .removed_pages
                .as_ref()
                .map(|removed_pages| removed_pages.missing(range, &mut removed));
            if !matches!(found, Some(Ok(()))) {
                removed.push(range);
            }
        }
        removed
    }

    /// Detects from now on if pages of a range that is about to be read are removed.
    pub fn watch(&mut self, range: PageRange) {
        if !self.trackable() {
            return;
        }
        let watch = |removed_pages: Option<RemovedPages>| {
            let removed_pages = removed_pages.map_or_else(|| RemovedPages::map(&self.file), Ok)?;
            removed_pages.populate(range)?;
            Ok(removed_pages)
        };
        let watched: io::Result<RemovedPages> = watch(self.removed_pages.take());
        match watched {
            Ok(removed_pages) => self.removed_pages = Some(removed_pages),
            Err(error) => tracing::debug!(%error, "comparing a shared segment by content"),
        }
    }
}

/// The kernel's name for anonymous shared memory.
const ANONYMOUS: &str = "/dev/zero";

/// Returns the name of a memfd. The kernel calls anonymous shared memory `/dev/zero`, and CRIU makes a memfd
/// of that name of it. A segment of huge pages has no name here, because it cannot be filled page by page.
fn memfd_name(file: &File) -> Option<MemfdName> {
    if file.metadata().ok()?.blksize() > PAGE_SIZE {
        return None;
    }
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    let path = path.to_str()?.strip_suffix(" (deleted)")?;
    match path.strip_prefix("/memfd:") {
        Some(name) => MemfdName::new(name),
        None => (path == ANONYMOUS).then(|| MemfdName::new(path))?,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    fn memfd() -> File {
        File::from(memfd_create("x", MFdFlags::empty()).unwrap())
    }

    fn mapping(pid: i32, start: u64) -> Mapping {
        Mapping {
            pid,
            range: PageRange::new(start, 4).unwrap(),
            offset: 8 * PAGE_SIZE,
        }
    }

    #[test]
    fn memfd_has_a_name() {
        assert_eq!(Segment::new(memfd()).memfd.unwrap().as_str(), "x");
        assert_eq!(
            Segment::new(File::open("/proc/self/exe").unwrap()).memfd,
            None
        );
    }

    #[test]
    fn mapped_addresses_have_offsets_in_the_segment() {
        let mapping = mapping(1, 0x10000);
        let page = PageRange::new(0x11000, 2).unwrap();
        assert_eq!(mapping.offsets(page), PageRange::new(0x9000, 2).ok());
    }

    #[test]
    fn page_tables_are_trusted_only_if_they_show_every_write() {
        let mut segment = Segment::new(memfd());
        segment.memfd = MemfdName::new(ANONYMOUS);
        let all = [mapping(1, 0x10000), mapping(2, 0x10000)];
        let update = |segment: &mut Segment, mappings: &[Mapping], same| {
            segment.update(mappings.to_vec(), same);
            segment.tracked
        };
        // The first update has nothing to compare with.
        assert!(!update(&mut segment, &all, true));
        segment.shared_outside = Some(false);
        assert!(update(&mut segment, &all, true));
        // The page table of a new mapping has missed earlier writes; that of a removed mapping is lost.
        let more = [&all[..], &[mapping(1, 0x20000)]].concat();
        assert!(!update(&mut segment, &more, true));
        assert!(!update(&mut segment, &all, true));
        assert!(update(&mut segment, &all, true));
        // A process was added or exited: others may map the segment now.
        assert!(!update(&mut segment, &all, false));
        assert_eq!(segment.shared_outside, None);
        segment.shared_outside = Some(true);
        assert!(!update(&mut segment, &all, true));
        assert_eq!(segment.shared_outside, Some(true));
        assert!(!update(&mut segment, &all, false));
        assert_eq!(segment.shared_outside, None);
    }
}
