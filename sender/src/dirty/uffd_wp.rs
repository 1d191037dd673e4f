//! userfaultfd write-protection, asynchronous: the kernel clears a page's protection at its first
//! write by itself, and `PAGEMAP_SCAN` lists and protects the written ones in one atomic step,
//! while the target runs.

use super::pages::Scanner;
use super::{DirtyTracker, Run, TrackError};
use crate::freeze::Frozen;
use crate::sys::pagemap::{PRESENT, SWAPPED, WPALLOWED, WRITTEN};
use crate::sys::uffd::Uffd;
use crate::target::process::Process;
use crate::target::vma::{Part, Vma};
use pageferry_common::PageRange;
use std::collections::HashMap;
use std::io;
use std::num::NonZero;
use std::thread;

/// See the module.
#[derive(Debug)]
pub struct UffdWp {
    scanner: Scanner,
    armed: HashMap<i32, Armed>,
    /// Processes that cannot have one: all their pages count as written, always.
    without: HashMap<i32, String>,
    /// No epoch follows: pages are no longer protected again when they are listed. Mappings that came
    /// after the last rearm are not registered, and would be left out.
    concluded: bool,
}

/// One process's tracking.
#[derive(Debug)]
struct Armed {
    /// Closing it unregisters the mappings.
    uffd: Uffd,
    /// Mappings that cannot be tracked (another userfaultfd has them, or the kernel would not):
    /// all their pages count as written. Ascending.
    untracked: Vec<PageRange>,
}

impl Armed {
    /// Registers every mapping that can be tracked; what was registered before costs next to
    /// nothing. `None` if the userfaultfd belongs to a memory that is gone.
    fn new(uffd: Uffd, task: &Process) -> Option<Self> {
        let mut untracked = Vec::new();
        let (mut tried, mut gone) = (0, 0);
        let shared = |vma: &Vma| task.shared.binary_search(&vma.range).is_ok();
        let tracked = |vma: &&Vma| vma.is_private() || shared(vma);
        for vma in task.vmas.iter().filter(tracked) {
            // Registered, a file's code would lose the kernel's fault-around, and its pages are
            // hardly ever the process's own. What is, is sent.
            if vma.file_code {
                untracked.push(vma.range);
                continue;
            }
            tried += 1;
            if let Err(error) = uffd.register(vma.range) {
                tracing::debug!(task.pid, %vma.range, %error, "not tracked");
                untracked.push(vma.range);
                gone += u32::from(matches!(
                    error.raw_os_error(),
                    // What the kernel says depends on its version.
                    Some(libc::ESRCH | libc::ENOMEM)
                ));
            }
        }
        (tried == 0 || gone < tried).then_some(Self { uffd, untracked })
    }

    fn tracks(&self, part: PageRange) -> bool {
        let before = self.untracked.partition_point(|r| r.end() <= part.start());
        let next = self.untracked.get(before);
        next.is_none_or(|next| next.intersect(part).is_none())
    }
}

impl UffdWp {
    /// Finds out whether this kernel can.
    pub fn probe() -> io::Result<Self> {
        if !cfg!(target_arch = "x86_64") {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let uffd = Uffd::for_this_process()?;
        let scanner = Scanner::probe()?;
        if !scanner.has_scan() {
            return Err(io::Error::from_raw_os_error(libc::ENOTTY));
        }
        if uffd.mremap_keeps_protection()? {
            return Err(io::Error::other("it does not see that pages were moved"));
        }
        Ok(Self {
            scanner,
            armed: HashMap::new(),
            without: HashMap::new(),
            concluded: false,
        })
    }

    fn scan_one_shared(
        &self,
        task: &Process,
        range: PageRange,
        scanner: &mut Scanner,
    ) -> io::Result<Vec<PageRange>> {
        if !self.tracks(task.pid, range) {
            return Ok(vec![range]);
        }
        let mut written: Vec<PageRange> = Vec::new();
        // Neighbours are one, or there would be as many as pages that are there beside pages that are not.
        let mut add = |next: PageRange| match written.last_mut() {
            Some(last) if last.end() == next.start() => {
                *last = last.joined(next).expect("they are neighbours");
            }
            _ => written.push(next),
        };
        if self.concluded {
            scanner.unprotected_pages(&task.pagemap, range, add)?;
            return Ok(written);
        }
        let report = WRITTEN | WPALLOWED | PRESENT | SWAPPED;
        let mut end = range.start();
        // Protecting leaves a marker for every page that is not there. So one without has been there since,
        // written or not, and is gone again; or the mapping is a new one. What the kernel leaves out is not
        // protected.
        scanner.protect_all(&task.pagemap, range, report, |found, bits| {
            PageRange::from_bounds(end, found.start())
                .into_iter()
                .for_each(&mut add);
            end = found.end();
            let protected = bits & (WRITTEN | WPALLOWED) == WPALLOWED;
            if !protected || bits & (PRESENT | SWAPPED) == 0 {
                add(found);
            }
        })?;
        PageRange::from_bounds(end, range.end())
            .into_iter()
            .for_each(&mut add);
        Ok(written)
    }

    fn tracks(&self, pid: i32, part: PageRange) -> bool {
        self.armed.get(&pid).is_some_and(|armed| armed.tracks(part))
    }
}

impl DirtyTracker for UffdWp {
    fn name(&self) -> &'static str {
        "uffd"
    }

    fn rearm(&mut self, frozen: &mut Frozen<'_>, task: &Process) -> Result<(), TrackError> {
        // If an end came to nothing.
        self.concluded = false;
        if let Some(before) = self.armed.remove(&task.pid)
            && let Some(armed) = Armed::new(before.uffd, task)
        {
            self.armed.insert(task.pid, armed);
            return Ok(());
        }
        // A new process, or a new memory: it called exec.
        if self.without.contains_key(&task.pid) {
            return Ok(());
        }
        let made = frozen.userfaultfd(task.pid)?.and_then(|fd| {
            let uffd = Uffd::handshake(fd).map_err(|error| error.to_string())?;
            Armed::new(uffd, task).ok_or_else(|| "no mapping can be registered".to_owned())
        });
        match made {
            Ok(armed) => drop(self.armed.insert(task.pid, armed)),
            Err(why) => {
                tracing::warn!(
                    task.pid,
                    why,
                    "its writes cannot be tracked: every round compares its memory by content"
                );
                self.without.insert(task.pid, why);
            }
        }
        Ok(())
    }

    fn conclude(&mut self, _: &Process) -> Result<(), TrackError> {
        self.concluded = true;
        Ok(())
    }

    fn scan(&mut self, task: &Process, part: Part, runs: &mut Vec<Run>) -> io::Result<()> {
        // Asked to protect, the kernel leaves out mappings that it cannot protect.
        let tracked = self.tracks(task.pid, part.range);
        let protect = tracked && !self.concluded;
        let report = WRITTEN | WPALLOWED | PRESENT | SWAPPED;
        self.scanner
            .own_pages(&task.pagemap, part, report, protect, |range, categories| {
                // A protected page of a file mapping that was given back leaves a marker, which
                // looks like a protected page in swap. Reading tells: the file's page or swap's.
                let marker = part.file && categories & (PRESENT | SWAPPED) == SWAPPED;
                let clean = categories & (WRITTEN | WPALLOWED) == WPALLOWED;
                let written = !tracked || marker || !clean;
                runs.push(Run { range, written });
            })
    }

    fn scan_shared(
        &mut self,
        mappings: &[(&Process, PageRange)],
    ) -> io::Result<Vec<Vec<PageRange>>> {
        // Processes that share much are many.
        let threads = thread::available_parallelism().map_or(1, NonZero::get);
        let share = mappings.len().div_ceil(threads).max(1);
        let this = &*self;
        thread::scope(|scope| {
            let mut workers = Vec::new();
            for mappings in mappings.chunks(share) {
                let mut scanner = this.scanner.clone();
                let work = move || {
                    let scan = |&(task, range): &(&Process, PageRange)| {
                        this.scan_one_shared(task, range, &mut scanner)
                    };
                    mappings.iter().map(scan).collect::<io::Result<Vec<_>>>()
                };
                let worker = thread::Builder::new().name("scan".into());
                workers.push(worker.spawn_scoped(scope, work)?);
            }
            let mut written = Vec::with_capacity(mappings.len());
            for worker in workers {
                written.extend(worker.join().expect("a scan does not panic")?);
            }
            Ok(written)
        })
    }

    fn pending(&mut self, task: &Process, vma: &Vma) -> io::Result<Option<u64>> {
        let tracked = self.tracks(task.pid, vma.range);
        let report = WRITTEN | WPALLOWED;
        let mut pages = 0;
        self.scanner
            .own_pages(&task.pagemap, vma.part(), report, false, |range, bits| {
                if !tracked || bits & report != WPALLOWED {
                    pages += range.pages();
                }
            })?;
        Ok(Some(pages))
    }

    fn untracked(&self, pid: i32) -> bool {
        self.without.contains_key(&pid)
    }

    fn forget(&mut self, pid: i32) {
        self.armed.remove(&pid);
        self.without.remove(&pid);
    }
}
