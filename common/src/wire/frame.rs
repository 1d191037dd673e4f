//! The frame header: 32 bytes, checked before memory is allocated for what follows it.

use super::limits::META_MAX;
use crate::CHUNK_SIZE;
use crate::digest::digest_concat;

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"PFRY";

/// Length of a header, bytes.
pub const HEADER_LEN: usize = 32;

/// Flag: the data is compressed.
const FLAG_ZSTD: u8 = 1;

macro_rules! frame_kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// Kind of a frame. The numbers are those on the wire.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum FrameKind { $($(#[$doc])* $name = $number,)* }

        impl FrameKind {
            /// All kinds.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            fn from_wire(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

frame_kinds! {
    /// Sender: identifies itself and its features.
    Hello = 1,
    /// Receiver: accepts the sender.
    Welcome = 2,
    /// Sender: begins a round.
    RoundBegin = 3,
    /// Sender: begins an image, to which later chunks belong.
    ImageOpen = 4,
    /// Sender: pagemap entries and their pages.
    Chunk = 5,
    /// Sender: completes a round, with its totals.
    RoundEnd = 6,
    /// Receiver: the round is complete and durable, with its totals. The last round before a hand-over is
    /// durable only by [`FrameKind::Running`].
    RoundAck = 7,
    /// Sender: no more rounds follow.
    Finish = 8,
    /// Receiver: acknowledges the end of the migration.
    FinishAck = 9,
    /// Either: still busy.
    Working = 10,
    /// Receiver: refuses, with the reason.
    Refuse = 11,
    /// Sender: aborts, with the reason.
    Abort = 12,
    /// Sender: a piece of one of CRIU's images of state.
    State = 13,
    /// Sender: all images are complete; the receiver restores the process but does not resume it.
    Restore = 14,
    /// Receiver: the process is restored, and can resume.
    Restored = 15,
    /// Sender: the receiver resumes the process. The copy of the sender never runs again, unless the receiver
    /// refuses.
    Commit = 16,
    /// Receiver: the process runs.
    Running = 17,
    /// Sender, first message of a connection: asks for the outcome of an interrupted migration.
    Resolve = 18,
    /// Receiver: whether the process runs here; otherwise it never will.
    Outcome = 19,
    /// Sender: the image is of a segment that a memfd with this name can hold.
    Memfd = 20,
    /// Sender: a file that the process needs.
    File = 21,
    /// Sender: the list of files is complete; the receiver compares them.
    Check = 22,
    /// Receiver: a file that is missing or differs.
    FileProblem = 23,
    /// Receiver: all files are compared.
    Checked = 24,
}

/// A decoded header, whose lengths are within their limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Kind of the frame.
    pub kind: FrameKind,
    /// Whether the data is zstd-compressed.
    pub compressed: bool,
    /// Length of the metadata, bytes.
    pub meta_len: usize,
    /// Length of the data, bytes.
    pub data_len: usize,
    /// Number of the frame in its direction, from 0.
    pub seq: u64,
    checksum: u64,
}

/// Bytes that are not a valid frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first four bytes are not [`MAGIC`].
    #[error("not a Pageferry frame (it begins with {0:02x?})")]
    Magic([u8; 4]),
    /// Unknown kind.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// Unknown flag or reserved bit.
    #[error("unknown flags {flags:#04x} or reserved bits {reserved:#06x}")]
    Flags {
        /// Flags.
        flags: u8,
        /// Reserved field.
        reserved: u16,
    },
    /// A length exceeds its limit.
    #[error("a {kind:?} frame may not have {meta} bytes of metadata and {data} of data")]
    Length {
        /// Kind of the frame.
        kind: FrameKind,
        /// Announced length of the metadata, bytes.
        meta: u32,
        /// Announced length of the data, bytes.
        data: u32,
    },
    /// A frame was lost, repeated or reordered.
    #[error("frame number {got}, expected {expected}")]
    Sequence {
        /// Expected number.
        expected: u64,
        /// Actual number.
        got: u64,
    },
    /// The header or the metadata was corrupted.
    #[error("checksum mismatch in a {0:?} frame")]
    Checksum(FrameKind),
}

impl Header {
    /// Encodes the header of a frame with this metadata and `data_len` bytes of data.
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
        let checksum = digest_concat(&bytes[..24], meta);
        bytes[24..32].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Decodes a header, and checks what can be checked before the metadata is read.
    ///
    /// # Errors
    /// The first [`FrameError`] that applies.
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
        let (allowed, data_max) = match kind {
            FrameKind::Chunk => (FLAG_ZSTD, CHUNK_SIZE),
            _ => (0, 0),
        };
        if flags & !allowed != 0 || reserved != 0 {
            return Err(FrameError::Flags { flags, reserved });
        }
        let (meta, data) = (u32_at(8), u32_at(12));
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

    /// Verifies the checksum of the header and the metadata.
    ///
    /// # Errors
    /// [`FrameError::Checksum`].
    pub fn verify(&self, header: &[u8; HEADER_LEN], meta: &[u8]) -> Result<(), FrameError> {
        match digest_concat(&header[..24], meta) == self.checksum {
            true => Ok(()),
            false => Err(FrameError::Checksum(self.kind)),
        }
    }
}

fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("frames are far shorter than 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_these_bytes() {
        let header = Header::encode(FrameKind::Chunk, true, 0x0102, b"meta", 0x1000);
        assert_eq!(&header[..8], b"PFRY\x05\x01\x00\x00");
        assert_eq!(&header[8..24], b"\x04\0\0\0\0\x10\0\0\x02\x01\0\0\0\0\0\0");
        let decoded = Header::decode(&header, 0x0102).unwrap();
        assert_eq!((decoded.meta_len, decoded.data_len), (4, 0x1000));
        decoded.verify(&header, b"meta").unwrap();
    }

    #[test]
    fn every_flipped_bit_is_rejected() {
        let good = Header::encode(FrameKind::Chunk, false, 7, b"meta", 4096);
        for bit in 0..HEADER_LEN * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            let rejected = match Header::decode(&bad, 7) {
                Err(_) => true,
                Ok(header) => header.meta_len != 4 || header.verify(&bad, b"meta").is_err(),
            };
            assert!(rejected, "bit {bit}");
        }
    }

    #[test]
    fn lengths_are_limited() {
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
