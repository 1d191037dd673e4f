//! What the receiver holds of an image: its pages, the round in flight, and content hashes.
//!
//! A round may be lost, so a page counts as held only once the receiver has acked the round that announced
//! it.

use pageferry_common::{PAGE_SIZE, PageRange, PageSet};
use std::collections::BTreeMap;

/// What the receiver holds of one image. Only pages in the baseline can become in-parent entries.
#[derive(Debug)]
pub struct Baseline {
    /// Pages of the last acked round, less those that changed since then in a round that was lost.
    held: PageSet,
    /// The round that was sent and is not acked yet.
    in_flight: Option<InFlight>,
    /// Hashes of the pages' content, where contents are compared.
    hashes: ContentHashes,
}

/// A round in flight, as far as it concerns one image.
#[derive(Debug)]
struct InFlight {
    /// Pages that the receiver holds if the round arrives.
    announced: PageSet,
    /// Pages that differ from the last acked round.
    changed: PageSet,
}

impl Baseline {
    /// A baseline without pages, whose content is compared where `hashes` covers it.
    #[must_use]
    pub fn new(hashes: ContentHashes) -> Self {
        Self {
            held: PageSet::new(),
            in_flight: None,
            hashes,
        }
    }

    /// Pages of the last acked round that the receiver still holds as they are in the target, unless the
    /// tracker reports them as written.
    #[must_use]
    pub fn pages(&self) -> &PageSet {
        &self.held
    }

    /// Content hashes of the pages.
    #[must_use]
    pub fn hashes(&self) -> &ContentHashes {
        &self.hashes
    }

    /// Content hashes of the pages, to change where contents are compared.
    pub fn hashes_mut(&mut self) -> &mut ContentHashes {
        &mut self.hashes
    }

    /// The pages, and the hashes to be updated while an image is sent.
    pub fn split_mut(&mut self) -> (&PageSet, &mut ContentHashes) {
        (&self.held, &mut self.hashes)
    }

    /// Records that a round was sent completely: it announces `announced`, of which `changed` differ from the
    /// round before. A tracker may report a write only once, so `changed` is kept until the round is acked.
    pub fn sent(&mut self, announced: PageSet, changed: PageSet) {
        self.in_flight = Some(InFlight { announced, changed });
    }

    /// Records that sending a round failed halfway: the pages in `changed` must be sent by the next.
    pub fn send_failed(&mut self, changed: &PageSet) {
        self.held = self.held.difference(changed);
    }

    /// Records that the receiver acked the round in flight, if there is one.
    pub fn acked(&mut self) {
        if let Some(InFlight { announced, .. }) = self.in_flight.take() {
            self.held = announced;
        }
    }

    /// Records that the round in flight, if there is one, was lost: the receiver does not store it.
    pub fn lost(&mut self) {
        if let Some(InFlight { announced, changed }) = self.in_flight.take() {
            // A page that was missing when the round was sent may come back with other content.
            self.held = self.held.intersection(&announced);
            self.send_failed(&changed);
        }
    }
}

/// Number of pages in a block of hashes: 2 MiB of memory.
const BLOCK_PAGES: u64 = 512;

/// Half of BLAKE3's output: no two of 2^32 pages have the same by accident (2^-65), and constructing two that
/// do takes 2^64 work.
type Hash = [u8; 16];

/// Marks a page without a recorded hash.
const UNKNOWN: Hash = [0; 16];

/// Hashes of the pages of one image as the receiver holds them. They take 16 bytes a page (4 MiB a GiB),
/// allocated in blocks for 2 MiB of address space.
#[derive(Debug)]
pub struct ContentHashes {
    /// Where pages are compared; `None`: everywhere.
    scope: Option<PageSet>,
    blocks: BTreeMap<u64, Box<[Hash; BLOCK_PAGES as usize]>>,
}

impl ContentHashes {
    /// Hashes to compare every page.
    #[must_use]
    pub fn everywhere() -> Self {
        Self {
            scope: None,
            blocks: BTreeMap::new(),
        }
    }

    /// Hashes to compare no page, until [`Self::compare_only`] or [`Self::compare_everything`] is called.
    #[must_use]
    pub fn nowhere() -> Self {
        Self {
            scope: Some(PageSet::new()),
            ..Self::everywhere()
        }
    }

    /// Compares every page from now on.
    pub fn compare_everything(&mut self) {
        self.scope = None;
    }

    /// Whether every page is compared.
    #[must_use]
    pub fn compares_everything(&self) -> bool {
        self.scope.is_none()
    }

    /// Compares only the pages of these ranges from now on. Hashes outside of them are dropped, because
    /// content sent there is no longer recorded.
    pub fn compare_only(&mut self, ranges: impl Iterator<Item = PageRange>) {
        let mut scope = PageSet::new();
        scope.extend(ranges);
        if self.scope.as_ref() == Some(&scope) {
            return;
        }
        for (number, block) in &mut self.blocks {
            for (index, hash) in block.iter_mut().enumerate() {
                if !scope.contains((number * BLOCK_PAGES + index as u64) * PAGE_SIZE) {
                    *hash = UNKNOWN;
                }
            }
        }
        self.scope = Some(scope);
    }

    /// Records the content of the page at `address`, and returns whether it equals the content recorded
    /// before. Returns `false` and records nothing where pages are not compared.
    pub fn record(&mut self, address: u64, page: &[u8]) -> bool {
        let scope = self.scope.as_ref();
        if scope.is_some_and(|scope| !scope.contains(address)) {
            return false;
        }
        let mut hash = UNKNOWN;
        hash.copy_from_slice(&blake3::hash(page).as_bytes()[..16]);
        let number = address / PAGE_SIZE;
        let block = self
            .blocks
            .entry(number / BLOCK_PAGES)
            .or_insert_with(|| Box::new([UNKNOWN; BLOCK_PAGES as usize]));
        let recorded = &mut block[(number % BLOCK_PAGES) as usize];
        let unchanged = *recorded == hash;
        *recorded = hash;
        unchanged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(numbers: &[u64]) -> PageSet {
        let page = |&number: &u64| PageRange::new(number << 12, 1).unwrap();
        numbers.iter().map(page).collect()
    }

    #[test]
    fn sent_pages_are_held_once_acked() {
        let mut baseline = Baseline::new(ContentHashes::nowhere());
        baseline.sent(pages(&[1, 2, 3]), pages(&[1, 2, 3]));
        assert!(baseline.pages().is_empty());
        baseline.acked();
        assert_eq!(*baseline.pages(), pages(&[1, 2, 3]));
        // Nothing is in flight any more.
        baseline.acked();
        baseline.lost();
        assert_eq!(*baseline.pages(), pages(&[1, 2, 3]));
    }

    #[test]
    fn changed_pages_of_a_lost_round_are_not_held() {
        let mut baseline = Baseline::new(ContentHashes::nowhere());
        baseline.sent(pages(&[1, 2, 3]), pages(&[1, 2, 3]));
        baseline.acked();
        // 2 was written, 3 disappeared, 4 is new.
        baseline.sent(pages(&[1, 2, 4]), pages(&[2, 4]));
        baseline.lost();
        assert_eq!(*baseline.pages(), pages(&[1]));
        baseline.send_failed(&pages(&[1, 5]));
        assert!(baseline.pages().is_empty());
    }

    #[test]
    fn page_is_unchanged_only_at_the_same_address_and_with_the_same_content() {
        let mut hashes = ContentHashes::everywhere();
        let (a, b) = ([1u8; 4096], [2u8; 4096]);
        assert!(!hashes.record(0x1000, &a));
        assert!(hashes.record(0x1000, &a));
        assert!(!hashes.record(0x2000, &a));
        assert!(!hashes.record(0x1000, &b));
        assert!(!hashes.record(0x1000, &a));
    }

    #[test]
    fn content_outside_the_scope_is_not_recorded() {
        let mut hashes = ContentHashes::nowhere();
        let (a, b) = ([1u8; 4096], [2u8; 4096]);
        let range = PageRange::new(0x1000, 1);
        hashes.compare_only(range.into_iter());
        assert!(!hashes.record(0x1000, &a));
        assert!(hashes.record(0x1000, &a));
        assert!(!hashes.record(0x2000, &a));
        assert!(!hashes.record(0x2000, &a));
        hashes.compare_only(std::iter::empty());
        assert!(!hashes.record(0x1000, &b));
        hashes.compare_only(range.into_iter());
        assert!(!hashes.record(0x1000, &a));
        hashes.compare_everything();
        assert!(hashes.record(0x1000, &a));
        assert!(!hashes.record(0x2000, &a));
    }
}
