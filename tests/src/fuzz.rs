//! Properties of every parser of foreign bytes: one function for each fuzz target in `tests/fuzz`. An ordinary
//! test calls them with every input that the fuzzer has kept.
//!
//! Each accepts any bytes, and panics if the parser panics or its result violates a property.

mod dirs;
mod page_server;
mod proc;
mod records;
mod session;

pub use dirs::images;
pub use page_server::page_server;
pub use proc::proc;
pub use records::records;
pub use session::{check_store, session};

use pageferry_common::digest::digest_concat;
use pageferry_common::wire::{
    CHUNK_ENTRIES_MAX, FrameKind, FrameReader, FrameWriter, HEADER_LEN, Incoming, MAGIC, META_MAX,
    Message, PIECE_MAX, STRING_MAX, SharedPhase, WireError,
};
use pageferry_common::{CHUNK_SIZE, PAGE_SIZE};
use pageferry_receiver::quota::Bounds;
use pageferry_receiver::session::{DumpParents, Limits, ServerContext};
use pageferry_receiver::storage::store::Store;
use std::cell::LazyCell;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

/// Name and function of a fuzz target.
pub type Target = (&'static str, fn(&[u8]));

/// Targets for bytes that a peer can send.
pub const OF_PEERS: [Target; 4] = [
    ("frames", frames),
    ("messages", messages),
    ("page_server", page_server),
    ("session", session),
];

/// Targets for content of files: images, the kernel's, our own.
pub const OF_FILES: [Target; 3] = [("images", images), ("proc", proc), ("records", records)];

const PAGE: usize = PAGE_SIZE as usize;

/// Never reached: the input ends instead of stalling.
const STALL: Duration = Duration::from_secs(60);

thread_local! {
    static RUNTIME: LazyCell<Runtime> = const {
        LazyCell::new(|| {
            let mut builder = Builder::new_current_thread();
            builder.enable_all().build().expect("a runtime can be made")
        })
    };
}

fn run<T>(work: impl Future<Output = T>) -> T {
    RUNTIME.with(|runtime| runtime.block_on(work))
}

/// Returns what sessions with a receiver on an empty directory share.
fn context(home: &Path, dump_parents: DumpParents) -> ServerContext {
    ServerContext {
        store: Store::open(home).expect("it is new"),
        limits: Limits {
            stall: STALL,
            handshake: STALL,
            buffers: 1,
            bounds: Bounds::NONE,
        },
        restorer: None,
        dump_parents,
    }
}

/// Creates a directory in memory, if there is a tmpfs: a fuzzer would wear out a disk.
#[must_use]
pub fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = match memory.is_dir() {
        true => TempDir::new_in(memory),
        false => TempDir::new(),
    };
    made.expect("a directory can be made")
}

/// Takes bytes from the front of an input; yields zeros once it is used up.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, most: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(most.min(self.0.len()));
        self.0 = later;
        now
    }

    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// Takes as many bytes as the first two specify.
    fn counted(&mut self) -> &'a [u8] {
        let len = u16::from_le_bytes([self.byte(), self.byte()]);
        self.take(len.into())
    }
}

/// Decodes the metadata of a message, after a byte that selects its kind.
pub fn messages(input: &[u8]) {
    let mut input = Input(input);
    let kind = FrameKind::ALL[usize::from(input.byte()) % FrameKind::ALL.len()];
    let meta = input.0;
    let Ok(message) = Message::decode(kind, meta) else {
        return;
    };
    assert_eq!(message.kind(), kind);
    // Each message has exactly one encoding.
    assert_eq!(message.encode(), meta);
    assert!(meta.len() <= META_MAX);
    match message {
        Message::Chunk(chunk) => {
            assert!(chunk.entries.len() <= CHUNK_ENTRIES_MAX);
            assert!(chunk.raw_len() <= CHUNK_SIZE);
            let mut neighbours = chunk.entries.windows(2);
            assert!(neighbours.all(|pair| pair[0].range.end() <= pair[1].range.start()));
        }
        Message::State { name, piece, .. } => {
            assert!(piece.len() <= PIECE_MAX);
            assert!(!name.as_str().contains('/') && !name.as_str().starts_with('.'));
        }
        Message::Welcome { directory, .. } => assert!(directory.len() <= STRING_MAX),
        Message::Refuse { reason: text, .. }
        | Message::Abort { reason: text }
        | Message::FileProblem { problem: text } => assert!(text.len() <= STRING_MAX),
        _ => {}
    }
}

/// Reads the bytes of a connection, unchanged and with all values repaired that cannot be guessed.
pub fn frames(input: &[u8]) {
    for bytes in [input.to_vec(), put_right(input)] {
        let (written, read) = run(read_and_write(&bytes));
        assert!(bytes.starts_with(&written));
        assert!(written.len() as u64 <= read);
    }
}

/// Reads frames up to the first rejected one. Returns their re-encoding, and the number of bytes read.
async fn read_and_write(bytes: &[u8]) -> (Vec<u8>, u64) {
    let mut reader = FrameReader::new(bytes, SharedPhase::default(), STALL);
    let mut written = Vec::new();
    let mut writer = FrameWriter::new(&mut written, SharedPhase::default(), STALL);
    loop {
        match reader.recv().await {
            Ok(Incoming::Message(message)) => {
                writer.send(&message).await.expect("it came in this phase");
            }
            Ok(Incoming::Chunk {
                chunk,
                meta,
                compressed,
                data_len,
            }) => {
                assert!(data_len <= CHUNK_SIZE);
                assert_eq!(Message::Chunk(chunk).encode(), meta);
                let mut data = vec![0; data_len];
                if reader.recv_data(&mut data).await.is_err() {
                    break;
                }
                let sent = writer.send_chunk(&meta, compressed, data.into()).await;
                sent.expect("it came in this phase");
            }
            Err(WireError::Refused { code, reason }) => {
                let refused = writer.send(&Message::Refuse { code, reason }).await;
                refused.expect("it came in this phase");
                break;
            }
            Err(WireError::Aborted(reason)) => {
                let aborted = writer.send(&Message::Abort { reason }).await;
                aborted.expect("it came in this phase");
                break;
            }
            Err(_) => break,
        }
    }
    (written, reader.bytes())
}

/// Returns the bytes with the magic, sequence number and checksum of each frame corrected.
fn put_right(input: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    let mut rest = &mut bytes[..];
    for seq in 0u64.. {
        let Some((header, after)) = rest.split_first_chunk_mut::<HEADER_LEN>() else {
            break;
        };
        header[..4].copy_from_slice(&MAGIC);
        header[16..24].copy_from_slice(&seq.to_le_bytes());
        let len = |at: usize| {
            let bytes = header[at..at + 4].try_into().expect("4 bytes");
            u32::from_le_bytes(bytes) as usize
        };
        let (meta_len, data_len) = (len(8), len(12));
        let Some(meta) = after.get(..meta_len) else {
            break;
        };
        let checksum = digest_concat(&header[..24], meta);
        header[24..].copy_from_slice(&checksum.to_le_bytes());
        let end = (meta_len + data_len).min(after.len());
        rest = &mut after[end..];
    }
    bytes
}
