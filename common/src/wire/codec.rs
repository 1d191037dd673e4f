//! Encoding and decoding of the metadata of messages, by hand and bounded.

use super::frame::FrameKind;
use super::limits::{CHUNK_ENTRIES_MAX, PIECE_MAX, STRING_MAX};
use super::message::{Chunk, Entry, EntryKind, Message, RefuseCode, RoundKind, Totals};
use crate::ids::{Claim, ImageId, MemfdName, MigrationId, ReceiverId, StateName, Token};
use crate::memory::addr::{BadRange, PAGE_SIZE, PageRange};
use crate::needed_files::{BUILD_ID_MAX, NeededFile};
use crate::{CHUNK_PAGES, CHUNK_SIZE};

/// Metadata that is not a valid message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// It ends too early.
    #[error("a {0:?} message is truncated")]
    Truncated(FrameKind),
    /// Bytes follow its end.
    #[error("a {0:?} message has {1} trailing bytes")]
    Surplus(FrameKind, usize),
    /// A number is not in its range.
    #[error("invalid {what}: {value}")]
    Value {
        /// Name of the number.
        what: &'static str,
        /// The number.
        value: u64,
    },
    /// The name of a state image is invalid, or the piece is too long.
    #[error("invalid piece of a state image")]
    State,
    /// The name of a memfd is invalid.
    #[error("invalid name of a memfd")]
    Memfd,
    /// A string is too long or not UTF-8.
    #[error("a string is longer than {STRING_MAX} bytes or not UTF-8")]
    Text,
    /// An entry is not a page range.
    #[error(transparent)]
    Range(#[from] BadRange),
    /// Entries overlap or descend.
    #[error("entry {0} overlaps or precedes the one before it")]
    Order(PageRange),
    /// A chunk has too many entries or pages, or its lengths disagree.
    #[error("a chunk of {entries} entries and {raw_len} bytes of pages is out of bounds")]
    Bounds {
        /// Announced number of entries.
        entries: usize,
        /// Announced or computed length of the pages, bytes.
        raw_len: u64,
    },
}

impl Message {
    /// Encodes the metadata of the frame that carries this message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Encoder(Vec::with_capacity(64));
        match self {
            Self::Hello {
                version,
                page_size,
                features,
                claim,
            } => {
                out.u16(*version).u32(*page_size).u64(*features);
                out.claim(claim);
            }
            Self::Welcome {
                version,
                features,
                rounds,
                receiver,
                directory,
            } => {
                out.u16(*version).u64(*features).u32(*rounds);
                out.0.extend_from_slice(&receiver.0);
                out.text(directory);
            }
            Self::RoundBegin {
                round,
                kind,
                uptime_us,
            } => {
                let kind = match kind {
                    RoundKind::PreDump => 1,
                    RoundKind::Final => 2,
                };
                out.u32(*round).u8(kind).u64(*uptime_us);
            }
            Self::ImageOpen(ImageId::Process(pid)) => {
                out.u8(1).u64(u64::from(*pid));
            }
            Self::ImageOpen(ImageId::Shmem(id)) => {
                out.u8(2).u64(*id);
            }
            Self::Chunk(chunk) => {
                out.u32(u32::try_from(chunk.raw_len()).expect("a chunk has few pages"))
                    .u32(u32::try_from(chunk.entries.len()).expect("a chunk has few entries"))
                    .u64(chunk.digest);
                for entry in &chunk.entries {
                    let pages =
                        u32::try_from(entry.range.pages()).expect("ranges are split at u32");
                    out.u64(entry.range.start())
                        .u32(pages)
                        .u32(entry.kind as u32);
                }
            }
            Self::RoundEnd(totals) => {
                out.totals(totals);
            }
            Self::RoundAck { round, totals } => {
                out.u32(*round).totals(totals);
            }
            Self::Finish
            | Self::FinishAck
            | Self::Working
            | Self::Restored
            | Self::Check
            | Self::Checked
            | Self::Commit
            | Self::Running => {}
            Self::State { name, last, piece } => {
                out.u8(u8::from(*last)).text(name.as_str());
                out.u32(u32::try_from(piece.len()).expect("pieces are split at PIECE_MAX"));
                out.0.extend_from_slice(piece);
            }
            Self::Restore { options } => {
                out.u32(*options);
            }
            Self::Resolve(claim) => out.claim(claim),
            Self::Memfd(name) => {
                out.text(name.as_str());
            }
            Self::File(NeededFile {
                path,
                size,
                build_id,
            }) => {
                out.u64(*size).text(path);
                out.u8(u8::try_from(build_id.len())
                    .expect("a build id has at most BUILD_ID_MAX bytes"));
                out.0.extend_from_slice(build_id);
            }
            Self::FileProblem { problem } => {
                out.text(problem);
            }
            Self::Outcome { running, receiver } => {
                out.u8(u8::from(*running));
                out.0.extend_from_slice(&receiver.0);
            }
            Self::Refuse { code, reason } => {
                out.u16(*code as u16).text(reason);
            }
            Self::Abort { reason } => {
                out.text(reason);
            }
        }
        out.0
    }

    /// Decodes the metadata of a frame of this kind.
    ///
    /// # Errors
    /// The first [`MessageError`] that applies.
    pub fn decode(kind: FrameKind, meta: &[u8]) -> Result<Self, MessageError> {
        let mut input = Decoder { kind, rest: meta };
        let message = match kind {
            FrameKind::Hello => Self::Hello {
                version: input.u16()?,
                page_size: input.u32()?,
                features: input.u64()?,
                claim: input.claim()?,
            },
            FrameKind::Welcome => Self::Welcome {
                version: input.u16()?,
                features: input.u64()?,
                rounds: input.u32()?,
                receiver: ReceiverId(input.array()?),
                directory: input.text()?,
            },
            FrameKind::RoundBegin => Self::RoundBegin {
                round: input.u32()?,
                kind: match input.u8()? {
                    1 => RoundKind::PreDump,
                    2 => RoundKind::Final,
                    other => return Err(bad("round kind", u64::from(other))),
                },
                uptime_us: input.u64()?,
            },
            FrameKind::ImageOpen => {
                let (kind, id) = (input.u8()?, input.u64()?);
                Self::ImageOpen(match kind {
                    1 => {
                        let pid = u32::try_from(id).ok().filter(|&p| p != 0 && p >> 31 == 0);
                        ImageId::Process(pid.ok_or_else(|| bad("PID", id))?)
                    }
                    2 => ImageId::Shmem(id),
                    other => return Err(bad("image kind", u64::from(other))),
                })
            }
            FrameKind::Chunk => Self::Chunk(input.chunk()?),
            FrameKind::RoundEnd => Self::RoundEnd(input.totals()?),
            FrameKind::RoundAck => Self::RoundAck {
                round: input.u32()?,
                totals: input.totals()?,
            },
            FrameKind::Finish => Self::Finish,
            FrameKind::FinishAck => Self::FinishAck,
            FrameKind::Working => Self::Working,
            FrameKind::Refuse => Self::Refuse {
                code: match input.u16()? {
                    1 => RefuseCode::Unsupported,
                    2 => RefuseCode::Protocol,
                    3 => RefuseCode::Storage,
                    4 => RefuseCode::Limit,
                    6 => RefuseCode::Restore,
                    7 => RefuseCode::Denied,
                    8 => RefuseCode::Silent,
                    9 => RefuseCode::Unknown,
                    other => return Err(bad("refusal code", u64::from(other))),
                },
                reason: input.text()?,
            },
            FrameKind::Abort => Self::Abort {
                reason: input.text()?,
            },
            FrameKind::State => Self::State {
                last: input.flag()?,
                name: StateName::new(&input.text()?).ok_or(MessageError::State)?,
                piece: input.piece()?,
            },
            FrameKind::Restore => Self::Restore {
                options: input.u32()?,
            },
            FrameKind::Restored => Self::Restored,
            FrameKind::Commit => Self::Commit,
            FrameKind::Running => Self::Running,
            FrameKind::Resolve => Self::Resolve(input.claim()?),
            FrameKind::File => Self::File(NeededFile {
                size: input.u64()?,
                path: input.text()?,
                build_id: input.build_id()?,
            }),
            FrameKind::Check => Self::Check,
            FrameKind::FileProblem => Self::FileProblem {
                problem: input.text()?,
            },
            FrameKind::Checked => Self::Checked,
            FrameKind::Memfd => {
                Self::Memfd(MemfdName::new(&input.text()?).ok_or(MessageError::Memfd)?)
            }
            FrameKind::Outcome => Self::Outcome {
                running: input.flag()?,
                receiver: ReceiverId(input.array()?),
            },
        };
        match input.rest.len() {
            0 => Ok(message),
            more => Err(MessageError::Surplus(kind, more)),
        }
    }
}

fn bad(what: &'static str, value: u64) -> MessageError {
    MessageError::Value { what, value }
}

struct Encoder(Vec<u8>);

impl Encoder {
    fn claim(&mut self, claim: &Claim) {
        self.0.extend_from_slice(&claim.id.0);
        self.u32(claim.root_pid);
        self.0.extend_from_slice(&claim.token.0);
    }

    fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends a string, truncated at a character boundary if it is too long.
    fn text(&mut self, text: &str) -> &mut Self {
        let mut len = text.len().min(STRING_MAX);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        self.u16(u16::try_from(len).expect("strings are truncated at STRING_MAX"));
        self.0.extend_from_slice(&text.as_bytes()[..len]);
        self
    }

    fn totals(&mut self, t: &Totals) -> &mut Self {
        self.u32(t.images)
            .u64(t.data_pages)
            .u64(t.zero_pages)
            .u64(t.parent_pages)
            .u64(t.digest)
    }
}

struct Decoder<'a> {
    kind: FrameKind,
    rest: &'a [u8],
}

impl Decoder<'_> {
    fn claim(&mut self) -> Result<Claim, MessageError> {
        Ok(Claim {
            id: MigrationId(self.array()?),
            root_pid: self.u32()?,
            token: Token(self.array()?),
        })
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let (head, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(MessageError::Truncated(self.kind))?;
        self.rest = rest;
        Ok(*head)
    }

    fn bytes(&mut self, len: usize) -> Result<&'_ [u8], MessageError> {
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(MessageError::Truncated(self.kind))?;
        self.rest = rest;
        Ok(head)
    }

    fn u8(&mut self) -> Result<u8, MessageError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn u16(&mut self) -> Result<u16, MessageError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn build_id(&mut self) -> Result<Vec<u8>, MessageError> {
        let len = usize::from(self.u8()?);
        if len > BUILD_ID_MAX {
            return Err(bad("length of a build id", len as u64));
        }
        Ok(self.bytes(len)?.to_vec())
    }

    fn text(&mut self) -> Result<String, MessageError> {
        let len = usize::from(self.u16()?);
        if len > STRING_MAX {
            return Err(MessageError::Text);
        }
        let text = str::from_utf8(self.bytes(len)?).map_err(|_| MessageError::Text)?;
        Ok(text.to_owned())
    }

    fn flag(&mut self) -> Result<bool, MessageError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(bad("flag", u64::from(other))),
        }
    }

    fn piece(&mut self) -> Result<Vec<u8>, MessageError> {
        let len = self.u32()? as usize;
        if len > PIECE_MAX {
            return Err(MessageError::State);
        }
        Ok(self.bytes(len)?.to_vec())
    }

    fn totals(&mut self) -> Result<Totals, MessageError> {
        Ok(Totals {
            images: self.u32()?,
            data_pages: self.u64()?,
            zero_pages: self.u64()?,
            parent_pages: self.u64()?,
            digest: self.u64()?,
        })
    }

    fn chunk(&mut self) -> Result<Chunk, MessageError> {
        let raw_len = u64::from(self.u32()?);
        let count = self.u32()? as usize;
        let digest = self.u64()?;
        let bounds = MessageError::Bounds {
            entries: count,
            raw_len,
        };
        if count == 0 || count > CHUNK_ENTRIES_MAX || raw_len > CHUNK_SIZE as u64 {
            return Err(bounds);
        }
        let mut entries: Vec<Entry> = Vec::with_capacity(count);
        let mut data_pages = 0;
        for _ in 0..count {
            let (start, pages, kind) = (self.u64()?, self.u32()?, self.u32()?);
            let range = PageRange::new(start, u64::from(pages))?;
            let kind = match kind {
                1 => EntryKind::Data,
                2 => EntryKind::Zero,
                3 => EntryKind::Parent,
                4 => EntryKind::Copy,
                other => return Err(bad("entry kind", u64::from(other))),
            };
            if entries.last().is_some_and(|e| e.range.end() > start) {
                return Err(MessageError::Order(range));
            }
            if kind == EntryKind::Data {
                data_pages += range.pages();
            }
            entries.push(Entry { range, kind });
        }
        if data_pages > CHUNK_PAGES as u64 || data_pages * PAGE_SIZE != raw_len {
            return Err(bounds);
        }
        Ok(Chunk { entries, digest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn arb_totals() -> impl Strategy<Value = Totals> {
        any::<(u32, u64, u64, u64, u64)>().prop_map(|(images, a, b, c, digest)| Totals {
            images,
            data_pages: a,
            zero_pages: b,
            parent_pages: c,
            digest,
        })
    }

    fn arb_chunk() -> impl Strategy<Value = Chunk> {
        let entry = (0u64..5, 1u64..20, 1u32..=4);
        (prop::collection::vec(entry, 1..50), any::<u64>()).prop_map(|(raw, digest)| {
            let mut at = 0x1000;
            let mut room = CHUNK_PAGES as u64;
            let mut entries = Vec::new();
            for (gap, pages, kind) in raw {
                let kind = [
                    EntryKind::Data,
                    EntryKind::Zero,
                    EntryKind::Parent,
                    EntryKind::Copy,
                ][kind as usize - 1];
                let mut range = PageRange::new(at + gap * PAGE_SIZE, pages).unwrap();
                if kind == EntryKind::Data {
                    let (Some(fits), _) = range.split_at(room) else {
                        continue;
                    };
                    range = fits;
                    room -= range.pages();
                }
                at = range.end();
                entries.push(Entry { range, kind });
            }
            Chunk { entries, digest }
        })
    }

    fn arb_claim() -> impl Strategy<Value = Claim> {
        any::<([u8; 16], u32, [u8; 32])>().prop_map(|(id, root_pid, token)| Claim {
            id: MigrationId(id),
            root_pid,
            token: Token(token),
        })
    }

    fn arb_message() -> impl Strategy<Value = Message> {
        prop_oneof![
            (any::<(u16, u32, u64)>(), arb_claim()).prop_map(
                |((version, page_size, features), claim)| Message::Hello {
                    version,
                    page_size,
                    features,
                    claim
                }
            ),
            (any::<(u16, u64, u32, [u8; 16])>(), ".{0,40}").prop_map(
                |((version, features, rounds, receiver), directory)| Message::Welcome {
                    version,
                    features,
                    rounds,
                    receiver: ReceiverId(receiver),
                    directory,
                }
            ),
            (any::<u32>(), any::<bool>(), any::<u64>()).prop_map(|(round, last, uptime_us)| {
                Message::RoundBegin {
                    round,
                    kind: if last {
                        RoundKind::Final
                    } else {
                        RoundKind::PreDump
                    },
                    uptime_us,
                }
            }),
            (1u32..1 << 31).prop_map(|pid| Message::ImageOpen(ImageId::Process(pid))),
            any::<u64>().prop_map(|id| Message::ImageOpen(ImageId::Shmem(id))),
            arb_chunk().prop_map(Message::Chunk),
            arb_totals().prop_map(Message::RoundEnd),
            (any::<u32>(), arb_totals())
                .prop_map(|(round, totals)| Message::RoundAck { round, totals }),
            Just(Message::Finish),
            Just(Message::FinishAck),
            Just(Message::Working),
            ".{0,40}".prop_map(|reason| Message::Refuse {
                code: RefuseCode::Limit,
                reason
            }),
            ".{0,40}".prop_map(|reason| Message::Abort { reason }),
            (
                "[a-z][a-z0-9-]{0,30}\\.img",
                any::<bool>(),
                prop::collection::vec(any::<u8>(), 0..99)
            )
                .prop_filter_map("the name of a state image", |(name, last, piece)| {
                    let name = StateName::new(&name)?;
                    Some(Message::State { name, last, piece })
                }),
            any::<u32>().prop_map(|options| Message::Restore { options }),
            Just(Message::Restored),
            Just(Message::Commit),
            Just(Message::Running),
            arb_claim().prop_map(Message::Resolve),
            any::<(bool, [u8; 16])>().prop_map(|(running, receiver)| Message::Outcome {
                running,
                receiver: ReceiverId(receiver),
            }),
            (
                ".{0,40}",
                any::<u64>(),
                prop::collection::vec(any::<u8>(), 0..=BUILD_ID_MAX)
            )
                .prop_map(|(path, size, build_id)| Message::File(NeededFile {
                    path,
                    size,
                    build_id,
                })),
            Just(Message::Check),
            ".{0,40}".prop_map(|problem| Message::FileProblem { problem }),
            Just(Message::Checked),
            "[^\0]{0,40}".prop_map(|name| Message::Memfd(MemfdName::new(&name).unwrap())),
        ]
    }

    proptest! {
        #[test]
        fn messages_round_trip(message in arb_message()) {
            let meta = message.encode();
            prop_assert_eq!(Message::decode(message.kind(), &meta), Ok(message.clone()));
            for cut in 0..meta.len() {
                prop_assert!(Message::decode(message.kind(), &meta[..cut]).is_err());
            }
            let mut long = meta;
            long.push(0);
            prop_assert!(Message::decode(message.kind(), &long).is_err());
        }

        #[test]
        fn any_metadata_is_decoded_or_rejected(
            kind in 0..FrameKind::ALL.len(), meta in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = Message::decode(FrameKind::ALL[kind], &meta);
        }
    }

    #[test]
    fn a_chunk_has_these_bytes() {
        let chunk = Message::Chunk(Chunk {
            entries: vec![Entry {
                range: PageRange::new(0x7000, 2).unwrap(),
                kind: EntryKind::Data,
            }],
            digest: 0x1122,
        });
        let expected = [
            &[0, 0x20, 0, 0, 1, 0, 0, 0, 0x22, 0x11, 0, 0, 0, 0, 0, 0][..],
            &[0, 0x70, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0],
        ]
        .concat();
        assert_eq!(chunk.encode(), expected);
    }

    #[test]
    fn an_inconsistent_chunk_is_rejected() {
        let entry = |start: u64, pages: u32, kind: u32| {
            [
                &start.to_le_bytes()[..],
                &pages.to_le_bytes(),
                &kind.to_le_bytes(),
            ]
            .concat()
        };
        let chunk = |raw_len: u32, entries: &[Vec<u8>]| {
            let head = [
                &raw_len.to_le_bytes()[..],
                &u32::try_from(entries.len()).unwrap().to_le_bytes(),
                &[0; 8],
            ]
            .concat();
            Message::decode(FrameKind::Chunk, &[head, entries.concat()].concat())
        };
        assert!(chunk(4096, &[entry(0x1000, 1, 1)]).is_ok());
        for inconsistent in [
            chunk(0, &[]),
            chunk(8192, &[entry(0x1000, 1, 1)]),
            chunk(4096, &[entry(0x1001, 1, 1)]),
            chunk(0, &[entry(0x1000, 0, 3)]),
            chunk(0, &[entry(0x1000, 1, 5)]),
            chunk(0, &[entry(0x2000, 1, 3), entry(0x2000, 1, 3)]),
            chunk(1025 * 4096, &[entry(0x1000, 1025, 1)]),
        ] {
            assert!(inconsistent.is_err(), "{inconsistent:?}");
        }
    }

    #[test]
    fn a_reserved_refusal_code_is_rejected() {
        let meta = [5, 0, 0, 0];
        let refused = Message::decode(FrameKind::Refuse, &meta);
        assert!(matches!(refused, Err(MessageError::Value { value: 5, .. })));
    }

    #[test]
    fn long_strings_are_truncated_at_a_character() {
        let reason = "é".repeat(STRING_MAX);
        let meta = Message::Abort { reason }.encode();
        let Ok(Message::Abort { reason }) = Message::decode(FrameKind::Abort, &meta) else {
            panic!("not an abort");
        };
        assert_eq!(reason.len(), STRING_MAX);
    }
}
