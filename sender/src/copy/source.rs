//! Reading pages into a buffer: from a process, or from a shared segment.
//!
//! Both say what *arrived*, packed one after the other; what did not is simply not among it.

use crate::target::process::Process;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use pageferry_common::{PAGE_SIZE, PageRange};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;

/// Where an image's pages come from.
pub trait PageSource {
    /// Reads `wanted` (ascending, together no longer than `buffer`) to the front of `buffer`, and
    /// appends to `arrived` the ranges that were read, in order, without gaps in the buffer.
    ///
    /// # Errors
    /// Only what ends the whole image: `ESRCH` when the process is gone, `EPERM`. A page that
    /// cannot be read is no error.
    fn read(
        &mut self,
        wanted: &[PageRange],
        buffer: &mut [u8],
        arrived: &mut Vec<PageRange>,
    ) -> io::Result<()>;
}

/// A process's private memory: one `process_vm_readv` for a whole chunk's pages, and
/// `/proc/PID/mem` for what the process itself may not read.
#[derive(Debug)]
pub struct ProcessSource<'a> {
    process: &'a Process,
    remote: Vec<RemoteIoVec>,
}

impl<'a> ProcessSource<'a> {
    /// Reads of this process.
    #[must_use]
    pub fn new(process: &'a Process) -> Self {
        Self {
            process,
            remote: Vec::new(),
        }
    }

    /// Reads a prefix of `wanted` at once; how many bytes, 0 if not even the first page.
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

    /// Reads a prefix of one range through `/proc/PID/mem`, which asks nobody's permission.
    fn read_forced(&self, wanted: PageRange, buffer: &mut [u8]) -> usize {
        let bytes = wanted.bytes() as usize;
        self.process
            .memory
            .read_at(&mut buffer[..bytes], wanted.start())
            .unwrap_or(0)
    }
}

impl PageSource for ProcessSource<'_> {
    fn read(
        &mut self,
        wanted: &[PageRange],
        buffer: &mut [u8],
        arrived: &mut Vec<PageRange>,
    ) -> io::Result<()> {
        let mut filled = 0;
        let mut rest = Rest::of(wanted);
        while !rest.is_empty() {
            let room = &mut buffer[filled..];
            let fast = self.read_fast(rest.ranges(), room)?;
            filled += rest.advance(fast, |range| arrived.push(range));
            // Where the fast way stops there is a hole, or memory that only the other way reads.
            if let Some(next) = rest.first() {
                let forced = self.read_forced(next, &mut buffer[filled..]);
                let pages = rest.advance(forced, |range| arrived.push(range));
                filled += pages;
                if pages == 0 {
                    rest.skip_page();
                }
            }
        }
        // Only now is it certain that the PID was this process's all the while.
        match self.process.alive() {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }
}

/// A shared segment: read once for the whole tree, by offset in the object.
#[derive(Debug)]
pub struct SegmentSource<'a> {
    /// The object.
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
                    Ok(0) => break,
                    Ok(bytes) => got += bytes,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // It shrank, or a page of it is lost.
                    Err(_) => break,
                }
            }
            // The last page of a segment may be only partly inside it; the rest reads as zero.
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

/// What is left to read of a list of ranges.
struct Rest {
    ranges: Vec<PageRange>,
    next: usize,
}

impl Rest {
    fn of(wanted: &[PageRange]) -> Self {
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

    /// The first `bytes` were read: names the ranges they are, and returns them rounded down to
    /// whole pages (a partly read page was not read).
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
    fn a_hole_in_the_middle_trims_what_arrived() {
        let pid = std::process::id() as i32;
        let process = Process::open(pid, pid, namespace_depth(pid).unwrap()).unwrap();
        let memory: Vec<u8> = (0..4 * 4096usize).map(|i| (i / 7) as u8).collect();
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let good = PageRange::new(start, 2).unwrap();
        // Nothing is ever mapped that low.
        let hole = PageRange::new(0x1000, 3).unwrap();
        let mut arrived = Vec::new();
        let mut buffer = vec![0; 8 * 4096];
        let mut source = ProcessSource::new(&process);
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
