//! All images of a migration's newest round.

use super::DirName;
use super::chain::images;
use super::index::{Index, Run, complete};
use crate::file_error::FileError;
use pageferry_common::{ImageId, PageRange};
use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::path::Path;

/// Most runs of all images that a [`Catalog`] has, 128 MiB of them: twice as much while it takes a round.
const RUNS_MAX: usize = 1 << 22;

/// All images of a migration's newest round. Kept from round to round, so that what is read of them when the
/// process moves is only what is new in the last.
#[derive(Debug, Default)]
pub struct Catalog {
    images: BTreeMap<ImageId, Index>,
    rounds: u32,
    /// Its memory is used for the next: new memory is slow.
    spare: Index,
}

impl Catalog {
    /// Takes the next round, complete, of the migration at `home`.
    ///
    /// # Errors
    /// [`FileError`], also if it would have more than 4 million runs.
    pub fn advance(&mut self, home: &Path) -> Result<(), FileError> {
        let dir = home.join(DirName::Round(self.rounds + 1).to_string());
        let mut next = BTreeMap::new();
        let mut room = RUNS_MAX;
        for image in images(&dir)? {
            let parent = self.images.remove(&image).unwrap_or_default();
            let spare = std::mem::take(&mut self.spare);
            let index = spare.follow(&parent, &dir, self.rounds as usize, image, room)?;
            let index = complete(index.expect("it was listed"), &dir, image)?;
            self.spare = parent;
            room = room.saturating_sub(index.runs.len());
            next.insert(image, index);
        }
        self.images = next;
        self.rounds += 1;
        Ok(())
    }

    /// The newest round.
    #[must_use]
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Each image with its index.
    pub fn images(&self) -> impl Iterator<Item = (ImageId, &Index)> {
        self.images.iter().map(|(&image, index)| (image, index))
    }

    /// Each image with its index, for good.
    pub fn into_images(self) -> impl Iterator<Item = (ImageId, Index)> {
        self.images.into_iter()
    }

    /// The index of one image.
    #[must_use]
    pub fn get(&self, image: ImageId) -> Option<&Index> {
        self.images.get(&image)
    }

    /// Writes what it says of processes, for [`Catalog::read`].
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let tasks = self
            .images
            .iter()
            .filter_map(|(&image, index)| match image {
                ImageId::Process(pid) => Some((pid, index)),
                ImageId::Shmem(_) => None,
            });
        write_words(out, [tasks.clone().count() as u64])?;
        for (pid, index) in tasks {
            write_words(out, [pid.into(), index.runs.len() as u64])?;
            for &Run {
                range,
                behind,
                offset,
            } in &index.runs
            {
                let words = [range.start(), range.pages(), behind as u64, offset];
                write_words(out, words)?;
            }
        }
        Ok(())
    }

    /// Reads what was written; it is of no round.
    ///
    /// # Errors
    /// `InvalidData` for what is none (runs that do not ascend, or end nowhere), `UnexpectedEof` for a part of
    /// one; those of `input`.
    pub fn read(input: &mut impl BufRead) -> io::Result<Self> {
        let mut catalog = Self::default();
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let [tasks] = read_words(input)?;
        for _ in 0..tasks {
            let [pid, count] = read_words(input)?;
            let mut index = Index::default();
            // It may say anything.
            index.runs.reserve(count.min(RUNS_MAX as u64) as usize);
            for _ in 0..count {
                let [start, pages, behind, offset] = read_words(input)?;
                let range = PageRange::new(start, pages).map_err(|_| invalid())?;
                let before = index.runs.last().map_or(0, |run| run.range.end());
                if range.start() < before || offset.checked_add(range.bytes()).is_none() {
                    return Err(invalid());
                }
                index.runs.push(Run {
                    range,
                    behind: behind as usize,
                    offset,
                });
            }
            let image = ImageId::Process(u32::try_from(pid).map_err(|_| invalid())?);
            catalog.images.insert(image, index);
        }
        Ok(catalog)
    }
}

pub(super) fn write_words<const N: usize>(out: &mut impl Write, words: [u64; N]) -> io::Result<()> {
    let mut bytes = words.iter().map(|word| word.to_le_bytes());
    bytes.try_for_each(|bytes| out.write_all(&bytes))
}

fn read_words<const N: usize>(input: &mut impl BufRead) -> io::Result<[u64; N]> {
    let mut words = [0; N];
    for word in &mut words {
        let mut bytes = [0; size_of::<u64>()];
        input.read_exact(&mut bytes)?;
        *word = u64::from_le_bytes(bytes);
    }
    Ok(words)
}
