//! Pages that an address space still misses, and where in the images they are.

use pageferry_common::PageRange;
use std::collections::BTreeMap;

/// Missing pages by their address. Each also has its address in the images, which differs once the process
/// has moved the page (`mremap`).
#[derive(Debug, Clone, Default)]
pub(super) struct Missing {
    /// Start address of each piece: its end address, and its start address in the images.
    pieces: BTreeMap<u64, (u64, u64)>,
}

impl Missing {
    /// Creates the set of pages in `ranges`, which ascend. Their addresses are those in the images.
    #[must_use]
    pub(super) fn new(ranges: &[PageRange]) -> Self {
        let joined = ranges.chunk_by(|one, next| one.end() == next.start());
        let pieces = joined.filter_map(|run| {
            let start = run.first()?.start();
            Some((start, (run.last()?.end(), start)))
        });
        Self {
            pieces: pieces.collect(),
        }
    }

    /// Adds pages that are not in the set. `image` is the address of the first one in the images.
    pub(super) fn insert(&mut self, range: PageRange, image: u64) {
        let start = match self.pieces.range(..=range.start()).next_back() {
            Some((&start, &(end, before)))
                if end == range.start() && before + (end - start) == image =>
            {
                start
            }
            _ => range.start(),
        };
        let image = image - (range.start() - start);
        self.pieces.insert(start, (range.end(), image));
    }

    /// Returns the first missing pages in `range`, up to a gap, and the address of the first one in the
    /// images.
    #[must_use]
    pub(super) fn first_in(&self, range: PageRange) -> Option<(PageRange, u64)> {
        let before = self.pieces.range(..=range.start()).next_back();
        let after = self.pieces.range(range.start()..range.end()).next();
        [before, after]
            .into_iter()
            .flatten()
            .find_map(|(&start, &(end, image))| {
                let first = start.max(range.start());
                let found = PageRange::from_bounds(first, end.min(range.end()))?;
                Some((found, image + (first - start)))
            })
    }

    /// Removes pages, whether or not they are missing.
    pub(super) fn remove(&mut self, range: PageRange) {
        self.take(range, |_, _| {});
    }

    /// Moves pages: those at `from` are at `to` now.
    pub(super) fn remap(&mut self, from: PageRange, to: PageRange) {
        let mut moved = Vec::new();
        self.take(from, |range, image| moved.push((range, image)));
        self.remove(to);
        for (range, image) in moved {
            let at = |address: u64| address - from.start() + to.start();
            let range = PageRange::from_bounds(at(range.start()), at(range.end()));
            self.insert(range.expect("it is as long as before"), image);
        }
    }

    /// Removes the missing pages in `range`, and calls `each` for each piece with its address in the images.
    fn take(&mut self, range: PageRange, mut each: impl FnMut(PageRange, u64)) {
        while let Some((found, image)) = self.first_in(range) {
            let (&start, &(end, first)) = self
                .pieces
                .range(..=found.start())
                .next_back()
                .expect("it was found");
            self.pieces.remove(&start);
            if start < found.start() {
                self.pieces.insert(start, (found.start(), first));
            }
            if found.end() < end {
                let rest = first + (found.end() - start);
                self.pieces.insert(found.end(), (end, rest));
            }
            each(found, image);
        }
    }

    /// Returns the missing pages, in ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.pieces().map(|(range, _)| range)
    }

    /// Returns the missing pages, in ascending order, and the address of the first one in the images for each
    /// range. [`Missing::insert`] makes the same set of them.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (PageRange, u64)> + '_ {
        let pieces = self.pieces.iter();
        pieces.filter_map(|(&start, &(end, image))| {
            Some((PageRange::from_bounds(start, end)?, image))
        })
    }

    /// Returns whether no page is missing.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_common::PAGE_SIZE;
    use proptest::prelude::*;

    fn range(start: u64, len: u64) -> PageRange {
        PageRange::new(start * PAGE_SIZE, len).unwrap()
    }

    fn pages(missing: &Missing) -> BTreeMap<u64, u64> {
        let mut pages = BTreeMap::new();
        for piece in missing.iter() {
            for number in 0..piece.pages() {
                let page = range(piece.start() / PAGE_SIZE + number, 1);
                let (found, image) = missing.first_in(page).unwrap();
                assert_eq!(found, page);
                pages.insert(page.start() / PAGE_SIZE, image / PAGE_SIZE);
            }
        }
        pages
    }

    #[derive(Debug, Clone)]
    enum Step {
        Remove(u64, u64),
        Remap(u64, u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..60u64, 1..9u64).prop_map(|(start, len)| Step::Remove(start, len)),
            (0..30u64, 30..60u64, 1..9u64).prop_map(|(from, to, len)| Step::Remap(
                from,
                to,
                len.min(30 - from)
            )),
        ]
    }

    proptest! {
        #[test]
        fn ranges_behave_like_a_map_of_single_pages(
            inserted in proptest::collection::btree_set(0..60u64, 0..50),
            steps in proptest::collection::vec(step(), 0..20),
        ) {
            let inserted: Vec<_> = inserted.into_iter().collect();
            let ranges: Vec<_> = inserted.iter().map(|&page| range(page, 1)).collect();
            let mut missing = Missing::new(&ranges);
            let mut model: BTreeMap<_, _> = inserted.into_iter().map(|page| (page, page)).collect();
            for step in steps {
                match step {
                    Step::Remove(start, len) => {
                        missing.remove(range(start, len));
                        model.retain(|page, _| !(start..start + len).contains(page));
                    }
                    Step::Remap(from, to, len) => {
                        missing.remap(range(from, len), range(to, len));
                        let moved: Vec<_> = model.range(from..from + len)
                            .map(|(&page, &image)| (page - from + to, image))
                            .collect();
                        model.retain(|page, _| {
                            !(from..from + len).contains(page) && !(to..to + len).contains(page)
                        });
                        model.extend(moved);
                    }
                }
                prop_assert_eq!(&pages(&missing), &model);
            }
            let mut again = Missing::default();
            missing.pieces().for_each(|(range, image)| again.insert(range, image));
            prop_assert_eq!(&pages(&again), &model);
        }
    }
}
