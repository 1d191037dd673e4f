//! Rounds of a real program into memory, without a network: the images equal the memory of the process.

use bytes::Bytes;
use pageferry_common::wire::{Entry, EntryKind, RoundKind, Totals, WireError};
use pageferry_common::{BufferPool, ImageId, PAGE_SIZE};
use pageferry_sender::converge::Limits;
use pageferry_sender::copy::{Copier, Pass, Scanned, WrittenPages};
use pageferry_sender::dirty::{self, TrackerChoice};
use pageferry_sender::freeze::{Freezer, Then};
use pageferry_sender::migrate::{Parts, Plan, migrate};
use pageferry_sender::progress::{Counters, Progress};
use pageferry_sender::report::Report;
use pageferry_sender::sink::{PageSink, Receipt, SinkError};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// A program that fills 64 MiB, and keeps changing them.
const PROGRAM: &str = "
import os, sys, random, threading, time
memory = bytearray(os.urandom(1 << 20) * 64)
def change():
    while True:
        at = random.randrange(len(memory))
        memory[at] = random.randrange(256)
        # So many pages in a round that they fill several chunks.
        if at % 4 == 0: time.sleep(0.0001)
threading.Thread(target=change, daemon=True).start()
print('ready', flush=True)
sys.stdin.read()
";

struct Program(Child, ChildStdin, Lines<BufReader<ChildStdout>>);

impl Program {
    fn start(program: &str) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", program])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let stdin = child.stdin.take().unwrap();
        Self(child, stdin, lines)
    }

    /// Sends a command, and waits until it is done.
    fn command(&mut self, what: &str) {
        writeln!(self.1, "{what}").unwrap();
        assert_eq!(self.2.next().unwrap().unwrap(), "done");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

type Image = HashMap<u64, Vec<u8>>;

/// Keeps the images of the last round, with in-parent entries resolved.
#[derive(Default)]
struct MemorySink {
    images: HashMap<ImageId, Image>,
    parents: HashMap<ImageId, Image>,
    open: Option<ImageId>,
    totals: Totals,
    /// Number of calls so far.
    calls: u32,
    /// Calls at which the connection is lost, together with the current round.
    lost_at: Vec<u32>,
    /// Whether the current round is complete: only its ack is lost.
    complete: bool,
}

impl MemorySink {
    fn call(&mut self) -> Result<(), SinkError> {
        self.calls += 1;
        match self.lost_at.contains(&self.calls) {
            true => Err(SinkError::Wire(WireError::Closed)),
            false => Ok(()),
        }
    }

    fn receipt(&self) -> Receipt {
        Receipt {
            totals: self.totals,
            bytes_wire: 0,
        }
    }
}

impl PageSink for MemorySink {
    fn reconnect(&mut self, _: SinkError) -> Result<Option<Receipt>, SinkError> {
        if std::mem::take(&mut self.complete) {
            return Ok(Some(self.receipt()));
        }
        self.images = std::mem::take(&mut self.parents);
        Ok(None)
    }

    fn begin(&mut self, _: u32, _: RoundKind, _: u64) -> Result<(), SinkError> {
        self.parents = std::mem::take(&mut self.images);
        self.totals = Totals::default();
        Ok(())
    }

    fn open(&mut self, image: ImageId) -> Result<(), SinkError> {
        self.call()?;
        self.open = Some(image);
        assert!(self.images.insert(image, Image::new()).is_none());
        Ok(())
    }

    fn put(&mut self, entries: Vec<Entry>, pages: Bytes) -> Result<(), SinkError> {
        self.call()?;
        self.totals.count(&entries);
        let id = self.open.unwrap();
        let image = self.images.get_mut(&id).unwrap();
        let mut data = pages.chunks_exact(PAGE_SIZE as usize);
        for entry in entries {
            for at in (entry.range.start()..entry.range.end()).step_by(PAGE_SIZE as usize) {
                let page = match entry.kind {
                    EntryKind::Data => data.next().unwrap().to_vec(),
                    EntryKind::Zero => vec![0; PAGE_SIZE as usize],
                    EntryKind::Parent | EntryKind::Copy => self.parents[&id][&at].clone(),
                };
                assert!(image.insert(at, page).is_none(), "{at:#x} twice");
            }
        }
        assert!(data.next().is_none());
        Ok(())
    }

    fn commit(&mut self) -> Result<Receipt, SinkError> {
        self.call()?;
        self.complete = true;
        self.call()?;
        self.complete = false;
        Ok(self.receipt())
    }

    fn finish(&mut self) -> Result<(), SinkError> {
        Ok(())
    }

    fn directory(&self) -> &str {
        ""
    }

    fn counters(&self) -> Arc<Counters> {
        Arc::<Counters>::default()
    }
}

fn rounds_are_right(choice: TrackerChoice, written_pages: WrittenPages, lost_at: &[u32]) {
    let program = Program::start(PROGRAM);
    let pid = program.0.id() as i32;
    let mut freezer = Freezer::start(Path::new(env!("CARGO_BIN_EXE_send"))).unwrap();
    let mut tracker = match dirty::probe(choice) {
        Ok(tracker) => tracker,
        Err(none) => {
            eprintln!("SKIPPED: {none}");
            return;
        }
    };
    let name = tracker.name();
    let mut tree = Copier::new(pid, written_pages).unwrap();
    let mut sink = MemorySink {
        lost_at: lost_at.to_vec(),
        ..MemorySink::default()
    };
    let mut report: Report = Report::new(pid, name);
    // No estimate meets this downtime, so all allowed rounds are made.
    let limits = Limits {
        max_downtime: Duration::ZERO,
        max_rounds: 4,
        exact_rounds: None,
    };
    let plan = Plan {
        root: pid,
        limits,
        then: Then::Stop,
        handover: None,
    };
    let parts = Parts {
        freezer: &mut freezer,
        copier: &mut tree,
        tracker: tracker.as_mut(),
        sink: &mut sink,
        pool: &BufferPool::new(2),
        progress: &Progress::start(Arc::default()),
    };
    migrate(&plan, parts, &mut report).unwrap();
    for round in &report.rounds {
        eprintln!("{name}: {round:?}");
    }
    assert!(report.rounds.len() >= 4);
    assert!(sink.calls > lost_at.last().copied().unwrap_or(0));
    assert_eq!(report.totals.reconnects as usize, lost_at.len());
    assert!(report.rounds[0].sent_pages > 64 * 256);
    assert!(report.rounds[1..].iter().all(|r| r.sent_pages < 48 * 256));
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let image = &sink.images[&ImageId::Process(pid as u32)];
    let mut page = vec![0; PAGE_SIZE as usize];
    for (&at, expected) in image {
        memory.read_exact_at(&mut page, at).unwrap();
        assert_eq!(&page, expected, "page {at:#x} differs");
    }
    assert!(image.len() > 64 * 256);
}

#[test]
fn rounds_equal_memory_with_uffd() {
    rounds_are_right(TrackerChoice::Uffd, WrittenPages::Send, &[]);
}

#[test]
fn rounds_equal_memory_with_uffd_and_a_content_filter() {
    rounds_are_right(TrackerChoice::Uffd, WrittenPages::Compare, &[]);
}

#[test]
fn rounds_equal_memory_with_soft_dirty() {
    rounds_are_right(TrackerChoice::SoftDirty, WrittenPages::Send, &[]);
}

#[test]
fn rounds_equal_memory_with_content_hashes() {
    rounds_are_right(TrackerChoice::Hash, WrittenPages::Send, &[]);
}

/// Losses at the first image, at its pages, at the end of a round, and after it; in consecutive rounds, and
/// repeatedly in one. (The first round makes about twenty calls, the others fewer than ten.)
const LOST_AT: [u32; 10] = [1, 4, 30, 31, 33, 36, 38, 40, 41, 43];

#[test]
fn lost_rounds_are_sent_again_with_uffd() {
    rounds_are_right(TrackerChoice::Uffd, WrittenPages::Send, &LOST_AT);
}

#[test]
fn lost_rounds_are_sent_again_with_uffd_and_a_content_filter() {
    rounds_are_right(TrackerChoice::Uffd, WrittenPages::Compare, &LOST_AT);
}

#[test]
fn lost_rounds_are_sent_again_with_soft_dirty() {
    rounds_are_right(TrackerChoice::SoftDirty, WrittenPages::Send, &LOST_AT);
}

#[test]
fn lost_rounds_are_sent_again_with_content_hashes() {
    rounds_are_right(TrackerChoice::Hash, WrittenPages::Send, &LOST_AT);
}

/// Three processes that share memory. The first passes commands to the others, each after the previous one is
/// done. `p` is a page, `w` a process.
const SHARING: &str = "
import mmap, os, signal, sys
pages, size = 2048, 4096
memory = mmap.mmap(-1, pages * size)
for p in range(pages): memory[p * size] = 1 + p % 255
def write(p, value): memory[p * size + p % size] = value % 256
def remove(p): memory.madvise(9, p * size, size)
def forget(): memory.madvise(mmap.MADV_DONTNEED)
def child(p, value, wait):
    # Writes, and is gone.
    pid = os.fork()
    if pid == 0:
        write(p, value)
        os._exit(0)
    try: wait(pid)
    except ChildProcessError: pass
def reap(pid): os.waitpid(pid, 0)
def leave(pid): os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
def worker(read, answer):
    for line in os.fdopen(read):
        exec(line, globals())
        os.write(answer, b'x')
    os._exit(0)
answers, answer = os.pipe()
commands = []
for w in range(2):
    read, write_end = os.pipe()
    if os.fork() == 0:
        os.close(write_end)
        worker(read, answer)
    os.close(read)
    commands.append(write_end)
print('ready', flush=True)
for line in sys.stdin:
    w, _, what = line.partition(' ')
    if w == '0':
        exec(what)
    else:
        os.write(commands[int(w) - 1], what.encode())
        os.read(answers, 1)
    print('done', flush=True)
";

/// Step that a process of [`SHARING`] performs on a page.
#[derive(Debug, Clone, Copy)]
enum Step {
    Write,
    /// Removes the page from the object.
    Remove,
    /// Does the same, then reads the page, which is allocated again as zeros.
    RemoveAndRead,
    /// Drops the page tables of the process for the page.
    WriteAndForget,
    /// Writes in a process that is created and exits.
    WriteByChild,
    /// Does the same without waiting for the process.
    WriteByZombie,
    /// Does the same with SIGCHLD ignored, so that the parent is not notified.
    WriteByUnnoticedChild,
}

const STEPS: [Step; 7] = [
    Step::Write,
    Step::Remove,
    Step::RemoveAndRead,
    Step::WriteAndForget,
    Step::WriteByChild,
    Step::WriteByZombie,
    Step::WriteByUnnoticedChild,
];

fn code(step: Step, page: u64, value: u64) -> String {
    let ignore = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)";
    match step {
        Step::Write => format!("write({page}, {value})"),
        Step::Remove => format!("remove({page})"),
        Step::RemoveAndRead => format!("remove({page}); memory[{page} * size]"),
        Step::WriteAndForget => format!("write({page}, {value}); forget()"),
        Step::WriteByChild => format!("child({page}, {value}, reap)"),
        Step::WriteByZombie => format!("child({page}, {value}, leave)"),
        Step::WriteByUnnoticedChild => format!("{ignore}; child({page}, {value}, reap)"),
    }
}

#[test]
fn shared_memory_arrives_after_every_round() {
    shared_memory_is_right(false);
}

#[test]
fn shared_memory_arrives_after_lost_rounds() {
    shared_memory_is_right(true);
}

/// Makes one running round after the other of processes that are idle during the round: the images equal their
/// memory, whatever each process did in between. If rounds are `lost`, the next contains everything they had.
fn shared_memory_is_right(lost: bool) {
    let mut program = Program::start(SHARING);
    let pid = program.0.id() as i32;
    let mut freezer = Freezer::start(Path::new(env!("CARGO_BIN_EXE_send"))).unwrap();
    let mut tracker = match dirty::probe(TrackerChoice::Uffd) {
        Ok(tracker) => tracker,
        Err(none) => {
            eprintln!("SKIPPED: {none}");
            return;
        }
    };
    let (mut tree, mut sink) = (
        Copier::new(pid, WrittenPages::Send).unwrap(),
        MemorySink::default(),
    );
    let pool = BufferPool::new(1);
    let mut round = |number: u32, what: &str| -> Scanned {
        // Of four rounds up to three are lost, each at another call.
        let losses = if lost { number % 4 } else { 0 };
        for loss in (1..=losses).rev() {
            let mut frozen = freezer.freeze(pid).unwrap();
            tree.collect(&mut frozen, tracker.as_mut()).unwrap();
            frozen.thaw(Then::Run).unwrap();
            sink.begin(number, RoundKind::PreDump, 0).unwrap();
            tree.survey_descriptors().unwrap();
            sink.lost_at = vec![sink.calls + 1 + (number + loss) % 8];
            let sent = tree.send(Pass::PreCopy, tracker.as_mut(), &mut sink, &pool);
            // At the latest, a round that arrived completely is lost together with its ack.
            drop(sent);
            tree.lost(tracker.as_mut());
            sink.lost_at.clear();
            let lost = sink.reconnect(SinkError::Wire(WireError::Closed));
            assert!(lost.unwrap().is_none());
        }
        let mut frozen = freezer.freeze(pid).unwrap();
        tree.collect(&mut frozen, tracker.as_mut()).unwrap();
        frozen.thaw(Then::Run).unwrap();
        sink.begin(number, RoundKind::PreDump, 0).unwrap();
        tree.survey_descriptors().unwrap();
        let look = Pass::PreCopy;
        let scanned = tree.send(look, tracker.as_mut(), &mut sink, &pool).unwrap();
        tree.acked();
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let line = maps.lines().find(|line| line.contains("/dev/zero"));
        let fields: Vec<_> = line.unwrap().split(' ').collect();
        let inode = fields.iter().rev().find_map(|field| field.parse().ok());
        let object = File::open(format!("/proc/{pid}/map_files/{}", fields[0])).unwrap();
        let image = &sink.images[&ImageId::Shmem(inode.unwrap())];
        let (mut page, zero) = (vec![0; PAGE_SIZE as usize], vec![0; PAGE_SIZE as usize]);
        for at in (0..2048 * PAGE_SIZE).step_by(PAGE_SIZE as usize) {
            object.read_exact_at(&mut page, at).unwrap();
            let arrived = image.get(&at).unwrap_or(&zero);
            assert!(*arrived == page, "after {what}: page {}", at / PAGE_SIZE);
        }
        scanned
    };
    assert!(round(1, "the beginning").compared >= 2048);
    // Nothing was written: nothing is read.
    let compared = round(2, "nothing").compared;
    assert!(lost || compared < 100);
    let mut number = 2;
    let mut page = 0;
    for last in STEPS {
        let steps: Vec<_> = match last {
            // From then on contents are compared; before that, the steps may come in any order.
            Step::WriteByUnnoticedChild => vec![last, Step::Write, last],
            _ => STEPS[..6].iter().flat_map(|&first| [first, last]).collect(),
        };
        for (index, step) in steps.into_iter().enumerate() {
            for process in 0..3 {
                page = (page + 31) % 2048;
                number += 1;
                let what = code(step, page, u64::from(number));
                program.command(&format!("{process} {what}"));
                // The same page again, by another process.
                if index % 2 == 1 {
                    let what = code(last, page, u64::from(number) + 1);
                    program.command(&format!("{} {what}", (process + 1) % 3));
                }
                let scanned = round(number, &format!("{step:?} by {process}, {last:?}"));
                let tracked = [step, last]
                    .iter()
                    .all(|step| matches!(step, Step::Write | Step::Remove | Step::RemoveAndRead));
                if tracked && !lost {
                    assert!(scanned.compared < 100, "{step:?}, {last:?}: {scanned:?}");
                }
            }
        }
    }
}
