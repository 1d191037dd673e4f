//! The native wire protocol, version 1. This page is its specification.
//!
//! One TCP connection carries one migration from a *sender* (S) to a *receiver* (R). All integers
//! are little-endian. Everything is a frame:
//!
//! | offset | size | field | |
//! |---|---|---|---|
//! | 0 | 4 | magic | `PFRY`: no CRIU command and no TLS record begins so |
//! | 4 | 1 | kind | see the table of messages |
//! | 5 | 1 | flags | bit 0: the data is one zstd frame (chunks only); others zero |
//! | 6 | 2 | reserved | zero |
//! | 8 | 4 | meta length | bytes, at most [`frame::META_MAX`] |
//! | 12 | 4 | data length | bytes, at most [`crate::CHUNK_SIZE`]; zero unless a chunk |
//! | 16 | 8 | sequence | counts the frames of this direction from 0: a lost, repeated or reordered frame shows |
//! | 24 | 8 | checksum | XXH3-64 of bytes 0..24 and of the metadata |
//! | 32 | | metadata | the message |
//! | | | data | page contents |
//!
//! Page contents are covered by the digest inside the chunk's metadata, computed over the
//! *uncompressed* pages: every byte is checked exactly once, and end to end. The checksums are
//! against faults. Against attackers there is TLS, or nothing.
//!
//! ```text
//!  S                                                            R
//!  | Hello {version, page size, features, claim}                |
//!  | ---------------------------------------------------------> |
//!  |    Welcome {version, features, rounds, directory}  or  Refuse
//!  | <--------------------------------------------------------- |
//!  |                                                            |
//!  | File {path, size, build id} ..., Check                     |  if the process moves:
//!  | ---------------------------------------------------------> |  compared with its own
//!  |                                 Lacks {what} ..., Checked  |
//!  | <--------------------------------------------------------- |
//!  |                                                            |
//!  | RoundBegin {round, final?, uptime}                         |  .N.tmp/ created
//!  | ImageOpen {process or segment}                             |  once for each image
//!  | Chunk {entries, digest} + pages                            |  pages-N.img appended to
//!  | Chunk ...                                                  |
//!  | RoundEnd {images, pages by kind, bytes, digest}            |  totals compared,
//!  | ---------------------------------------------------------> |  fsync, rename to N/
//!  |                              RoundAck {the same totals}    |
//!  | <--------------------------------------------------------- |
//!  |           ... more rounds, RoundBegin to RoundAck ...      |
//!  |                                                            |
//!  | State {name, last?, piece} ...                             |  if the process moves:
//!  | Restore {options}                                          |  CRIU's other images
//!  | ---------------------------------------------------------> |
//!  |                                     Restored  or  Refuse   |  criu restore, held back
//!  | <--------------------------------------------------------- |
//!  | Commit                                                     |
//!  | ---------------------------------------------------------> |
//!  |                                      Running  or  Refuse   |  let go
//!  | <--------------------------------------------------------- |
//!  |                                                            |
//!  | Finish                                                     |
//!  | ---------------------------------------------------------> |
//!  |                                              FinishAck     |
//!  | <--------------------------------------------------------- |
//! ```
//!
//! | kind | name | from | metadata |
//! |---|---|---|---|
//! | 1 | Hello | S | version u16, page size u32, features u64, claim |
//! | 2 | Welcome | R | version u16, features u64 (those both ends have), complete rounds u32, directory string |
//! | 3 | RoundBegin | S | round u32 (from 1, ascending), kind u8 (1 pre-dump, 2 final), uptime u64 µs |
//! | 4 | ImageOpen | S | kind u8 (1 process, 2 segment), id u64 |
//! | 21 | File | S | size u64, path string, build id: its length u8 (at most 64) and that many bytes |
//! | 22 | Check | S | |
//! | 23 | Lacks | R | what is wrong with which file, string |
//! | 24 | Checked | R | |
//! | 20 | Memfd | S | name string; of the segment that was just opened, if the process is to move |
//! | 5 | Chunk | S | raw length u32, entries u32, digest u64, then the entries |
//! | 6 | RoundEnd | S | totals: images u32, data, zero and parent pages u64 each, digest u64 |
//! | 7 | RoundAck | R | round u32, the same totals |
//! | 8 | Finish | S | |
//! | 9 | FinishAck | R | |
//! | 10 | Working | both | nothing: the peer is alive and busy (a long scan, a long fsync) |
//! | 11 | Refuse | R | code u16, reason string; the connection ends |
//! | 12 | Abort | S | reason string; the round in progress is discarded, the connection ends |
//! | 13 | State | S | last u8 (0, 1), name string, length u32, the piece: at most 32 KiB |
//! | 14 | Restore | S | options u32: [`crate::criu::session::Options::bits`] |
//! | 15 | Restored | R | |
//! | 16 | Commit | S | |
//! | 17 | Running | R | |
//! | 18 | Resolve | S | claim; first message of a connection |
//! | 19 | Outcome | R | running u8 (0, 1); the connection ends |
//!
//! A sender whose connection is lost says Hello again, on another, with the same claim. The receiver then ends what
//! is left of the first, discards a round that has not come to its end, and says in its Welcome how many it has: the
//! sender goes on with the next.
//!
//! A claim is a migration's id (16 bytes), the root's PID (u32) and a secret of 32 bytes that the receiver has
//! only from Hello.
//! A string is a u16 length and that many bytes of UTF-8, at most [`message::STRING_MAX`].
//! A chunk's entry is `address u64, pages u32, kind u32`; kinds are 1 data (its pages follow, in
//! order), 2 zero (present, all zero bytes, nothing follows), 3 parent (unchanged since the
//! previous round), 4 copy (unchanged, but the receiver must store it again: hugetlb pages, which
//! restore reads from the newest directory only). Addresses ascend through all chunks of an image;
//! images are not interleaved and none is opened twice in a round.
//!
//! Who may say what when is [`phase::Phase`]; both ends pass every frame through it. Unknown kinds,
//! flags and feature bits, a frame out of phase, a length out of bounds, or a checksum that does
//! not match end the connection.

pub mod connection;
pub mod frame;
pub mod message;
pub mod phase;

pub use connection::{FrameReader, FrameWriter, Incoming, Patience, SharedPhase, WireError};
pub use frame::{FrameKind, Header};
pub use message::{Chunk, Entry, EntryKind, Message, RefuseCode, RoundKind, Totals};
pub use phase::Phase;

/// The protocol version this code speaks.
pub const VERSION: u16 = 1;

/// Feature bit: chunk data may be zstd-compressed.
pub const FEATURE_ZSTD: u64 = 1;

/// Feature bit: the process can be restored where its memory goes.
pub const FEATURE_RESTORE: u64 = 2;

/// Every feature this code knows.
pub const FEATURES: u64 = FEATURE_ZSTD | FEATURE_RESTORE;
