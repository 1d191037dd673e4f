//! `PAGEMAP_SCAN` (Linux 6.7): lists which pages of a range are populated and written, and write-protects the
//! written pages again in the same atomic step.

use super::check;
use super::mapping::Mapping;
use pageferry_common::{PAGE_SIZE, PageRange};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// The page is in a mapping that is registered for write-protection.
pub const WPALLOWED: u64 = 1 << 0;
/// The page was written since it was last protected.
pub const WRITTEN: u64 = 1 << 1;
/// The page belongs to a file or to shared memory, and is not private.
pub const FILE: u64 = 1 << 2;
/// The page is in memory.
pub const PRESENT: u64 = 1 << 3;
/// The page is in swap.
pub const SWAPPED: u64 = 1 << 4;
/// The page is the shared page of zeros.
pub const PFNZERO: u64 = 1 << 5;
/// The page was written since the soft-dirty bits were last cleared.
pub const SOFT_DIRTY: u64 = 1 << 7;
/// The page is in a guard region (Linux 6.15).
pub const GUARD: u64 = 1 << 8;

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// Run of pages of the same categories: `struct page_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Region {
    /// Address of the first byte.
    pub start: u64,
    /// Address behind the last byte.
    pub end: u64,
    /// Categories of the pages, among those in [`Query::report`].
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

/// Which pages to list, and whether to protect the written pages among them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Query {
    /// Categories that a page must all have.
    pub all: u64,
    /// Categories of which a page must have at least one; 0 for no such condition.
    pub any: u64,
    /// Categories that a page must not have.
    pub none: u64,
    /// Categories to report.
    pub report: u64,
    /// Whether to write-protect the matching pages that were written.
    pub protect: bool,
}

/// Calls `each` with the runs of matching pages in `range`, in ascending order. Each system call returns at
/// most `regions.len()` runs.
///
/// # Errors
/// `ENOTTY` from a kernel without `PAGEMAP_SCAN`, `ESRCH` if the memory no longer exists, `EPERM` if a
/// mapping cannot be protected.
pub fn scan(
    pagemap: &File,
    range: PageRange,
    query: Query,
    regions: &mut [Region],
    mut each: impl FnMut(&Region),
) -> io::Result<()> {
    let vec_len = regions.len();
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
            vec: regions.as_mut_ptr() as u64,
            vec_len: vec_len as u64,
            category_inverted: query.none,
            category_mask: query.none | query.all,
            category_anyof_mask: query.any,
            return_mask: query.report,
            ..ScanArg::default()
        };
        // SAFETY: the kernel reads and writes one pm_scan_arg, which has the layout of ScanArg, and writes at
        // most vec_len regions to `regions`, which is borrowed exclusively.
        let found = check(libc::c_long::from(unsafe {
            libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg)
        }))?;
        let found = &regions[..found as usize];
        found.iter().for_each(&mut each);
        // Only a full list ends a walk early. `walk_end` alone is not reliable: once the small buffer inside
        // the kernel was full, `walk_end` stays there even if the walk went on to the end (seen on 6.18).
        // Continuing there would list pages again that this call has protected, now as not written.
        let Some(last) = found.last().filter(|_| found.len() == vec_len) else {
            return Ok(());
        };
        start = arg.walk_end.max(last.end);
    }
    Ok(())
}

/// Memory mapped by one page table, in bytes.
const TABLE_BYTES: u64 = 512 * PAGE_SIZE;

/// Calls `each` with the pages of `range` that are not write-protected, populated or not, in ascending order.
///
/// The query is the one that the kernel has a fast path for. That path skips memory without a page table,
/// where nothing is protected. So for each page table that the kernel lists nothing of, one entry of the
/// pagemap is read.
///
/// # Errors
/// As [`scan`]; `UnexpectedEof` if the memory no longer exists.
pub fn scan_unprotected(
    pagemap: &File,
    range: PageRange,
    regions: &mut [Region],
    mut each: impl FnMut(PageRange),
) -> io::Result<()> {
    let query = Query {
        all: WRITTEN,
        report: WRITTEN,
        ..Query::default()
    };
    // `scan` takes no errors from its callback.
    let (mut listed_end, mut result) = (range.start(), Ok(()));
    scan(pagemap, range, query, regions, |region| {
        let gap = PageRange::from_bounds(listed_end, region.start);
        if result.is_ok() {
            result = list_missing_tables(pagemap, range, gap, &mut each);
        }
        listed_end = region.end;
        let found = PageRange::from_bounds(region.start, region.end);
        found.into_iter().for_each(&mut each);
    })?;
    result?;
    let gap = PageRange::from_bounds(listed_end, range.end());
    list_missing_tables(pagemap, range, gap, &mut each)
}

/// Calls `each` with the parts of `gap`, a part of `range` that a scan listed nothing of, that have no page
/// table.
fn list_missing_tables(
    pagemap: &File,
    range: PageRange,
    gap: Option<PageRange>,
    each: &mut impl FnMut(PageRange),
) -> io::Result<()> {
    // A table that a page was listed of exists. So only whole tables, or what `range` has of them, may be
    // missing.
    let may_be_missing = |part: &PageRange| {
        (part.start().is_multiple_of(TABLE_BYTES) || part.start() == range.start())
            && (part.end().is_multiple_of(TABLE_BYTES) || part.end() == range.end())
    };
    let mut rest = gap;
    while let Some(now) = rest {
        let end = (now.start() + 1)
            .next_multiple_of(TABLE_BYTES)
            .min(now.end());
        let part = PageRange::from_bounds(now.start(), end);
        rest = PageRange::from_bounds(end, now.end());
        if let Some(part) = part.filter(may_be_missing)
            && !is_protected(pagemap, part.start())?
        {
            each(part);
        }
    }
    Ok(())
}

/// Bits of an entry of the pagemap.
const ENTRY_EXCLUSIVE: u64 = 1 << 56;
const ENTRY_UFFD_WP: u64 = 1 << 57;
const ENTRY_GUARD: u64 = 1 << 58;
const ENTRY_FILE_OR_SHARED: u64 = 1 << 61;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_PRESENT: u64 = 1 << 63;

/// Size of an entry of the pagemap, in bytes.
const ENTRY_BYTES: usize = size_of::<u64>();

/// Reads the entry of one page.
///
/// # Errors
/// Errors of reading; `UnexpectedEof` if the memory no longer exists.
fn read_entry(pagemap: &File, address: u64) -> io::Result<u64> {
    let mut entry = [0; ENTRY_BYTES];
    pagemap.read_exact_at(&mut entry, address / PAGE_SIZE * ENTRY_BYTES as u64)?;
    Ok(u64::from_le_bytes(entry))
}

/// Returns whether a page is write-protected, populated or not.
fn is_protected(pagemap: &File, address: u64) -> io::Result<bool> {
    Ok(read_entry(pagemap, address)? & ENTRY_UFFD_WP != 0)
}

/// Returns whether a private page has content of its own, in memory or in swap. The page of zeros counts, a
/// guard region does not.
///
/// # Errors
/// Errors of reading the pagemap; `UnexpectedEof` if the memory no longer exists.
pub fn is_populated(pagemap: &File, address: u64) -> io::Result<bool> {
    let entry = read_entry(pagemap, address)?;
    if entry & (ENTRY_FILE_OR_SHARED | ENTRY_GUARD) != 0 {
        return Ok(false);
    }
    let may_be_guard = || entry & ENTRY_SWAPPED != 0 && !reports_guards().unwrap_or(false);
    Ok(entry & ENTRY_PRESENT != 0 || entry & ENTRY_SWAPPED != 0 && !may_be_guard())
}

/// Returns whether the pagemap distinguishes guard regions from pages in swap, if the kernel has any: Linux
/// 6.13 and 6.14 have them and do not.
///
/// # Errors
/// Errors of mapping a page, and of reading the pagemap.
pub fn reports_guards() -> io::Result<bool> {
    let page = Mapping::private_page()?;
    match page.make_guard() {
        Ok(()) => {
            let pagemap = File::open("/proc/self/pagemap")?;
            Ok(read_entry(&pagemap, page.start())? & ENTRY_GUARD != 0)
        }
        Err(_) => Ok(true),
    }
}

/// Returns whether no anonymous page in memory, and no page in swap, of `range` is mapped by another process,
/// too. The page of zeros counts as such a page. `buffer` is scratch space, 8 bytes a page.
///
/// # Errors
/// Errors of reading the pagemap.
pub fn is_exclusive(pagemap: &File, range: PageRange, buffer: &mut Vec<u8>) -> io::Result<bool> {
    buffer.resize(range.pages() as usize * ENTRY_BYTES, 0);
    let start = range.start() / PAGE_SIZE * ENTRY_BYTES as u64;
    let mut filled = 0;
    // The pagemap ends where user space does.
    while filled < buffer.len() {
        match pagemap.read_at(&mut buffer[filled..], start + filled as u64) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let mut entries = buffer[..filled].chunks_exact(ENTRY_BYTES);
    Ok(entries.all(|entry| {
        let entry = u64::from_le_bytes(entry.try_into().expect("8 bytes"));
        let populated = entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0;
        // The kernel reports no page in swap as exclusive.
        !populated || entry & (ENTRY_FILE_OR_SHARED | ENTRY_EXCLUSIVE) != 0
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::uffd::Uffd;
    use pageferry_common::PageSet;
    use std::fs::OpenOptions;

    #[test]
    fn own_pages_holes_and_shared_memory_are_exclusive() {
        let memory = vec![1u8; 8 << 12];
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let range = PageRange::new(start, 7).unwrap();
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut buffer = Vec::new();
        assert!(is_exclusive(&pagemap, range, &mut buffer).unwrap());
        // Nothing is mapped there.
        let hole = PageRange::new(0x1000, 3).unwrap();
        assert!(is_exclusive(&pagemap, hole, &mut buffer).unwrap());
        let shared = Mapping::shared(PAGE_SIZE as usize).unwrap();
        let own = OpenOptions::new().write(true).open("/proc/self/mem");
        own.unwrap().write_all_at(&[1], shared.start()).unwrap();
        assert!(is_exclusive(&pagemap, shared.range(), &mut buffer).unwrap());
        drop(memory);
    }

    #[test]
    fn only_a_page_with_content_is_populated() {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut page = Mapping::private_page().unwrap();
        assert!(!is_populated(&pagemap, page.start()).unwrap());
        page.touch();
        assert!(is_populated(&pagemap, page.start()).unwrap());
        if page.make_guard().is_ok() {
            assert!(!is_populated(&pagemap, page.start()).unwrap());
        }
    }

    #[test]
    fn unprotected_pages_are_listed_with_and_without_page_table() {
        const PAGES: u64 = 6 * 512;
        let Ok(uffd) = Uffd::for_this_process() else {
            eprintln!("skipped: this kernel has no asynchronous write-protection");
            return;
        };
        let mapping = Mapping::shared((PAGES * PAGE_SIZE) as usize).unwrap();
        let start = mapping.start();
        let range = |first: u64, pages| PageRange::new(start + first * PAGE_SIZE, pages).unwrap();
        let all = range(0, PAGES);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut regions = [Region::default(); 3];
        // A write here goes through the page table, like a write by the process itself.
        let memory = OpenOptions::new()
            .write(true)
            .open("/proc/self/mem")
            .unwrap();
        let write = |page: u64| memory.write_all_at(&[1], range(page, 1).start()).unwrap();
        let mut unprotected = || {
            let mut found = PageSet::new();
            scan_unprotected(&pagemap, all, &mut regions, |range| found.insert(range)).unwrap();
            found
        };
        let set = |ranges: &[PageRange]| {
            let mut set = PageSet::new();
            ranges.iter().for_each(|&range| set.insert(range));
            set
        };
        // First without any page table, then with one page and its table.
        assert_eq!(unprotected(), set(&[all]));
        write(700);
        assert_eq!(unprotected(), set(&[all]));
        uffd.register(all).unwrap();
        assert_eq!(unprotected(), set(&[all]));
        // At least one page table is missing between the two protected ranges.
        let (first, last) = (range(0, 512 + 7), range(4 * 512 + 9, 512));
        for part in [first, last] {
            let query = Query {
                report: WRITTEN | PRESENT,
                protect: true,
                ..Query::default()
            };
            let mut regions = [Region::default(); 16];
            scan(&pagemap, part, query, &mut regions, |_| {}).unwrap();
        }
        let mut expected = set(&[all]).difference(&set(&[first, last]));
        assert_eq!(unprotected(), expected);
        for page in [0, 3, 511, 512, 512 + 6, 4 * 512 + 9, 5 * 512 - 1] {
            write(page);
            expected.insert(range(page, 1));
        }
        assert_eq!(unprotected(), expected);
    }
}
