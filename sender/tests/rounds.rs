//! Rounds of a real program into memory, without a network: what arrives is what the process held.

use bytes::Bytes;
use pageferry_common::wire::{Entry, EntryKind, RoundKind, Totals};
use pageferry_common::{BufferPool, ImageId, PAGE_SIZE};
use pageferry_sender::converge::Limits;
use pageferry_sender::dirty::{self, TrackerChoice};
use pageferry_sender::freeze::{Freezer, Then};
use pageferry_sender::migrate::{Parts, Plan, migrate};
use pageferry_sender::progress::{Counters, Progress};
use pageferry_sender::report::Report;
use pageferry_sender::sink::{PageSink, Receipt, SinkError};
use pageferry_sender::tree::Tree;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// A program that fills 64 MiB, and goes on changing it.
const PROGRAM: &str = "
import os, sys, random, threading, time
memory = bytearray(os.urandom(1 << 20) * 64)
def change():
    while True:
        at = random.randrange(len(memory))
        memory[at] = random.randrange(256)
        time.sleep(0.0001)
threading.Thread(target=change, daemon=True).start()
print('ready', flush=True)
sys.stdin.read()
";

struct Program(
    Child,
    #[expect(dead_code, reason = "kept open: its end ends the program")] ChildStdin,
);

impl Program {
    fn start() -> Self {
        let mut child = Command::new("python3")
            .args(["-c", PROGRAM])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        let stdin = child.stdin.take().unwrap();
        Self(child, stdin)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

type Image = HashMap<u64, Vec<u8>>;

/// Keeps the images of the last round, in-parent entries resolved.
#[derive(Default)]
struct MemorySink {
    images: HashMap<ImageId, Image>,
    parents: HashMap<ImageId, Image>,
    open: Option<ImageId>,
    totals: Totals,
}

impl PageSink for MemorySink {
    fn begin(&mut self, _: u32, _: RoundKind, _: u64) -> Result<(), SinkError> {
        self.parents = std::mem::take(&mut self.images);
        self.totals = Totals::default();
        Ok(())
    }

    fn open(&mut self, image: ImageId) -> Result<(), SinkError> {
        self.open = Some(image);
        assert!(self.images.insert(image, Image::new()).is_none());
        Ok(())
    }

    fn put(&mut self, entries: Vec<Entry>, pages: Bytes) -> Result<(), SinkError> {
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
        Ok(Receipt {
            totals: self.totals,
            bytes_wire: 0,
        })
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

fn rounds_are_right(choice: TrackerChoice, skip_unchanged: bool) {
    let program = Program::start();
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
    let mut tree = Tree::new(pid, skip_unchanged).unwrap();
    let mut sink = MemorySink::default();
    let mut report: Report = Report::new(pid, name);
    // A downtime that no estimate meets: the rounds allowed are all made.
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
        tracker: tracker.as_mut(),
        sink: &mut sink,
        pool: &BufferPool::new(2),
        progress: &Progress::start(Arc::default()),
    };
    migrate(&plan, &mut tree, parts, &mut report).unwrap();
    for round in &report.rounds {
        eprintln!("{name}: {round:?}");
    }
    assert!(report.rounds.len() >= 4);
    assert!(report.rounds[0].sent_pages > 64 * 256);
    assert!(report.rounds[1..].iter().all(|r| r.sent_pages < 6000));
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let image = &sink.images[&ImageId::Task(pid as u32)];
    let mut page = vec![0; PAGE_SIZE as usize];
    for (&at, expected) in image {
        memory.read_exact_at(&mut page, at).unwrap();
        assert_eq!(&page, expected, "page {at:#x} differs");
    }
    assert!(image.len() > 64 * 256);
}

#[test]
fn rounds_with_uffd() {
    rounds_are_right(TrackerChoice::Uffd, false);
}

#[test]
fn rounds_with_uffd_and_a_content_filter() {
    rounds_are_right(TrackerChoice::Uffd, true);
}

#[test]
fn rounds_with_soft_dirty() {
    rounds_are_right(TrackerChoice::SoftDirty, false);
}

#[test]
fn rounds_with_content_hashes() {
    rounds_are_right(TrackerChoice::Hash, false);
}
