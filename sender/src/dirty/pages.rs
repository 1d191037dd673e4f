//! Lists populated private pages: with `PAGEMAP_SCAN`, or on kernels before 6.7 by reading
//! `/proc/PID/pagemap`.

use crate::sys::pagemap::{self, Query, Region};
use crate::target::vma::Part;
use pageferry_common::{PAGE_SIZE, PageRange};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Greatest number of runs that one `PAGEMAP_SCAN` returns: 768 KiB.
const SCAN_ROOM: usize = 32_768;

/// What a scan does to the written pages that it lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScanMode {
    /// Nothing.
    Report,
    /// Write-protects them again, which begins the next epoch. Only `PAGEMAP_SCAN` can.
    Protect,
}

/// Returns the query for private memory that CRIU would dump: populated, neither the zero page nor a page of
/// the mapped file.
fn own_pages(file: bool) -> Query {
    Query {
        any: pagemap::PRESENT | pagemap::SWAPPED,
        none: if file {
            pagemap::PFNZERO | pagemap::FILE
        } else {
            pagemap::PFNZERO
        },
        ..Query::default()
    }
}

/// Scans page tables; owns the scratch space for it.
#[derive(Debug, Clone)]
pub(super) struct Scanner {
    room: Vec<Region>,
    has_scan: bool,
}

impl Scanner {
    /// Creates a scanner, and checks whether the kernel has `PAGEMAP_SCAN`.
    pub(super) fn probe() -> io::Result<Self> {
        let mut scanner = Self {
            room: vec![Region::default(); SCAN_ROOM],
            has_scan: true,
        };
        let own = File::open("/proc/self/pagemap")?;
        let page = PageRange::new(0x10000, 1).expect("a page");
        scanner.has_scan = scanner.scan(&own, page, own_pages(true), |_, _| {}).is_ok();
        Ok(scanner)
    }

    /// Returns whether the kernel has `PAGEMAP_SCAN`.
    pub(super) fn has_scan(&self) -> bool {
        self.has_scan
    }

    /// Calls `each` with every run of the process's own pages in `part`, and with the categories in `report`
    /// that apply to it.
    pub(super) fn own_pages(
        &mut self,
        pagemap: &File,
        part: Part,
        report: u64,
        mode: ScanMode,
        each: impl FnMut(PageRange, u64),
    ) -> io::Result<()> {
        if self.has_scan {
            let query = Query {
                report,
                protect: mode == ScanMode::Protect,
                ..own_pages(part.file)
            };
            self.scan(pagemap, part.range, query, each)
        } else {
            read_pagemap(pagemap, part.range, each)
        }
    }

    /// Write-protects all pages of `range`, populated or not, and calls `each` with every run of them and the
    /// categories in `report` that applied to it. Works only with `PAGEMAP_SCAN`.
    pub(super) fn protect_all(
        &mut self,
        pagemap: &File,
        range: PageRange,
        report: u64,
        each: impl FnMut(PageRange, u64),
    ) -> io::Result<()> {
        let query = Query {
            report,
            protect: true,
            ..Query::default()
        };
        self.scan(pagemap, range, query, each)
    }

    /// Calls [`pagemap::scan_unprotected`] with the scratch space.
    pub(super) fn unprotected_pages(
        &mut self,
        pagemap: &File,
        range: PageRange,
        each: impl FnMut(PageRange),
    ) -> io::Result<()> {
        pagemap::scan_unprotected(pagemap, range, &mut self.room, each)
    }

    fn scan(
        &mut self,
        pagemap: &File,
        range: PageRange,
        query: Query,
        mut each: impl FnMut(PageRange, u64),
    ) -> io::Result<()> {
        // Without a category to report, the kernel would not separate neighbours that differ.
        let query = Query {
            report: query.report | pagemap::PRESENT,
            ..query
        };
        pagemap::scan(pagemap, range, query, &mut self.room, |region| {
            if let Some(range) = PageRange::from_bounds(region.start, region.end) {
                each(range, region.categories);
            }
        })
    }
}

/// Lists own pages from the bits of `/proc/PID/pagemap`. The zero page cannot be distinguished here: it is
/// recognised when it is read.
fn read_pagemap(
    pagemap: &File,
    range: PageRange,
    mut each: impl FnMut(PageRange, u64),
) -> io::Result<()> {
    const ENTRIES: u64 = 4096;
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE_OR_SHARED: u64 = 1 << 61;
    const GUARD: u64 = 1 << 58;
    const SOFT_DIRTY: u64 = 1 << 55;
    let mut buffer = vec![0; ENTRIES as usize * 8];
    let mut run: Option<(PageRange, u64)> = None;
    let mut rest = Some(range);
    while let Some(at) = rest {
        let (now, later) = at.split_at(ENTRIES);
        let now = now.expect("a range is not empty");
        let bytes = &mut buffer[..now.pages() as usize * 8];
        pagemap.read_exact_at(bytes, now.start() / PAGE_SIZE * 8)?;
        for (index, entry) in bytes.chunks_exact(8).enumerate() {
            let entry = u64::from_le_bytes(entry.try_into().expect("8 bytes"));
            let populated = entry & (PRESENT | SWAPPED) != 0;
            if !populated || entry & (FILE_OR_SHARED | GUARD) != 0 {
                continue;
            }
            let start = now.start() + index as u64 * PAGE_SIZE;
            let dirty = if entry & SOFT_DIRTY != 0 {
                pagemap::SOFT_DIRTY
            } else {
                0
            };
            let page = PageRange::new(start, 1).expect("a page of a range");
            let longer = run.and_then(|(before, bits)| {
                let longer = before.joined(page).filter(|_| bits == dirty)?;
                Some((longer, bits))
            });
            if let (None, Some((before, bits))) = (longer, run) {
                each(before, bits);
            }
            run = longer.or(Some((page, dirty)));
        }
        rest = later;
    }
    if let Some((range, bits)) = run {
        each(range, bits);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_common::PageSet;

    #[test]
    fn pagemap_scan_and_pagemap_list_the_same_pages() {
        let mut scanner = Scanner::probe().unwrap();
        if !scanner.has_scan() {
            eprintln!("skipped: this kernel has no PAGEMAP_SCAN");
            return;
        }
        let memory = vec![1u8; 64 << 12];
        let start = memory.as_ptr() as u64 / PAGE_SIZE * PAGE_SIZE;
        let range = PageRange::new(start, 64).unwrap();
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let (mut by_scan, mut by_read) = (PageSet::new(), PageSet::new());
        let part = Part { range, file: false };
        let add = |range, _| by_scan.insert(range);
        scanner
            .own_pages(&pagemap, part, 0, ScanMode::Report, add)
            .unwrap();
        read_pagemap(&pagemap, range, |range, _| by_read.insert(range)).unwrap();
        assert_eq!(by_scan, by_read);
        assert!(by_scan.pages() >= 63);
        drop(memory);
    }
}
