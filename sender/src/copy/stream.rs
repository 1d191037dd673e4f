//! From runs of pages to chunks: batches what must be read for one chunk, reads it, and only
//! then says what it is.

use crate::baseline::ContentHashes;
use crate::copy::source::PageSource;
use crate::dirty::Run;
use crate::sink::{PageSink, SinkError};
use bytes::Bytes;
use pageferry_common::wire::{Entry, EntryKind};
use pageferry_common::{BufferPool, CHUNK_PAGES, PAGE_SIZE, PageRange, PageSet};
use std::io;
use std::time::{Duration, Instant};

/// Pieces (to read, or kept) in one chunk. What is read may come apart into as many entries as it
/// has pages, so this and a chunk's pages stay together below a chunk's most entries.
const PIECES_MAX: usize = 2048;

/// Most pages in one entry: the wire has 32 bits for them.
const ENTRY_PAGES_MAX: u64 = 1 << 31;

static ZERO_PAGE: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// Why an image ends early.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The receiving side.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The process or segment is gone, or forbidden.
    #[error("cannot read memory")]
    Source(#[source] io::Error),
}

/// Sends one image of a round.
pub struct ImageStream<'a> {
    sink: &'a mut dyn PageSink,
    pool: &'a BufferPool,
    /// What the receiver holds from the previous round.
    parent: &'a PageSet,
    hashes: &'a mut ContentHashes,
    /// Changed since then, as far as nothing will tell again.
    changed: &'a mut PageSet,
    /// That a page was written is told once: what does not get as far as being compared is changed, too.
    told_once: bool,
    /// How to say "unchanged" of what is batched now; `None` if it is to be sent all the same.
    kept_kind: Option<EntryKind>,
    /// To be read: ascending, together at most a chunk's pages.
    wanted: Vec<PageRange>,
    wanted_pages: u64,
    /// Not to be read: in-parent entries that lie between.
    kept: Vec<Entry>,
    arrived: Vec<PageRange>,
    announced: PageSet,
    scanned_pages: u64,
    changed_pages: u64,
    compared_pages: u64,
    compare_time: Duration,
}

/// What became of an image.
#[derive(Debug)]
pub struct Sent {
    /// What the receiver will hold of it once the round is acked.
    pub announced: PageSet,
    /// Populated pages looked at.
    pub scanned_pages: u64,
    /// Pages that the receiver did not have so.
    pub changed_pages: u64,
    /// Pages that were read only to see whether they changed.
    pub compared_pages: u64,
    /// Time spent reading and comparing pages only to see whether they changed: a frozen round will
    /// spend it again, however little has.
    pub compare_time: Duration,
}

impl<'a> ImageStream<'a> {
    /// The image must have been opened in `sink`. Pages that change are added to `changed`, however it ends; and
    /// with `told_once`, those that are said to be written.
    pub fn new(
        sink: &'a mut dyn PageSink,
        pool: &'a BufferPool,
        parent: &'a PageSet,
        hashes: &'a mut ContentHashes,
        changed: &'a mut PageSet,
        told_once: bool,
    ) -> Self {
        Self {
            sink,
            pool,
            parent,
            hashes,
            changed,
            told_once,
            kept_kind: Some(EntryKind::Parent),
            wanted: Vec::with_capacity(PIECES_MAX),
            wanted_pages: 0,
            kept: Vec::with_capacity(PIECES_MAX),
            arrived: Vec::with_capacity(CHUNK_PAGES),
            announced: PageSet::new(),
            scanned_pages: 0,
            changed_pages: 0,
            compared_pages: 0,
            compare_time: Duration::ZERO,
        }
    }

    /// Adds a run of populated pages, behind all before it. Pages that were not written and that
    /// the receiver has are kept (as `kept_kind`, if there is such a kind); the others are read.
    ///
    /// # Errors
    /// [`StreamError`].
    pub fn run(
        &mut self,
        source: &mut dyn PageSource,
        run: Run,
        kept_kind: Option<EntryKind>,
    ) -> Result<(), StreamError> {
        self.scanned_pages += run.range.pages();
        if self.kept_kind != kept_kind {
            self.flush(source)?;
            self.kept_kind = kept_kind;
        }
        let Some(kept_kind) = kept_kind.filter(|_| !run.written) else {
            return self.want(source, run.range);
        };
        let parent = self.parent;
        let mut result = Ok(());
        parent.split(run.range, |range, known| {
            if result.is_ok() {
                result = match known {
                    true => self.keep(source, range, kept_kind),
                    false => self.want(source, range),
                };
            }
        });
        result
    }

    fn keep(
        &mut self,
        source: &mut dyn PageSource,
        range: PageRange,
        kind: EntryKind,
    ) -> Result<(), StreamError> {
        let mut rest = Some(range);
        while let Some(range) = rest {
            let (range, later) = range.split_at(ENTRY_PAGES_MAX);
            self.make_room(source)?;
            let range = range.expect("a range is not empty");
            self.kept.push(Entry { range, kind });
            rest = later;
        }
        Ok(())
    }

    fn want(&mut self, source: &mut dyn PageSource, range: PageRange) -> Result<(), StreamError> {
        if self.told_once {
            self.changed.insert(range);
        }
        let mut rest = Some(range);
        while let Some(range) = rest {
            self.make_room(source)?;
            let (now, later) = range.split_at(CHUNK_PAGES as u64 - self.wanted_pages);
            let now = now.expect("make_room leaves room");
            self.wanted_pages += now.pages();
            self.wanted.push(now);
            rest = later;
        }
        Ok(())
    }

    fn make_room(&mut self, source: &mut dyn PageSource) -> Result<(), StreamError> {
        let full = self.wanted_pages == CHUNK_PAGES as u64
            || self.wanted.len() + self.kept.len() == PIECES_MAX;
        if full { self.flush(source) } else { Ok(()) }
    }

    /// Reads what is wanted and puts one chunk.
    fn flush(&mut self, source: &mut dyn PageSource) -> Result<(), StreamError> {
        if self.wanted.is_empty() && self.kept.is_empty() {
            return Ok(());
        }
        let mut entries = std::mem::replace(&mut self.kept, Vec::with_capacity(PIECES_MAX));
        let pages = match self.wanted.is_empty() {
            true => Bytes::new(),
            false => self.read_wanted(source, &mut entries)?,
        };
        if entries.is_empty() {
            return Ok(());
        }
        entries.sort_unstable_by_key(|entry| entry.range.start());
        self.announced
            .extend(entries.iter().map(|entry| entry.range));
        let changed = |entry: &&Entry| matches!(entry.kind, EntryKind::Data | EntryKind::Zero);
        for entry in entries.iter().filter(changed) {
            self.changed_pages += entry.range.pages();
            self.changed.insert(entry.range);
        }
        self.sink.put(entries, pages)?;
        Ok(())
    }

    /// Reads what is wanted, adds what it is to `entries`, and returns the pages that have data.
    fn read_wanted(
        &mut self,
        source: &mut dyn PageSource,
        entries: &mut Vec<Entry>,
    ) -> Result<Bytes, StreamError> {
        let mut buffer = self.pool.take_blocking();
        let begun = Instant::now();
        let room = &mut buffer[..(self.wanted_pages * PAGE_SIZE) as usize];
        self.arrived.clear();
        source
            .read(&self.wanted, room, &mut self.arrived)
            .map_err(StreamError::Source)?;
        self.wanted.clear();
        self.wanted_pages = 0;
        let len = self.judge(&mut buffer, entries);
        if self.hashes.has_everything() {
            self.compared_pages += self.arrived.iter().map(|range| range.pages()).sum::<u64>();
            self.compare_time += begun.elapsed();
        }
        Ok(buffer.freeze(len))
    }

    /// Tells of every page that arrived what it is: changed data (moved up so that the buffer's
    /// front holds nothing else), zero, or what the receiver has. Returns the length of the data.
    fn judge(&mut self, buffer: &mut [u8], entries: &mut Vec<Entry>) -> usize {
        const PAGE: usize = PAGE_SIZE as usize;
        let (mut from, mut to) = (0, 0);
        let arrived = std::mem::take(&mut self.arrived);
        for &range in &arrived {
            let mut open: Option<Entry> = None;
            for at in (range.start()..range.end()).step_by(PAGE) {
                let kind = self.kind_of(at, &buffer[from..from + PAGE]);
                if kind == EntryKind::Data {
                    if from != to {
                        buffer.copy_within(from..from + PAGE, to);
                    }
                    to += PAGE;
                }
                from += PAGE;
                let page = PageRange::new(at, 1).expect("a page of a range");
                let range = match open.filter(|entry| entry.kind == kind) {
                    Some(entry) => entry.range.joined(page).expect("pages come in order"),
                    None => {
                        entries.extend(open);
                        page
                    }
                };
                open = Some(Entry { range, kind });
            }
            entries.extend(open);
        }
        self.arrived = arrived;
        to
    }

    fn kind_of(&mut self, address: u64, page: &[u8]) -> EntryKind {
        let unchanged = self.hashes.unchanged(address, page);
        match self.kept_kind {
            Some(kept) if unchanged && self.parent.contains(address) => kept,
            _ if page == ZERO_PAGE => EntryKind::Zero,
            _ => EntryKind::Data,
        }
    }

    /// Sends what is left.
    ///
    /// # Errors
    /// [`StreamError`].
    pub fn finish(mut self, source: &mut dyn PageSource) -> Result<Sent, StreamError> {
        self.flush(source)?;
        Ok(Sent {
            announced: self.announced,
            scanned_pages: self.scanned_pages,
            changed_pages: self.changed_pages,
            compared_pages: self.compared_pages,
            compare_time: self.compare_time,
        })
    }
}
