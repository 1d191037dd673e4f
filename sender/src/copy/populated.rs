//! Finding the populated pages of a shared segment.

use crate::sys::removed_pages::RemovedPages;
use nix::unistd::{Whence, lseek64};
use pageferry_common::{PAGE_SIZE, PageRange};
use std::fs::File;
use std::io;

/// Single pages that are looked for one by one before it is better to ask how far it goes on.
const WALKS_SPARED: u32 = 64;

/// Pages that a removed_pages is asked of at once.
const WITNESSED: u64 = 512;

/// Finds the populated ranges of a segment, in ascending order: asking the kernel for one takes it time for
/// each page in it, tens of milliseconds where there are gigabytes.
pub struct Populated<'a> {
    file: &'a File,
    last: Option<PageRange>,
    /// How often the question is not asked.
    walks: u32,
}

impl<'a> Populated<'a> {
    /// Of this segment nothing is known yet.
    #[must_use]
    pub fn new(file: &'a File) -> Self {
        Self {
            file,
            last: None,
            walks: WALKS_SPARED,
        }
    }

    /// The first pages from the first of `wanted` on that are populated; there may be more directly behind.
    pub fn at(
        &mut self,
        wanted: PageRange,
        removed_pages: Option<&RemovedPages>,
    ) -> io::Result<Option<PageRange>> {
        let offset = wanted.start();
        if let Some(last) = self.last.filter(|last| offset < last.end()) {
            return Ok(Some(last));
        }
        if let Some(removed_pages) = removed_pages {
            // What it still has is there.
            let (mut gone, asked) = (Vec::new(), wanted.split_at(WITNESSED).0);
            let asked = asked.expect("a range is not empty");
            let has = removed_pages.missing(asked, &mut gone).is_ok();
            let end = gone.first().map_or(asked.end(), |gone| gone.start());
            if let Some(there) = PageRange::from_bounds(offset, end).filter(|_| has) {
                return Ok(Some(there));
            }
            if self.walks > 0 {
                self.walks -= 1;
                let next = seek(self.file, offset, Whence::SeekData)?;
                let page = next.map(|at| at - at % PAGE_SIZE);
                return Ok(page.and_then(|page| PageRange::new(page, 1).ok()));
            }
        }
        self.last = next_data(self.file, offset)?;
        Ok(self.last)
    }
}

/// The next populated range of a segment at or behind offset `at`.
fn next_data(file: &File, at: u64) -> io::Result<Option<PageRange>> {
    let Some(start) = seek(file, at, Whence::SeekData)? else {
        return Ok(None);
    };
    // It may have been truncated between the two questions.
    let Some(end) = seek(file, start, Whence::SeekHole)? else {
        return Ok(None);
    };
    let start = start - start % PAGE_SIZE;
    Ok(PageRange::from_bounds(
        start,
        end.next_multiple_of(PAGE_SIZE),
    ))
}

/// The next offset from `offset` on of data, or of none.
fn seek(file: &File, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
    match lseek64(file, offset as i64, whence) {
        Ok(offset) => Ok(Some(offset as u64)),
        Err(nix::Error::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
