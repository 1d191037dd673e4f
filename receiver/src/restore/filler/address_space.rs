//! Address space of one restored process: which pages it misses, and filling them.

use super::journal::{Entry, Journal, Source};
use super::missing::Missing;
use super::{CHUNK, FillError, RETRY_DELAY, report};
use crate::image::index::Pages;
use crate::restore::lazy::PendingPages;
use crate::sys::uffd::{Event, Uffd};
use pageferry_common::{PAGE_SIZE, PageRange};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::rc::Rc;
use std::thread::sleep;

/// Number of pages filled on a fault, from the faulting one on.
const FAULT_AHEAD: u64 = 8;

/// Address space of one process.
pub(super) struct AddressSpace {
    uffd: Uffd,
    journal: &'static Journal,
    /// PID in the name of its image.
    image: i32,
    pages: Rc<Pages>,
    missing: Missing,
    /// Ranges to fill next. Not all of their pages need be missing.
    queue: VecDeque<PageRange>,
    /// Ranges to fill after those.
    later: Box<dyn Iterator<Item = PageRange>>,
    /// Addresses of pages that threads wait for.
    faults: Vec<u64>,
    /// Whether the process has exited.
    gone: bool,
}

/// Whether pages were filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filled {
    /// At least the first page.
    Some,
    /// None: events have to be read first, or filling has to be tried again.
    Nothing,
}

impl AddressSpace {
    /// Address space of a process that CRIU has restored from the image of `pid`.
    pub(super) fn new(
        uffd: RawFd,
        journal: &'static Journal,
        pid: i32,
        pending: &PendingPages,
    ) -> Self {
        Self {
            missing: Missing::new(&pending.missing),
            ..Self::filled(uffd, journal, pid, pending)
        }
    }

    /// Address space that misses no pages, until they are added with [`AddressSpace::add_missing`].
    pub(super) fn filled(
        uffd: RawFd,
        journal: &'static Journal,
        pid: i32,
        pending: &PendingPages,
    ) -> Self {
        Self {
            uffd: Uffd::held(uffd),
            journal,
            image: pid,
            pages: Rc::clone(&pending.pages),
            missing: Missing::default(),
            queue: VecDeque::new(),
            later: Box::new(Rc::clone(&pending.pages).newest_first()),
            faults: Vec::new(),
            gone: false,
        }
    }

    /// Address space of a forked child, which misses the same pages.
    fn child(&self, uffd: RawFd) -> Self {
        Self {
            uffd: Uffd::held(uffd),
            journal: self.journal,
            image: self.image,
            pages: Rc::clone(&self.pages),
            missing: self.missing.clone(),
            queue: VecDeque::new(),
            later: Box::new(std::iter::empty()),
            faults: Vec::new(),
            gone: false,
        }
    }

    /// Adds missing pages; `image` is the address of the first one in the images.
    pub(super) fn add_missing(&mut self, range: PageRange, image: u64) {
        self.missing.insert(range, image);
    }

    /// Removes pages that an earlier filler process has filled.
    pub(super) fn remove_missing(&mut self, range: PageRange) {
        self.missing.remove(range);
    }

    /// Returns the entries of a journal that describe it.
    pub(super) fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        let fd = self.uffd.number();
        let first = Entry {
            source: Source::Space(fd),
            message: [u64::from(self.image.cast_unsigned()), 0, 0, 0],
        };
        let pieces = self.missing.pieces().map(move |(range, image)| Entry {
            source: Source::Piece(fd),
            message: [range.start(), range.end(), image, 0],
        });
        std::iter::once(first).chain(pieces)
    }

    /// Returns its userfaultfd.
    pub(super) fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Returns its userfaultfd, to be closed.
    pub(super) fn into_uffd(self) -> Uffd {
        self.uffd
    }

    /// Returns whether nothing remains to be filled.
    pub(super) fn is_complete(&self) -> bool {
        self.gone || self.missing.is_empty()
    }

    /// Returns whether the process has exited.
    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }

    /// Returns whether threads wait for pages.
    pub(super) fn has_faults(&self) -> bool {
        !self.faults.is_empty()
    }

    /// Follows an event. Returns the address space of a forked child.
    pub(super) fn apply(&mut self, event: Event) -> Option<Self> {
        match event {
            Event::Fault(address) => self.faults.push(address),
            Event::Fork(uffd) => return Some(self.child(uffd)),
            Event::Remap { from, to, len } => {
                let range = |start| PageRange::from_bounds(start, start.checked_add(len)?);
                if let (Some(from), Some(to)) = (range(from), range(to)) {
                    self.missing.remap(from, to);
                }
            }
            Event::Gone { start, end } => {
                if let Some(range) = PageRange::from_bounds(start, end) {
                    self.missing.remove(range);
                }
            }
        }
        None
    }

    /// Fills the pages that threads wait for. Faults that cannot be resolved yet are kept.
    pub(super) fn resolve_faults(&mut self, buffer: &mut [u8]) -> Result<(), FillError> {
        for address in std::mem::take(&mut self.faults) {
            let page = PageRange::new(address, 1).map_err(io::Error::other)?;
            let ahead = PageRange::new(address, FAULT_AHEAD).unwrap_or(page);
            match self.missing.first_in(ahead) {
                Some((found, image)) if found.start() == address => {
                    match self.put(found, image, buffer)? {
                        // The process will probably touch the next pages soon.
                        Filled::Some => {
                            let next = PageRange::new(found.end(), CHUNK);
                            next.into_iter()
                                .for_each(|next| self.queue.push_front(next));
                        }
                        Filled::Nothing => self.faults.push(address),
                    }
                }
                _ => self.put_zero(page)?,
            }
        }
        Ok(())
    }

    /// Fills a faulting page that the images do not have, or that the process has given back.
    fn put_zero(&mut self, page: PageRange) -> Result<(), FillError> {
        let Err(error) = self.uffd.zero(page) else {
            return Ok(());
        };
        match error.raw_os_error() {
            // The page is there.
            Some(libc::EEXIST) => self.uffd.wake(page)?,
            // An event has to be read first.
            Some(libc::EAGAIN) => self.faults.push(page.start()),
            // The mapping is gone.
            Some(libc::ENOENT) => {}
            Some(libc::ENOMEM) => {
                self.faults.push(page.start());
                sleep(RETRY_DELAY);
            }
            Some(libc::ESRCH) => self.gone = true,
            _ => return Err(error.into()),
        }
        Ok(())
    }

    /// Fills at most [`CHUNK`] pages that no thread waits for.
    pub(super) fn fill_some(&mut self, buffer: &mut [u8]) -> Result<(), FillError> {
        if self.is_complete() {
            return Ok(());
        }
        let next = self.queue.pop_front().or_else(|| self.later.next());
        let Some(range) = next else {
            // Pages that were moved, or are a child's.
            self.queue.extend(self.missing.iter());
            return Ok(());
        };
        let Some((found, image)) = self.missing.first_in(range) else {
            return Ok(());
        };
        let (now, _) = found.split_at(CHUNK);
        let now = now.expect("a range is not empty");
        let rest = match self.put(now, image, buffer)? {
            Filled::Some => now.end(),
            Filled::Nothing => range.start(),
        };
        if let Some(rest) = PageRange::from_bounds(rest, range.end()) {
            self.queue.push_front(rest);
        }
        Ok(())
    }

    /// Puts pages in their place; `image` is the address of the first one in the images. It may put fewer
    /// than there are in `range`.
    fn put(
        &mut self,
        range: PageRange,
        image: u64,
        buffer: &mut [u8],
    ) -> Result<Filled, FillError> {
        let buffer = &mut buffer[..range.bytes() as usize];
        let len = match self.pages.read(image, buffer) {
            Ok(pages) => pages * PAGE_SIZE,
            // The process waits rather than see wrong memory.
            Err(error) => {
                report(&error);
                sleep(RETRY_DELAY);
                return Ok(Filled::Nothing);
            }
        };
        let mut done = 0;
        let mut step = len;
        while done < len {
            let part = &buffer[done as usize..(done + step.min(len - done)) as usize];
            let (copied, result) = self.uffd.copy(range.start() + done, part);
            done += copied;
            let Err(error) = result else {
                continue;
            };
            match error.raw_os_error() {
                // The page is there: from CRIU, or from the process itself, whose event is not read yet.
                Some(libc::EEXIST) => {
                    let page = PageRange::new(range.start() + done, 1).map_err(io::Error::other)?;
                    self.uffd.wake(page)?;
                    done += PAGE_SIZE;
                }
                // The range spans two mappings, or one that is gone.
                Some(libc::ENOENT) if part.len() as u64 > PAGE_SIZE => step = PAGE_SIZE,
                Some(libc::ENOENT) => done += PAGE_SIZE,
                Some(libc::EAGAIN) => break,
                Some(libc::ENOMEM) => {
                    sleep(RETRY_DELAY);
                    break;
                }
                Some(libc::ESRCH | libc::ENOSPC) => {
                    self.gone = true;
                    return Ok(Filled::Some);
                }
                _ => return Err(error.into()),
            }
        }
        let Some(filled) = PageRange::from_bounds(range.start(), range.start() + done) else {
            return Ok(Filled::Nothing);
        };
        self.journal.append(Entry {
            source: Source::Filled(self.uffd.number()),
            message: [filled.start(), filled.end(), 0, 0],
        });
        self.missing.remove(filled);
        Ok(Filled::Some)
    }
}

impl AsFd for AddressSpace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}
