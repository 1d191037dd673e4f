//! Shared segments of the tree: anonymous shared memory, memfds, System V shared memory.
//!
//! Each is sent once for the whole tree, by offset. What was written is told by the page tables of all who
//! map it, if nobody can have written it otherwise ([`Segment::look`]), and what was taken away by a mapping
//! of our own ([`RemovedPages`]); else contents are compared.

use crate::baseline::{Baseline, ContentHashes};
use crate::sys::removed_pages::RemovedPages;
use crate::target::vma::{Device, Vma};
use pageferry_common::{MemfdName, PAGE_SIZE, PageRange};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// Names a shared segment: inode numbers are only unique on their device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentKey {
    /// Device of the kernel's mount.
    pub device: Device,
    /// Inode number there.
    pub inode: u64,
}

impl SegmentKey {
    /// Of what a mapping maps.
    #[must_use]
    pub fn of(vma: &Vma) -> Self {
        Self {
            device: vma.device,
            inode: vma.inode,
        }
    }
}

/// Where a process maps a part of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The process.
    pub pid: i32,
    /// Where, in its memory.
    pub range: PageRange,
    /// Offset in the segment, bytes.
    pub offset: u64,
}

impl Mapping {
    /// The part of the segment that is mapped at `range`; `None` if there is no such offset.
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
    /// The name of the memfd that it is, or that CRIU makes of it: `None` if of neither.
    pub memfd: Option<MemfdName>,
    /// What the receiver holds of it.
    pub baseline: Baseline,
    /// Content hashes of what the receiver holds.
    pub hashes: ContentHashes,
    /// Who maps it, at the last freeze.
    pub mappings: Vec<Mapping>,
    /// Whether the page tables of [`Segment::mappings`] tell of everything that was written between the
    /// last two freezes.
    pub tracked: bool,
    /// Whether somebody may execute it, at the last freeze.
    pub executable: bool,
    /// Whether a process has had a descriptor of it.
    pub opened: bool,
    /// Whether somebody else maps it, if that is known.
    pub shared_outside: Option<bool>,
    /// Tells of pages that were taken away, if writes are tracked.
    pub removed_pages: Option<RemovedPages>,
}

impl Segment {
    /// A segment met for the first time.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self {
            memfd: memfd_name(&file),
            file,
            baseline: Baseline::default(),
            hashes: ContentHashes::of_everything(),
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

    /// Whether its writes may be tracked: only those of anonymous shared memory (once CRIU has restored it,
    /// a memfd that nobody has open). Memfds are written to through descriptors, which come and go, and
    /// System V segments are attached by whoever knows the number.
    #[must_use]
    pub fn trackable(&self) -> bool {
        let anonymous = |name: &MemfdName| name.as_str() == ANONYMOUS;
        !self.opened && self.memfd.as_ref().is_some_and(anonymous)
    }

    /// Looks at it while the tree is stopped: who maps it now. `same_processes`: none came, went, or came
    /// and went since the last time.
    ///
    /// Page tables tell of all writes since then if those that map it are those that did, and nobody
    /// outside the tree does.
    pub fn look(&mut self, mappings: Vec<Mapping>, same_processes: bool) {
        if !same_processes {
            self.shared_outside = None;
        }
        let ours_alone = self.trackable() && self.shared_outside == Some(false);
        self.tracked = ours_alone && same_processes && self.mappings == mappings;
        self.mappings = mappings;
    }

    /// The round on its way did not arrive. It may not have compared all of it, and what it was told of
    /// writes, nothing tells again: the next compares.
    pub fn lost(&mut self) {
        self.baseline.lost();
        self.shared_outside = None;
    }

    /// What was taken away, of what the receiver holds, since it was sent; everything, if that is not known.
    pub fn taken_away(&self) -> Vec<PageRange> {
        let mut gone = Vec::new();
        for range in self.baseline.pages().iter() {
            let found = self
                .removed_pages
                .as_ref()
                .map(|removed_pages| removed_pages.missing(range, &mut gone));
            if !matches!(found, Some(Ok(()))) {
                gone.push(range);
            }
        }
        gone
    }

    /// From now on notices if pages are taken away, which are about to be read.
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
            Err(error) => tracing::debug!(%error, "a shared segment will be compared by content"),
        }
    }
}

/// What the kernel calls anonymous shared memory.
const ANONYMOUS: &str = "/dev/zero";

/// The name of a memfd. Anonymous shared memory is `/dev/zero` to the kernel, and CRIU makes a memfd of
/// that name of it. One of huge pages is of no kind that can be filled page by page.
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
    fn a_memfd_has_a_name() {
        assert_eq!(Segment::new(memfd()).memfd.unwrap().as_str(), "x");
        assert_eq!(
            Segment::new(File::open("/proc/self/exe").unwrap()).memfd,
            None
        );
    }

    #[test]
    fn a_mapping_is_a_part_of_the_segment() {
        let mapping = mapping(1, 0x10000);
        let page = PageRange::new(0x11000, 2).unwrap();
        assert_eq!(mapping.offsets(page), PageRange::new(0x9000, 2).ok());
    }

    #[test]
    fn page_tables_are_believed_only_if_they_tell_everything() {
        let mut segment = Segment::new(memfd());
        segment.memfd = MemfdName::new(ANONYMOUS);
        let all = [mapping(1, 0x10000), mapping(2, 0x10000)];
        let look = |segment: &mut Segment, mappings: &[Mapping], same| {
            segment.look(mappings.to_vec(), same);
            segment.tracked
        };
        // The first time nothing is known.
        assert!(!look(&mut segment, &all, true));
        segment.shared_outside = Some(false);
        assert!(look(&mut segment, &all, true));
        // A mapping that came knows nothing; one that went has taken what it knew along.
        let more = [&all[..], &[mapping(1, 0x20000)]].concat();
        assert!(!look(&mut segment, &more, true));
        assert!(!look(&mut segment, &all, true));
        assert!(look(&mut segment, &all, true));
        // A process came or went: others may have the segment now.
        assert!(!look(&mut segment, &all, false));
        assert_eq!(segment.shared_outside, None);
        segment.shared_outside = Some(true);
        assert!(!look(&mut segment, &all, true));
        assert_eq!(segment.shared_outside, Some(true));
        assert!(!look(&mut segment, &all, false));
        assert_eq!(segment.shared_outside, None);
    }
}
