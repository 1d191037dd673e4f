//! A mapping of our own of a shared segment, that tells which of its pages were taken away.
//!
//! A page that is removed from the object (`MADV_REMOVE`) is unmapped everywhere, and one that is touched
//! there afterwards is a new one, of zeros. The page tables of who maps it do not tell, for write-protection
//! outlasts both. Ours do: nobody touches that mapping but us.

use super::pagemap::{self, PRESENT, Query, Region};
use super::{check, map};
use pageferry_common::PageRange;
use std::fs::File;
use std::io;

/// Room for the runs that one scan returns: 24 KiB.
const ROOM: usize = 1024;

/// See the module. Unmapped when dropped.
#[derive(Debug)]
pub struct RemovedPages {
    start: u64,
    bytes: usize,
    pagemap: File,
}

impl RemovedPages {
    /// Maps all of an object, to be read.
    ///
    /// # Errors
    /// The kernel's; `EINVAL` for an empty object.
    pub fn map(file: &File) -> io::Result<Self> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let at = map(bytes, libc::PROT_READ, flags, Some(file))?;
        Ok(Self {
            start: at as u64,
            bytes,
            pagemap,
        })
    }

    /// Looks after the pages of a range of offsets from now on. Those that are not there are made.
    ///
    /// # Errors
    /// The kernel's: the object has become shorter, or there is no memory.
    pub fn populate(&self, offsets: PageRange) -> io::Result<()> {
        let range = self.at(offsets)?;
        // SAFETY: the range lies in our mapping; its pages are only mapped.
        check(libc::c_long::from(unsafe {
            libc::madvise(
                range.start() as *mut libc::c_void,
                range.bytes() as usize,
                libc::MADV_POPULATE_READ,
            )
        }))?;
        Ok(())
    }

    /// Appends the pages of a range of offsets that were taken away since they are looked after, or never
    /// were; the kernel may have taken them by itself.
    ///
    /// # Errors
    /// The kernel's.
    pub fn missing(&self, offsets: PageRange, gone: &mut Vec<PageRange>) -> io::Result<()> {
        let query = Query {
            none: PRESENT,
            report: PRESENT,
            ..Query::default()
        };
        let mut room = vec![Region::default(); ROOM];
        let range = self.at(offsets)?;
        pagemap::scan(&self.pagemap, range, query, &mut room, |region| {
            let (start, end) = (region.start - self.start, region.end - self.start);
            gone.extend(PageRange::from_bounds(start, end));
        })
    }

    /// Where a range of offsets is in our memory.
    fn at(&self, offsets: PageRange) -> io::Result<PageRange> {
        let inside =
            offsets.end() <= (self.bytes as u64).next_multiple_of(pageferry_common::PAGE_SIZE);
        let range = PageRange::new(self.start + offsets.start(), offsets.pages()).ok();
        range
            .filter(|_| inside)
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl Drop for RemovedPages {
    fn drop(&mut self) {
        // SAFETY: it is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use pageferry_common::PAGE_SIZE;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_page_that_is_taken_away_and_comes_again_shows() {
        let memfd = File::from(memfd_create("x", MFdFlags::empty()).unwrap());
        memfd.write_all_at(&vec![1; 1000 << 12], 0).unwrap();
        let removed_pages = RemovedPages::map(&memfd).unwrap();
        let all = PageRange::new(0, 1000).unwrap();
        let gone = || {
            let mut gone = Vec::new();
            if let Err(error) = removed_pages.missing(all, &mut gone) {
                assert_eq!(error.raw_os_error(), Some(libc::ENOTTY), "{error}");
                return None;
            }
            Some(gone)
        };
        if gone().is_none() {
            eprintln!("skipped: this kernel has no PAGEMAP_SCAN");
            return;
        }
        assert_eq!(gone().unwrap(), [all]);
        removed_pages.populate(all).unwrap();
        memfd.write_all_at(&[2], 0).unwrap();
        assert_eq!(gone().unwrap(), []);
        let (mode, page) = (FallocateFlags::FALLOC_FL_PUNCH_HOLE, PAGE_SIZE as i64);
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&memfd, mode, 7 * page, 3 * page).unwrap();
        memfd.write_all_at(&[2], 8 << 12).unwrap();
        let expected = PageRange::new(7 * PAGE_SIZE, 3).unwrap();
        assert_eq!(gone().unwrap(), [expected]);
        removed_pages.populate(expected).unwrap();
        assert_eq!(gone().unwrap(), []);
        assert!(
            removed_pages
                .populate(PageRange::new(999 * PAGE_SIZE, 2).unwrap())
                .is_err()
        );
    }
}
