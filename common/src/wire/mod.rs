//! The native wire protocol, version 2. This page is its specification.
//!
//! # Frames
//!
//! One TCP connection carries one migration from a *sender* (S) to a *receiver* (R). All integers are
//! little-endian. Each direction is a sequence of frames:
//!
//! | offset | size | field | |
//! |---|---|---|---|
//! | 0 | 4 | magic | `PFRY`; neither a CRIU command nor a TLS record begins with these bytes |
//! | 4 | 1 | kind | see [Messages](#messages) |
//! | 5 | 1 | flags | bit 0: the data is one zstd frame (chunks only); other bits are zero |
//! | 6 | 2 | reserved | zero |
//! | 8 | 4 | metadata length | bytes, at most [`META_MAX`] |
//! | 12 | 4 | data length | bytes, at most [`crate::CHUNK_SIZE`]; zero except in a chunk |
//! | 16 | 8 | sequence number | number of the frame in its direction, from 0 |
//! | 24 | 8 | checksum | XXH3-64 of bytes 0..24 and of the metadata |
//! | 32 | | metadata | the message |
//! | | | data | contents of pages |
//!
//! The sequence number reveals a lost, repeated or reordered frame. The contents of pages are covered by the
//! digest in the metadata of the chunk, which is computed over the *uncompressed* pages. Thus each byte is
//! checked exactly once, and end to end. Checksums protect against faults; only TLS protects against
//! attackers.
//!
//! # Conversation
//!
//! ```text
//!  S                                                            R
//!  | Hello {version, page size, features, claim}                |
//!  | ---------------------------------------------------------> |
//!  | Welcome {version, features, rounds, receiver, directory}   |  or Refuse
//!  | <--------------------------------------------------------- |
//!  |                                                            |
//!  | File {path, size, build id} ..., Check                     |  hand-over only:
//!  | ---------------------------------------------------------> |  R compares its own files
//!  |                         FileProblem {problem} ..., Checked |
//!  | <--------------------------------------------------------- |
//!  |                                                            |
//!  | RoundBegin {round, kind, uptime}                           |  .N.tmp/ is created
//!  | ImageOpen {process or segment}                             |  once for each image
//!  | Chunk {entries, digest} + pages                            |  appended to pages-N.img
//!  | Chunk ...                                                  |
//!  | RoundEnd {totals}                                          |  totals are compared,
//!  | ---------------------------------------------------------> |  fsync, rename to N/ (the last round
//!  |                                                            |  of a hand-over: fsync before commit)
//!  |                                          RoundAck {totals} |
//!  | <--------------------------------------------------------- |
//!  |           ... more rounds, RoundBegin to RoundAck ...      |
//!  |                                                            |
//!  | State {name, last, piece} ...                              |  hand-over only:
//!  | Restore {options}                                          |  CRIU's other images
//!  | ---------------------------------------------------------> |
//!  |                                     Restored  or  Refuse   |  criu restore, not resumed
//!  | <--------------------------------------------------------- |
//!  | Commit                                                     |
//!  | ---------------------------------------------------------> |
//!  |                                      Running  or  Refuse   |  resumed
//!  | <--------------------------------------------------------- |
//!  |                                                            |
//!  | Finish                                                     |
//!  | ---------------------------------------------------------> |
//!  |                                              FinishAck     |
//!  | <--------------------------------------------------------- |
//! ```
//!
//! [`Phase`] defines which frame may follow which. Both ends check every frame against it.
//!
//! Either end closes the connection when it receives an unknown kind, flag or feature bit, a frame that the phase
//! does not permit, a length beyond its limit, or a wrong checksum or sequence number.
//!
//! A sender that loses its connection sends Hello again on a new connection, with the same claim. The
//! receiver then closes the old connection, discards an incomplete round, and returns the number of complete
//! rounds in Welcome. The sender continues with the next round.
//!
//! # Messages
//!
//! | kind | name | from | metadata |
//! |---|---|---|---|
//! | 1 | Hello | S | version u16, page size u32, features u64, claim |
//! | 2 | Welcome | R | version u16, common features u64, complete rounds u32, receiver, directory string |
//! | 3 | RoundBegin | S | round u32 (ascending, from 1), kind u8 (1 pre-dump, 2 final), uptime u64 (µs) |
//! | 4 | ImageOpen | S | kind u8 (1 process, 2 segment), id u64 |
//! | 5 | Chunk | S | length of the uncompressed pages u32, number of entries u32, digest u64, entries |
//! | 6 | RoundEnd | S | totals |
//! | 7 | RoundAck | R | round u32, totals |
//! | 8 | Finish | S | |
//! | 9 | FinishAck | R | |
//! | 10 | Working | both | the peer is busy, for example with a long scan or fsync |
//! | 11 | Refuse | R | code u16, reason string; the connection ends |
//! | 12 | Abort | S | reason string; the round in progress is discarded, and the connection ends |
//! | 13 | State | S | last u8 (0 or 1), name string, length u32, piece of at most [`PIECE_MAX`] bytes |
//! | 14 | Restore | S | options u32, see [`crate::criu::Options::bits`] |
//! | 15 | Restored | R | |
//! | 16 | Commit | S | |
//! | 17 | Running | R | |
//! | 18 | Resolve | S | claim; only as the first message of a connection |
//! | 19 | Outcome | R | running u8 (0 or 1), receiver; the connection ends |
//! | 20 | Memfd | S | name string of the segment just opened, if the process is to move |
//! | 21 | File | S | size u64, path string, length of the build id u8 (at most 64), build id |
//! | 22 | Check | S | |
//! | 23 | FileProblem | R | problem string, which names the file |
//! | 24 | Checked | R | |
//!
//! - A *claim* is the id of a migration (16 bytes), the PID of the root (u32) and a secret of 32 bytes, which
//!   the receiver learns only from Hello.
//! - A *receiver* is 16 random bytes that the receiver keeps with its migrations. A sender accepts an Outcome
//!   only from the receiver that sent Welcome.
//! - A *string* is a length (u16, at most [`STRING_MAX`]) and that many bytes of UTF-8.
//! - *Totals* are the number of images (u32), of data, zero and parent pages (u64 each), and a digest (u64).
//! - An *entry* of a chunk is an address (u64), a number of pages (u32) and a kind (u32). The kinds are 1
//!   data (its pages follow, in order), 2 zero (present and all zero; nothing follows), 3 parent (unchanged
//!   since the previous round), 4 copy (unchanged, but the receiver stores it again: hugetlb pages, which a
//!   restore reads only from the newest directory). Addresses ascend through all chunks of an image. Images
//!   are not interleaved, and none is opened twice in a round.

mod phase;

mod codec;
mod connection;
mod frame;
mod limits;
mod message;

pub use codec::MessageError;
pub use connection::{FrameReader, FrameWriter, Incoming, SharedPhase, StallLimit, WireError};
pub use frame::{FrameError, FrameKind, HEADER_LEN, Header, MAGIC};
pub use limits::{CHUNK_ENTRIES_MAX, META_MAX, PIECE_MAX, STRING_MAX};
pub use message::{Chunk, Entry, EntryKind, Message, RefuseCode, RoundKind, Totals};
pub use phase::{OutOfPhase, Phase};

/// Version of the protocol.
pub const VERSION: u16 = 2;

/// Feature: the data of a chunk may be compressed with zstd.
pub const FEATURE_ZSTD: u64 = 1;

/// Feature: the receiver can restore the process.
pub const FEATURE_RESTORE: u64 = 2;

/// All features of this version.
pub const FEATURES: u64 = FEATURE_ZSTD | FEATURE_RESTORE;
