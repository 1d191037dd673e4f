//! The fixed frame header: 32 bytes, checked before anything is allocated for what follows it.

use super::message::CHUNK_ENTRIES_MAX;
use crate::CHUNK_SIZE;
use crate::digest::digest2;

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"PFRY";

/// Header length, bytes.
pub const HEADER_LEN: usize = 32;

/// Longest metadata of any message, bytes: a chunk with all the entries it may have.
pub const META_MAX: usize = 16 + 16 * CHUNK_ENTRIES_MAX;

/// Flag bit: the data is compressed.
pub const FLAG_ZSTD: u8 = 1;

macro_rules! frame_kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a frame is; the numbers are those on the wire.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum FrameKind { $($(#[$doc])* $name = $number,)* }

        impl FrameKind {
            /// Every kind there is.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            fn from_wire(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

frame_kinds! {
    /// Sender: who I am and what I can.
    Hello = 1,
    /// Receiver: agreed.
    Welcome = 2,
    /// Sender: a round begins.
    RoundBegin = 3,
    /// Sender: the chunks that follow belong to this image.
    ImageOpen = 4,
    /// Sender: pagemap entries and their pages.
    Chunk = 5,
    /// Sender: the round is complete; its totals.
    RoundEnd = 6,
    /// Receiver: the round is complete and durable (the last before a process moves: by [`FrameKind::Running`]); its
    /// totals.
    RoundAck = 7,
    /// Sender: no more rounds.
    Finish = 8,
    /// Receiver: goodbye.
    FinishAck = 9,
    /// Either: alive and busy.
    Working = 10,
    /// Receiver: no, and why.
    Refuse = 11,
    /// Sender: giving up, and why.
    Abort = 12,
    /// Sender: a piece of one of CRIU's images.
    State = 13,
    /// Sender: all of them are there; restore the process, and stop short of letting it run.
    Restore = 14,
    /// Receiver: it is restored, and could run.
    Restored = 15,
    /// Sender: let it run. Its copy never will again, unless the receiver refuses.
    Commit = 16,
    /// Receiver: it runs.
    Running = 17,
    /// Sender, first thing on a new connection: what became of a migration that was lost sight of?
    Resolve = 18,
    /// Receiver: whether it runs here; if not, it never will.
    Outcome = 19,
    /// Sender: the image is of a segment that a memfd of this name could be.
    Memfd = 20,
    /// Sender: the process needs this file.
    File = 21,
    /// Sender: those were all. Are they there?
    Check = 22,
    /// Receiver: what is wrong with one of them.
    Lacks = 23,
    /// Receiver: that was all.
    Checked = 24,
}

/// A decoded and bounds-checked frame header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: FrameKind,
    /// Whether the data is zstd-compressed.
    pub compressed: bool,
    /// Length of the metadata, bytes.
    pub meta_len: usize,
    /// Length of the data, bytes.
    pub data_len: usize,
    /// Number of this frame in its direction.
    pub seq: u64,
    checksum: u64,
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first four bytes are not ours.
    #[error("not a Pageferry frame (it begins with {0:02x?})")]
    Magic([u8; 4]),
    /// A kind nobody knows.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// A flag or reserved bit nobody knows.
    #[error("unknown flags {flags:#04x} or reserved bits {reserved:#06x}")]
    Flags {
        /// The flags byte.
        flags: u8,
        /// The reserved field.
        reserved: u16,
    },
    /// A length out of bounds.
    #[error("a {kind:?} frame may not have {meta} bytes of metadata and {data} of data")]
    Length {
        /// The frame's kind.
        kind: FrameKind,
        /// Announced metadata, bytes.
        meta: u32,
        /// Announced data, bytes.
        data: u32,
    },
    /// A frame was lost, repeated or reordered.
    #[error("frame number {got} where {expected} was due")]
    Sequence {
        /// The number it should have.
        expected: u64,
        /// The number it has.
        got: u64,
    },
    /// Header or metadata were damaged.
    #[error("checksum of a {0:?} frame does not match")]
    Checksum(FrameKind),
}

impl Header {
    /// A header for `meta` and `data_len` bytes of data, and its encoding.
    #[must_use]
    pub fn encode(
        kind: FrameKind,
        compressed: bool,
        seq: u64,
        meta: &[u8],
        data_len: usize,
    ) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4] = kind as u8;
        bytes[5] = if compressed { FLAG_ZSTD } else { 0 };
        bytes[8..12].copy_from_slice(&len32(meta.len()).to_le_bytes());
        bytes[12..16].copy_from_slice(&len32(data_len).to_le_bytes());
        bytes[16..24].copy_from_slice(&seq.to_le_bytes());
        let checksum = digest2(&bytes[..24], meta);
        bytes[24..32].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Checks everything about a header that can be checked before its metadata is read.
    ///
    /// # Errors
    /// [`FrameError`], whichever applies first.
    pub fn decode(bytes: &[u8; HEADER_LEN], expected_seq: u64) -> Result<Self, FrameError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let magic: [u8; 4] = bytes[0..4].try_into().expect("4 bytes");
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let kind = FrameKind::from_wire(bytes[4]).ok_or(FrameError::Kind(bytes[4]))?;
        let (flags, reserved) = (bytes[5], u16_at(6));
        let allowed = if kind == FrameKind::Chunk {
            FLAG_ZSTD
        } else {
            0
        };
        if flags & !allowed != 0 || reserved != 0 {
            return Err(FrameError::Flags { flags, reserved });
        }
        let (meta, data) = (u32_at(8), u32_at(12));
        let data_max = if kind == FrameKind::Chunk {
            CHUNK_SIZE
        } else {
            0
        };
        if meta as usize > META_MAX || data as usize > data_max {
            return Err(FrameError::Length { kind, meta, data });
        }
        let seq = u64_at(16);
        if seq != expected_seq {
            return Err(FrameError::Sequence {
                expected: expected_seq,
                got: seq,
            });
        }
        Ok(Self {
            kind,
            compressed: flags & FLAG_ZSTD != 0,
            meta_len: meta as usize,
            data_len: data as usize,
            seq,
            checksum: u64_at(24),
        })
    }

    /// Checks header and metadata against the checksum.
    ///
    /// # Errors
    /// [`FrameError::Checksum`].
    pub fn verify(&self, header: &[u8; HEADER_LEN], meta: &[u8]) -> Result<(), FrameError> {
        if digest2(&header[..24], meta) == self.checksum {
            Ok(())
        } else {
            Err(FrameError::Checksum(self.kind))
        }
    }
}

fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("frames are bounded far below 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let header = Header::encode(FrameKind::Chunk, true, 0x0102, b"meta", 0x1000);
        assert_eq!(&header[..8], b"PFRY\x05\x01\x00\x00");
        assert_eq!(&header[8..24], b"\x04\0\0\0\0\x10\0\0\x02\x01\0\0\0\0\0\0");
        let decoded = Header::decode(&header, 0x0102).unwrap();
        assert_eq!((decoded.meta_len, decoded.data_len), (4, 0x1000));
        decoded.verify(&header, b"meta").unwrap();
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let good = Header::encode(FrameKind::Chunk, false, 7, b"meta", 4096);
        for bit in 0..HEADER_LEN * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            let refused = match Header::decode(&bad, 7) {
                Err(_) => true,
                Ok(header) => header.meta_len != 4 || header.verify(&bad, b"meta").is_err(),
            };
            assert!(refused, "bit {bit}");
        }
    }

    #[test]
    fn lengths_are_bounded_before_anything_is_read() {
        for (kind, meta, data) in [
            (FrameKind::Chunk, 0, CHUNK_SIZE + 1),
            (FrameKind::Hello, 0, 1),
        ] {
            let header = Header::encode(kind, false, 0, &vec![0; meta], data);
            assert!(matches!(
                Header::decode(&header, 0),
                Err(FrameError::Length { .. })
            ));
        }
        let long = Header::encode(FrameKind::Chunk, false, 0, &vec![0; META_MAX + 1], 0);
        assert!(matches!(
            Header::decode(&long, 0),
            Err(FrameError::Length { .. })
        ));
    }
}
