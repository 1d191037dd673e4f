//! Where the pages of images are, for reading in any order.

pub use super::catalog::Catalog;
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

/// One image through all directories of a chain. Its memory grows with the entries, not with the pages.
#[derive(Debug, Clone, Default)]
pub struct Index {
    /// Ascending.
    pub(super) runs: Vec<Run>,
}

/// Pages that lie together in memory and in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) range: PageRange,
    /// Directories of the chain that are behind the one that has them.
    pub(super) behind: usize,
    /// Where they begin in the pages file, bytes.
    pub(super) offset: u64,
}

impl Index {
    /// Reads where an image's pages are; `None` if it is not in the first of `levels`.
    ///
    /// # Errors
    /// [`FileError`], also if one of its pages is nowhere.
    pub fn load(levels: &Levels, image: ImageId) -> Result<Option<Self>, FileError> {
        let mut newest = None;
        for (behind, dir) in levels.iter().rev().enumerate() {
            let parent = newest.map(|(index, _)| index).unwrap_or_default();
            newest = Self::default().follow(&parent, dir, behind, image, usize::MAX)?;
        }
        newest
            .map(|newest| complete(newest, &levels[0], image))
            .transpose()
    }

    /// Becomes that of the image in `dir`, which has so many directories behind it, `parent` being that of the
    /// next of these; and the first pages that are said to be there, and are not. `None` if the image is not in
    /// `dir`. That it would have more than so many runs is an error.
    pub(super) fn follow(
        mut self,
        parent: &Self,
        dir: &Path,
        behind: usize,
        image: ImageId,
        most: usize,
    ) -> Result<Option<(Self, Option<PageRange>)>, FileError> {
        let Some(mut list) = Cursor::open(&[dir.to_owned()].into(), image)? else {
            return Ok(None);
        };
        self.runs.clear();
        let mut nowhere = None;
        let mut parent = parent.runs.iter().copied().peekable();
        while let Some(entry) = list.next_entry()? {
            // Whatever is in the parent was within the limit, so it is passed by no more than once.
            if self.runs.len() > most {
                let error = io::Error::other("it is in too many pieces");
                return Err(failed("keep the index of", dir)(error));
            }
            let range = entry.range;
            if let PageLocation::Present { .. } = entry.place {
                let offset = list.offset();
                self.add(Run {
                    range,
                    behind,
                    offset,
                });
                continue;
            }
            let mut at = range.start();
            while parent.next_if(|run| run.range.end() <= at).is_some() {}
            while let (PageLocation::Parent, Some(run)) = (entry.place, parent.peek())
                && let Some(found) = run.range.intersect(range)
            {
                // The rest of the entry may be there all the same.
                nowhere = nowhere.or(PageRange::from_bounds(at, found.start()));
                let skip = found.start() - run.range.start();
                self.add(Run {
                    range: found,
                    behind: run.behind,
                    offset: run.offset + skip,
                });
                at = found.end();
                // The next entry may be in the same run.
                if at < run.range.end() {
                    break;
                }
                parent.next();
            }
            nowhere = nowhere.or(PageRange::from_bounds(at, range.end()));
        }
        Ok(Some((self, nowhere)))
    }

    fn add(&mut self, next: Run) {
        if let Some(last) = self.runs.last_mut()
            && last.behind == next.behind
            && last.offset + last.range.bytes() == next.offset
            && let Some(range) = last.range.joined(next.range)
        {
            last.range = range;
            return;
        }
        self.runs.push(next);
    }

    /// Its pages, ascending, those that lie together in one range.
    pub fn ranges(&self) -> impl Iterator<Item = PageRange> + '_ {
        let together = |one: &Run, next: &Run| one.range.end() == next.range.start();
        self.runs.chunk_by(together).filter_map(|runs| {
            let (first, last) = (runs.first()?, runs.last()?);
            PageRange::from_bounds(first.range.start(), last.range.end())
        })
    }
}

/// An index that all pages are in.
pub(super) fn complete(
    (index, nowhere): (Index, Option<PageRange>),
    dir: &Path,
    image: ImageId,
) -> Result<Index, FileError> {
    match nowhere {
        None => Ok(index),
        Some(range) => {
            let what = format!("pages {range} are nowhere in the chain");
            let error = io::Error::new(io::ErrorKind::InvalidData, what);
            Err(failed("resolve", &dir.join(image.pagemap_name()))(error))
        }
    }
}

/// The pages of an image, wherever in a chain they are.
#[derive(Debug)]
pub struct Pages {
    index: Index,
    /// By how many directories are behind.
    files: BTreeMap<usize, File>,
    /// Its pagemap in the newest directory.
    path: PathBuf,
}

impl Pages {
    /// Opens the files that have them.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn open(levels: &Levels, image: ImageId, index: Index) -> Result<Self, FileError> {
        let path = levels[0].join(image.pagemap_name());
        let mut files = BTreeMap::new();
        for run in &index.runs {
            if let Entry::Vacant(unknown) = files.entry(run.behind) {
                let dir = levels.iter().rev().nth(run.behind);
                let dir = [dir.unwrap_or(&levels[0]).clone()];
                let gone = || failed("open", &path)(io::ErrorKind::NotFound.into());
                let list = Cursor::open(&dir.into(), image)?.ok_or_else(gone)?;
                unknown.insert(list.into_pages());
            }
        }
        Ok(Self { index, files, path })
    }

    /// Where they are in memory, those of the newest directory first.
    pub fn by_age(self: Rc<Self>) -> impl Iterator<Item = PageRange> + use<> {
        let newest = self.files.keys().next_back().copied();
        // They are not sorted, for that takes memory, and time before the first.
        let ages = (0..=newest.unwrap_or(0)).rev();
        ages.flat_map(move |behind| {
            let this = Rc::clone(&self);
            (0..this.index.runs.len()).filter_map(move |number| {
                let run = this.index.runs[number];
                (run.behind == behind).then_some(run.range)
            })
        })
    }

    /// Reads the pages from `address` on, as many as there are without a gap and fit into `buffer`.
    /// Returns how many.
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
            self.files[&run.behind]
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
    use crate::image::catalog::write_words;
    use crate::image::chain::levels;
    use crate::image::format::PagemapEntry;
    use crate::image::writer::DirWriter;
    use proptest::prelude::*;

    const IMAGE: ImageId = ImageId::Process(7);
    const PAGES: usize = 12;

    /// One round: each page is not there (0), new, or kept if it was there (3 and more).
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

    #[test]
    fn what_is_written_of_no_index_is_not_read() {
        let read = |runs: &[[u64; 4]]| {
            let mut bytes = Vec::new();
            write_words(&mut bytes, [1, 7, runs.len() as u64]).unwrap();
            runs.iter()
                .for_each(|&run| write_words(&mut bytes, run).unwrap());
            Catalog::read(&mut &bytes[..])
                .map(drop)
                .map_err(|error| error.kind())
        };
        let run = |page: u64, pages, offset| [page * PAGE_SIZE, pages, 0, offset];
        read(&[run(1, 2, 0), run(3, 1, 0)]).unwrap();
        for bad in [
            &[run(3, 1, 0), run(1, 2, 0)][..],
            &[run(1, 3, 0), run(3, 1, 0)],
            &[run(1, 1, u64::MAX - 7)],
        ] {
            assert_eq!(read(bad), Err(io::ErrorKind::InvalidData), "{bad:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        /// Every page is found with what was put there last, by whichever way the index was made.
        #[test]
        fn it_finds_what_was_put(
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
            let pages = Pages::open(&levels, IMAGE, read).unwrap();
            for (page, &content) in model.iter().enumerate() {
                let mut buffer = vec![0xee; PAGE_SIZE as usize];
                let found = pages.read(page as u64 * PAGE_SIZE, &mut buffer).unwrap();
                prop_assert_eq!(found, u64::from(content != 0));
                prop_assert!(content == 0 || buffer.iter().all(|&byte| byte == content));
            }
        }

        #[test]
        fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Catalog::read(&mut &bytes[..]);
        }
    }

    #[test]
    fn an_index_of_too_many_pieces_is_given_up() {
        let home = tempfile::tempdir().unwrap();
        put_round(home.path(), 1, &[], &[1, 0, 1, 0, 1, 0]);
        put_round(home.path(), 2, &[1, 0, 1, 0, 1, 0], &[3, 0, 3, 1, 3, 1]);
        let follow = |parent: &Index, round: &str, most| {
            let dir = home.path().join(round);
            Index::default().follow(parent, &dir, 0, IMAGE, most)
        };
        let (parent, _) = follow(&Index::default(), "1", 3).unwrap().unwrap();
        assert_eq!(parent.runs.len(), 3);
        assert!(follow(&Index::default(), "1", 1).is_err());
        assert!(follow(&parent, "2", 3).is_err());
    }

    #[test]
    fn pages_that_are_nowhere_are_missed_only_in_the_newest() {
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
