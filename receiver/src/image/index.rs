//! An image with its pages found, for reading in any order.

use super::chain::{Cursor, Levels};
use super::{FileError, failed};
use pageferry_common::{ImageId, PAGE_SIZE, PageRange};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// One image through all levels of a chain. Its memory grows with the entries, not with the pages.
#[derive(Debug)]
pub struct Index {
    image: ImageId,
    /// Ascending.
    runs: Vec<Run>,
    /// The pages files, by level.
    files: BTreeMap<usize, File>,
    levels: Levels,
}

/// Pages that lie together in memory and in a file.
#[derive(Debug, Clone, Copy)]
struct Run {
    range: PageRange,
    level: usize,
    offset: u64,
}

impl Index {
    /// Reads where an image's pages are; `None` if it is not in the first of `levels`.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn load(levels: &Levels, image: ImageId) -> Result<Option<Self>, FileError> {
        let (Some(mut list), Some(mut cursor)) =
            (Cursor::open(levels, image)?, Cursor::open(levels, image)?)
        else {
            return Ok(None);
        };
        let mut index = Self {
            image,
            runs: Vec::new(),
            files: BTreeMap::new(),
            levels: levels.clone(),
        };
        while let Some(entry) = list.next_entry()? {
            cursor.read(entry.range, &mut |found| {
                if let std::collections::btree_map::Entry::Vacant(unknown) =
                    index.files.entry(found.level)
                {
                    let file = found.file.try_clone();
                    unknown.insert(file.map_err(failed("open", &levels[found.level]))?);
                }
                index.add(Run {
                    range: found.range,
                    level: found.level,
                    offset: found.offset,
                });
                Ok(())
            })?;
        }
        Ok(Some(index))
    }

    fn add(&mut self, next: Run) {
        if let Some(last) = self.runs.last_mut()
            && last.level == next.level
            && last.offset + last.range.bytes() == next.offset
            && let Some(range) = last.range.joined(next.range)
        {
            last.range = range;
            return;
        }
        self.runs.push(next);
    }

    /// Where its pages are in memory, those of the newest level first.
    #[must_use]
    pub fn by_age(&self) -> Vec<PageRange> {
        let mut runs: Vec<_> = self.runs.iter().collect();
        runs.sort_by_key(|run| run.level);
        runs.iter().map(|run| run.range).collect()
    }

    /// Reads the pages from `address` on, as many as there are without a gap and fit into `buffer`.
    /// Returns how many.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Result<u64, FileError> {
        let mut at = address;
        let mut filled = 0;
        let first = self.runs.partition_point(|run| run.range.end() <= address);
        for run in &self.runs[first..] {
            let room = (buffer.len() - filled) as u64 / PAGE_SIZE * PAGE_SIZE;
            if run.range.start() > at || room == 0 {
                break;
            }
            let skip = at - run.range.start();
            let len = room.min(run.range.bytes() - skip);
            let part = &mut buffer[filled..filled + len as usize];
            self.files[&run.level]
                .read_exact_at(part, run.offset + skip)
                .map_err(|error| self.failed(run.level, error))?;
            filled += len as usize;
            at += len;
        }
        Ok(filled as u64 / PAGE_SIZE)
    }

    fn failed(&self, level: usize, error: io::Error) -> FileError {
        let path = self.levels[level].join(self.image.pagemap_name());
        failed("read the pages of", &path)(error)
    }
}
