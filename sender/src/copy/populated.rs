//! Finds the populated pages of a shared segment.

use crate::sys::removed_pages::RemovedPages;
use nix::unistd::{Whence, lseek64};
use pageferry_common::{PAGE_SIZE, PageRange};
use std::fs::File;
use std::io;

/// Number of single pages to look up one by one before the kernel is asked for the end of a populated range.
const SINGLE_LOOKUPS: u32 = 64;

/// Number of pages that [`RemovedPages`] is asked about at once.
const REMOVED_WINDOW_PAGES: u64 = 512;

/// Finds the populated ranges of a segment, in ascending order. To find the end of one, the kernel visits
/// each of its pages, which takes tens of milliseconds where it has gigabytes: so this is avoided if only a
/// few pages are wanted.
pub(super) struct Populated<'a> {
    file: &'a File,
    /// The populated range found last.
    last: Option<PageRange>,
    /// Remaining number of single pages to look up.
    single_lookups: u32,
}

impl<'a> Populated<'a> {
    /// Starts a search.
    #[must_use]
    pub(super) fn new(file: &'a File) -> Self {
        Self {
            file,
            last: None,
            single_lookups: SINGLE_LOOKUPS,
        }
    }

    /// Returns the first populated range that does not end before the start of `wanted`; more pages may be
    /// populated directly behind it.
    pub(super) fn at(
        &mut self,
        wanted: PageRange,
        removed_pages: Option<&RemovedPages>,
    ) -> io::Result<Option<PageRange>> {
        let offset = wanted.start();
        if let Some(last) = self.last.filter(|last| offset < last.end()) {
            return Ok(Some(last));
        }
        if let Some(removed_pages) = removed_pages {
            // Pages that were watched and not removed are populated.
            let (mut missing, window) = (Vec::new(), wanted.split_at(REMOVED_WINDOW_PAGES).0);
            let window = window.expect("a range is not empty");
            let is_known = removed_pages.missing(window, &mut missing).is_ok();
            let end = missing.first().map_or(window.end(), |first| first.start());
            if let Some(there) = PageRange::from_bounds(offset, end).filter(|_| is_known) {
                return Ok(Some(there));
            }
            if self.single_lookups > 0 {
                self.single_lookups -= 1;
                let next = seek(self.file, offset, Whence::SeekData)?;
                let page = next.map(|at| at - at % PAGE_SIZE);
                return Ok(page.and_then(|page| PageRange::new(page, 1).ok()));
            }
        }
        self.last = next_data(self.file, offset)?;
        Ok(self.last)
    }
}

/// Returns the next populated range of a segment that ends behind offset `at`.
fn next_data(file: &File, at: u64) -> io::Result<Option<PageRange>> {
    let Some(start) = seek(file, at, Whence::SeekData)? else {
        return Ok(None);
    };
    // The segment may have been truncated between the two calls.
    let Some(end) = seek(file, start, Whence::SeekHole)? else {
        return Ok(None);
    };
    let start = start - start % PAGE_SIZE;
    Ok(PageRange::from_bounds(
        start,
        end.next_multiple_of(PAGE_SIZE),
    ))
}

/// Returns the next offset, at or behind `offset`, of data or of a hole; `None` behind the last.
fn seek(file: &File, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
    match lseek64(file, offset as i64, whence) {
        Ok(offset) => Ok(Some(offset as u64)),
        Err(nix::Error::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
