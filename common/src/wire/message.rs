//! The messages as types.

use super::frame::FrameKind;
use crate::ids::{Claim, ImageId, MemfdName, ReceiverId, StateName};
use crate::memory::addr::PageRange;
use crate::needed_files::NeededFile;

/// Kind of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RoundKind {
    /// The target runs while its memory is read.
    PreDump,
    /// The target is frozen while its memory is read: the images are consistent.
    Final,
}

/// Reason of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum RefuseCode {
    /// Unsupported version, page size or feature.
    Unsupported = 1,
    /// The peer broke the protocol.
    Protocol = 2,
    /// The receiver cannot store what it received.
    Storage = 3,
    /// A limit of the receiver was reached.
    Limit = 4,
    // 5 is reserved: it meant that the receiver was busy.
    /// The process cannot be restored here.
    Restore = 6,
    /// The migration belongs to another sender.
    Denied = 7,
    /// The sender was silent for too long. It may reconnect.
    Silent = 8,
    /// The receiver does not have the migration that it was asked about.
    Unknown = 9,
}

/// Totals of a round, which both ends count and compare before it is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Number of images opened.
    pub images: u32,
    /// Number of pages whose contents were sent.
    pub data_pages: u64,
    /// Number of pages announced as zero.
    pub zero_pages: u64,
    /// Number of pages announced as unchanged since the previous round, stored again or not.
    pub parent_pages: u64,
    /// [`crate::digest::RoundDigest`] of the round.
    pub digest: u64,
}

impl Totals {
    /// Adds the entries of a chunk.
    pub fn count(&mut self, entries: &[Entry]) {
        for entry in entries {
            *match entry.kind {
                EntryKind::Data => &mut self.data_pages,
                EntryKind::Zero => &mut self.zero_pages,
                EntryKind::Parent | EntryKind::Copy => &mut self.parent_pages,
            } += entry.range.pages();
        }
    }

    /// Returns the number of all pages announced.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.data_pages + self.zero_pages + self.parent_pages
    }
}

/// Kind of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum EntryKind {
    /// The contents of the pages are in the chunk.
    Data = 1,
    /// The pages are present and all zero.
    Zero = 2,
    /// The pages are unchanged since the previous round.
    Parent = 3,
    /// The pages are unchanged since the previous round, and the receiver must store them again.
    Copy = 4,
}

/// A range of pages of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The pages.
    pub range: PageRange,
    /// Their kind.
    pub kind: EntryKind,
}

/// Metadata of a chunk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chunk {
    /// Ascending, disjoint ranges; at most [`super::CHUNK_ENTRIES_MAX`].
    pub entries: Vec<Entry>,
    /// [`crate::digest::digest`] of the uncompressed pages.
    pub digest: u64,
}

impl Chunk {
    /// Returns the length of the uncompressed pages, bytes; at most [`crate::CHUNK_SIZE`].
    #[must_use]
    pub fn raw_len(&self) -> usize {
        let data = self.entries.iter().filter(|e| e.kind == EntryKind::Data);
        usize::try_from(data.map(|e| e.range.bytes()).sum::<u64>()).expect("a chunk has few pages")
    }
}

/// A message and its fields.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the table of messages in the specification describes the fields"
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
        receiver: ReceiverId,
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
    Outcome { running: bool, receiver: ReceiverId },
    /// See [`FrameKind::Memfd`].
    Memfd(MemfdName),
    /// See [`FrameKind::File`].
    File(NeededFile),
    /// See [`FrameKind::Check`].
    Check,
    /// See [`FrameKind::FileProblem`].
    FileProblem { problem: String },
    /// See [`FrameKind::Checked`].
    Checked,
}

impl Message {
    /// Returns the kind of the frame that carries this message.
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
            Self::FileProblem { .. } => FrameKind::FileProblem,
            Self::Checked => FrameKind::Checked,
        }
    }
}
