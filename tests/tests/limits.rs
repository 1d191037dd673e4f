//! A receiver limits the resources of its peers. It reports the limit to a peer that reaches one, and no other
//! peer is harmed.

use pageferry_common::criu::page_server::{self, Command, PageLocation, Width};
use pageferry_common::digest::{RoundDigest, digest};
use pageferry_common::wire::{
    self, CHUNK_ENTRIES_MAX, Chunk, Entry, EntryKind, FrameKind, HEADER_LEN, Header, META_MAX,
    Message, RefuseCode, RoundKind, Totals,
};
use pageferry_common::{CHUNK_SIZE, Claim, ImageId, MigrationId, PAGE_SIZE, PageRange, Token};
use pageferry_tests::daemon::until;
use pageferry_tests::scenario::{assert_arrived, resume};
use pageferry_tests::{Pair, Victim};
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::Duration;

/// A scripted peer.
struct Peer {
    stream: TcpStream,
    sent: u64,
    received: u64,
    totals: Totals,
    digest: RoundDigest,
}

impl Peer {
    /// Connects without sending anything.
    fn connect(to: SocketAddr) -> io::Result<Self> {
        Ok(Self {
            stream: TcpStream::connect(to)?,
            sent: 0,
            received: 0,
            totals: Totals::default(),
            digest: RoundDigest::default(),
        })
    }

    /// Returns the Hello of a new migration.
    fn hello() -> Message {
        static MIGRATIONS: AtomicU32 = AtomicU32::new(1);
        let mut id = [0; 16];
        let number = MIGRATIONS.fetch_add(1, Ordering::Relaxed);
        id[..4].copy_from_slice(&number.to_le_bytes());
        Message::Hello {
            version: wire::VERSION,
            page_size: PAGE_SIZE as u32,
            features: wire::FEATURES,
            claim: Claim {
                id: MigrationId(id),
                root_pid: 7,
                token: Token([7; 32]),
            },
        }
    }

    /// Connects, and is welcomed with a new migration.
    fn greet(to: SocketAddr) -> io::Result<Self> {
        let mut peer = Self::connect(to)?;
        peer.send(&Self::hello())?;
        match peer.recv()? {
            Message::Welcome { .. } => Ok(peer),
            other => Err(io::Error::other(format!("{other:?}"))),
        }
    }

    fn frame(&mut self, kind: FrameKind, meta: &[u8], zstd: bool, data: &[u8]) -> io::Result<()> {
        let header = Header::encode(kind, zstd, self.sent, meta, data.len());
        self.sent += 1;
        self.stream.write_all(&[&header, meta, data].concat())
    }

    fn send(&mut self, message: &Message) -> io::Result<()> {
        self.frame(message.kind(), &message.encode(), false, &[])
    }

    /// Receives the next message, except those that only report progress.
    fn recv(&mut self) -> io::Result<Message> {
        loop {
            let mut header = [0; HEADER_LEN];
            self.stream.read_exact(&mut header)?;
            let decoded = Header::decode(&header, self.received).map_err(io::Error::other)?;
            self.received += 1;
            let mut meta = vec![0; decoded.meta_len];
            self.stream.read_exact(&mut meta)?;
            match Message::decode(decoded.kind, &meta).map_err(io::Error::other)? {
                Message::Working => {}
                message => return Ok(message),
            }
        }
    }

    fn begin(&mut self, round: u32) -> io::Result<()> {
        (self.totals, self.digest) = Default::default();
        self.send(&Message::RoundBegin {
            round,
            kind: RoundKind::PreDump,
            uptime_us: 1,
        })
    }

    fn open(&mut self, image: ImageId) -> io::Result<()> {
        self.totals.images += 1;
        self.digest.open(image);
        self.send(&Message::ImageOpen(image))
    }

    /// Sends a chunk without pages.
    fn entries(&mut self, entries: Vec<Entry>) -> io::Result<()> {
        self.totals.count(&entries);
        let digest = digest(&[]);
        let meta = Message::Chunk(Chunk { entries, digest }).encode();
        self.digest.chunk(&meta);
        self.frame(FrameKind::Chunk, &meta, false, &[])
    }

    fn end(&mut self) -> io::Result<()> {
        self.totals.digest = self.digest.value();
        self.send(&Message::RoundEnd(self.totals))?;
        match self.recv()? {
            Message::RoundAck { .. } => Ok(()),
            other => Err(io::Error::other(format!("{other:?}"))),
        }
    }
}

fn entry(page: u64, pages: u64, kind: EntryKind) -> Entry {
    let range = PageRange::new(page * PAGE_SIZE, pages).unwrap();
    Entry { range, kind }
}

/// Returns as many entries as a chunk may have, none of which can be joined with another; `number` selects one of
/// several such lists.
fn scattered(number: u64, kind: EntryKind) -> Vec<Entry> {
    let first = 1 + number * 2 * CHUNK_ENTRIES_MAX as u64;
    let pages = (0..CHUNK_ENTRIES_MAX as u64).map(|index| first + 2 * index);
    pages.map(|page| entry(page, 1, kind)).collect()
}

#[test]
fn reached_limit_is_named_and_the_target_runs_on() {
    let mut victim = Victim::start("heap=8 children=1 dirty=20");
    for limit in [
        ["--max-rounds", "1"],
        ["--max-bytes", "4M"],
        ["--max-images", "1"],
        ["--keep-free", "1000000T"],
    ] {
        let pair = Pair::start(&limit);
        let sent = pair.send(victim.pid(), &["--rounds", "2"]);
        assert_eq!(sent.status.code(), Some(4), "{limit:?}: {}", sent.stderr);
        for word in [limit[0], "the target runs"] {
            assert!(sent.stderr.contains(word), "{word}: {}", sent.stderr);
        }
        victim.assert_unharmed();
    }
}

#[test]
fn surplus_sender_is_refused_and_resolve_is_still_answered() {
    let mut victim = Victim::start("heap=1");
    let pair = Pair::start(&["--max-senders", "1"]);
    let first = Peer::greet(pair.address()).unwrap();
    let sent = pair.send(victim.pid(), &["--rounds", "1"]);
    assert_eq!(sent.status.code(), Some(4), "{}", sent.stderr);
    assert!(sent.stderr.contains("--max-senders"), "{}", sent.stderr);
    let mut asks = Peer::connect(pair.address()).unwrap();
    let claim = Claim {
        id: MigrationId([9; 16]),
        root_pid: 9,
        token: Token([9; 32]),
    };
    asks.send(&Message::Resolve(claim)).unwrap();
    let answer = asks.recv().unwrap();
    assert!(
        matches!(
            answer,
            Message::Refuse {
                code: RefuseCode::Unknown,
                ..
            }
        ),
        "{answer:?}"
    );
    drop(first);
    until("the place is free", || {
        let sent = pair.send(victim.pid(), &["--rounds", "1"]);
        sent.status.success().then_some(()).ok_or(sent.stderr)
    });
    victim.assert_unharmed();
}

#[test]
fn unauthenticated_connection_is_refused_or_dropped_after_the_timeout() {
    let pair = Pair::start(&["--handshake-timeout", "200ms"]);
    // The beginning of a Hello.
    let mut slow = Peer::connect(pair.address()).unwrap();
    let header = Header::encode(FrameKind::Hello, false, 0, &[0; 62], 0);
    slow.stream.write_all(&header[..20]).unwrap();
    let Message::Refuse { code, reason } = slow.recv().unwrap() else {
        panic!("not refused");
    };
    assert_eq!(code, RefuseCode::Silent, "{reason}");
    // The beginning of a dump by CRIU, whose protocol has no message for a refusal.
    let mut slow = Peer::connect(pair.address()).unwrap();
    slow.stream.write_all(&[4, 0, 0, 0, 0]).unwrap();
    let mut rest = Vec::new();
    slow.stream.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

#[test]
fn greeting_byte_by_byte_is_accepted() {
    let pair = Pair::start(&[]);
    let mut slow = Peer::connect(pair.address()).unwrap();
    slow.stream.set_nodelay(true).unwrap();
    let hello = Peer::hello();
    let meta = hello.encode();
    let header = Header::encode(hello.kind(), false, 0, &meta, 0);
    for byte in [&header[..], &meta].concat() {
        slow.stream.write_all(&[byte]).unwrap();
        // Nothing shows when the receiver has read the bytes so far.
        thread::sleep(Duration::from_millis(1));
    }
    let answer = slow.recv().unwrap();
    assert!(matches!(answer, Message::Welcome { .. }), "{answer:?}");
}

/// One hostile behaviour. It reports when it has reached its point, and returns when the receiver ends it.
type Part = fn(SocketAddr, &dyn Fn()) -> io::Result<()>;

/// Behaviours that occupy a slot.
const SENDERS: [(&str, Part); 8] = [
    ("greets and is silent", |to, reached| {
        let mut peer = Peer::greet(to)?;
        reached();
        peer.recv().map(drop)
    }),
    ("works forever", |to, reached| {
        let mut peer = Peer::greet(to)?;
        reached();
        loop {
            peer.send(&Message::Working)?;
        }
    }),
    ("sends bombs", |to, reached| {
        let mut peer = Peer::greet(to)?;
        peer.begin(1)?;
        peer.open(ImageId::Process(7))?;
        let entries = vec![entry(1, (CHUNK_SIZE as u64) / PAGE_SIZE, EntryKind::Data)];
        let meta = Message::Chunk(Chunk { entries, digest: 0 }).encode();
        peer.frame(FrameKind::Chunk, &meta, true, &BOMB)?;
        reached();
        peer.recv().map(drop)
    }),
    ("sends nothing but entries", |to, reached| {
        let mut peer = Peer::greet(to)?;
        peer.begin(1)?;
        peer.open(ImageId::Process(7))?;
        for number in 0.. {
            peer.entries(scattered(number, EntryKind::Zero))?;
            reached();
        }
        Ok(())
    }),
    ("refers to its parent", |to, reached| {
        let mut peer = Peer::greet(to)?;
        for round in 1.. {
            peer.begin(round)?;
            peer.open(ImageId::Process(7))?;
            for number in 0..16 {
                let kind = [EntryKind::Zero, EntryKind::Parent][usize::from(round > 1)];
                peer.entries(scattered(number, kind))?;
            }
            peer.end()?;
            reached();
        }
        Ok(())
    }),
    ("has a few pages stand for many", |to, reached| {
        let mut peer = Peer::greet(to)?;
        for (round, kind) in [(1, EntryKind::Zero), (2, EntryKind::Copy)] {
            peer.begin(round)?;
            peer.open(ImageId::Process(7))?;
            peer.entries(vec![entry(1, 1 << 30, kind)])?;
            reached();
            peer.end()?;
        }
        Ok(())
    }),
    ("opens images", |to, reached| {
        let mut peer = Peer::greet(to)?;
        peer.begin(1)?;
        for id in 0.. {
            peer.open(ImageId::Shmem(id))?;
            reached();
        }
        Ok(())
    }),
    ("is CRIU gone mad", |to, reached| {
        let mut peer = Peer::connect(to)?;
        let send = |peer: &mut Peer, command, page: u64, pages| {
            let header = page_server::Header {
                command,
                pages,
                address: page * PAGE_SIZE,
                object: page_server::object(ImageId::Process(7)).unwrap(),
            };
            let mut bytes = Vec::new();
            header.encode(Width::Wide, &mut bytes);
            peer.stream.write_all(&bytes)
        };
        send(&mut peer, Command::Open { answered: false }, 0, 0)?;
        for page in 1.. {
            send(
                &mut peer,
                Command::Add(PageLocation::Elsewhere),
                2 * page,
                1,
            )?;
            reached();
        }
        Ok(())
    }),
];

/// Behaviours that never authenticate, each with its number of simultaneous connections.
const STRANGERS: [(&str, usize, Part); 3] = [
    ("sends nothing", 20, |to, reached| {
        let mut peer = Peer::connect(to)?;
        reached();
        peer.stream.read_to_end(&mut Vec::new()).map(drop)
    }),
    ("greets at length and never to the end", 8, |to, reached| {
        let mut peer = Peer::connect(to)?;
        let header = Header::encode(FrameKind::Hello, false, 0, &[0; META_MAX], 0);
        peer.stream.write_all(&header)?;
        peer.stream.write_all(&[0; META_MAX - 1])?;
        reached();
        peer.stream.read_to_end(&mut Vec::new()).map(drop)
    }),
    ("talks nonsense", 2, |to, reached| {
        let mut peer = Peer::connect(to)?;
        peer.stream.write_all(&[0xc5; 1 << 16])?;
        reached();
        peer.stream.read_to_end(&mut Vec::new()).map(drop)
    }),
];

/// Returns a gigabyte of zeros in a zstd frame that requires a window of 2 GiB.
static BOMB: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    io::copy(&mut io::repeat(0).take(1 << 30), &mut encoder).unwrap();
    let mut frame = encoder.finish().unwrap();
    // The exponent minus 10, and an eighth.
    frame[5] = (31 - 10) << 3;
    frame
});

/// All behaviours at once, each repeated until this is dropped.
struct Hostile {
    over: Arc<AtomicBool>,
    /// Number of times that each has reached its point.
    times: Vec<Arc<AtomicU32>>,
}

impl Hostile {
    /// Starts all; returns when each has reached its point.
    fn start(to: SocketAddr) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let senders = SENDERS.iter().map(|&(name, part)| (name, 1, part));
        let parts = senders.chain(STRANGERS);
        let times = parts.map(|(name, connections, part)| {
            let times = Arc::new(AtomicU32::new(0));
            for _ in 0..connections {
                let (over, times) = (Arc::clone(&over), Arc::clone(&times));
                // Threads that wait for an answer may outlive the test.
                thread::spawn(move || {
                    let reached = || {
                        times.fetch_add(1, Ordering::Relaxed);
                    };
                    while !over.load(Ordering::Relaxed) {
                        // A refusal or a disconnect is the expected result.
                        let _ = part(to, &reached);
                    }
                });
            }
            until(name, || match times.load(Ordering::Relaxed) {
                0 => Err("not yet".to_owned()),
                _ => Ok(()),
            });
            times
        });
        let times = times.collect();
        Self { over, times }
    }

    fn times(&self) -> u64 {
        let times = self.times.iter();
        times
            .map(|times| u64::from(times.load(Ordering::Relaxed)))
            .sum()
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Returns the peak memory of a process, in bytes.
fn peak(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.unwrap().split_whitespace().next().unwrap();
    kib.parse::<u64>().unwrap() << 10
}

#[test]
fn hostile_peers_stay_within_the_stated_memory_while_a_migration_succeeds() {
    // A behaviour that returns may find its previous slot not yet free.
    let (senders, buffers, images, rounds) = (2 * SENDERS.len() as u64 + 1, 2, 4096, 200);
    let mut pair = Pair::start(&[
        "--max-senders",
        &senders.to_string(),
        "--buffers",
        &buffers.to_string(),
        "--max-images",
        &images.to_string(),
        "--max-rounds",
        &rounds.to_string(),
        "--max-bytes",
        "256M",
        "--handshake-timeout",
        "5s",
    ]);
    LazyLock::force(&BOMB);
    let hostile = Hostile::start(pair.address());
    let mut victim = Victim::start("heap=32 children=1 shared=2 dirty=20");
    let before = hostile.times();
    // A slow machine would otherwise make rounds until it reaches the byte limit.
    let options = ["--max-rounds", "2", "--then", "stop"];
    let sent = pair.send(victim.pid(), &options);
    assert!(hostile.times() > before, "they went on");
    let peak = peak(pair.receiver().program().pid());
    drop(hostile);
    assert_arrived(victim.pid(), &sent.expect_report());
    resume(victim.pid());
    victim.assert_unharmed();
    // As docs/security.md promises.
    let (kib, mib) = (1 << 10, 1 << 20);
    let sender = buffers * 4 * mib + 6 * mib + images * 128 + rounds * 12 * kib;
    let stated = 32 * mib + (senders + 64) * 256 * kib + senders * sender;
    println!("{} MiB of {} MiB", peak / mib, stated / mib);
    assert!(peak <= stated, "{} MiB", peak / mib);
}
