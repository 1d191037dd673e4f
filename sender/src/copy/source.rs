//! Reads pages into a buffer, from a process or from a shared segment.
//!
//! Pages may disappear while they are read. So a source reports the ranges that it has read, and packs their
//! content without gaps.

use crate::freeze::Frozen;
use crate::sys::pagemap;
use crate::target::process::Process;
use crate::target::sharing::{Forks, PinCheck, Sharing};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use pageferry_common::{PAGE_SIZE, PageRange};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;

/// Source of the pages of an image.
pub trait PageSource {
    /// Reads `wanted` (in ascending order, together no longer than `buffer`) to the front of `buffer`, and
    /// appends the ranges that were read to `arrived`, in order. The buffer has no gaps between them.
    ///
    /// # Errors
    /// Errors that end the whole image: `ESRCH` when the process is gone, `EPERM`; for a stopped process or a
    /// segment, a page that exists and cannot be read. A page that does not exist any more is not an error.
    fn read(
        &mut self,
        wanted: &[PageRange],
        buffer: &mut [u8],
        arrived: &mut Vec<PageRange>,
    ) -> io::Result<()>;
}

/// What keeps a process stopped while it is read.
#[derive(Debug)]
pub enum Access<'a, 'f> {
    /// Nothing: pages can disappear, and what cannot be read now is left to the final round.
    Running,
    /// The freezer, which traces it.
    Traced(&'a mut Frozen<'f>),
    /// Something else. It can neither give pages back nor fork.
    Stopped,
}

/// A page that exists and cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the page at {address:#x} of process {pid}")]
struct Unreadable {
    pid: i32,
    address: u64,
    source: io::Error,
}

/// Private memory of a process: read with one `process_vm_readv` for all pages of a chunk, and through
/// `/proc/PID/mem` where the process itself may not read, or shares the pages with another process.
#[derive(Debug)]
pub struct ProcessSource<'a, 'f> {
    process: &'a Process,
    pin_check: PinCheck<'a>,
    access: Access<'a, 'f>,
    remote: Vec<RemoteIoVec>,
    unreadable_pages: u64,
}

impl<'a, 'f> ProcessSource<'a, 'f> {
    /// Creates the source for a process.
    #[must_use]
    pub fn new(process: &'a Process, sharing: &'a mut Sharing, access: Access<'a, 'f>) -> Self {
        let forks = match access {
            Access::Running => Forks::Possible,
            Access::Traced(_) | Access::Stopped => Forks::Impossible,
        };
        Self {
            process,
            pin_check: PinCheck::new(sharing, process, forks),
            access,
            remote: Vec::new(),
            unreadable_pages: 0,
        }
    }

    /// Returns the number of pages of the running process that exist and could not be read.
    #[must_use]
    pub fn unreadable_pages(&self) -> u64 {
        self.unreadable_pages
    }

    /// Reads a prefix of `wanted` in one call. Returns its length in bytes, 0 if the first page cannot be
    /// read.
    fn read_fast(&mut self, wanted: &[PageRange], buffer: &mut [u8]) -> io::Result<usize> {
        self.remote.clear();
        self.remote.extend(wanted.iter().map(|range| RemoteIoVec {
            base: range.start() as usize,
            len: range.bytes() as usize,
        }));
        let pid = Pid::from_raw(self.process.tid);
        match process_vm_readv(pid, &mut [IoSliceMut::new(buffer)], &self.remote) {
            Ok(bytes) => Ok(bytes),
            Err(nix::Error::EFAULT) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads a prefix of one range through `/proc/PID/mem`, which ignores the protection of the mapping.
    /// Returns its length in bytes, 0 if the first page does not exist any more.
    fn read_forced(&mut self, wanted: PageRange, buffer: &mut [u8]) -> io::Result<usize> {
        let buffer = &mut buffer[..wanted.bytes() as usize];
        let address = wanted.start();
        let source = loop {
            match self.process.memory.read_at(buffer, address) {
                // The memory is gone.
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
                Ok(bytes) => return Ok(bytes),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break error,
            }
        };
        // The kernel reports EIO for a page that is gone, and for one that it cannot or will not read.
        match pagemap::is_populated(&self.process.pagemap, address) {
            Ok(true) => {}
            Ok(false) => return Ok(0),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Err(error) => return Err(error),
        }
        let pid = self.process.pid;
        match &mut self.access {
            Access::Running => {
                self.unreadable_pages += 1;
                return Ok(0);
            }
            Access::Traced(frozen) => {
                let bytes = frozen.read(pid, wanted, buffer);
                let bytes = bytes.map_err(io::Error::other)?;
                if bytes > 0 {
                    return Ok(bytes);
                }
            }
            Access::Stopped => {}
        }
        Err(io::Error::other(Unreadable {
            pid,
            address,
            source,
        }))
    }
}

impl PageSource for ProcessSource<'_, '_> {
    fn read(
        &mut self,
        wanted: &[PageRange],
        buffer: &mut [u8],
        arrived: &mut Vec<PageRange>,
    ) -> io::Result<()> {
        let mut filled = 0;
        let mut rest = Rest::new(wanted);
        let may_pin = self.pin_check.may_pin(self.process, wanted);
        while !rest.is_empty() {
            if may_pin {
                let fast = self.read_fast(rest.ranges(), &mut buffer[filled..])?;
                filled += rest.advance(fast, |range| arrived.push(range));
            }
            // The fast read stops at a hole, or at memory that only the forced read can access.
            if let Some(next) = rest.first() {
                let forced = self.read_forced(next, &mut buffer[filled..])?;
                let pages = rest.advance(forced, |range| arrived.push(range));
                filled += pages;
                if pages == 0 {
                    rest.skip_page();
                }
            }
        }
        // If the process is alive, the PID was not reused during the reads.
        match self.process.is_alive() {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }
}

/// A shared segment, read by offset.
#[derive(Debug)]
pub struct SegmentSource<'a> {
    /// The segment.
    pub file: &'a File,
}

impl PageSource for SegmentSource<'_> {
    fn read(
        &mut self,
        wanted: &[PageRange],
        buffer: &mut [u8],
        arrived: &mut Vec<PageRange>,
    ) -> io::Result<()> {
        let mut filled = 0;
        for &range in wanted {
            let room = &mut buffer[filled..filled + range.bytes() as usize];
            let mut got = 0;
            while got < room.len() {
                match self
                    .file
                    .read_at(&mut room[got..], range.start() + got as u64)
                {
                    // The segment was truncated.
                    Ok(0) => break,
                    Ok(bytes) => got += bytes,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // A page has a hardware error, or cannot come back from swap.
                    Err(error) => return Err(error),
                }
            }
            // The segment may end within its last page; the rest of that page reads as zero.
            let whole = got.next_multiple_of(PAGE_SIZE as usize);
            room[got..whole].fill(0);
            if let (Some(range), _) = range.split_at(whole as u64 / PAGE_SIZE) {
                arrived.push(range);
                filled += whole;
            }
        }
        Ok(())
    }
}

/// The ranges of a list that are not read yet.
struct Rest {
    ranges: Vec<PageRange>,
    next: usize,
}

impl Rest {
    fn new(wanted: &[PageRange]) -> Self {
        Self {
            ranges: wanted.to_vec(),
            next: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.next == self.ranges.len()
    }

    fn ranges(&self) -> &[PageRange] {
        &self.ranges[self.next..]
    }

    fn first(&self) -> Option<PageRange> {
        self.ranges().first().copied()
    }

    /// Removes the first `bytes`, rounded down to whole pages, because a page that was read in part counts as
    /// not read. Calls `read` with their ranges, and returns their number of bytes.
    fn advance(&mut self, bytes: usize, mut read: impl FnMut(PageRange)) -> usize {
        let whole = bytes - bytes % PAGE_SIZE as usize;
        let mut pages = (whole / PAGE_SIZE as usize) as u64;
        while pages > 0 {
            let (head, tail) = self.ranges[self.next].split_at(pages);
            let head = head.expect("pages is not zero");
            pages -= head.pages();
            read(head);
            self.drop_head(tail);
        }
        whole
    }

    fn skip_page(&mut self) {
        let (_, tail) = self.ranges[self.next].split_at(1);
        self.drop_head(tail);
    }

    fn drop_head(&mut self, tail: Option<PageRange>) {
        match tail {
            Some(tail) => self.ranges[self.next] = tail,
            None => self.next += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::process::namespace_depth;

    #[test]
    fn ranges_around_a_hole_arrive_without_it() {
        let pid = std::process::id() as i32;
        let process = Process::open(pid, pid, namespace_depth(pid).unwrap()).unwrap();
        let memory: Vec<u8> = (0..4 * 4096usize).map(|i| (i / 7) as u8).collect();
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let good = PageRange::new(start, 2).unwrap();
        // The kernel does not map memory at such a low address.
        let hole = PageRange::new(0x1000, 3).unwrap();
        let mut arrived = Vec::new();
        let mut buffer = vec![0; 8 * 4096];
        let mut sharing = Sharing::default();
        let mut source = ProcessSource::new(&process, &mut sharing, Access::Running);
        for wanted in [vec![hole, good], vec![good, hole], vec![good, hole, good]] {
            arrived.clear();
            source.read(&wanted, &mut buffer, &mut arrived).unwrap();
            let expected: Vec<_> = wanted.iter().copied().filter(|&r| r == good).collect();
            assert_eq!(arrived, expected);
            let offset = (start - memory.as_ptr() as u64) as usize;
            assert_eq!(buffer[..8192], memory[offset..offset + 8192]);
        }
    }
}
