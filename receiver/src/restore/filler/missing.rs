//! What is not there yet of one process's memory, and where in its images it is.

use pageferry_common::PageRange;
use std::collections::BTreeMap;

/// Pages by the address where they are wanted. Each has its address in the images, which is another once
/// the process has moved them.
#[derive(Debug, Clone, Default)]
pub struct Missing {
    /// By their first address: one past the last, and the first address in the images.
    pieces: BTreeMap<u64, (u64, u64)>,
}

impl Missing {
    /// Pages in the order of their addresses, which are those in the images.
    #[must_use]
    pub fn new(ranges: &[PageRange]) -> Self {
        let joined = ranges.chunk_by(|one, next| one.end() == next.start());
        let pieces = joined.filter_map(|run| {
            let start = run.first()?.start();
            Some((start, (run.last()?.end(), start)))
        });
        Self {
            pieces: pieces.collect(),
        }
    }

    /// Adds pages that are not in it, `image` being the address of the first in the images.
    fn insert(&mut self, range: PageRange, image: u64) {
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

    /// The first of the pages in `range` that are missing, up to a gap, and the first one's address in
    /// the images.
    #[must_use]
    pub fn first_in(&self, range: PageRange) -> Option<(PageRange, u64)> {
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

    /// Takes pages out, missing or not.
    pub fn remove(&mut self, range: PageRange) {
        self.take(range, |_, _| {});
    }

    /// What was at `from` is at `to` now.
    pub fn remap(&mut self, from: PageRange, to: PageRange) {
        let mut moved = Vec::new();
        self.take(from, |range, image| moved.push((range, image)));
        self.remove(to);
        for (range, image) in moved {
            let at = |address: u64| address - from.start() + to.start();
            let range = PageRange::from_bounds(at(range.start()), at(range.end()));
            self.insert(range.expect("it is as long as before"), image);
        }
    }

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

    /// All of it, in order.
    pub fn iter(&self) -> impl Iterator<Item = PageRange> + '_ {
        let ranges = self.pieces.iter();
        ranges.filter_map(|(&start, &(end, _))| PageRange::from_bounds(start, end))
    }

    /// Whether everything is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
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
        /// It is what a map of single pages would be.
        #[test]
        fn like_single_pages(
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
        }
    }
}
