//! Finds out whether a process may share private pages, copy on write, with another process.
//!
//! `process_vm_readv` pins the pages that it reads, and since Linux 5.19 a page that is pinned must belong to
//! one process: the kernel makes a copy for the target of every page that another process maps, too. The copy
//! stays. So such pages are read through `/proc/PID/mem`, which does not pin them, but is slower.
//!
//! Finding out which pages they are takes a look at each. That can be omitted if no process has memory of the
//! same origin: pages are shared by fork (or by KSM, which merges equal pages).

use crate::sys::pagemap;
use crate::target::is_gone;
use crate::target::process::Process;
use pageferry_common::PageRange;
use pageferry_common::proc::status;
use pageferry_common::sys::pidfd;
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// File with the PID that was assigned last (`CONFIG_CHECKPOINT_RESTORE`).
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// Greatest length of an auxiliary vector, in bytes; 400 on current kernels.
const AUXV_MAX: usize = 4096;

/// Greatest number of new PIDs that are looked at one by one. More than that take longer than looking at the
/// pages, which happens instead.
const NEW_PIDS_MAX: i32 = 256;

/// How long a new PID without a process may belong to a fork that is under way: almost always, and at most.
const FORK_USUAL: Duration = Duration::from_millis(5);
const FORK_MAX: Duration = Duration::from_millis(100);

/// How often all processes are listed again if new ones could not be.
const SURVEY_INTERVAL: Duration = Duration::from_secs(1);

/// Memory around a page that may be shared by parts: that of a huge page.
const BLOCK_BYTES: u64 = 2 << 20;

/// Greatest distance, in bytes, of pages that are looked at together.
const LOOK_BYTES_MAX: u64 = 4 * BLOCK_BYTES;

/// What a process has had since its last exec and passes on to its children: the content of `/proc/PID/auxv`,
/// with addresses that the kernel chooses at random in each exec. Empty for a thread of the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Origin(Vec<u8>);

impl Origin {
    fn read(tid: i32) -> io::Result<Self> {
        let mut content = [0; AUXV_MAX];
        // The kernel returns all of it at once.
        let bytes = File::open(format!("/proc/{tid}/auxv"))?.read(&mut content)?;
        Ok(Self(content[..bytes].to_vec()))
    }
}

/// Whether a process that is read can fork meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forks {
    /// It runs.
    Possible,
    /// It has been stopped since [`Sharing::survey`], or since before.
    Impossible,
}

/// The processes of the host, by the origin of their memory.
#[derive(Debug)]
pub struct Sharing {
    by_origin: HashMap<Origin, BTreeSet<i32>>,
    /// Whether all processes are listed that had a PID when `last_pid` was the last.
    complete: bool,
    /// Time of the last survey.
    surveyed: Instant,
    last_pid: i32,
    last_pid_file: Option<File>,
    /// New PIDs that no process had when they were looked at, and when that was: it had exited, or its fork
    /// was still under way.
    unseen: Vec<(i32, Instant)>,
    /// Whether KSM merges equal pages of any process.
    merges: bool,
    /// Whether this program may trace any process (`CAP_SYS_PTRACE`). If it may not inspect a process even so,
    /// a security module separates that one from the target, and fork does not lead from one to the other.
    may_trace: bool,
}

impl Default for Sharing {
    /// An empty list: until [`Sharing::survey`] is called, every process may share memory.
    fn default() -> Self {
        const CAP_SYS_PTRACE: u64 = 1 << 19;
        let status = fs::read("/proc/self/status").unwrap_or_default();
        let capabilities = status::mask(&status, "CapEff").unwrap_or(0);
        Self {
            may_trace: capabilities & CAP_SYS_PTRACE != 0,
            by_origin: HashMap::new(),
            complete: false,
            surveyed: Instant::now(),
            last_pid: 0,
            last_pid_file: File::open(LAST_PID).ok(),
            unseen: Vec::new(),
            merges: true,
        }
    }
}

impl Sharing {
    /// Lists all processes of the host. That takes about 5 µs for each, so it is done before a freeze.
    pub fn survey(&mut self) {
        self.surveyed = Instant::now();
        self.by_origin.clear();
        self.unseen.clear();
        // Read first: a process that appears meanwhile is listed by this or by `update`.
        let last_pid = self.last_pid();
        self.last_pid = last_pid.unwrap_or(0);
        self.complete = last_pid.is_some() && self.add_all().is_ok();
        self.merges = ["run", "pages_shared"].iter().any(|file| {
            let text = fs::read(format!("/sys/kernel/mm/ksm/{file}"));
            text.is_ok_and(|text| text != b"0\n")
        });
    }

    fn add_all(&mut self) -> io::Result<()> {
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            if let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) {
                self.add(pid)?;
            }
        }
        Ok(())
    }

    /// Adds a process. One that is gone, or that belongs to the kernel, is left out.
    ///
    /// # Errors
    /// Errors of reading its origin: `EACCES` if it may not be inspected, and could be related to the target.
    fn add(&mut self, pid: i32) -> io::Result<()> {
        match Origin::read(pid) {
            Ok(origin) if origin.0.is_empty() => {}
            Ok(origin) => drop(self.by_origin.entry(origin).or_default().insert(pid)),
            Err(error) if is_gone(&error) => {}
            Err(error) if self.may_trace && error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Adds the processes that were created since the last call. Returns whether there may be any.
    fn update(&mut self) -> bool {
        let (before, last_pid) = (self.last_pid, self.last_pid());
        let forked = last_pid != Some(before);
        if !self.complete {
            if self.surveyed.elapsed() > SURVEY_INTERVAL {
                self.survey();
            }
        } else if forked || !self.unseen.is_empty() {
            let last_pid = last_pid.unwrap_or(0);
            self.last_pid = last_pid;
            // PIDs ascend until they begin again with the lowest.
            self.complete = (before..=before.saturating_add(NEW_PIDS_MAX)).contains(&last_pid)
                && self.add_new(before + 1..=last_pid).is_ok();
        }
        forked
    }

    /// Adds the processes that have these PIDs, or one that was unseen before.
    fn add_new(&mut self, pids: RangeInclusive<i32>) -> io::Result<()> {
        let now = Instant::now();
        let mut unseen = std::mem::take(&mut self.unseen);
        unseen.extend(pids.map(|pid| (pid, now)));
        for (pid, since) in unseen {
            if Path::new(&format!("/proc/{pid}")).exists() {
                // Threads have PIDs, too. No pidfd can be opened of one.
                if pidfd::open(pid).is_ok() {
                    self.add(pid)?;
                }
            } else if now - since < FORK_MAX {
                self.unseen.push((pid, since));
            }
        }
        Ok(())
    }

    /// Whether a fork that created a new process may be under way.
    fn may_be_forking(&self) -> bool {
        let mut unseen = self.unseen.iter();
        unseen.any(|(_, since)| since.elapsed() < FORK_USUAL)
    }

    fn last_pid(&self) -> Option<i32> {
        let mut text = [0; 16];
        let bytes = self.last_pid_file.as_ref()?.read_at(&mut text, 0).ok()?;
        str::from_utf8(&text[..bytes]).ok()?.trim().parse().ok()
    }

    /// Returns whether another process than `pid` may have memory of this origin.
    fn has_relative(&mut self, pid: i32, origin: &Origin, forks: Forks) -> bool {
        // When a process has been stopped, all of its forks are complete.
        if !self.complete || forks == Forks::Possible && self.may_be_forking() {
            return true;
        }
        let Some(pids) = self.by_origin.get_mut(origin) else {
            return false;
        };
        while let Some(&other) = pids.iter().find(|&&other| other != pid) {
            if Origin::read(other).is_ok_and(|now| now == *origin) {
                return true;
            }
            // It exited, or called exec.
            pids.remove(&other);
        }
        false
    }
}

/// Decides for one process which of its pages may be pinned.
#[derive(Debug)]
pub(crate) struct PinCheck<'a> {
    sharing: &'a mut Sharing,
    forks: Forks,
    /// Origin of the memory; `None` if unknown.
    origin: Option<Origin>,
    /// Whether KSM merges equal pages of the process.
    merges: bool,
    /// Addresses that were looked at last, and whether their pages may be pinned.
    looked_at: Option<(PageRange, bool)>,
    buffer: Vec<u8>,
}

impl<'a> PinCheck<'a> {
    /// Prepares to read a process.
    pub(crate) fn new(sharing: &'a mut Sharing, process: &Process, forks: Forks) -> Self {
        sharing.update();
        Self {
            forks,
            origin: Origin::read(process.tid).ok(),
            merges: sharing.merges && is_merged_by_ksm(process.tid),
            looked_at: None,
            buffer: Vec::new(),
            sharing,
        }
    }

    /// Returns whether reading these pages (in ascending order) with `process_vm_readv` leaves shared what is
    /// shared. A fork between this call and the read goes unnoticed.
    pub(crate) fn may_pin(&mut self, process: &Process, wanted: &[PageRange]) -> bool {
        let (Some(first), Some(last)) = (wanted.first(), wanted.last()) else {
            return true;
        };
        // A page of a huge page that is shared in part is copied even if no other process maps that page.
        let start = first.start() - first.start() % BLOCK_BYTES;
        let span = PageRange::from_bounds(start, last.end().next_multiple_of(BLOCK_BYTES));
        let forked = self.forks == Forks::Possible && self.sharing.update();
        if let Some((range, may_pin)) = self.looked_at.filter(|_| !forked)
            && span.is_some_and(|span| range.intersect(span) == Some(span))
        {
            return may_pin;
        }
        let (pid, forks) = (process.pid, self.forks);
        let has_relative = |origin| self.sharing.has_relative(pid, origin, forks);
        if !self.merges && !self.origin.as_ref().is_none_or(has_relative) {
            return true;
        }
        // Looking at pages that are far from each other takes longer than reading them the slow way.
        let Some(span) = span.filter(|span| span.bytes() <= LOOK_BYTES_MAX) else {
            return false;
        };
        let exclusive = pagemap::is_exclusive(&process.pagemap, span, &mut self.buffer);
        let may_pin = exclusive.unwrap_or(false);
        self.looked_at = Some((span, may_pin));
        may_pin
    }
}

/// Returns whether KSM looks for pages of the process to merge, or has merged some.
fn is_merged_by_ksm(tid: i32) -> bool {
    const NONE: &[u8] = b"ksm_rmap_items 0\n";
    let mut line = [0; NONE.len()];
    // Kernels before Linux 6.1 do not have the file.
    let read = File::open(format!("/proc/{tid}/ksm_stat")).and_then(|mut it| it.read(&mut line));
    read.is_err() || line != NONE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::process::namespace_depth;
    use pageferry_common::PAGE_SIZE;
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    /// A shell, and a copy of it that lives until the shell's input ends.
    struct Shells(Child, i32);

    impl Shells {
        fn start() -> Self {
            let script = "exec 3<&0; (echo; read line <&3; :) & echo $!; wait";
            let mut shell = Command::new("sh");
            shell.args(["-c", script]).stdin(Stdio::piped());
            let mut shell = shell.stdout(Stdio::piped()).spawn().unwrap();
            let lines = BufReader::new(shell.stdout.take().unwrap()).lines();
            let lines: Vec<_> = lines.take(2).map(Result::unwrap).collect();
            let copy = lines.concat().parse().unwrap();
            Self(shell, copy)
        }

        fn pid(&self) -> i32 {
            self.0.id().cast_signed()
        }

        fn process(&self) -> Process {
            Process::open(self.pid(), self.pid(), namespace_depth(self.pid()).unwrap()).unwrap()
        }

        /// Ends the copy, and then the shell.
        fn end(&mut self) {
            drop(self.0.stdin.take());
            self.0.wait().unwrap();
        }
    }

    fn has_relative(sharing: &mut Sharing, pid: i32) -> bool {
        let origin = Origin::read(pid).unwrap();
        sharing.has_relative(pid, &origin, Forks::Impossible)
    }

    #[test]
    fn copy_made_by_fork_is_a_relative_until_it_ends() {
        let mut shells = Shells::start();
        let (shell, copy) = (shells.pid(), shells.1);
        let mut sharing = Sharing::default();
        assert!(has_relative(&mut sharing, shell), "nothing is known yet");
        sharing.survey();
        assert!(has_relative(&mut sharing, shell) && has_relative(&mut sharing, copy));
        // A program that was executed shares nothing with its parent.
        assert!(!has_relative(
            &mut sharing,
            std::process::id().cast_signed()
        ));
        let origin = Origin::read(shell).unwrap();
        shells.end();
        assert!(!sharing.has_relative(shell, &origin, Forks::Impossible));
    }

    #[test]
    fn copy_made_after_the_survey_is_a_relative() {
        let mut sharing = Sharing::default();
        sharing.survey();
        let mut shells = Shells::start();
        assert!(sharing.update());
        assert!(has_relative(&mut sharing, shells.pid()));
        shells.end();
    }

    #[test]
    fn shared_pages_must_not_be_pinned() {
        let mut shells = Shells::start();
        let process = shells.process();
        let maps = fs::read_to_string(format!("/proc/{}/maps", shells.pid())).unwrap();
        let heap = maps.lines().find(|line| line.ends_with("[heap]")).unwrap();
        let start = u64::from_str_radix(heap.split('-').next().unwrap(), 16).unwrap();
        let wanted = [PageRange::new(start, 1).unwrap()];
        let mut sharing = Sharing::default();
        sharing.survey();
        let mut check = PinCheck::new(&mut sharing, &process, Forks::Possible);
        assert!(!check.may_pin(&process, &wanted));
        // This process has the memory of another program.
        let pid = std::process::id().cast_signed();
        let own = Process::open(pid, pid, namespace_depth(pid).unwrap()).unwrap();
        let memory = vec![1u8; 1 << 16];
        let page = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let mut check = PinCheck::new(&mut sharing, &own, Forks::Possible);
        assert!(check.may_pin(&own, &[PageRange::new(page, 15).unwrap()]));
        drop(memory);
        shells.end();
    }
}
