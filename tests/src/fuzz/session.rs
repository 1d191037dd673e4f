//! Sessions with the receiver: frames are valid as frames, so that the fuzzer reaches the code behind them.

use super::{Input, PAGE, STALL, context, run, scratch};
use pageferry_common::digest::{RoundDigest, digest};
use pageferry_common::wire::{Chunk, Entry, EntryKind, FrameKind, Header, Message, Totals};
use pageferry_common::{ImageId, PageRange};
use pageferry_receiver::session::admission::Admission;
use pageferry_receiver::session::{DumpParents, native};
use pageferry_receiver::tools::verify::verify;
use std::fs;
use std::path::Path;

/// Maximum number of pages after one chunk.
const PAGES_MAX: u64 = 16;

/// Changes to a frame: bits of the byte after its kind.
mod how {
    pub(super) const COMPRESSED: u8 = 1;
    pub(super) const MISNUMBERED: u8 = 2;
    pub(super) const DAMAGED: u8 = 4;
    /// Leaves values that depend on earlier frames uncorrected.
    pub(super) const AS_IT_IS: u8 = 8;
    pub(super) const CUT: u8 = 16;
    /// Begins another connection with this frame.
    pub(super) const ANEW: u8 = 32;
    pub(super) const ZEROS: u8 = 64;
}

/// Runs any number of connections, one after the other, with a receiver that keeps rounds. The input is a list of
/// frames: a kind, its changes, the length of its metadata (u16), and the metadata.
pub fn session(input: &[u8]) {
    let home = scratch();
    let context = context(home.path(), DumpParents::None);
    for bytes in connections(input) {
        let write = tokio::io::sink();
        let pending = Admission::new(1).admit(STALL).expect("it is the only one");
        let received = native::receive(&bytes[..], write, pending, &context);
        // The receiver may accept or reject it.
        let migration = run(received).migration;
        assert!(migration.bytes_wire <= bytes.len() as u64);
        if migration.rounds > 0 {
            let newest = migration.directory.join(migration.rounds.to_string());
            assert!(newest.is_dir());
        }
    }
    check_store(context.store.dir());
}

/// Checks that a receiver's directory contains nothing but migrations with complete rounds. Returns the number of
/// rounds.
///
/// # Panics
/// If it contains anything else.
pub fn check_store(dir: &Path) -> usize {
    let mut rounds = 0;
    for name in names(dir) {
        if matches!(&*name, ".lock" | "identity.json") {
            continue;
        }
        let home = dir.join(&name);
        let mut numbers = Vec::new();
        for name in names(&home) {
            match name.parse::<u32>() {
                Ok(number) => numbers.push(number),
                Err(_) => assert!(matches!(&*name, "token" | "outcome.json"), "{name}"),
            }
        }
        numbers.sort_unstable();
        assert!(numbers.iter().copied().eq(1..=numbers.len() as u32));
        for number in numbers {
            let verified = verify(&home.join(number.to_string())).expect("there is a chain");
            assert_eq!(verified.problems, [""; 0]);
            rounds += 1;
        }
    }
    rounds
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("it is there");
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("it is readable").file_name();
    let names = entries.map(|entry| name(entry).into_string().expect("we give it UTF-8"));
    names.collect()
}

/// One direction of a connection, as its bytes are composed.
#[derive(Default)]
struct Wire {
    bytes: Vec<u8>,
    seq: u64,
    totals: Totals,
    digest: RoundDigest,
}

fn connections(input: &[u8]) -> Vec<Vec<u8>> {
    let mut input = Input(input);
    let mut done = Vec::new();
    let mut wire = Wire::default();
    while !input.is_empty() {
        let kind = FrameKind::ALL[usize::from(input.byte()) % FrameKind::ALL.len()];
        let how = input.byte();
        if how & how::ANEW != 0 {
            done.push(std::mem::take(&mut wire).bytes);
        }
        wire.frame(kind, how, input.counted());
    }
    done.push(wire.bytes);
    done
}

impl Wire {
    fn frame(&mut self, kind: FrameKind, how: u8, meta: &[u8]) {
        let mut meta = meta.to_vec();
        let mut data = Vec::new();
        match kind {
            FrameKind::RoundBegin => (self.totals, self.digest) = Default::default(),
            FrameKind::ImageOpen => {
                if let Ok(Message::ImageOpen(image)) = Message::decode(kind, &meta) {
                    self.open(image);
                }
            }
            FrameKind::Chunk => data = self.chunk(how, &mut meta),
            FrameKind::RoundEnd if how & how::AS_IT_IS == 0 => {
                self.totals.digest = self.digest.value();
                meta = Message::RoundEnd(self.totals).encode();
            }
            _ => {}
        }
        let compressed = kind == FrameKind::Chunk && how & how::COMPRESSED != 0;
        if compressed {
            data = zstd::bulk::compress(&data, 1).expect("there is room");
        }
        let seq = self.seq + u64::from(how & how::MISNUMBERED != 0);
        let mut header = Header::encode(kind, compressed, seq, &meta, data.len());
        if how & how::DAMAGED != 0 {
            header[24] ^= 1;
        }
        self.seq += 1;
        let frame = [&header[..], &meta, &data].concat();
        let len = match how & how::CUT {
            0 => frame.len(),
            _ => frame.len() / 2,
        };
        self.bytes.extend_from_slice(&frame[..len]);
    }

    fn open(&mut self, image: ImageId) {
        self.totals.images += 1;
        self.digest.open(image);
    }

    /// Corrects the head of a chunk, and returns its pages.
    fn chunk(&mut self, how: u8, meta: &mut Vec<u8>) -> Vec<u8> {
        const HEAD: usize = 16;
        if meta.len() < HEAD {
            return Vec::new();
        }
        let (entries, _) = meta[HEAD..].as_chunks::<16>();
        let entries: Vec<Entry> = entries.iter().filter_map(entry).collect();
        let mut chunk = Chunk { entries, digest: 0 };
        let pages: u64 = {
            let data = chunk.entries.iter().filter(|it| it.kind == EntryKind::Data);
            data.map(|it| it.range.pages()).sum()
        };
        if pages > PAGES_MAX {
            return Vec::new();
        }
        let fill = match how & how::ZEROS {
            0 => self.seq as u8,
            _ => 0,
        };
        let data = vec![fill; pages as usize * PAGE];
        if how & how::AS_IT_IS == 0 {
            chunk.digest = digest(&data);
            self.totals.count(&chunk.entries);
            *meta = Message::Chunk(chunk).encode();
            self.digest.chunk(meta);
        }
        data
    }
}

fn entry(bytes: &[u8; 16]) -> Option<Entry> {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let address = u64::from(word(4)) << 32 | u64::from(word(0));
    let kinds = [
        EntryKind::Data,
        EntryKind::Zero,
        EntryKind::Parent,
        EntryKind::Copy,
    ];
    Some(Entry {
        range: PageRange::new(address, word(8).into()).ok()?,
        kind: kinds[word(12) as usize % kinds.len()],
    })
}
