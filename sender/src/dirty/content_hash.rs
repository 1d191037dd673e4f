//! Content hashes: what needs nothing of the kernel. Every populated page is read every round and
//! compared by a cryptographic hash with what the receiver holds.

use super::pages::Scanner;
use super::{DirtyTracker, Part, Run, TrackError};
use crate::freeze::Frozen;
use crate::target::process::Process;
use crate::target::vma::Vma;
use pageferry_common::{PAGE_SIZE, PageRange, PageSet};
use std::collections::BTreeMap;
use std::io;

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

/// The tracker: every populated page may have been written.
#[derive(Debug)]
pub struct ContentHash(Scanner);

impl ContentHash {
    /// Works everywhere.
    pub fn probe() -> io::Result<Self> {
        Scanner::probe().map(Self)
    }
}

impl DirtyTracker for ContentHash {
    fn name(&self) -> &'static str {
        "hash"
    }

    fn untracked(&self, _: i32) -> bool {
        true
    }

    fn rearm(&mut self, _: &mut Frozen<'_>, _: &Process) -> Result<(), TrackError> {
        Ok(())
    }

    fn conclude(&mut self, _: &Process) -> Result<(), TrackError> {
        Ok(())
    }

    fn scan(&mut self, task: &Process, part: Part, runs: &mut Vec<Run>) -> io::Result<()> {
        self.0.own_pages(&task.pagemap, part, 0, false, |range, _| {
            runs.push(Run {
                range,
                written: true,
            });
        })
    }

    fn pending(&mut self, _: &Process, _: &Vma) -> io::Result<Option<u64>> {
        Ok(None)
    }

    fn forget(&mut self, _: i32) {}
}

#[cfg(test)]
mod tests {
    use super::*;

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
