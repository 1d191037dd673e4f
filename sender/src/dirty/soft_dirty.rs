//! Tracking with soft-dirty bits: a write to `/proc/PID/clear_refs` clears those of a whole process, and the
//! kernel sets them at the next write to each page. They are collected and cleared while the process is
//! stopped.

use super::pages::{ScanMode, Scanner};
use super::{DirtyTracker, Run, TrackError};
use crate::freeze::Frozen;
use crate::sys::pagemap::SOFT_DIRTY;
use crate::target::process::Process;
use crate::target::vma::{Part, Vma};
use pageferry_common::{PAGE_SIZE, PageRange, PageSet};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;

/// Tracker that uses soft-dirty bits.
#[derive(Debug)]
pub(super) struct SoftDirty {
    scanner: Scanner,
    /// Pages of each process that were written in the epoch that ended last, by PID.
    written: HashMap<i32, PageSet>,
    /// Pages of each process that were written in earlier epochs whose rounds were lost, by PID. Their bits
    /// are cleared already.
    carried_over: HashMap<i32, PageSet>,
}

impl SoftDirty {
    /// Creates the tracker, and checks that the kernel supports it: fresh memory of our own must be
    /// soft-dirty.
    ///
    /// # Errors
    /// `Unsupported`, or errors of reading `/proc/self/pagemap`.
    pub(super) fn probe() -> io::Result<Self> {
        let mut scanner = Scanner::probe()?;
        let memory = vec![1u8; 2 * PAGE_SIZE as usize];
        let page = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let page = PageRange::new(page, 1).expect("an address of this process");
        let pagemap = File::open("/proc/self/pagemap")?;
        let mut dirty = false;
        let part = Part {
            range: page,
            file: false,
        };
        dirty_pages(&mut scanner, &pagemap, part, |_| dirty = true)?;
        drop(memory);
        match dirty {
            true => Ok(Self {
                scanner,
                written: HashMap::new(),
                carried_over: HashMap::new(),
            }),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn collect_and_clear(&mut self, process: &Process) -> io::Result<PageSet> {
        let mut written = PageSet::new();
        for vma in process.vmas.iter().filter(|vma| vma.is_private()) {
            dirty_pages(&mut self.scanner, &process.pagemap, vma.part(), |range| {
                written.insert(range);
            })?;
        }
        fs::write(format!("/proc/{}/clear_refs", process.tid), "4")?;
        Ok(written)
    }
}

/// Calls `each` with the process's own pages in `part` whose soft-dirty bit is set.
fn dirty_pages(
    scanner: &mut Scanner,
    pagemap: &File,
    part: Part,
    mut each: impl FnMut(PageRange),
) -> io::Result<()> {
    scanner.own_pages(
        pagemap,
        part,
        SOFT_DIRTY,
        ScanMode::Report,
        |range, bits| {
            if bits & SOFT_DIRTY != 0 {
                each(range);
            }
        },
    )
}

impl DirtyTracker for SoftDirty {
    fn name(&self) -> &'static str {
        "soft-dirty"
    }

    fn untracked(&self, _: i32) -> bool {
        false
    }

    fn rearm(&mut self, _: &mut Frozen<'_>, process: &Process) -> Result<(), TrackError> {
        self.conclude(process)
    }

    fn conclude(&mut self, process: &Process) -> Result<(), TrackError> {
        let pid = process.pid;
        match self.collect_and_clear(process) {
            Ok(written) => {
                let written = match self.carried_over.remove(&pid) {
                    Some(carried_over) => written.union(&carried_over),
                    None => written,
                };
                self.written.insert(pid, written);
                Ok(())
            }
            Err(_) if !process.is_alive() => Ok(()),
            Err(source) => Err(TrackError::Io { pid, source }),
        }
    }

    fn scan(&mut self, process: &Process, part: Part, runs: &mut Vec<Run>) -> io::Result<()> {
        let nothing = PageSet::new();
        let dirty = self.written.get(&process.pid).unwrap_or(&nothing);
        self.scanner
            .own_pages(&process.pagemap, part, 0, ScanMode::Report, |range, _| {
                dirty.split(range, |range, written| runs.push(Run { range, written }));
            })
    }

    fn pending(&mut self, process: &Process, vma: &Vma) -> io::Result<Option<u64>> {
        let mut pages = 0;
        dirty_pages(&mut self.scanner, &process.pagemap, vma.part(), |range| {
            pages += range.pages();
        })?;
        Ok(Some(pages))
    }

    fn lost(&mut self) {
        for (pid, written) in self.written.drain() {
            let carried_over = self.carried_over.entry(pid).or_default();
            *carried_over = carried_over.union(&written);
        }
    }

    fn forget(&mut self, pid: i32) {
        self.written.remove(&pid);
        self.carried_over.remove(&pid);
    }
}
