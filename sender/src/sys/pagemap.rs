//! `PAGEMAP_SCAN` (Linux 6.7): asks the kernel which pages of a range are populated and written,
//! and protects the written ones again in the same atomic step.

use super::check;
use pageferry_common::PageRange;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

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
#[derive(Debug, Clone, Copy)]
pub struct Query {
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
            category_mask: query.none,
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
