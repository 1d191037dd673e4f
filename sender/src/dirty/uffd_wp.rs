//! userfaultfd write-protection, asynchronous: the kernel clears a page's protection at its first
//! write by itself, and `PAGEMAP_SCAN` lists and protects the written ones in one atomic step,
//! while the target runs.

use super::pages::Scanner;
use super::{DirtyTracker, Run, TrackError};
use crate::freeze::Frozen;
use crate::maps::{Class, Vma};
use crate::sys::pagemap::{WPALLOWED, WRITTEN};
use crate::sys::uffd::Uffd;
use crate::task::Task;
use pageferry_common::PageRange;
use std::collections::HashMap;
use std::io;

/// See the module.
#[derive(Debug)]
pub struct UffdWp {
    scanner: Scanner,
    /// One for each process; closing it unregisters its mappings.
    uffds: HashMap<i32, Uffd>,
    /// Processes that cannot have one: all their pages count as written, always.
    without: HashMap<i32, String>,
}

impl UffdWp {
    /// Finds out whether this kernel can.
    pub fn probe() -> io::Result<Self> {
        if !cfg!(target_arch = "x86_64") {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Uffd::of_this_process()?;
        let scanner = Scanner::probe()?;
        match scanner.has_scan() {
            true => Ok(Self {
                scanner,
                uffds: HashMap::new(),
                without: HashMap::new(),
            }),
            false => Err(io::Error::from_raw_os_error(libc::ENOTTY)),
        }
    }

    /// Registers every mapping that can be tracked. What was registered before costs next to
    /// nothing; what cannot be (and what was moved since) shows in the scan as not allowed.
    ///
    /// # Errors
    /// `ESRCH` if the userfaultfd belongs to a memory that is gone.
    fn register(uffd: &Uffd, task: &Task) -> io::Result<()> {
        for vma in task.vmas.iter().filter(|vma| is_tracked(vma)) {
            match uffd.register(vma.range) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Err(error),
                Err(error) => tracing::debug!(task.pid, %vma.range, %error, "not tracked"),
                Ok(()) => {}
            }
        }
        Ok(())
    }
}

/// A file's code is left alone: registered, it would lose the kernel's fault-around, and its pages
/// are not the process's own anyway.
fn is_tracked(vma: &Vma) -> bool {
    matches!(vma.class, Class::Private { .. }) && !vma.file_code
}

impl DirtyTracker for UffdWp {
    fn name(&self) -> &'static str {
        "uffd"
    }

    fn rearm(&mut self, frozen: &mut Frozen<'_>, task: &Task) -> Result<(), TrackError> {
        if let Some(uffd) = self.uffds.get(&task.pid) {
            match Self::register(uffd, task) {
                Ok(()) => return Ok(()),
                // It called exec: another memory, so another userfaultfd.
                Err(_) => drop(self.uffds.remove(&task.pid)),
            }
        }
        if self.without.contains_key(&task.pid) {
            return Ok(());
        }
        let made = frozen.userfaultfd(task.pid)?.and_then(|fd| {
            let armed = Uffd::agree(fd).and_then(|uffd| {
                Self::register(&uffd, task)?;
                Ok(uffd)
            });
            armed.map_err(|error| error.to_string())
        });
        match made {
            Ok(uffd) => drop(self.uffds.insert(task.pid, uffd)),
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

    fn scan(&mut self, task: &Task, part: PageRange, runs: &mut Vec<Run>) -> io::Result<()> {
        let report = WRITTEN | WPALLOWED;
        self.scanner
            .own_pages(&task.pagemap, part, report, true, |range, categories| {
                let written = categories & report != WPALLOWED;
                runs.push(Run { range, written });
            })
    }

    fn pending(&mut self, task: &Task, vma: &Vma) -> io::Result<Option<u64>> {
        let report = WRITTEN | WPALLOWED;
        let mut pages = 0;
        self.scanner
            .own_pages(&task.pagemap, vma.range, report, false, |range, bits| {
                if bits & report != WPALLOWED {
                    pages += range.pages();
                }
            })?;
        Ok(Some(pages))
    }

    fn untracked(&self, pid: i32) -> bool {
        self.without.contains_key(&pid)
    }

    fn forget(&mut self, pid: i32) {
        self.uffds.remove(&pid);
        self.without.remove(&pid);
    }
}
