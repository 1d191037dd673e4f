//! The typed messages and their encoding, by hand and bounded.

use super::frame::FrameKind;
use crate::ids::{Claim, ImageId, MemfdName, MigrationId, StateName, Token};
use crate::memory::addr::{BadRange, PAGE_SIZE, PageRange};
use crate::needed_files::{BUILD_ID_MAX, NeededFile};
use crate::{CHUNK_PAGES, CHUNK_SIZE};

/// Most entries one chunk may have.
pub const CHUNK_ENTRIES_MAX: usize = 4096;

/// Longest piece of a state image in a message, bytes.
pub const PIECE_MAX: usize = 1 << 15;

/// Longest string in a message, bytes.
pub const STRING_MAX: usize = 1024;

/// What kind of round begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RoundKind {
    /// The target runs while its memory is read.
    PreDump,
    /// The target is frozen while its memory is read: the images are the process.
    Final,
}

/// Why a receiver refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum RefuseCode {
    /// Another version, page size or an unknown feature.
    Unsupported = 1,
    /// The peer broke the protocol.
    Protocol = 2,
    /// The receiver cannot store what it was sent.
    Storage = 3,
    /// A limit of the receiver was reached.
    Limit = 4,
    /// The receiver takes nobody (more) now.
    Busy = 5,
    /// The process cannot be restored here.
    Restore = 6,
    /// The migration is somebody else's.
    Denied = 7,
    /// The sender was silent for too long. It may come again.
    Silent = 8,
}

/// What both ends count over a round and compare before it is acked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Images opened.
    pub images: u32,
    /// Pages whose content crossed the wire.
    pub data_pages: u64,
    /// Pages announced as all zero.
    pub zero_pages: u64,
    /// Pages announced as unchanged since the previous round (stored again or not).
    pub parent_pages: u64,
    /// [`crate::digest::RoundDigest`] over the round.
    pub digest: u64,
}

impl Totals {
    /// Counts the entries of one chunk.
    pub fn count(&mut self, entries: &[Entry]) {
        for entry in entries {
            *match entry.kind {
                EntryKind::Data => &mut self.data_pages,
                EntryKind::Zero => &mut self.zero_pages,
                EntryKind::Parent | EntryKind::Copy => &mut self.parent_pages,
            } += entry.range.pages();
        }
    }

    /// All pages announced.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.data_pages + self.zero_pages + self.parent_pages
    }
}

/// What an entry says of its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum EntryKind {
    /// Their contents are in the chunk.
    Data = 1,
    /// They are present and hold only zero bytes.
    Zero = 2,
    /// They are as in the previous round.
    Parent = 3,
    /// They are as in the previous round, and the receiver must store them again.
    Copy = 4,
}

/// One run of pages in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The pages.
    pub range: PageRange,
    /// What is said of them.
    pub kind: EntryKind,
}

/// The metadata of a chunk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chunk {
    /// Ascending, disjoint runs; at most [`CHUNK_ENTRIES_MAX`].
    pub entries: Vec<Entry>,
    /// [`crate::digest::digest`] of the uncompressed pages.
    pub digest: u64,
}

impl Chunk {
    /// Length of the uncompressed pages, bytes; at most [`CHUNK_SIZE`].
    #[must_use]
    pub fn raw_len(&self) -> usize {
        let data = self.entries.iter().filter(|e| e.kind == EntryKind::Data);
        usize::try_from(data.map(|e| e.range.bytes()).sum::<u64>())
            .expect("a chunk's pages are few")
    }
}

/// A message with its fields.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the fields are specified in the module's table"
)]
pub enum Message {
    /// See [`FrameKind::Hello`].
    Hello {
        version: u16,
        page_size: u32,
        features: u64,
        claim: Claim,
    },
    /// See [`FrameKind::Welcome`].
    Welcome {
        version: u16,
        features: u64,
        rounds: u32,
        directory: String,
    },
    /// See [`FrameKind::RoundBegin`].
    RoundBegin {
        round: u32,
        kind: RoundKind,
        uptime_us: u64,
    },
    /// See [`FrameKind::ImageOpen`].
    ImageOpen(ImageId),
    /// See [`FrameKind::Chunk`].
    Chunk(Chunk),
    /// See [`FrameKind::RoundEnd`].
    RoundEnd(Totals),
    /// See [`FrameKind::RoundAck`].
    RoundAck { round: u32, totals: Totals },
    /// See [`FrameKind::Finish`].
    Finish,
    /// See [`FrameKind::FinishAck`].
    FinishAck,
    /// See [`FrameKind::Working`].
    Working,
    /// See [`FrameKind::Refuse`].
    Refuse { code: RefuseCode, reason: String },
    /// See [`FrameKind::Abort`].
    Abort { reason: String },
    /// See [`FrameKind::State`].
    State {
        name: StateName,
        last: bool,
        piece: Vec<u8>,
    },
    /// See [`FrameKind::Restore`].
    Restore { options: u32 },
    /// See [`FrameKind::Restored`].
    Restored,
    /// See [`FrameKind::Commit`].
    Commit,
    /// See [`FrameKind::Running`].
    Running,
    /// See [`FrameKind::Resolve`].
    Resolve(Claim),
    /// See [`FrameKind::Outcome`].
    Outcome { running: bool },
    /// See [`FrameKind::Memfd`].
    Memfd(MemfdName),
    /// See [`FrameKind::File`].
    File(NeededFile),
    /// See [`FrameKind::Check`].
    Check,
    /// See [`FrameKind::Lacks`].
    Lacks { what: String },
    /// See [`FrameKind::Checked`].
    Checked,
}

/// Why metadata is not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// It ends too early.
    #[error("a {0:?} message is cut short")]
    Short(FrameKind),
    /// It goes on after its end.
    #[error("a {0:?} message has {1} bytes too many")]
    Long(FrameKind, usize),
    /// A number stands for nothing.
    #[error("{value} is no {what}")]
    Value {
        /// What the number should have been.
        what: &'static str,
        /// The number.
        value: u64,
    },
    /// A name that no state image has, or too long a piece of one.
    #[error("this is no piece of a state image")]
    State,
    /// A name that no memfd has.
    #[error("this is no name of a memfd")]
    Memfd,
    /// A string is too long or not UTF-8.
    #[error("a string is longer than {STRING_MAX} bytes or not UTF-8")]
    Text,
    /// An entry is not a page range.
    #[error(transparent)]
    Range(#[from] BadRange),
    /// Entries overlap or descend.
    #[error("entry {0} does not lie behind the one before it")]
    Order(PageRange),
    /// A chunk with too many entries or pages, or whose lengths disagree.
    #[error("a chunk of {entries} entries and {raw_len} bytes of pages is out of bounds")]
    Bounds {
        /// Announced entries.
        entries: usize,
        /// Announced or computed length of the pages, bytes.
        raw_len: u64,
    },
}

impl Message {
    /// The kind of frame that carries this message.
    #[must_use]
    pub fn kind(&self) -> FrameKind {
        match self {
            Self::Hello { .. } => FrameKind::Hello,
            Self::Welcome { .. } => FrameKind::Welcome,
            Self::RoundBegin { .. } => FrameKind::RoundBegin,
            Self::ImageOpen(_) => FrameKind::ImageOpen,
            Self::Chunk(_) => FrameKind::Chunk,
            Self::RoundEnd(_) => FrameKind::RoundEnd,
            Self::RoundAck { .. } => FrameKind::RoundAck,
            Self::Finish => FrameKind::Finish,
            Self::FinishAck => FrameKind::FinishAck,
            Self::Working => FrameKind::Working,
            Self::Refuse { .. } => FrameKind::Refuse,
            Self::Abort { .. } => FrameKind::Abort,
            Self::State { .. } => FrameKind::State,
            Self::Restore { .. } => FrameKind::Restore,
            Self::Restored => FrameKind::Restored,
            Self::Commit => FrameKind::Commit,
            Self::Running => FrameKind::Running,
            Self::Resolve(_) => FrameKind::Resolve,
            Self::Outcome { .. } => FrameKind::Outcome,
            Self::Memfd(_) => FrameKind::Memfd,
            Self::File(_) => FrameKind::File,
            Self::Check => FrameKind::Check,
            Self::Lacks { .. } => FrameKind::Lacks,
            Self::Checked => FrameKind::Checked,
        }
    }

    /// The metadata bytes.
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
                directory,
            } => {
                out.u16(*version)
                    .u64(*features)
                    .u32(*rounds)
                    .text(directory);
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
                out.u32(u32::try_from(chunk.raw_len()).expect("a chunk's pages are few"))
                    .u32(u32::try_from(chunk.entries.len()).expect("entries are bounded"))
                    .u64(chunk.digest);
                for entry in &chunk.entries {
                    let pages = u32::try_from(entry.range.pages()).expect("runs are cut at u32");
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
                out.u32(u32::try_from(piece.len()).expect("pieces are cut at PIECE_MAX"));
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
                out.u8(u8::try_from(build_id.len()).expect("build ids are bounded"));
                out.0.extend_from_slice(build_id);
            }
            Self::Lacks { what } => {
                out.text(what);
            }
            Self::Outcome { running } => {
                out.u8(u8::from(*running));
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

    /// Parses the metadata of a frame of `kind`.
    ///
    /// # Errors
    /// [`MessageError`], whichever applies first.
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
                        ImageId::Process(pid.ok_or_else(|| bad("process id", id))?)
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
                    5 => RefuseCode::Busy,
                    6 => RefuseCode::Restore,
                    7 => RefuseCode::Denied,
                    8 => RefuseCode::Silent,
                    other => return Err(bad("refusal", u64::from(other))),
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
            FrameKind::Lacks => Self::Lacks {
                what: input.text()?,
            },
            FrameKind::Checked => Self::Checked,
            FrameKind::Memfd => {
                Self::Memfd(MemfdName::new(&input.text()?).ok_or(MessageError::Memfd)?)
            }
            FrameKind::Outcome => Self::Outcome {
                running: input.flag()?,
            },
        };
        match input.rest.len() {
            0 => Ok(message),
            more => Err(MessageError::Long(kind, more)),
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

    /// A reason or a name for people: cut, at a character, where it would be too long to send.
    fn text(&mut self, text: &str) -> &mut Self {
        let mut len = text.len().min(STRING_MAX);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        self.u16(u16::try_from(len).expect("strings are cut at STRING_MAX"));
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
            .ok_or(MessageError::Short(self.kind))?;
        self.rest = rest;
        Ok(*head)
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
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(MessageError::Short(self.kind))?;
        self.rest = rest;
        Ok(head.to_vec())
    }

    fn text(&mut self) -> Result<String, MessageError> {
        let len = usize::from(self.u16()?);
        if len > STRING_MAX {
            return Err(MessageError::Text);
        }
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(MessageError::Short(self.kind))?;
        self.rest = rest;
        String::from_utf8(head.to_vec()).map_err(|_| MessageError::Text)
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
        let (piece, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(MessageError::Short(self.kind))?;
        self.rest = rest;
        Ok(piece.to_vec())
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
                    // No chunk has more data than this.
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
            (any::<(u16, u64, u32)>(), ".{0,40}").prop_map(
                |((version, features, rounds), directory)| Message::Welcome {
                    version,
                    features,
                    rounds,
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
                .prop_filter_map("a name of state", |(name, last, piece)| {
                    let name = StateName::new(&name)?;
                    Some(Message::State { name, last, piece })
                }),
            any::<u32>().prop_map(|options| Message::Restore { options }),
            Just(Message::Restored),
            Just(Message::Commit),
            Just(Message::Running),
            arb_claim().prop_map(Message::Resolve),
            any::<bool>().prop_map(|running| Message::Outcome { running }),
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
            ".{0,40}".prop_map(|what| Message::Lacks { what }),
            Just(Message::Checked),
            "[^\0]{0,40}".prop_map(|name| Message::Memfd(MemfdName::new(&name).unwrap())),
        ]
    }

    proptest! {
        #[test]
        fn messages_survive_the_wire(message in arb_message()) {
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
        fn foreign_bytes_do_no_harm(kind in 0..FrameKind::ALL.len(), meta in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Message::decode(FrameKind::ALL[kind], &meta);
        }
    }

    #[test]
    fn a_chunk_golden() {
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
    fn a_chunk_that_lies_is_refused() {
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
        for lie in [
            chunk(0, &[]),
            chunk(8192, &[entry(0x1000, 1, 1)]),
            chunk(4096, &[entry(0x1001, 1, 1)]),
            chunk(0, &[entry(0x1000, 0, 3)]),
            chunk(0, &[entry(0x1000, 1, 5)]),
            chunk(0, &[entry(0x2000, 1, 3), entry(0x2000, 1, 3)]),
            chunk(1025 * 4096, &[entry(0x1000, 1025, 1)]),
        ] {
            assert!(lie.is_err(), "{lie:?}");
        }
    }

    #[test]
    fn long_reasons_are_cut_at_a_character() {
        let reason = "é".repeat(STRING_MAX);
        let meta = Message::Abort { reason }.encode();
        let Ok(Message::Abort { reason }) = Message::decode(FrameKind::Abort, &meta) else {
            panic!("not an abort");
        };
        assert_eq!(reason.len(), STRING_MAX);
    }
}
