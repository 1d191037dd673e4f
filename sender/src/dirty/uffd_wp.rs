//! Tracking with asynchronous userfaultfd write-protection: the kernel itself removes the protection of a
//! page at its first write, and `PAGEMAP_SCAN` lists the written pages and protects them again in one atomic
//! step, while the target runs.

use super::pages::{ScanMode, Scanner};
use super::{DirtyTracker, Run, TrackError};
use crate::freeze::Frozen;
use crate::sys::pagemap::{PRESENT, SWAPPED, WPALLOWED, WRITTEN};
use crate::sys::uffd::Uffd;
use crate::target::process::Process;
use crate::target::vma::{Part, Vma};
use pageferry_common::PageRange;
use std::collections::{HashMap, HashSet};
use std::io;
use std::num::NonZero;
use std::thread;

/// Tracker that uses userfaultfd write-protection.
#[derive(Debug)]
pub(super) struct UffdWp {
    scanner: Scanner,
    /// Tracked processes, by PID.
    armed: HashMap<i32, Armed>,
    /// PIDs of processes that cannot have a userfaultfd: all their pages count as written.
    untrackable: HashSet<i32>,
    /// Whether no epoch follows, so that listed pages are not protected again. A scan that protects would
    /// leave out mappings that were added after the last rearm, because they are not registered.
    concluded: bool,
}

/// The tracking of one process.
#[derive(Debug)]
struct Armed {
    /// The userfaultfd; closing it unregisters the mappings.
    uffd: Uffd,
    /// Mappings that cannot be tracked, because another userfaultfd has them or the kernel refused, in
    /// ascending order: all their pages count as written.
    untracked: Vec<PageRange>,
    /// Number of their pages that another userfaultfd has.
    taken_pages: u64,
}

impl Armed {
    /// Registers every mapping that can be tracked; registering one again takes almost no time. Returns
    /// `None` if the memory that the userfaultfd belongs to is gone.
    fn new(uffd: Uffd, process: &Process) -> Option<Self> {
        let (mut untracked, mut taken_pages) = (Vec::new(), 0);
        let (mut tried, mut gone) = (0, 0);
        let shared = |vma: &Vma| process.shared.binary_search(&vma.range).is_ok();
        let tracked = |vma: &&Vma| vma.is_private() || shared(vma);
        for vma in process.vmas.iter().filter(tracked) {
            // Registration would disable fault-around for the code of a file, which hardly ever has pages of
            // the process's own. Those that it has are sent in each round.
            if vma.file_code {
                untracked.push(vma.range);
                continue;
            }
            tried += 1;
            if let Err(error) = uffd.register(vma.range) {
                tracing::debug!(process.pid, %vma.range, %error, "mapping not tracked");
                untracked.push(vma.range);
                match error.raw_os_error() {
                    Some(libc::EBUSY) => taken_pages += vma.range.pages(),
                    // The error depends on the version of the kernel.
                    Some(libc::ESRCH | libc::ENOMEM) => gone += 1,
                    _ => {}
                }
            }
        }
        (tried == 0 || gone < tried).then_some(Self {
            uffd,
            untracked,
            taken_pages,
        })
    }

    /// Reports pages that another userfaultfd has, if they are more than before.
    fn report_taken(&self, pid: i32, before: u64) {
        if self.taken_pages > before {
            tracing::warn!(
                event = "pages_untracked",
                pid,
                pages = self.taken_pages,
                "the process itself has a userfaultfd for these pages: every round compares them by content"
            );
        }
    }

    fn tracks(&self, part: PageRange) -> bool {
        let before = self.untracked.partition_point(|r| r.end() <= part.start());
        let next = self.untracked.get(before);
        next.is_none_or(|next| next.intersect(part).is_none())
    }
}

impl UffdWp {
    /// Creates the tracker, and checks that the kernel supports it.
    ///
    /// # Errors
    /// Errors of the kernel; `Unsupported` on other architectures than x86-64, `ENOTTY` without
    /// `PAGEMAP_SCAN`.
    pub(super) fn probe() -> io::Result<Self> {
        if !cfg!(target_arch = "x86_64") {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let uffd = Uffd::for_this_process()?;
        let scanner = Scanner::probe()?;
        if !scanner.has_scan() {
            return Err(io::Error::from_raw_os_error(libc::ENOTTY));
        }
        if uffd.mremap_keeps_protection()? {
            return Err(io::Error::other("write-protection survives mremap"));
        }
        Ok(Self {
            scanner,
            armed: HashMap::new(),
            untrackable: HashSet::new(),
            concluded: false,
        })
    }

    fn scan_one_shared(
        &self,
        process: &Process,
        range: PageRange,
        scanner: &mut Scanner,
    ) -> io::Result<Vec<PageRange>> {
        if !self.tracks(process.pid, range) {
            return Ok(vec![range]);
        }
        let mut written: Vec<PageRange> = Vec::new();
        // Adjacent ranges are joined, or the list would alternate with every populated page.
        let mut add = |next: PageRange| match written.last_mut() {
            Some(last) if last.end() == next.start() => {
                *last = last.joined(next).expect("they are adjacent");
            }
            _ => written.push(next),
        };
        if self.concluded {
            scanner.unprotected_pages(&process.pagemap, range, add)?;
            return Ok(written);
        }
        let report = WRITTEN | WPALLOWED | PRESENT | SWAPPED;
        let mut end = range.start();
        // Protecting leaves a marker for every missing page. A missing page without a marker was populated
        // since, written or not, and removed again; or the mapping is new. Pages that the kernel leaves out
        // are not protected.
        scanner.protect_all(&process.pagemap, range, report, |found, bits| {
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

    fn rearm(&mut self, frozen: &mut Frozen<'_>, process: &Process) -> Result<(), TrackError> {
        // A hand-over may have failed after `conclude`.
        self.concluded = false;
        if let Some(before) = self.armed.remove(&process.pid)
            && let Some(armed) = Armed::new(before.uffd, process)
        {
            armed.report_taken(process.pid, before.taken_pages);
            self.armed.insert(process.pid, armed);
            return Ok(());
        }
        // The process is new, or it called exec and has new memory.
        if self.untrackable.contains(&process.pid) {
            return Ok(());
        }
        let made = frozen.userfaultfd(process.pid)?.and_then(|fd| {
            let uffd = Uffd::handshake(fd).map_err(|error| error.to_string())?;
            Armed::new(uffd, process).ok_or_else(|| "no mapping can be registered".to_owned())
        });
        match made {
            Ok(armed) => {
                armed.report_taken(process.pid, 0);
                self.armed.insert(process.pid, armed);
            }
            Err(why) => {
                tracing::warn!(
                    event = "process_untracked",
                    process.pid,
                    why,
                    "writes of the process cannot be tracked: every round compares its memory by content"
                );
                self.untrackable.insert(process.pid);
            }
        }
        Ok(())
    }

    fn conclude(&mut self, _: &Process) -> Result<(), TrackError> {
        self.concluded = true;
        Ok(())
    }

    fn scan(&mut self, process: &Process, part: Part, runs: &mut Vec<Run>) -> io::Result<()> {
        // A scan that protects leaves out mappings that cannot be protected.
        let tracked = self.tracks(process.pid, part.range);
        let mode = match tracked && !self.concluded {
            true => ScanMode::Protect,
            false => ScanMode::Report,
        };
        let report = WRITTEN | WPALLOWED | PRESENT | SWAPPED;
        self.scanner
            .own_pages(&process.pagemap, part, report, mode, |range, categories| {
                // A protected page of a file mapping that was given back leaves a marker, which looks like a
                // protected page in swap. Only reading the page distinguishes them.
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
        // Large segments are often mapped by many processes.
        let threads = thread::available_parallelism().map_or(1, NonZero::get);
        let share = mappings.len().div_ceil(threads).max(1);
        let this = &*self;
        thread::scope(|scope| {
            let mut workers = Vec::new();
            for mappings in mappings.chunks(share) {
                let mut scanner = this.scanner.clone();
                let work = move || {
                    let scan = |&(process, range): &(&Process, PageRange)| {
                        this.scan_one_shared(process, range, &mut scanner)
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

    fn pending(&mut self, process: &Process, vma: &Vma) -> io::Result<Option<u64>> {
        if !self.tracks(process.pid, vma.range) {
            return Ok(None);
        }
        let report = WRITTEN | WPALLOWED;
        let mut pages = 0;
        self.scanner.own_pages(
            &process.pagemap,
            vma.part(),
            report,
            ScanMode::Report,
            |range, bits| {
                if bits & report != WPALLOWED {
                    pages += range.pages();
                }
            },
        )?;
        Ok(Some(pages))
    }

    fn untracked(&self, pid: i32) -> bool {
        self.untrackable.contains(&pid)
    }

    fn untracked_mappings(&self, pid: i32) -> &[PageRange] {
        self.armed.get(&pid).map_or(&[], |armed| &armed.untracked)
    }

    fn forget(&mut self, pid: i32) {
        self.armed.remove(&pid);
        self.untrackable.remove(&pid);
    }
}
