//! Index of an image: where each of its pages is in the chain, for reading in any order.

use super::chain::{Cursor, Levels};
use crate::file_error::{FileError, failed};
use pageferry_common::criu::page_server::PageLocation;
use pageferry_common::{ImageId, PAGE_SIZE, PageRange};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Index of one image through all directories of a chain. Its memory grows with the number of entries, not of
/// pages.
#[derive(Debug, Clone, Default)]
pub struct Index {
    /// Ascending.
    pub(super) runs: Vec<Run>,
}

/// Run of pages that are contiguous in memory and in a pages file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) range: PageRange,
    /// Generation of the directory that has them: the number of directories behind it in the chain.
    pub(super) generation: usize,
    /// Offset of the first page in the pages file, bytes.
    pub(super) offset: u64,
}

/// Directory of a chain, as an index takes it in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Generation<'a> {
    pub(super) dir: &'a Path,
    /// Number of directories behind it in the chain.
    pub(super) number: usize,
}

/// Index that [`Index::advance`] has made.
#[derive(Debug)]
pub(super) struct Advanced {
    index: Index,
    /// The first pages that an entry lists, and no directory has.
    unresolved: Option<PageRange>,
}

impl Advanced {
    /// Returns the index if no page is unresolved. `dir` and `image` are for the error.
    ///
    /// # Errors
    /// [`FileError`].
    pub(super) fn resolved(self, dir: &Path, image: ImageId) -> Result<Index, FileError> {
        match self.unresolved {
            None => Ok(self.index),
            Some(range) => {
                let what = format!("pages {range} are missing from the chain");
                let error = io::Error::new(io::ErrorKind::InvalidData, what);
                Err(failed("resolve", &dir.join(image.pagemap_name()))(error))
            }
        }
    }
}

impl Index {
    /// Loads the index of an image; `None` if the image is not in the first of `levels`.
    ///
    /// # Errors
    /// [`FileError`], also if one of the image's pages is missing in the chain.
    pub fn load(levels: &Levels, image: ImageId) -> Result<Option<Self>, FileError> {
        let mut newest: Option<Advanced> = None;
        for (number, dir) in levels.iter().rev().enumerate() {
            let parent = newest.map(|newest| newest.index).unwrap_or_default();
            let generation = Generation { dir, number };
            newest = Self::default().advance(&parent, generation, image, usize::MAX)?;
        }
        newest
            .map(|newest| newest.resolved(&levels[0], image))
            .transpose()
    }

    /// Makes the index of the image in one directory out of that of its parent. The memory of `self` is used
    /// again. Returns `None` if the image is not in the directory.
    ///
    /// # Errors
    /// [`FileError`], also if there are more than `max_runs` runs.
    pub(super) fn advance(
        mut self,
        parent: &Self,
        generation: Generation<'_>,
        image: ImageId,
        max_runs: usize,
    ) -> Result<Option<Advanced>, FileError> {
        let dir = generation.dir;
        let Some(mut list) = Cursor::open(&[dir.to_owned()].into(), image)? else {
            return Ok(None);
        };
        self.runs.clear();
        let mut unresolved = None;
        let mut parent = parent.runs.iter().copied().peekable();
        while let Some(entry) = list.next_entry()? {
            // Checked once for each entry: one entry adds at most the runs of the parent, which is within the
            // limit itself.
            if self.runs.len() > max_runs {
                let error = io::Error::other("it has too many pieces");
                return Err(failed("keep the index of", dir)(error));
            }
            let range = entry.range;
            if let PageLocation::Present { .. } = entry.place {
                self.push(Run {
                    range,
                    generation: generation.number,
                    offset: list.offset(),
                });
                continue;
            }
            let mut at = range.start();
            while parent.next_if(|run| run.range.end() <= at).is_some() {}
            while let (PageLocation::Parent, Some(run)) = (entry.place, parent.peek())
                && let Some(found) = run.range.intersect(range)
            {
                // The rest of the entry may still be resolved.
                unresolved = unresolved.or(PageRange::from_bounds(at, found.start()));
                let skip = found.start() - run.range.start();
                self.push(Run {
                    range: found,
                    generation: run.generation,
                    offset: run.offset + skip,
                });
                at = found.end();
                // The next entry may begin in the same run.
                if at < run.range.end() {
                    break;
                }
                parent.next();
            }
            unresolved = unresolved.or(PageRange::from_bounds(at, range.end()));
        }
        Ok(Some(Advanced {
            index: self,
            unresolved,
        }))
    }

    fn push(&mut self, next: Run) {
        if let Some(last) = self.runs.last_mut()
            && last.generation == next.generation
            && last.offset + last.range.bytes() == next.offset
            && let Some(range) = last.range.joined(next.range)
        {
            last.range = range;
            return;
        }
        self.runs.push(next);
    }

    /// Returns all pages as ranges without gaps between adjacent pages, in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = PageRange> + '_ {
        let together = |one: &Run, next: &Run| one.range.end() == next.range.start();
        self.runs.chunk_by(together).filter_map(|runs| {
            let (first, last) = (runs.first()?, runs.last()?);
            PageRange::from_bounds(first.range.start(), last.range.end())
        })
    }
}

/// Pages of an image, wherever in a chain they are.
#[derive(Debug)]
pub struct Pages {
    index: Index,
    /// Pages files by the generation of their directory.
    files: BTreeMap<usize, File>,
    /// Pagemap in the newest directory, for errors.
    path: PathBuf,
}

impl Pages {
    /// Opens the pages files of an image.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn open(levels: &Levels, image: ImageId, index: Index) -> Result<Self, FileError> {
        let path = levels[0].join(image.pagemap_name());
        let mut files = BTreeMap::new();
        for run in &index.runs {
            if let Entry::Vacant(unknown) = files.entry(run.generation) {
                let dir = levels.iter().rev().nth(run.generation);
                let dir = [dir.unwrap_or(&levels[0]).clone()];
                let missing = || failed("open", &path)(io::ErrorKind::NotFound.into());
                let list = Cursor::open(&dir.into(), image)?.ok_or_else(missing)?;
                unknown.insert(list.into_pages());
            }
        }
        Ok(Self { index, files, path })
    }

    /// Returns the ranges of all pages, those of the newest directory first.
    pub fn newest_first(self: Rc<Self>) -> impl Iterator<Item = PageRange> + use<> {
        let newest = self.files.keys().next_back().copied();
        // A pass for each generation: sorting takes memory, and time before the first range.
        let generations = (0..=newest.unwrap_or(0)).rev();
        generations.flat_map(move |generation| {
            let this = Rc::clone(&self);
            (0..this.index.runs.len()).filter_map(move |number| {
                let run = this.index.runs[number];
                (run.generation == generation).then_some(run.range)
            })
        })
    }

    /// Reads pages from `address` on, up to a gap or the end of `buffer`. Returns their number.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Result<u64, FileError> {
        let mut at = address;
        let mut filled = 0;
        let runs = &self.index.runs;
        let first = runs.partition_point(|run| run.range.end() <= address);
        for run in &runs[first..] {
            let room = (buffer.len() - filled) as u64 / PAGE_SIZE * PAGE_SIZE;
            if run.range.start() > at || room == 0 {
                break;
            }
            let skip = at - run.range.start();
            let len = room.min(run.range.bytes() - skip);
            let part = &mut buffer[filled..filled + len as usize];
            self.files[&run.generation]
                .read_exact_at(part, run.offset + skip)
                .map_err(failed("read the pages of", &self.path))?;
            filled += len as usize;
            at += len;
        }
        Ok(filled as u64 / PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::DirName;
    use crate::image::catalog::Catalog;
    use crate::image::chain::levels;
    use crate::image::format::PagemapEntry;
    use crate::image::writer::DirWriter;
    use proptest::prelude::*;

    const IMAGE: ImageId = ImageId::Process(7);
    const PAGES: usize = 12;

    /// Writes one round. `step % 8` says what becomes of each page: missing (0), in the parent if that has it
    /// (3 and more), or new. Returns the expected content of each page, 0 if it is missing.
    fn put_round(home: &Path, round: u32, old: &[u8], steps: &[u8]) -> Vec<u8> {
        let mut writer = DirWriter::begin(home, DirName::Round(round)).unwrap();
        if round > 1 {
            writer.follow(DirName::Round(round - 1)).unwrap();
        }
        writer.open(IMAGE).unwrap();
        let mut new = vec![0; PAGES];
        for (page, &step) in steps.iter().enumerate() {
            let range = PageRange::new(page as u64 * PAGE_SIZE, 1).unwrap();
            let old = old.get(page).copied().unwrap_or(0);
            let (place, content) = match (step % 8, old) {
                (0, _) => continue,
                (3.., 1..) => (PageLocation::Parent, old),
                _ => (PageLocation::Present { lazy: true }, step.max(1)),
            };
            new[page] = content;
            let len = if place == PageLocation::Parent {
                0
            } else {
                PAGE_SIZE as usize
            };
            let entries = [PagemapEntry { range, place }];
            writer.put_as_is(&entries, &vec![content; len]).unwrap();
        }
        writer.publish().unwrap();
        new
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        /// However the index was made: loaded, advanced round by round, or written and read again.
        #[test]
        fn index_finds_the_newest_copy_of_every_page(
            rounds in prop::collection::vec(prop::collection::vec(any::<u8>(), PAGES), 1..6),
        ) {
            let home = tempfile::tempdir().unwrap();
            let (mut catalog, mut model) = (Catalog::default(), Vec::new());
            for (round, steps) in (1u32..).zip(&rounds) {
                model = put_round(home.path(), round, &model, steps);
                catalog.advance(home.path()).unwrap();
            }
            prop_assert_eq!(catalog.rounds() as usize, rounds.len());
            let levels = levels(&home.path().join(rounds.len().to_string())).unwrap();
            let loaded = Index::load(&levels, IMAGE).unwrap().unwrap();
            prop_assert_eq!(&loaded.runs, &catalog.get(IMAGE).unwrap().runs);
            let mut written = Vec::new();
            catalog.write(&mut written).unwrap();
            let read = Catalog::read(&mut &written[..]).unwrap();
            let (_, read) = read.into_images().next().unwrap();
            prop_assert_eq!(&loaded.runs, &read.runs);
            let newest = home.path().join(rounds.len().to_string());
            let whole = Catalog::load(&newest).unwrap();
            prop_assert_eq!(&loaded.runs, &whole.get(IMAGE).unwrap().runs);
            let pages = Pages::open(&levels, IMAGE, read).unwrap();
            for (page, &content) in model.iter().enumerate() {
                let mut buffer = vec![0xee; PAGE_SIZE as usize];
                let found = pages.read(page as u64 * PAGE_SIZE, &mut buffer).unwrap();
                prop_assert_eq!(found, u64::from(content != 0));
                prop_assert!(content == 0 || buffer.iter().all(|&byte| byte == content));
            }
        }
    }

    #[test]
    fn index_with_too_many_runs_is_refused() {
        let home = tempfile::tempdir().unwrap();
        put_round(home.path(), 1, &[], &[1, 0, 1, 0, 1, 0]);
        put_round(home.path(), 2, &[1, 0, 1, 0, 1, 0], &[3, 0, 3, 1, 3, 1]);
        let advance = |parent: &Index, round: &str, max_runs| {
            let dir = home.path().join(round);
            let generation = Generation {
                dir: &dir,
                number: 0,
            };
            Index::default().advance(parent, generation, IMAGE, max_runs)
        };
        let parent = advance(&Index::default(), "1", 3).unwrap().unwrap().index;
        assert_eq!(parent.runs.len(), 3);
        assert!(advance(&Index::default(), "1", 1).is_err());
        assert!(advance(&parent, "2", 3).is_err());
    }

    #[test]
    fn missing_pages_are_an_error_only_in_the_newest_round() {
        let home = tempfile::tempdir().unwrap();
        let entry = |page: u64, place| PagemapEntry {
            range: PageRange::new(page * PAGE_SIZE, 1).unwrap(),
            place,
        };
        let data = [1; PAGE_SIZE as usize];
        for (round, entries) in [
            (
                1,
                vec![
                    entry(1, PageLocation::Elsewhere),
                    entry(2, PageLocation::Present { lazy: false }),
                ],
            ),
            (
                2,
                vec![
                    entry(1, PageLocation::Parent),
                    entry(2, PageLocation::Parent),
                ],
            ),
            (3, vec![entry(2, PageLocation::Parent)]),
        ] {
            let mut writer = DirWriter::begin(home.path(), DirName::Round(round)).unwrap();
            if round > 1 {
                writer.follow(DirName::Round(round - 1)).unwrap();
            }
            writer.open(IMAGE).unwrap();
            let present = if round == 1 { &data[..] } else { &[] };
            writer.put_as_is(&entries, present).unwrap();
            writer.publish().unwrap();
        }
        let load = |round: &str| Index::load(&levels(&home.path().join(round)).unwrap(), IMAGE);
        assert_eq!(load("3").unwrap().unwrap().runs.len(), 1);
        assert!(load("2").is_err());
        assert!(Catalog::default().advance(home.path()).is_err());
    }
}
