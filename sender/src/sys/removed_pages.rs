//! Detection of pages that were removed from a shared segment.
//!
//! `MADV_REMOVE` removes a page from the object and unmaps it from every process; a later access maps a new
//! page of zeros. The page tables of the target do not show this, for write-protection outlasts both. The
//! page tables of a mapping in this process do: nothing else accesses that mapping.

use super::mapping::Mapping;
use super::pagemap::{self, PRESENT, Query, Region};
use pageferry_common::{PAGE_SIZE, PageRange};
use std::fs::File;
use std::io;

/// Number of runs that one scan returns at most; they take 24 KiB.
const REGIONS_MAX: usize = 1024;

/// A read-only mapping of a shared segment that detects pages punched out with `MADV_REMOVE`.
#[derive(Debug)]
pub struct RemovedPages {
    mapping: Mapping,
    pagemap: File,
}

impl RemovedPages {
    /// Maps a whole object.
    ///
    /// # Errors
    /// Errors of `open` and `mmap`: `EINVAL` for an empty object.
    pub fn map(file: &File) -> io::Result<Self> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let mapping = Mapping::read_only(file, bytes)?;
        Ok(Self { mapping, pagemap })
    }

    /// Watches the pages of a range of offsets from now on. Allocates those that are missing in the object.
    ///
    /// # Errors
    /// As [`Mapping::populate`].
    pub fn populate(&self, offsets: PageRange) -> io::Result<()> {
        self.mapping.populate(self.address_range(offsets)?)
    }

    /// Appends the pages of a range of offsets that are not mapped: removed since [`RemovedPages::populate`],
    /// never populated, or unmapped by the kernel itself.
    ///
    /// # Errors
    /// As [`pagemap::scan`].
    pub fn missing(&self, offsets: PageRange, missing: &mut Vec<PageRange>) -> io::Result<()> {
        let query = Query {
            none: PRESENT,
            report: PRESENT,
            ..Query::default()
        };
        let mut regions = vec![Region::default(); REGIONS_MAX];
        let (range, base) = (self.address_range(offsets)?, self.mapping.start());
        pagemap::scan(&self.pagemap, range, query, &mut regions, |region| {
            missing.extend(PageRange::from_bounds(
                region.start - base,
                region.end - base,
            ));
        })
    }

    /// Converts offsets in the object to addresses in this process.
    fn address_range(&self, offsets: PageRange) -> io::Result<PageRange> {
        let mapped_bytes = self.mapping.range().pages() * PAGE_SIZE;
        let range = PageRange::new(self.mapping.start() + offsets.start(), offsets.pages()).ok();
        range
            .filter(|_| offsets.end() <= mapped_bytes)
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::unix::fs::FileExt;

    #[test]
    fn removed_page_is_missing_even_if_it_is_written_again() {
        let memfd = File::from(memfd_create("x", MFdFlags::empty()).unwrap());
        memfd.write_all_at(&vec![1; 1000 << 12], 0).unwrap();
        let removed_pages = RemovedPages::map(&memfd).unwrap();
        let all = PageRange::new(0, 1000).unwrap();
        let missing = || {
            let mut pages = Vec::new();
            if let Err(error) = removed_pages.missing(all, &mut pages) {
                assert_eq!(error.raw_os_error(), Some(libc::ENOTTY), "{error}");
                return None;
            }
            Some(pages)
        };
        if missing().is_none() {
            eprintln!("skipped: this kernel has no PAGEMAP_SCAN");
            return;
        }
        assert_eq!(missing().unwrap(), [all]);
        removed_pages.populate(all).unwrap();
        memfd.write_all_at(&[2], 0).unwrap();
        assert_eq!(missing().unwrap(), []);
        let (mode, page) = (FallocateFlags::FALLOC_FL_PUNCH_HOLE, PAGE_SIZE as i64);
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&memfd, mode, 7 * page, 3 * page).unwrap();
        memfd.write_all_at(&[2], 8 << 12).unwrap();
        let expected = PageRange::new(7 * PAGE_SIZE, 3).unwrap();
        assert_eq!(missing().unwrap(), [expected]);
        removed_pages.populate(expected).unwrap();
        assert_eq!(missing().unwrap(), []);
        assert!(
            removed_pages
                .populate(PageRange::new(999 * PAGE_SIZE, 2).unwrap())
                .is_err()
        );
    }
}
