//! What the receiver holds of an image, as far as it is known: rounds may be lost on their way.

use pageferry_common::{PAGE_SIZE, PageRange, PageSet};
use std::collections::BTreeMap;

/// The pages of one image that the receiver holds. Only they can be in-parent entries.
#[derive(Debug, Default)]
pub struct Baseline {
    /// Those of the last round that it has acked, as they are there, but for those that were written and
    /// sent since, and did not arrive.
    acked: PageSet,
    /// The round on its way.
    sent: Option<InFlight>,
}

/// What a round says of an image.
#[derive(Debug, Default)]
struct InFlight {
    announced: PageSet,
    changed: PageSet,
}

impl Baseline {
    /// Pages of the last acked round that are still as they are there, or are known by the tracker not to be.
    #[must_use]
    pub fn pages(&self) -> &PageSet {
        &self.acked
    }

    /// A round was sent to its end: it says of `announced` what they are. That `changed` have changed since the
    /// one before, nothing will tell again: a tracker tells of a write once.
    pub fn sent(&mut self, announced: PageSet, changed: PageSet) {
        self.sent = Some(InFlight { announced, changed });
    }

    /// A round was not sent to its end.
    pub fn send_failed(&mut self, changed: &PageSet) {
        self.acked = self.acked.difference(changed);
    }

    /// The receiver has the round.
    pub fn acked(&mut self) {
        if let Some(InFlight { announced, .. }) = self.sent.take() {
            self.acked = announced;
        }
    }

    /// The receiver has not got the round, and never will.
    pub fn lost(&mut self) {
        if let Some(InFlight { announced, changed }) = self.sent.take() {
            // What was gone when it was sent may be something else when it is there again.
            self.acked = self.acked.intersection(&announced);
            self.send_failed(&changed);
        }
    }
}

/// Pages a block of hashes covers: 2 MiB of memory.
const BLOCK_PAGES: u64 = 512;

/// Half of BLAKE3's output: no two of 2^32 pages share it by accident (2^-65), and making two that
/// do takes 2^64 work.
type Hash = [u8; 16];

/// Stands for "not known".
const UNKNOWN: Hash = [0; 16];

/// The hashes of the pages of one image that the receiver holds. Memory: 16 bytes a page, 4 MiB a
/// GiB, in blocks of 2 MiB of address space.
#[derive(Debug)]
pub struct ContentHashes {
    /// Where pages are compared; `None`: everywhere.
    scope: Option<PageSet>,
    blocks: BTreeMap<u64, Box<[Hash; BLOCK_PAGES as usize]>>,
}

impl ContentHashes {
    /// Compares every page.
    #[must_use]
    pub fn of_everything() -> Self {
        Self {
            scope: None,
            blocks: BTreeMap::new(),
        }
    }

    /// Compares pages of these ranges; none so far.
    #[must_use]
    pub fn of_nothing() -> Self {
        Self {
            scope: Some(PageSet::new()),
            ..Self::of_everything()
        }
    }

    /// From now on compares every page.
    pub fn compare_everything(&mut self) {
        self.scope = None;
    }

    /// Whether every page is compared.
    #[must_use]
    pub fn has_everything(&self) -> bool {
        self.scope.is_none()
    }

    /// From now on compares the pages of these ranges only. What lies elsewhere is forgotten, for
    /// what is sent there will not be remembered.
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

    /// Remembers the content of the page at `address`, and tells whether it was so before.
    pub fn unchanged(&mut self, address: u64, page: &[u8]) -> bool {
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
        let known = &mut block[(number % BLOCK_PAGES) as usize];
        let unchanged = *known == hash;
        *known = hash;
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
    fn what_was_sent_is_held_once_it_is_acked() {
        let mut baseline = Baseline::default();
        baseline.sent(pages(&[1, 2, 3]), pages(&[1, 2, 3]));
        assert!(baseline.pages().is_empty());
        baseline.acked();
        assert_eq!(*baseline.pages(), pages(&[1, 2, 3]));
        // Another word of the same round changes nothing.
        baseline.acked();
        baseline.lost();
        assert_eq!(*baseline.pages(), pages(&[1, 2, 3]));
    }

    #[test]
    fn what_was_sent_and_lost_is_sent_again() {
        let mut baseline = Baseline::default();
        baseline.sent(pages(&[1, 2, 3]), pages(&[1, 2, 3]));
        baseline.acked();
        // 2 was written, 3 went, 4 came.
        baseline.sent(pages(&[1, 2, 4]), pages(&[2, 4]));
        baseline.lost();
        assert_eq!(*baseline.pages(), pages(&[1]));
        baseline.send_failed(&pages(&[1, 5]));
        assert!(baseline.pages().is_empty());
    }

    #[test]
    fn a_page_is_unchanged_only_where_and_while_it_was_so() {
        let mut hashes = ContentHashes::of_everything();
        let (a, b) = ([1u8; 4096], [2u8; 4096]);
        assert!(!hashes.unchanged(0x1000, &a));
        assert!(hashes.unchanged(0x1000, &a));
        assert!(!hashes.unchanged(0x2000, &a));
        assert!(!hashes.unchanged(0x1000, &b));
        assert!(!hashes.unchanged(0x1000, &a));
    }

    #[test]
    fn what_was_sent_outside_the_scope_is_not_known() {
        let mut hashes = ContentHashes::of_nothing();
        let (a, b) = ([1u8; 4096], [2u8; 4096]);
        let range = PageRange::new(0x1000, 1);
        hashes.compare_only(range.into_iter());
        assert!(!hashes.unchanged(0x1000, &a));
        assert!(hashes.unchanged(0x1000, &a));
        assert!(!hashes.unchanged(0x2000, &a));
        assert!(!hashes.unchanged(0x2000, &a));
        hashes.compare_only(std::iter::empty());
        assert!(!hashes.unchanged(0x1000, &b));
        hashes.compare_only(range.into_iter());
        assert!(!hashes.unchanged(0x1000, &a));
        hashes.compare_everything();
        assert!(hashes.unchanged(0x1000, &a));
        assert!(!hashes.unchanged(0x2000, &a));
    }
}
