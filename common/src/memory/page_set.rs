//! Sets of pages.

use crate::memory::addr::{PAGE_SIZE, PageRange};

/// Set of pages, as ranges. It takes 16 bytes for each range: a few dozen bytes for a fully populated
/// process, more for a fragmented one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    /// Ascending, disjoint and not adjacent, so that equal sets have equal ranges.
    ranges: Vec<PageRange>,
}

impl PageSet {
    /// Returns the empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a range: O(1) behind all others, otherwise O(number of ranges).
    pub fn insert(&mut self, range: PageRange) {
        let appendable = self
            .ranges
            .last()
            .is_none_or(|last| last.end() < range.start());
        if appendable {
            self.ranges.push(range);
            return;
        }
        // All ranges that overlap the new one, or are adjacent to it, are merged with it.
        let first = self.ranges.partition_point(|r| r.end() < range.start());
        let last = self.ranges.partition_point(|r| r.start() <= range.end());
        let merged = self.ranges[first..last]
            .iter()
            .fold(range, |all, &r| hull(all, r));
        self.ranges.splice(first..last, [merged]);
    }

    /// Returns whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Returns the number of pages in the set.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|r| r.pages()).sum()
    }

    /// Returns the ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.ranges.iter().copied()
    }

    /// Returns whether the page at `address` (bytes) is in the set.
    #[must_use]
    pub fn contains(&self, address: u64) -> bool {
        let page = address - address % PAGE_SIZE;
        PageRange::new(page, 1).is_ok_and(|page| self.overlapping(page).next().is_some())
    }

    /// Returns the parts of `range` that are in the set, ascending.
    pub fn overlapping(&self, range: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        let first = self.ranges.partition_point(|r| r.end() <= range.start());
        self.ranges[first..]
            .iter()
            .map_while(move |r| r.intersect(range))
    }

    /// Splits `range` where membership changes, and calls `piece` with each part and whether it is in the
    /// set.
    pub fn split(&self, range: PageRange, mut piece: impl FnMut(PageRange, bool)) {
        let mut at = range.start();
        for inside in self.overlapping(range) {
            if let Some(outside) = PageRange::from_bounds(at, inside.start()) {
                piece(outside, false);
            }
            piece(inside, true);
            at = inside.end();
        }
        if let Some(outside) = PageRange::from_bounds(at, range.end()) {
            piece(outside, false);
        }
    }

    /// Returns the pages in either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut merged = Self::with_capacity(self.ranges.len() + other.ranges.len());
        let (mut a, mut b) = (self.iter().peekable(), other.iter().peekable());
        loop {
            let next = match (a.peek(), b.peek()) {
                (Some(x), Some(y)) if x.start() <= y.start() => a.next(),
                (_, Some(_)) => b.next(),
                (_, None) => a.next(),
            };
            match next {
                Some(range) => merged.insert(range),
                None => return merged,
            }
        }
    }

    /// Returns the pages in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let mut common = Self::new();
        for range in self.iter() {
            for part in other.overlapping(range) {
                common.insert(part);
            }
        }
        common
    }

    /// Returns the pages in this set that are not in the other.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let mut rest = Self::new();
        for range in self.iter() {
            other.split(range, |part, inside| {
                if !inside {
                    rest.insert(part);
                }
            });
        }
        rest
    }

    fn with_capacity(ranges: usize) -> Self {
        Self {
            ranges: Vec::with_capacity(ranges),
        }
    }
}

fn hull(a: PageRange, b: PageRange) -> PageRange {
    PageRange::from_bounds(a.start().min(b.start()), a.end().max(b.end()))
        .expect("the hull of two ranges is a range")
}

impl FromIterator<PageRange> for PageSet {
    fn from_iter<T: IntoIterator<Item = PageRange>>(ranges: T) -> Self {
        let mut set = Self::new();
        set.extend(ranges);
        set
    }
}

impl Extend<PageRange> for PageSet {
    fn extend<T: IntoIterator<Item = PageRange>>(&mut self, ranges: T) {
        ranges.into_iter().for_each(|range| self.insert(range));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn arb_ranges() -> impl Strategy<Value = Vec<PageRange>> {
        prop::collection::vec((0u64..200, 1u64..12), 0..40).prop_map(|raw| {
            raw.into_iter()
                .map(|(page, pages)| PageRange::new(page * PAGE_SIZE, pages).unwrap())
                .collect()
        })
    }

    fn model(ranges: impl IntoIterator<Item = PageRange>) -> BTreeSet<u64> {
        ranges
            .into_iter()
            .flat_map(|r| (r.start() / PAGE_SIZE)..(r.end() / PAGE_SIZE))
            .collect()
    }

    fn is_canonical(set: &PageSet) -> bool {
        set.ranges.windows(2).all(|w| w[0].end() < w[1].start())
    }

    proptest! {
        #[test]
        fn operations_agree_with_a_plain_set(a in arb_ranges(), b in arb_ranges()) {
            let (x, y): (PageSet, PageSet) = (a.iter().copied().collect(), b.iter().copied().collect());
            let (mx, my) = (model(a), model(b));
            for (set, expected) in [
                (x.clone(), mx.clone()),
                (x.union(&y), mx.union(&my).copied().collect()),
                (x.intersection(&y), mx.intersection(&my).copied().collect()),
                (x.difference(&y), mx.difference(&my).copied().collect()),
            ] {
                prop_assert!(is_canonical(&set));
                prop_assert_eq!(set.pages(), expected.len() as u64);
                prop_assert_eq!(model(set.iter()), expected);
            }
        }

        #[test]
        fn split_parts_cover_the_range_in_order(a in arb_ranges(), page in 0u64..220, pages in 1u64..60) {
            let set: PageSet = a.iter().copied().collect();
            let range = PageRange::new(page * PAGE_SIZE, pages).unwrap();
            let mut at = range.start();
            set.split(range, |piece, inside| {
                assert_eq!(piece.start(), at);
                for p in model([piece]) {
                    assert_eq!(set.contains(p * PAGE_SIZE + 7), inside);
                }
                at = piece.end();
            });
            prop_assert_eq!(at, range.end());
        }
    }
}
