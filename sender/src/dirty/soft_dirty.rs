//! Soft-dirty bits: cleared for a whole process at once by writing to `clear_refs`, set by the
//! kernel at the next write. Collecting and clearing both happen while the process is stopped.

use super::pages::Scanner;
use super::{DirtyTracker, Run, TrackError};
use crate::freeze::Frozen;
use crate::sys::pagemap::SOFT_DIRTY;
use crate::target::process::Process;
use crate::target::vma::{Part, Vma};
use pageferry_common::{PAGE_SIZE, PageRange, PageSet};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;

/// See the module.
#[derive(Debug)]
pub struct SoftDirty {
    scanner: Scanner,
    /// For each process, the pages written in the epoch that ended last.
    written: HashMap<i32, PageSet>,
    /// What was written in epochs whose rounds did not arrive, and is not told again otherwise: bits are
    /// cleared for the whole process at once.
    untold: HashMap<i32, PageSet>,
}

impl SoftDirty {
    /// Finds out whether this kernel can: fresh memory of our own must show as soft-dirty.
    pub fn probe() -> io::Result<Self> {
        let mut scanner = Scanner::probe()?;
        let memory = vec![1u8; 2 * PAGE_SIZE as usize];
        let page = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let page = PageRange::new(page, 1).expect("an address of ours");
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
                untold: HashMap::new(),
            }),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn collect_and_clear(&mut self, task: &Process) -> io::Result<PageSet> {
        let mut written = PageSet::new();
        for vma in task.vmas.iter().filter(|vma| vma.is_private()) {
            dirty_pages(&mut self.scanner, &task.pagemap, vma.part(), |range| {
                written.insert(range);
            })?;
        }
        fs::write(format!("/proc/{}/clear_refs", task.tid), "4")?;
        Ok(written)
    }
}

/// The process's own pages in `part` whose soft-dirty bit is set.
fn dirty_pages(
    scanner: &mut Scanner,
    pagemap: &File,
    part: Part,
    mut each: impl FnMut(PageRange),
) -> io::Result<()> {
    scanner.own_pages(pagemap, part, SOFT_DIRTY, false, |range, bits| {
        if bits & SOFT_DIRTY != 0 {
            each(range);
        }
    })
}

impl DirtyTracker for SoftDirty {
    fn name(&self) -> &'static str {
        "soft-dirty"
    }

    fn untracked(&self, _: i32) -> bool {
        false
    }

    fn rearm(&mut self, _: &mut Frozen<'_>, task: &Process) -> Result<(), TrackError> {
        self.conclude(task)
    }

    fn conclude(&mut self, task: &Process) -> Result<(), TrackError> {
        let pid = task.pid;
        match self.collect_and_clear(task) {
            Ok(written) => {
                let written = match self.untold.remove(&pid) {
                    Some(untold) => written.union(&untold),
                    None => written,
                };
                self.written.insert(pid, written);
                Ok(())
            }
            Err(_) if !task.alive() => Ok(()),
            Err(source) => Err(TrackError::Io { pid, source }),
        }
    }

    fn scan(&mut self, task: &Process, part: Part, runs: &mut Vec<Run>) -> io::Result<()> {
        let nothing = PageSet::new();
        let dirty = self.written.get(&task.pid).unwrap_or(&nothing);
        self.scanner
            .own_pages(&task.pagemap, part, 0, false, |range, _| {
                dirty.split(range, |range, written| runs.push(Run { range, written }));
            })
    }

    fn pending(&mut self, task: &Process, vma: &Vma) -> io::Result<Option<u64>> {
        let mut pages = 0;
        dirty_pages(&mut self.scanner, &task.pagemap, vma.part(), |range| {
            pages += range.pages();
        })?;
        Ok(Some(pages))
    }

    fn lost(&mut self) {
        for (pid, written) in self.written.drain() {
            let untold = self.untold.entry(pid).or_default();
            *untold = untold.union(&written);
        }
    }

    fn forget(&mut self, pid: i32) {
        self.written.remove(&pid);
        self.untold.remove(&pid);
    }
}
