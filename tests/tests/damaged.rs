//! Damages every part of a complete migration on the wire: sender and receiver detect all damage, and it has no
//! effect but to end the session.

use cap::Cap;
use pageferry_common::criu::Options;
use pageferry_common::digest::{RoundDigest, digest, digest_concat};
use pageferry_common::needed_files::NeededFile;
use pageferry_common::wire::{
    self, Chunk, Entry, EntryKind, FrameKind, HEADER_LEN, Header, Message, RoundKind, Totals,
};
use pageferry_common::{
    BufferPool, Claim, ImageId, MemfdName, MigrationId, PAGE_SIZE, PageRange, ReceiverId,
    StateName, Token,
};
use pageferry_receiver::quota::Bounds;
use pageferry_receiver::refusal::Failure;
use pageferry_receiver::restore::Restorer;
use pageferry_receiver::session::admission::Admission;
use pageferry_receiver::session::native::receive;
use pageferry_receiver::session::{DumpParents, Limits, ServerContext};
use pageferry_receiver::storage::store::Store;
use pageferry_sender::sink::{CommitError, Compression, Connect, Dialect, SinkError};
use pageferry_tests::criu::Criu;
use pageferry_tests::fuzz::{check_store, scratch};
use std::alloc::System;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::thread;
use std::time::Duration;
use tokio::runtime::Builder;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

/// Maximum memory of both ends at a time, in bytes: their buffers, and small allocations.
const MEMORY_MAX: usize = 48 << 20;

const PAGE: usize = PAGE_SIZE as usize;

/// Number of bytes to damage among the pages of a frame; of everything else, every byte is damaged.
const SAMPLE: usize = 509;

/// Never reached: a cut connection ends instead of stalling.
const STALL: Duration = Duration::from_secs(60);

const CLAIM: Claim = Claim {
    id: MigrationId([1; 16]),
    root_pid: 7,
    token: Token([2; 32]),
};

/// Content of one image in one round: runs of pages with their kinds, by chunk.
type Image = (ImageId, Option<&'static str>, &'static [&'static [Run]]);

/// First page, number of pages, kind.
type Run = (u64, u64, EntryKind);

use EntryKind::{Copy as Again, Data, Parent, Zero};

const MEMFD: Option<&str> = Some("/dev/zero");
const ROUNDS: [&[Image]; 2] = [
    &[
        (
            ImageId::Process(7),
            None,
            &[&[(16, 2, Data), (18, 1, Zero)], &[(30, 4, Data)]],
        ),
        (ImageId::Shmem(3), MEMFD, &[&[(0, 2, Data)]]),
    ],
    &[
        (
            ImageId::Process(7),
            None,
            &[&[
                (16, 1, Parent),
                (17, 1, Data),
                (18, 1, Zero),
                (30, 4, Again),
            ]],
        ),
        (
            ImageId::Shmem(3),
            MEMFD,
            &[&[(0, 1, Again), (1, 1, Parent)]],
        ),
    ],
];

/// Returns the chunks of an image, and their pages.
fn chunks(image: &Image) -> impl Iterator<Item = (Chunk, Vec<u8>)> {
    image.2.iter().map(|runs| {
        let entry = |&(page, pages, kind): &Run| Entry {
            range: PageRange::new(page * PAGE_SIZE, pages).unwrap(),
            kind,
        };
        let entries: Vec<_> = runs.iter().map(entry).collect();
        let data = runs.iter().filter(|run| run.2 == Data);
        let pages = data.flat_map(|run| run.0..run.0 + run.1);
        let pages: Vec<_> = pages.flat_map(|page| [page as u8; PAGE]).collect();
        let digest = digest(&pages);
        (Chunk { entries, digest }, pages)
    })
}

/// Returns the totals of a round.
fn totals(round: &[Image]) -> Totals {
    let (mut totals, mut all) = (Totals::default(), RoundDigest::default());
    for image in round {
        totals.images += 1;
        all.open(image.0);
        for (chunk, _) in chunks(image) {
            totals.count(&chunk.entries);
            all.chunk(&Message::Chunk(chunk).encode());
        }
    }
    totals.digest = all.value();
    totals
}

const KINDS: [RoundKind; 2] = [RoundKind::PreDump, RoundKind::Final];

fn program() -> NeededFile {
    NeededFile::read("/bin/sh").unwrap()
}

fn state() -> (StateName, Vec<u8>) {
    (StateName::new("core-7.img").unwrap(), vec![7; 100])
}

/// One frame on the wire.
#[derive(Clone)]
struct Frame {
    bytes: Vec<u8>,
    /// Offset of its pages.
    data: usize,
}

impl Frame {
    /// Returns the offsets at which it is damaged and cut.
    fn places(&self) -> impl Iterator<Item = usize> {
        let last = self.bytes.len() - 1;
        let pages = (self.data..self.bytes.len()).step_by(SAMPLE);
        (0..self.data)
            .chain(pages)
            .chain((last > self.data).then_some(last))
    }

    /// Returns the same frame with another sequence number.
    fn renumbered(&self, seq: usize) -> Self {
        let mut bytes = self.bytes.clone();
        bytes[16..24].copy_from_slice(&(seq as u64).to_le_bytes());
        let checksum = digest_concat(&bytes[..24], &bytes[HEADER_LEN..self.data]);
        bytes[24..HEADER_LEN].copy_from_slice(&checksum.to_le_bytes());
        let data = self.data;
        Self { bytes, data }
    }
}

/// One direction of a connection.
#[derive(Default)]
struct Recording(Vec<Frame>);

impl Recording {
    fn send(&mut self, message: &Message) {
        self.frame(message.kind(), false, &message.encode(), &[]);
    }

    fn frame(&mut self, kind: FrameKind, compressed: bool, meta: &[u8], pages: &[u8]) {
        let seq = self.0.len() as u64;
        let header = Header::encode(kind, compressed, seq, meta, pages.len());
        self.0.push(Frame {
            bytes: [&header[..], meta, pages].concat(),
            data: HEADER_LEN + meta.len(),
        });
    }
}

/// Returns the frames of a sender that compresses every other chunk, and that asks for missing files if `files`.
fn sender_frames(files: bool) -> Vec<Frame> {
    let mut frames = Recording::default();
    frames.send(&Message::Hello {
        version: wire::VERSION,
        page_size: PAGE_SIZE as u32,
        features: wire::FEATURE_ZSTD,
        claim: CLAIM,
    });
    if files {
        frames.send(&Message::File(program()));
        frames.send(&Message::Check);
    }
    for ((round, images), kind) in (1..).zip(ROUNDS).zip(KINDS) {
        let uptime_us = 1;
        frames.send(&Message::RoundBegin {
            round,
            kind,
            uptime_us,
        });
        for image in images {
            frames.send(&Message::ImageOpen(image.0));
            if let Some(name) = image.1 {
                frames.send(&Message::Memfd(MemfdName::new(name).unwrap()));
            }
            for (number, (chunk, pages)) in chunks(image).enumerate() {
                let meta = Message::Chunk(chunk).encode();
                let small = zstd::bulk::compress(&pages, 1).unwrap();
                let compressed = number % 2 == 1;
                let data = if compressed { &small } else { &pages };
                frames.frame(FrameKind::Chunk, compressed, &meta, data);
                frames.send(&Message::Working);
            }
        }
        frames.send(&Message::RoundEnd(totals(images)));
    }
    let (name, image) = state();
    for (piece, last) in [(&image[..50], false), (&image[50..], true)] {
        let (name, piece) = (name.clone(), piece.to_vec());
        frames.send(&Message::State { name, last, piece });
    }
    frames.send(&Message::Finish);
    frames.0
}

/// Damages the first frames of one direction in every way. Calls `deliver` with the damage, the remaining frames,
/// and whether the other end must detect it.
fn damage(frames: &[Frame], first: usize, mut deliver: impl FnMut(&str, &[Frame], bool)) {
    for (number, frame) in frames[..first].iter().enumerate() {
        let mut so_far = frames[..=number].to_vec();
        for at in frame.places() {
            so_far[number] = frame.clone();
            so_far[number].bytes[at] ^= 1 << (at % 8);
            deliver(&format!("byte {at} of frame {number}"), &so_far, true);
            so_far[number].bytes.truncate(at);
            deliver(&format!("cut at {at} of frame {number}"), &so_far, true);
        }
    }
    for number in 0..first {
        let next = number + 1;
        let after = &frames[next..];
        let is_last = after.is_empty();
        let mut late = frames.to_vec();
        late.swap(number, next.min(frames.len() - 1));
        for (what, order, noticed) in [
            ("without", [&frames[..number], after].concat(), true),
            // After the last frame, the other end no longer reads.
            (
                "twice",
                [&frames[..next], &frames[number..]].concat(),
                !is_last,
            ),
            ("late", late, !is_last),
            (
                "at the end again",
                [frames, &frames[number..]].concat(),
                false,
            ),
        ] {
            let name = format!("{what}: frame {number}");
            deliver(&name, &order, noticed);
            // By an attacker who corrects the sequence numbers.
            let order = order.iter().enumerate();
            let order: Vec<_> = order.map(|(seq, frame)| frame.renumbered(seq)).collect();
            deliver(&(name + ", renumbered"), &order, false);
        }
    }
}

fn assert_little_memory() {
    let most = MEMORY.max_allocated();
    assert!(most < MEMORY_MAX, "{most} bytes");
}

/// Returns the memory files of each round with their content.
fn memory_in(home: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for round in 1..=ROUNDS.len() {
        for entry in fs::read_dir(home.join(round.to_string()))
            .into_iter()
            .flatten()
        {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.starts_with("page") {
                files.insert(format!("{round}/{name}"), fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// Returns what a receiver does with these bytes: its result, the complete rounds, and their memory.
fn received(
    frames: &[Frame],
    restorer: Option<&Restorer>,
) -> (Result<(), Failure>, usize, BTreeMap<String, Vec<u8>>) {
    let dir = scratch();
    let context = ServerContext {
        store: Store::open(dir.path()).unwrap(),
        limits: Limits {
            stall: STALL,
            handshake: STALL,
            buffers: 1,
            bounds: Bounds::NONE,
        },
        restorer: restorer.cloned(),
        dump_parents: DumpParents::None,
    };
    let bytes: Vec<u8> = frames
        .iter()
        .flat_map(|frame| &frame.bytes)
        .copied()
        .collect();
    let write = tokio::io::sink();
    let pending = Admission::new(1).admit(STALL).unwrap();
    let receiving = receive(&bytes[..], write, pending, &context);
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let result = runtime.block_on(receiving).result;
    let rounds = check_store(context.store.dir());
    (result, rounds, memory_in(&context.store.home(&CLAIM)))
}

/// Damages the first frames of a session; at least `least` damages must be detected.
fn damaged_sessions(frames: &[Frame], first: usize, least: usize, restorer: Option<&Restorer>) {
    let (result, rounds, whole) = received(frames, restorer);
    result.unwrap();
    assert_eq!((rounds, whole.len()), (2, 8));
    let (mut refused, mut taken) = (0, 0);
    damage(frames, first, |what, frames, noticed| {
        let (result, _, memory) = received(frames, restorer);
        match result {
            Ok(()) => taken += 1,
            Err(_) => refused += 1,
        }
        if noticed {
            assert!(result.is_err(), "{what}: not noticed");
            for (name, content) in memory {
                assert!(whole[&name] == content, "{what}: {name} is another");
            }
        }
    });
    // Most damages by an attacker who corrects the sequence numbers are detected as well.
    assert!(refused >= least && taken < least / 10, "{refused} {taken}");
    assert_little_memory();
}

#[test]
fn damaged_session_is_detected_and_leaves_complete_rounds() {
    let frames = sender_frames(false);
    damaged_sessions(&frames, frames.len(), 2000, None);
}

#[test]
fn damaged_file_comparison_is_detected() {
    let Some(criu) = Criu::stable("damage to a session that compares files") else {
        return;
    };
    let criu = pageferry_common::criu::Criu::find(Some(criu.path())).unwrap();
    let lazy = false;
    // Hello, the list of files, and its end.
    damaged_sessions(
        &sender_frames(true),
        3,
        300,
        Some(&Restorer {
            criu,
            lazy,
            timeout: STALL,
        }),
    );
}

/// Returns the answers of a receiver.
fn receiver_frames() -> Vec<Frame> {
    let mut answers = Recording::default();
    answers.send(&Message::Welcome {
        version: wire::VERSION,
        features: wire::FEATURE_RESTORE,
        rounds: 0,
        receiver: ReceiverId([5; 16]),
        directory: "somewhere".to_owned(),
    });
    let what = "it is missing".to_owned();
    answers.send(&Message::FileProblem { problem: what });
    answers.send(&Message::Checked);
    for (round, images) in (1..).zip(ROUNDS) {
        let totals = totals(images);
        answers.send(&Message::RoundAck { round, totals });
    }
    answers.send(&Message::Restored);
    answers.send(&Message::Running);
    answers.send(&Message::FinishAck);
    answers.0
}

/// Accepts one sender, answers each of its requests with the next answer, and closes after the last.
fn answer(listener: TcpListener, answers: Vec<Frame>) {
    let (mut stream, _) = listener.accept().unwrap();
    // The sender connects once only.
    drop(listener);
    let mut answers = answers.into_iter().peekable();
    for seq in 0.. {
        let mut header = [0; HEADER_LEN];
        if answers.peek().is_none() || stream.read_exact(&mut header).is_err() {
            return;
        }
        let header = Header::decode(&header, seq).unwrap();
        let mut rest = vec![0; header.meta_len + header.data_len];
        if stream.read_exact(&mut rest).is_err() {
            return;
        }
        let due = match header.kind {
            FrameKind::Hello
            | FrameKind::RoundEnd
            | FrameKind::Restore
            | FrameKind::Commit
            | FrameKind::Finish => 1,
            // One file, and the end of the list.
            FrameKind::Check => 2,
            _ => 0,
        };
        for answer in answers.by_ref().take(due) {
            if stream.write_all(&answer.bytes).is_err() {
                return;
            }
        }
    }
}

/// How a move ended for the sender.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// Before the commit: the target resumes.
    Early,
    /// The copy may run.
    InDoubt,
    /// The receiver reports that the copy does not run.
    Refused,
    /// The copy runs; the frames after that are lost.
    Late,
    Good,
}

/// Moves a process to a scripted receiver.
fn move_process(pool: &BufferPool, answers: &[Frame]) -> End {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let answers = answers.to_vec();
    let receiver = thread::spawn(move || answer(listener, answers));
    let connect = Connect {
        to,
        claim: CLAIM,
        stall: STALL,
        reconnect_for: Duration::ZERO,
        max_frozen: STALL,
        tls: None,
        compression: Compression::None,
        needs_restore: true,
    };
    let mut sink = match Dialect::Native.connect(connect, pool) {
        Ok(sink) => sink,
        Err(_) => {
            receiver.join().unwrap();
            return End::Early;
        }
    };
    let mut restored = || -> Result<(), SinkError> {
        let destination = sink.destination().unwrap();
        assert!(destination.check_files(vec![program()])?.len() <= 1);
        for ((round, images), kind) in (1..).zip(ROUNDS).zip(KINDS) {
            sink.begin(round, kind, 1)?;
            for image in images {
                sink.open(image.0)?;
                if let Some(name) = image.1 {
                    sink.memfd_name(&MemfdName::new(name).unwrap())?;
                }
                for (chunk, pages) in chunks(image) {
                    sink.put(chunk.entries, pages.into())?;
                }
            }
            assert_eq!(sink.commit()?.totals, totals(images));
        }
        let destination = sink.destination().unwrap();
        let (name, image) = state();
        destination.put_state(&name, &mut &image[..])?;
        destination.restore(Options::default())
    };
    let end = match restored() {
        Err(_) => End::Early,
        Ok(()) => match sink.destination().unwrap().commit() {
            Err(CommitError::InDoubt(_)) => End::InDoubt,
            Err(CommitError::Refused(_)) => End::Refused,
            Ok(()) => match sink.finish() {
                Err(_) => End::Late,
                Ok(()) => End::Good,
            },
        },
    };
    drop(sink);
    receiver.join().unwrap();
    end
}

#[test]
fn damaged_answers_are_detected_and_never_decide_which_copy_runs() {
    let answers = receiver_frames();
    let pool = BufferPool::new(1);
    assert_eq!(move_process(&pool, &answers), End::Good);
    let running = answers.len() - 2;
    let mut in_doubt = 0;
    damage(&answers, answers.len(), |what, received, noticed| {
        let end = move_process(&pool, received);
        if noticed {
            assert_ne!(end, End::Good, "{what}: not noticed");
        }
        // No answer was a refusal.
        assert_ne!(end, End::Refused, "{what}");
        if matches!(end, End::Late | End::Good) {
            let as_it_was = |(ours, theirs): (&Frame, &Frame)| ours.bytes == theirs.bytes;
            let mut all = answers[..=running].iter().zip(received);
            assert!(
                all.all(as_it_was),
                "{what}: the sender does not report that the copy runs"
            );
        }
        in_doubt += usize::from(end == End::InDoubt);
    });
    // Each byte of one answer, flipped and cut.
    assert!(in_doubt >= 2 * HEADER_LEN, "{in_doubt}");
    assert_little_memory();
}
