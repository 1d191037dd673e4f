//! `PAGEMAP_SCAN` (Linux 6.7): asks the kernel which pages of a range are populated and written,
//! and protects the written ones again in the same atomic step.

use super::check;
use pageferry_common::{PAGE_SIZE, PageRange};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// The page lies in a mapping registered for write-protect tracking.
pub const WPALLOWED: u64 = 1 << 0;
/// Written since it was last protected.
pub const WRITTEN: u64 = 1 << 1;
/// The page is a file's (or shared memory's), not private.
pub const FILE: u64 = 1 << 2;
/// In memory.
pub const PRESENT: u64 = 1 << 3;
/// In swap.
pub const SWAPPED: u64 = 1 << 4;
/// The zero page.
pub const PFNZERO: u64 = 1 << 5;
/// Written since soft-dirty bits were last cleared.
pub const SOFT_DIRTY: u64 = 1 << 7;

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// One run of pages that are alike: `struct page_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Region {
    /// First address, bytes.
    pub start: u64,
    /// One past the last address, bytes.
    pub end: u64,
    /// The categories asked for with [`Query::report`].
    pub categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Which pages to list, and whether to protect the written ones among them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Query {
    /// Categories of which a page must have every one.
    pub all: u64,
    /// Categories of which a page must have at least one (0: no such demand).
    pub any: u64,
    /// Categories of which a page must have none.
    pub none: u64,
    /// Categories to report.
    pub report: u64,
    /// Write-protect what matches and was written.
    pub protect: bool,
}

/// Lists the runs of matching pages in `range`, ascending, in calls of `room.len()` runs at most.
///
/// # Errors
/// `ENOTTY` from a kernel without the call, `ESRCH` if the memory is gone, `EPERM` where some
/// mapping cannot be protected; otherwise what `each` returns.
pub fn scan(
    pagemap: &File,
    range: PageRange,
    query: Query,
    room: &mut [Region],
    mut each: impl FnMut(&Region),
) -> io::Result<()> {
    let vec_len = room.len();
    let mut start = range.start();
    while start < range.end() {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: if query.protect {
                PM_SCAN_WP_MATCHING
            } else {
                0
            },
            start,
            end: range.end(),
            vec: room.as_mut_ptr() as u64,
            vec_len: vec_len as u64,
            category_inverted: query.none,
            category_mask: query.none | query.all,
            category_anyof_mask: query.any,
            return_mask: query.report,
            ..ScanArg::default()
        };
        // SAFETY: the kernel reads and writes one pm_scan_arg, which ScanArg is field for field,
        // and writes at most vec_len regions into `room`, borrowed exclusively meanwhile.
        let found = check(libc::c_long::from(unsafe {
            libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg)
        }))?;
        let found = &room[..found as usize];
        found.iter().for_each(&mut each);
        // Only a full list ends a walk early. `walk_end` alone must not be believed: once the
        // kernel's own small buffer was full in between, it stays at that place even if the walk
        // went on to the end (seen on 6.18), and going on there would list, as not written, what
        // this very call protected.
        let Some(last) = found.last().filter(|_| found.len() == vec_len) else {
            return Ok(());
        };
        start = arg.walk_end.max(last.end);
    }
    Ok(())
}

/// What one page table maps, bytes.
const TABLE: u64 = 512 * PAGE_SIZE;

/// Lists the pages of `range`, there or not, that are not write-protected, ascending.
///
/// It takes a fraction of the time of other questions, for the kernel has a short way for exactly this one.
/// That leaves out what has no page table, where nothing is protected; so of each table that it says nothing
/// of, one entry is read.
///
/// # Errors
/// As [`scan`]; `UnexpectedEof` if the memory is gone.
pub fn scan_unprotected(
    pagemap: &File,
    range: PageRange,
    room: &mut [Region],
    mut each: impl FnMut(PageRange),
) -> io::Result<()> {
    let query = Query {
        all: WRITTEN,
        report: WRITTEN,
        ..Query::default()
    };
    // A table that something was listed of is there.
    let is_silent = |part: PageRange| {
        (part.start().is_multiple_of(TABLE) || part.start() == range.start())
            && (part.end().is_multiple_of(TABLE) || part.end() == range.end())
    };
    let look = |silent: Option<PageRange>, each: &mut dyn FnMut(PageRange)| {
        let mut rest = silent;
        while let Some(now) = rest {
            let end = (now.start() + 1).next_multiple_of(TABLE).min(now.end());
            let part = PageRange::from_bounds(now.start(), end);
            rest = PageRange::from_bounds(end, now.end());
            if let Some(part) = part.filter(|part| is_silent(*part))
                && !is_protected(pagemap, part.start())?
            {
                each(part);
            }
        }
        io::Result::Ok(())
    };
    let (mut end, mut looked) = (range.start(), Ok(()));
    scan(pagemap, range, query, room, |region| {
        let silent = PageRange::from_bounds(end, region.start);
        if looked.is_ok() {
            looked = look(silent, &mut each);
        }
        end = region.end;
        let found = PageRange::from_bounds(region.start, region.end);
        found.into_iter().for_each(&mut each);
    })?;
    looked?;
    look(PageRange::from_bounds(end, range.end()), &mut each)
}

/// Whether a page is write-protected, there or not.
fn is_protected(pagemap: &File, address: u64) -> io::Result<bool> {
    const UFFD_WP: u64 = 1 << 57;
    let mut entry = [0; size_of::<u64>()];
    let at = address / PAGE_SIZE * size_of::<u64>() as u64;
    pagemap.read_exact_at(&mut entry, at)?;
    Ok(u64::from_le_bytes(entry) & UFFD_WP != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map;
    use crate::sys::uffd::Uffd;
    use pageferry_common::PageSet;
    use std::fs::OpenOptions;

    #[test]
    fn what_is_not_protected_is_listed_page_table_or_not() {
        const PAGES: u64 = 6 * 512;
        let Ok(uffd) = Uffd::for_this_process() else {
            eprintln!("skipped: this kernel has no asynchronous write-protection");
            return;
        };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let at = map((PAGES * PAGE_SIZE) as usize, protection, flags, None).unwrap();
        let start = at.addr() as u64;
        let range = |first: u64, pages| PageRange::new(start + first * PAGE_SIZE, pages).unwrap();
        let all = range(0, PAGES);
        let (pagemap, mut room) = (
            File::open("/proc/self/pagemap").unwrap(),
            [Region::default(); 3],
        );
        // As a process writes: through its page table.
        let memory = OpenOptions::new()
            .write(true)
            .open("/proc/self/mem")
            .unwrap();
        let write = |page: u64| memory.write_all_at(&[1], range(page, 1).start()).unwrap();
        let mut unprotected = || {
            let mut found = PageSet::new();
            scan_unprotected(&pagemap, all, &mut room, |range| found.insert(range)).unwrap();
            found
        };
        let set = |ranges: &[PageRange]| {
            let mut set = PageSet::new();
            ranges.iter().for_each(|&range| set.insert(range));
            set
        };
        // Nothing is there; then one page is, and its table.
        assert_eq!(unprotected(), set(&[all]));
        write(700);
        assert_eq!(unprotected(), set(&[all]));
        uffd.register(all).unwrap();
        assert_eq!(unprotected(), set(&[all]));
        // Between what is protected there is at least one table that is not there.
        let (first, last) = (range(0, 512 + 7), range(4 * 512 + 9, 512));
        for part in [first, last] {
            let query = Query {
                report: WRITTEN | PRESENT,
                protect: true,
                ..Query::default()
            };
            let mut room = [Region::default(); 16];
            scan(&pagemap, part, query, &mut room, |_| {}).unwrap();
        }
        let mut expected = set(&[all]).difference(&set(&[first, last]));
        assert_eq!(unprotected(), expected);
        for page in [0, 3, 511, 512, 512 + 6, 4 * 512 + 9, 5 * 512 - 1] {
            write(page);
            expected.insert(range(page, 1));
        }
        assert_eq!(unprotected(), expected);
        // SAFETY: it is ours, and nothing refers to it.
        unsafe { libc::munmap(at, (PAGES * PAGE_SIZE) as usize) };
    }
}
