//! The native dialect with a scripted sender: valid rounds are stored, invalid ones are refused with a reason, and
//! no incomplete round is left behind.

use bytes::Bytes;
use pageferry_common::digest::{RoundDigest, digest};
use pageferry_common::wire::{
    self, Chunk, Entry, EntryKind, FrameReader, FrameWriter, Incoming, Message, RefuseCode,
    RoundKind, SharedPhase, Totals, WireError,
};
use pageferry_common::{Claim, ImageId, MigrationId, PAGE_SIZE, PageRange, StateName, Token};
use pageferry_receiver::quota::Bounds;
use pageferry_receiver::refusal::Failure;
use pageferry_receiver::session::admission::Admission;
use pageferry_receiver::session::native::receive;
use pageferry_receiver::session::{DumpParents, Limits, Migration, ServerContext};
use pageferry_receiver::storage::store::Store;
use pageferry_receiver::tools::verify::verify;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::Duration;
use tokio::io::{DuplexStream, ReadHalf, WriteHalf, duplex, split};

const STALL: Duration = Duration::from_secs(5);

struct Sender {
    reader: FrameReader<ReadHalf<DuplexStream>>,
    writer: FrameWriter<WriteHalf<DuplexStream>>,
    totals: Totals,
    digest: RoundDigest,
}

impl Sender {
    async fn send(&mut self, message: Message) {
        self.writer.send(&message).await.unwrap();
    }

    async fn recv(&mut self) -> Result<Message, WireError> {
        match self.reader.recv().await? {
            Incoming::Message(message) => Ok(message),
            Incoming::Chunk { .. } => panic!("a receiver sends no chunks"),
        }
    }

    async fn greet(&mut self, version: u16) -> Result<Message, WireError> {
        self.greet_as(version, claim(2)).await
    }

    async fn greet_as(&mut self, version: u16, claim: Claim) -> Result<Message, WireError> {
        let hello = Message::Hello {
            version,
            page_size: PAGE_SIZE as u32,
            features: wire::FEATURES,
            claim,
        };
        self.send(hello).await;
        self.recv().await
    }

    async fn send_begin(&mut self, round: u32, kind: RoundKind) {
        self.totals = Totals::default();
        self.digest = RoundDigest::default();
        let uptime_us = 1;
        self.send(Message::RoundBegin {
            round,
            kind,
            uptime_us,
        })
        .await;
    }

    async fn begin(&mut self, round: u32) {
        self.send_begin(round, RoundKind::PreDump).await;
        self.totals.images += 1;
        self.digest.open(ImageId::Process(7));
        self.send(Message::ImageOpen(ImageId::Process(7))).await;
    }

    /// Sends two pages of data with the correct or a false digest, optionally compressed.
    async fn chunk(&mut self, at: u64, false_digest: u64, compressed: Option<Vec<u8>>) {
        self.chunk_of(5, at, false_digest, compressed).await;
    }

    /// Does the same with pages filled with this byte.
    async fn chunk_of(
        &mut self,
        byte: u8,
        at: u64,
        false_digest: u64,
        compressed: Option<Vec<u8>>,
    ) {
        let pages = Bytes::from(vec![byte; 2 * PAGE_SIZE as usize]);
        let range = PageRange::new(at, 2).unwrap();
        let kind = EntryKind::Data;
        let chunk = Chunk {
            entries: vec![Entry { range, kind }],
            digest: digest(&pages) ^ false_digest,
        };
        self.totals.count(&chunk.entries);
        let meta = Message::Chunk(chunk).encode();
        self.digest.chunk(&meta);
        let (is_compressed, data) = match compressed {
            Some(bytes) => (true, Bytes::from(bytes)),
            None => (false, pages),
        };
        self.writer
            .send_chunk(&meta, is_compressed, data)
            .await
            .unwrap();
    }

    /// Sends an entry without pages.
    async fn entry(&mut self, at: u64, pages: u64, kind: EntryKind) {
        let range = PageRange::new(at, pages).unwrap();
        let chunk = Chunk {
            entries: vec![Entry { range, kind }],
            digest: digest(&[]),
        };
        self.totals.count(&chunk.entries);
        let meta = Message::Chunk(chunk).encode();
        self.digest.chunk(&meta);
        self.writer
            .send_chunk(&meta, false, Bytes::new())
            .await
            .unwrap();
    }

    async fn end(&mut self) -> Result<Message, WireError> {
        self.totals.digest = self.digest.value();
        self.send(Message::RoundEnd(self.totals)).await;
        self.recv().await
    }
}

/// Returns the claim of a sender with this secret.
fn claim(secret: u8) -> Claim {
    Claim {
        id: MigrationId([1; 16]),
        root_pid: 7,
        token: Token([secret; 32]),
    }
}

/// Runs a script against the receiver; returns the receiver's result.
async fn session<F: AsyncFnOnce(&mut Sender)>(
    dir: &Path,
    script: F,
) -> (Migration, Result<(), Failure>) {
    bounded_session(Bounds::NONE, dir, script).await
}

/// Does the same with limits.
async fn bounded_session<F: AsyncFnOnce(&mut Sender)>(
    bounds: Bounds,
    dir: &Path,
    script: F,
) -> (Migration, Result<(), Failure>) {
    session_at(&Admission::new(1), bounds, dir, script).await
}

/// Does the same with this admission.
async fn session_at<F: AsyncFnOnce(&mut Sender)>(
    admission: &Admission,
    bounds: Bounds,
    dir: &Path,
    script: F,
) -> (Migration, Result<(), Failure>) {
    let context = ServerContext {
        store: Store::open(dir).unwrap(),
        limits: Limits {
            stall: STALL,
            handshake: STALL,
            buffers: 1,
            bounds,
        },
        restorer: None,
        dump_parents: DumpParents::None,
    };
    let (ours, theirs) = duplex(1 << 16);
    let (read, write) = split(ours);
    let phase = SharedPhase::default();
    let mut sender = Sender {
        reader: FrameReader::new(read, phase.clone(), STALL),
        writer: FrameWriter::new(write, phase, STALL),
        totals: Totals::default(),
        digest: RoundDigest::default(),
    };
    let (read, write) = split(theirs);
    let pending = admission.admit(STALL).unwrap();
    let (end, ()) = tokio::join!(receive(read, write, pending, &context), async {
        script(&mut sender).await;
        drop(sender);
    });
    (end.migration, end.result)
}

fn refusal(received: Result<Message, WireError>) -> RefuseCode {
    match received {
        Err(WireError::Refused { code, reason }) => {
            assert!(!reason.is_empty());
            code
        }
        other => panic!("not refused: {other:?}"),
    }
}

/// Lists a migration's directory without its token.
fn rounds(migration: &Migration) -> Vec<String> {
    let entries = fs::read_dir(&migration.directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "token")
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn valid_session_leaves_its_rounds() {
    let dir = tempfile::tempdir().unwrap();
    let (migration, result) = session(dir.path(), async |sender| {
        assert!(matches!(
            sender.greet(wire::VERSION).await,
            Ok(Message::Welcome { .. })
        ));
        for round in 1..=2 {
            sender.begin(round).await;
            sender.chunk(0x1000, 0, None).await;
            let compressed = zstd::bulk::compress(&[5; 8192], 1).unwrap();
            sender.chunk(0x8000, 0, Some(compressed)).await;
            let totals = sender.totals;
            assert!(matches!(
                sender.end().await,
                Ok(Message::RoundAck { round: acked, totals: theirs })
                    if acked == round && theirs.data_pages == totals.data_pages
            ));
        }
        sender.send(Message::Finish).await;
        assert_eq!(sender.recv().await.unwrap(), Message::FinishAck);
    })
    .await;
    result.unwrap();
    assert_eq!((migration.rounds, migration.data_pages), (2, 8));
    assert_eq!(rounds(&migration), ["1", "2"]);
    assert!(verify(&migration.directory).unwrap().problems.is_empty());
}

/// After a valid round, sends an invalid second one; returns the receiver's refusal.
async fn second_round_refused<F: AsyncFnOnce(&mut Sender)>(wrong: F) -> RefuseCode {
    let dir = tempfile::tempdir().unwrap();
    let mut code = None;
    let (migration, result) = session(dir.path(), async |sender| {
        sender.greet(wire::VERSION).await.unwrap();
        sender.begin(1).await;
        sender.chunk(0x1000, 0, None).await;
        sender.end().await.unwrap();
        wrong(sender).await;
        code = Some(refusal(sender.recv().await));
    })
    .await;
    assert!(result.is_err());
    // The first round is intact, and nothing of the second is left.
    assert_eq!(rounds(&migration), ["1"]);
    assert!(verify(&migration.directory).unwrap().problems.is_empty());
    code.unwrap()
}

#[tokio::test]
async fn damaged_pages_are_refused() {
    let code = second_round_refused(async |sender| {
        sender.begin(2).await;
        sender.chunk(0x1000, 1, None).await;
        sender.totals.digest = sender.digest.value();
        sender.send(Message::RoundEnd(sender.totals)).await;
    })
    .await;
    assert_eq!(code, RefuseCode::Protocol);
}

#[tokio::test]
async fn wrong_totals_are_refused() {
    let code = second_round_refused(async |sender| {
        sender.begin(2).await;
        sender.chunk(0x1000, 0, None).await;
        sender.totals.data_pages += 1;
        sender.send(Message::RoundEnd(sender.totals)).await;
    })
    .await;
    assert_eq!(code, RefuseCode::Protocol);
}

/// Returns a compressed frame of zeros that does or does not declare its size.
fn zeros(bytes: u64, says_size: bool) -> Vec<u8> {
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    let pledged = says_size.then_some(bytes);
    encoder.set_pledged_src_size(pledged).unwrap();
    encoder.include_contentsize(says_size).unwrap();
    std::io::copy(&mut std::io::repeat(0).take(bytes), &mut encoder).unwrap();
    encoder.finish().unwrap()
}

/// Returns the same frame with the widest window that the format allows, 2 GiB.
fn widest(mut frame: Vec<u8>) -> Vec<u8> {
    // Magic number, flags and, if no size is declared, the window: its exponent minus 10, and an eighth.
    assert_eq!(frame[4] >> 5, 0);
    frame[5] = (31 - 10) << 3;
    frame
}

/// Returns the peak memory of this process, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.unwrap().split_whitespace().next().unwrap();
    kib.parse::<u64>().unwrap() << 10
}

#[tokio::test]
async fn decompression_bomb_is_cut_off_at_the_announced_size() {
    let size = 1 << 30;
    for bomb in [
        zeros(size, true),
        zeros(size, false),
        widest(zeros(size, false)),
    ] {
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = peak();
        let code = second_round_refused(async |sender| {
            sender.begin(2).await;
            sender.chunk(0x1000, 0, Some(bomb)).await;
            sender.send(Message::RoundEnd(sender.totals)).await;
        })
        .await;
        assert_eq!(code, RefuseCode::Protocol);
        // Other tests may run at the same time, but none needs that much memory.
        assert!(peak() - before < 128 << 20, "{}", peak() - before);
    }
}

#[tokio::test]
async fn frame_with_the_widest_window_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let (_, result) = session(dir.path(), async |sender| {
        sender.greet(wire::VERSION).await.unwrap();
        sender.begin(1).await;
        let frame = widest(zeros(2 * PAGE_SIZE, false));
        sender.chunk_of(0, 0x1000, 0, Some(frame)).await;
        sender.end().await.unwrap();
        sender.send(Message::Finish).await;
        sender.recv().await.unwrap();
    })
    .await;
    result.unwrap();
}

/// Reaches a limit; the receiver must name the option that sets it.
async fn limit_named<F: AsyncFnOnce(&mut Sender) -> Result<Message, WireError>>(
    option: &str,
    bounds: Bounds,
    rounds_kept: &[&str],
    reach: F,
) {
    let dir = tempfile::tempdir().unwrap();
    let (migration, result) = bounded_session(bounds, dir.path(), async |sender| {
        let answer = reach(sender).await;
        let Err(WireError::Refused { code, reason }) = answer else {
            panic!("{option}: {answer:?}");
        };
        assert_eq!(code, RefuseCode::Limit, "{reason}");
        assert!(reason.contains(option), "{reason}");
    })
    .await;
    assert!(result.is_err());
    match migration.directory.as_os_str().is_empty() {
        true => {
            let left = fs::read_dir(dir.path()).unwrap();
            assert_eq!(left.count(), 2, "nothing but the lock and the identity");
        }
        false => {
            assert_eq!(rounds(&migration), rounds_kept);
            assert!(verify(&migration.directory).unwrap().problems.is_empty());
        }
    }
}

#[tokio::test]
async fn every_limit_of_a_migration_is_answered_with_its_option() {
    let rounds = Bounds {
        rounds: 2,
        ..Bounds::NONE
    };
    limit_named("--max-rounds", rounds, &["1", "2"], async |sender| {
        sender.greet(wire::VERSION).await.unwrap();
        for round in 1..=2 {
            sender.begin(round).await;
            sender.chunk(0x1000, 0, None).await;
            sender.end().await.unwrap();
        }
        sender.begin(3).await;
        sender.recv().await
    })
    .await;
    let bytes = Bounds {
        bytes: 64 << 10,
        ..Bounds::NONE
    };
    limit_named("--max-bytes", bytes, &["1"], async |sender| {
        sender.greet(wire::VERSION).await.unwrap();
        for round in 1..=2 {
            sender.begin(round).await;
            for at in 1..=3 {
                sender.chunk(at * 0x2000, 0, None).await;
            }
            sender.end().await?;
        }
        panic!("twelve pages and four files are more than 64 KiB");
    })
    .await;
    let images = Bounds {
        images: 2,
        ..Bounds::NONE
    };
    limit_named("--max-images", images, &["1"], async |sender| {
        sender.greet(wire::VERSION).await.unwrap();
        sender.begin(1).await;
        sender.chunk(0x1000, 0, None).await;
        sender.end().await.unwrap();
        sender.begin(2).await;
        sender.chunk(0x1000, 0, None).await;
        for id in 1..=2 {
            sender.send(Message::ImageOpen(ImageId::Shmem(id))).await;
        }
        sender.recv().await
    })
    .await;
    let keep_free = Bounds {
        keep_free: u64::MAX,
        ..Bounds::NONE
    };
    limit_named("--keep-free", keep_free, &[], async |sender| {
        sender.greet(wire::VERSION).await
    })
    .await;
}

#[tokio::test]
async fn copies_count_towards_the_byte_limit() {
    let bytes = Bounds {
        bytes: 1 << 20,
        ..Bounds::NONE
    };
    limit_named("--max-bytes", bytes, &["1"], async |sender| {
        sender.greet(wire::VERSION).await.unwrap();
        for (round, kind) in [(1, EntryKind::Zero), (2, EntryKind::Copy)] {
            sender.begin(round).await;
            sender.entry(0x1000, u32::MAX.into(), kind).await;
            sender.end().await?;
        }
        panic!("four thousand million pages are more than 1 MiB");
    })
    .await;
}

#[tokio::test]
async fn state_images_have_the_same_limits() {
    let state = |name: String, piece: usize| Message::State {
        name: StateName::new(&name).unwrap(),
        last: true,
        piece: vec![0; piece],
    };
    for (option, bounds, piece) in [
        (
            "--max-images",
            Bounds {
                images: 5,
                ..Bounds::NONE
            },
            1,
        ),
        (
            "--max-bytes",
            Bounds {
                bytes: 200 << 10,
                ..Bounds::NONE
            },
            wire::PIECE_MAX,
        ),
    ] {
        limit_named(option, bounds, &["1"], async |sender| {
            sender.greet(wire::VERSION).await.unwrap();
            sender.send_begin(1, RoundKind::Final).await;
            sender.end().await.unwrap();
            for number in 0..6 {
                sender
                    .send(state(format!("core-{number}.img"), piece))
                    .await;
            }
            sender.recv().await
        })
        .await;
    }
}

#[tokio::test]
async fn surplus_sender_is_refused_and_resolve_needs_no_slot() {
    let dir = tempfile::tempdir().unwrap();
    let admission = Admission::new(1);
    let _slot = admission.admit(STALL).unwrap().promote().unwrap();
    let (_, result) = session_at(&admission, Bounds::NONE, dir.path(), async |sender| {
        let answer = sender.greet(wire::VERSION).await;
        let Err(WireError::Refused { code, reason }) = answer else {
            panic!("{answer:?}");
        };
        assert_eq!(code, RefuseCode::Limit);
        assert!(reason.contains("--max-senders"), "{reason}");
    })
    .await;
    assert!(matches!(result, Err(Failure::Refusal(_))));
    let (_, result) = session_at(&admission, Bounds::NONE, dir.path(), async |sender| {
        sender.send(Message::Resolve(claim(2))).await;
        // Another receiver may run its process.
        assert_eq!(refusal(sender.recv().await), RefuseCode::Unknown);
    })
    .await;
    assert!(matches!(result, Err(Failure::Refusal(_))), "{result:?}");
}

#[tokio::test]
async fn rounds_out_of_order_are_refused() {
    let code = second_round_refused(async |sender| sender.begin(3).await).await;
    assert_eq!(code, RefuseCode::Protocol);
}

#[tokio::test]
async fn another_version_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_, result) = session(dir.path(), async |sender| {
        assert_eq!(
            refusal(sender.greet(wire::VERSION + 1).await),
            RefuseCode::Unsupported
        );
    })
    .await;
    assert!(result.is_err());
}

#[tokio::test]
async fn reconnecting_sender_continues_and_a_stranger_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let welcomed = |answer| match answer {
        Ok(Message::Welcome { rounds, .. }) => rounds,
        other => panic!("not welcome: {other:?}"),
    };
    let (_, result) = session(dir.path(), async |sender| {
        assert_eq!(welcomed(sender.greet(wire::VERSION).await), 0);
        for round in 1..=2 {
            sender.begin(round).await;
            sender.chunk(0x1000, 0, None).await;
            sender.end().await.unwrap();
        }
        // This round is incomplete.
        sender.begin(3).await;
        sender.chunk(0x1000, 0, None).await;
    })
    .await;
    assert!(result.unwrap_err().is_broken_connection());
    let (_, result) = session(dir.path(), async |stranger| {
        let answer = stranger.greet_as(wire::VERSION, claim(3)).await;
        assert_eq!(refusal(answer), RefuseCode::Denied);
    })
    .await;
    assert!(!result.unwrap_err().is_broken_connection());
    let (migration, result) = session(dir.path(), async |sender| {
        assert_eq!(welcomed(sender.greet(wire::VERSION).await), 2);
        sender.begin(3).await;
        sender.chunk(0x2000, 0, None).await;
        sender.end().await.unwrap();
        sender.send(Message::Finish).await;
        assert_eq!(sender.recv().await.unwrap(), Message::FinishAck);
    })
    .await;
    result.unwrap();
    assert_eq!(rounds(&migration), ["1", "2", "3"]);
    assert!(verify(&migration.directory).unwrap().problems.is_empty());
}

#[tokio::test]
async fn image_opened_twice_is_refused() {
    let code = second_round_refused(async |sender| {
        sender.begin(2).await;
        sender.chunk(0x1000, 0, None).await;
        sender.send(Message::ImageOpen(ImageId::Process(7))).await;
    })
    .await;
    assert_eq!(code, RefuseCode::Protocol);
}

#[tokio::test]
async fn disconnected_sender_leaves_no_incomplete_round() {
    let dir = tempfile::tempdir().unwrap();
    let (migration, result) = session(dir.path(), async |sender| {
        sender.greet(wire::VERSION).await.unwrap();
        sender.begin(1).await;
        sender.chunk(0x1000, 0, None).await;
    })
    .await;
    assert!(matches!(result, Err(Failure::Wire(_))));
    assert_eq!(rounds(&migration), [""; 0]);
}

#[tokio::test]
async fn only_the_sender_of_a_migration_can_resolve_it() {
    let dir = tempfile::tempdir().unwrap();
    let (migration, _) = session(dir.path(), async |sender| {
        sender.greet(wire::VERSION).await.unwrap();
        sender.begin(1).await;
        sender.end().await.unwrap();
    })
    .await;
    let outcome = migration.directory.join("outcome.json");
    let (_, denied) = session(dir.path(), async |stranger| {
        stranger.send(Message::Resolve(claim(3))).await;
        assert_eq!(refusal(stranger.recv().await), RefuseCode::Denied);
    })
    .await;
    assert!(matches!(denied, Err(Failure::Refusal(_))), "{denied:?}");
    assert!(!outcome.exists());
    let (_, answered) = session(dir.path(), async |sender| {
        sender.send(Message::Resolve(claim(2))).await;
        let answer = sender.recv().await.unwrap();
        let Message::Outcome { running, receiver } = answer else {
            panic!("{answer:?}");
        };
        assert!(!running);
        let identity = fs::read_to_string(dir.path().join("identity.json")).unwrap();
        assert!(identity.contains(&receiver.to_string()));
    })
    .await;
    answered.unwrap();
    assert!(fs::read_to_string(outcome).unwrap().contains("aborted"));
}
