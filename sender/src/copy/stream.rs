//! Turns runs of pages into chunks: collects the pages of one chunk, reads them, and announces only what was
//! read.

use crate::baseline::{Baseline, ContentHashes};
use crate::copy::source::PageSource;
use crate::dirty::Run;
use crate::sink::{PageSink, SinkError};
use bytes::Bytes;
use pageferry_common::wire::{Entry, EntryKind};
use pageferry_common::{BufferPool, CHUNK_PAGES, PAGE_SIZE, PageRange, PageSet};
use std::io;
use std::time::{Duration, Instant};

/// Greatest number of pieces (ranges to read, or entries to keep) in one chunk. A range may come apart into
/// as many entries as it has pages, so this and the pages of a chunk together stay below the wire's limit on
/// entries.
const PIECES_MAX: usize = 2048;

/// Greatest number of pages in one entry: the wire has 32 bits for it.
const ENTRY_PAGES_MAX: u64 = 1 << 31;

static ZERO_PAGE: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// Why an image could not be sent completely.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The connection or the receiver failed.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The process or segment is gone, or may not be read.
    #[error("cannot read memory")]
    Source(#[source] io::Error),
}

/// Whether pages that a scan reports as written are reported again if this round fails before they are
/// compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScanKind {
    /// A write is reported once: pages count as changed as soon as they are to be read.
    Destructive,
    /// The next round reads them again in any case, or [`ImageStream::assume_changed`] has recorded them.
    Repeatable,
}

/// Whether pages are read only to compare them, in every round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// No page, or those that look unchanged and may not be.
    OfDoubtful,
    /// All pages, because their writes are not tracked.
    Always,
}

/// Sends one image of a round.
pub struct ImageStream<'a> {
    sink: &'a mut dyn PageSink,
    pool: &'a BufferPool,
    source: &'a mut dyn PageSource,
    /// Pages that the receiver holds from the previous round.
    held: &'a PageSet,
    hashes: &'a mut ContentHashes,
    comparison: Comparison,
    scan: ScanKind,
    /// Entry kind for unchanged pages of the current chunk; `None` if they must be sent again.
    kept_kind: Option<EntryKind>,
    /// Ranges to read: ascending, together at most the pages of a chunk.
    wanted: Vec<PageRange>,
    wanted_pages: u64,
    /// In-parent entries between them, which are not read.
    kept: Vec<Entry>,
    arrived: Vec<PageRange>,
    outcome: Outcome,
}

/// What was sent of an image, completely or up to an error.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Pages that the receiver holds once the round is acked.
    pub announced: PageSet,
    /// Pages that differ, or may differ, from what the receiver holds.
    pub changed: PageSet,
    /// Number of populated pages that were scanned.
    pub scanned_pages: u64,
    /// Number of pages that were sent because the receiver does not hold them as they are.
    pub sent_pages: u64,
    /// Number of those whose writes are not tracked.
    pub untracked_pages: u64,
    /// Number of pages that were read only to find out whether they changed.
    pub compared_pages: u64,
    /// Time spent on reading and comparing pages only to find out whether they changed. A round of the frozen
    /// target takes it again, however few pages have.
    pub compare_time: Duration,
}

impl<'a> ImageStream<'a> {
    /// Starts an image that was opened in `sink`.
    pub fn new(
        sink: &'a mut dyn PageSink,
        pool: &'a BufferPool,
        source: &'a mut dyn PageSource,
        baseline: &'a mut Baseline,
        scan: ScanKind,
    ) -> Self {
        let (held, hashes) = baseline.split_mut();
        Self {
            sink,
            pool,
            source,
            held,
            comparison: comparison_of(hashes, Comparison::OfDoubtful),
            hashes,
            scan,
            kept_kind: Some(EntryKind::Parent),
            wanted: Vec::with_capacity(PIECES_MAX),
            wanted_pages: 0,
            kept: Vec::with_capacity(PIECES_MAX),
            arrived: Vec::with_capacity(CHUNK_PAGES),
            outcome: Outcome::default(),
        }
    }

    /// Pages that the receiver holds from the previous round.
    #[must_use]
    pub fn held(&self) -> &'a PageSet {
        self.held
    }

    /// The source of the pages.
    pub fn source(&mut self) -> &mut dyn PageSource {
        &mut *self.source
    }

    /// Records pages as changed before they are compared. Called before the first run.
    pub fn assume_changed(&mut self, pages: PageSet) {
        self.outcome.changed = pages;
    }

    /// Sets whether pages are read only to compare them, for the runs that follow.
    ///
    /// # Errors
    /// [`StreamError`].
    pub fn compare(&mut self, comparison: Comparison) -> Result<(), StreamError> {
        let comparison = comparison_of(self.hashes, comparison);
        if self.comparison != comparison {
            self.flush()?;
            self.comparison = comparison;
        }
        Ok(())
    }

    /// Adds a run of populated pages, behind all earlier ones. Pages that were not written and that the
    /// receiver holds are kept (as `kept_kind`, if there is such a kind); the others are read.
    ///
    /// # Errors
    /// [`StreamError`].
    pub fn run(&mut self, run: Run, kept_kind: Option<EntryKind>) -> Result<(), StreamError> {
        self.outcome.scanned_pages += run.range.pages();
        if self.kept_kind != kept_kind {
            self.flush()?;
            self.kept_kind = kept_kind;
        }
        let Some(kept_kind) = kept_kind.filter(|_| !run.written) else {
            return self.want(run.range);
        };
        let held = self.held;
        let mut result = Ok(());
        held.split(run.range, |range, is_held| {
            if result.is_ok() {
                result = match is_held {
                    true => self.keep(range, kept_kind),
                    false => self.want(range),
                };
            }
        });
        result
    }

    fn keep(&mut self, range: PageRange, kind: EntryKind) -> Result<(), StreamError> {
        let mut rest = Some(range);
        while let Some(range) = rest {
            let (range, later) = range.split_at(ENTRY_PAGES_MAX);
            self.make_room()?;
            let range = range.expect("a range is not empty");
            self.kept.push(Entry { range, kind });
            rest = later;
        }
        Ok(())
    }

    fn want(&mut self, range: PageRange) -> Result<(), StreamError> {
        if self.scan == ScanKind::Destructive {
            self.outcome.changed.insert(range);
        }
        let mut rest = Some(range);
        while let Some(range) = rest {
            self.make_room()?;
            let (now, later) = range.split_at(CHUNK_PAGES as u64 - self.wanted_pages);
            let now = now.expect("make_room leaves room");
            self.wanted_pages += now.pages();
            self.wanted.push(now);
            rest = later;
        }
        Ok(())
    }

    fn make_room(&mut self) -> Result<(), StreamError> {
        let full = self.wanted_pages == CHUNK_PAGES as u64
            || self.wanted.len() + self.kept.len() == PIECES_MAX;
        if full { self.flush() } else { Ok(()) }
    }

    /// Reads the wanted pages and puts one chunk. After the last run, this sends the rest.
    ///
    /// # Errors
    /// [`StreamError`].
    pub fn flush(&mut self) -> Result<(), StreamError> {
        if self.wanted.is_empty() && self.kept.is_empty() {
            return Ok(());
        }
        let mut entries = std::mem::replace(&mut self.kept, Vec::with_capacity(PIECES_MAX));
        let pages = match self.wanted.is_empty() {
            true => Bytes::new(),
            false => self.read_wanted(&mut entries)?,
        };
        if entries.is_empty() {
            return Ok(());
        }
        entries.sort_unstable_by_key(|entry| entry.range.start());
        let outcome = &mut self.outcome;
        outcome
            .announced
            .extend(entries.iter().map(|entry| entry.range));
        let is_sent = |entry: &&Entry| matches!(entry.kind, EntryKind::Data | EntryKind::Zero);
        for entry in entries.iter().filter(is_sent) {
            outcome.sent_pages += entry.range.pages();
            if self.comparison == Comparison::Always {
                outcome.untracked_pages += entry.range.pages();
            }
            outcome.changed.insert(entry.range);
        }
        self.sink.put(entries, pages)?;
        Ok(())
    }

    /// Reads the wanted pages, appends their entries, and returns the content of those that are data.
    fn read_wanted(&mut self, entries: &mut Vec<Entry>) -> Result<Bytes, StreamError> {
        let mut buffer = self.pool.take_blocking();
        let begun = Instant::now();
        let room = &mut buffer[..(self.wanted_pages * PAGE_SIZE) as usize];
        self.arrived.clear();
        self.source
            .read(&self.wanted, room, &mut self.arrived)
            .map_err(StreamError::Source)?;
        self.wanted.clear();
        self.wanted_pages = 0;
        let len = self.classify(&mut buffer, entries);
        if self.comparison == Comparison::Always {
            let outcome = &mut self.outcome;
            outcome.compared_pages += self.arrived.iter().map(|range| range.pages()).sum::<u64>();
            outcome.compare_time += begun.elapsed();
        }
        Ok(buffer.freeze(len))
    }

    /// Appends an entry for each run of arrived pages of one kind, and moves the data pages to the front of
    /// the buffer. Returns the length of the data, in bytes.
    fn classify(&mut self, buffer: &mut [u8], entries: &mut Vec<Entry>) -> usize {
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
        let unchanged = self.hashes.record(address, page);
        match self.kept_kind {
            Some(kept) if unchanged && self.held.contains(address) => kept,
            _ if page == ZERO_PAGE => EntryKind::Zero,
            _ => EntryKind::Data,
        }
    }

    /// Returns what was sent so far; the baseline is free again.
    #[must_use]
    pub fn into_outcome(self) -> Outcome {
        self.outcome
    }
}

/// Returns `comparison`, or [`Comparison::Always`] for an image that is compared as a whole.
fn comparison_of(hashes: &ContentHashes, comparison: Comparison) -> Comparison {
    match hashes.compares_everything() {
        true => Comparison::Always,
        false => comparison,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Counters;
    use crate::sink::Receipt;
    use pageferry_common::ImageId;
    use pageferry_common::wire::{RoundKind, WireError};
    use std::sync::Arc;

    /// Keeps what is put, or fails.
    #[derive(Default)]
    struct Chunks {
        entries: Vec<Entry>,
        data: Vec<u8>,
        is_lost: bool,
    }

    impl PageSink for Chunks {
        fn begin(&mut self, _: u32, _: RoundKind, _: u64) -> Result<(), SinkError> {
            Ok(())
        }

        fn open(&mut self, _: ImageId) -> Result<(), SinkError> {
            Ok(())
        }

        fn put(&mut self, entries: Vec<Entry>, pages: Bytes) -> Result<(), SinkError> {
            if self.is_lost {
                return Err(WireError::Closed.into());
            }
            self.entries.extend(entries);
            self.data.extend_from_slice(&pages);
            Ok(())
        }

        fn commit(&mut self) -> Result<Receipt, SinkError> {
            Ok(Receipt::default())
        }

        fn finish(&mut self) -> Result<(), SinkError> {
            Ok(())
        }

        fn directory(&self) -> &str {
            ""
        }

        fn counters(&self) -> Arc<Counters> {
            Arc::default()
        }
    }

    /// Memory whose pages are filled with their number, modulo 256.
    struct Numbered;

    impl PageSource for Numbered {
        fn read(
            &mut self,
            wanted: &[PageRange],
            buffer: &mut [u8],
            arrived: &mut Vec<PageRange>,
        ) -> io::Result<()> {
            let mut rooms = buffer.chunks_exact_mut(PAGE_SIZE as usize);
            for range in wanted {
                for at in (range.start()..range.end()).step_by(PAGE_SIZE as usize) {
                    if at != MISSING << 12 {
                        rooms.next().unwrap().fill((at >> 12) as u8);
                        arrived.push(PageRange::new(at, 1).unwrap());
                    }
                }
            }
            Ok(())
        }
    }

    /// Number of the page that cannot be read, and of one that is all zero.
    const MISSING: u64 = 3;
    const ZERO: u64 = 256;

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange::new(first << 12, pages).unwrap()
    }

    fn set(ranges: &[PageRange]) -> PageSet {
        ranges.iter().copied().collect()
    }

    fn held(ranges: &[PageRange]) -> Baseline {
        let mut baseline = Baseline::new(ContentHashes::nowhere());
        baseline.sent(set(ranges), PageSet::new());
        baseline.acked();
        baseline
    }

    fn send(
        sink: &mut Chunks,
        baseline: &mut Baseline,
        scan: ScanKind,
        runs: &[Run],
    ) -> (Outcome, Result<(), StreamError>) {
        let pool = BufferPool::new(1);
        let mut source = Numbered;
        let mut stream = ImageStream::new(sink, &pool, &mut source, baseline, scan);
        let kept = Some(EntryKind::Parent);
        let mut result = runs.iter().try_for_each(|&run| stream.run(run, kept));
        result = result.and_then(|()| stream.flush());
        (stream.into_outcome(), result)
    }

    fn run(range: PageRange, written: bool) -> Run {
        Run { range, written }
    }

    #[test]
    fn only_clean_pages_that_the_receiver_holds_are_kept() {
        let (mut sink, mut baseline) = (Chunks::default(), held(&[range(4, 4)]));
        let runs = [run(range(4, 2), true), run(range(6, 3), false)];
        let (outcome, result) = send(&mut sink, &mut baseline, ScanKind::Repeatable, &runs);
        result.unwrap();
        let expected = [
            (range(4, 1), EntryKind::Data),
            (range(5, 1), EntryKind::Data),
            (range(6, 2), EntryKind::Parent),
            (range(8, 1), EntryKind::Data),
        ];
        assert_eq!(
            sink.entries,
            expected.map(|(range, kind)| Entry { range, kind })
        );
        assert_eq!(outcome.announced, set(&[range(4, 5)]));
        assert_eq!(outcome.changed, set(&[range(4, 2), range(8, 1)]));
        assert_eq!((outcome.scanned_pages, outcome.sent_pages), (5, 3));
    }

    #[test]
    fn page_that_cannot_be_read_is_not_announced() {
        let (mut sink, mut baseline) = (Chunks::default(), held(&[]));
        let runs = [run(range(2, 3), true), run(range(ZERO, 1), true)];
        let (outcome, result) = send(&mut sink, &mut baseline, ScanKind::Repeatable, &runs);
        result.unwrap();
        assert_eq!(
            outcome.announced,
            set(&[range(2, 1), range(4, 1), range(ZERO, 1)])
        );
        assert_eq!(sink.entries[2].kind, EntryKind::Zero);
        let data: Vec<u8> = sink.data.chunks_exact(4096).map(|page| page[0]).collect();
        assert_eq!(data, [2, 4]);
    }

    #[test]
    fn compared_page_of_the_same_content_is_kept() {
        let mut baseline = Baseline::new(ContentHashes::everywhere());
        let runs = [run(range(4, 2), true)];
        let mut sink = Chunks::default();
        let (outcome, result) = send(&mut sink, &mut baseline, ScanKind::Repeatable, &runs);
        result.unwrap();
        assert_eq!((outcome.sent_pages, outcome.compared_pages), (2, 2));
        // Not acked: the receiver may not hold them.
        let (outcome, _) = send(&mut sink, &mut baseline, ScanKind::Repeatable, &runs);
        assert_eq!(outcome.sent_pages, 2);
        baseline.sent(outcome.announced, outcome.changed);
        baseline.acked();
        let (outcome, _) = send(&mut sink, &mut baseline, ScanKind::Repeatable, &runs);
        assert_eq!((outcome.sent_pages, outcome.compared_pages), (0, 2));
        assert!(outcome.changed.is_empty());
    }

    #[test]
    fn pages_of_a_destructive_scan_count_as_changed_if_the_round_fails() {
        for (scan, changed) in [
            (ScanKind::Destructive, set(&[range(MISSING, 2)])),
            (ScanKind::Repeatable, set(&[range(4, 1)])),
        ] {
            let mut sink = Chunks {
                is_lost: true,
                ..Chunks::default()
            };
            let mut baseline = held(&[range(2, 8)]);
            let runs = [run(range(MISSING, 2), true), run(range(6, 2), false)];
            let (outcome, result) = send(&mut sink, &mut baseline, scan, &runs);
            result.unwrap_err();
            assert_eq!(outcome.changed, changed, "{scan:?}");
        }
    }
}
