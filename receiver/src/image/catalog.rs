//! Catalog of a migration: the index of every image of its newest round.

use super::DirName;
use super::chain::{images, levels};
use super::index::{Generation, Index, Run};
use crate::file_error::FileError;
use pageferry_common::{ImageId, PageRange};
use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::path::Path;

/// Most runs in all indexes of a [`Catalog`]: 128 MiB of memory, and twice that while it takes in a round.
const RUNS_MAX: usize = 1 << 22;

/// Index of every image of a migration's newest round. Kept from round to round, so that a hand-over reads
/// only the pagemaps of the last.
#[derive(Debug, Default)]
pub struct Catalog {
    images: BTreeMap<ImageId, Index>,
    rounds: u32,
    /// Memory for the next index: allocating it anew is slow.
    spare: Index,
}

impl Catalog {
    /// Takes in the next round of the migration in `home`, which must be complete.
    ///
    /// # Errors
    /// [`FileError`], also if there are more than 4 million runs.
    pub fn advance(&mut self, home: &Path) -> Result<(), FileError> {
        let dir = home.join(DirName::Round(self.rounds + 1).to_string());
        let generation = Generation {
            dir: &dir,
            number: self.rounds as usize,
        };
        let mut next = BTreeMap::new();
        let mut room = RUNS_MAX;
        for image in images(&dir)? {
            let parent = self.images.remove(&image).unwrap_or_default();
            let spare = std::mem::take(&mut self.spare);
            let index = spare.advance(&parent, generation, image, room)?;
            let index = index.expect("it was listed").resolved(&dir, image)?;
            self.spare = parent;
            room = room.saturating_sub(index.runs.len());
            next.insert(image, index);
        }
        self.images = next;
        self.rounds += 1;
        Ok(())
    }

    /// Loads the indexes of all processes of a round from its chain. The result has no round number.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn load(round: &Path) -> Result<Self, FileError> {
        let chain = levels(round)?;
        let mut catalog = Self::default();
        for image in images(round)? {
            if let ImageId::Process(_) = image
                && let Some(index) = Index::load(&chain, image)?
            {
                catalog.images.insert(image, index);
            }
        }
        Ok(catalog)
    }

    /// Returns the number of the newest round.
    #[must_use]
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Returns each image with its index.
    pub fn images(&self) -> impl Iterator<Item = (ImageId, &Index)> {
        self.images.iter().map(|(&image, index)| (image, index))
    }

    /// Returns each image with its index, owned.
    pub fn into_images(self) -> impl Iterator<Item = (ImageId, Index)> {
        self.images.into_iter()
    }

    /// Returns the index of one image.
    #[must_use]
    pub fn get(&self, image: ImageId) -> Option<&Index> {
        self.images.get(&image)
    }

    /// Writes the indexes of all processes, for [`Catalog::read`].
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let processes = self
            .images
            .iter()
            .filter_map(|(&image, index)| match image {
                ImageId::Process(pid) => Some((pid, index)),
                ImageId::Shmem(_) => None,
            });
        write_words(out, [processes.clone().count() as u64])?;
        for (pid, index) in processes {
            write_words(out, [pid.into(), index.runs.len() as u64])?;
            for run in &index.runs {
                let (range, generation) = (run.range, run.generation as u64);
                write_words(out, [range.start(), range.pages(), generation, run.offset])?;
            }
        }
        Ok(())
    }

    /// Reads what [`Catalog::write`] has written. The result has no round number.
    ///
    /// # Errors
    /// `InvalidData` for bytes that are not a catalog (runs that do not ascend, or whose offset overflows),
    /// `UnexpectedEof` if they are truncated; those of `input`.
    pub fn read(input: &mut impl BufRead) -> io::Result<Self> {
        let mut catalog = Self::default();
        let [processes] = read_words(input)?;
        for _ in 0..processes {
            let [pid, runs] = read_words(input)?;
            let pid = u32::try_from(pid).map_err(|_| invalid())?;
            let index = read_index(input, runs)?;
            catalog.images.insert(ImageId::Process(pid), index);
        }
        Ok(catalog)
    }
}

fn read_index(input: &mut impl BufRead, runs: u64) -> io::Result<Index> {
    let mut index = Index::default();
    // Bounded: the number is not checked yet.
    index.runs.reserve(runs.min(RUNS_MAX as u64) as usize);
    for _ in 0..runs {
        let [start, pages, generation, offset] = read_words(input)?;
        let range = PageRange::new(start, pages).map_err(|_| invalid())?;
        let before = index.runs.last().map_or(0, |run| run.range.end());
        if range.start() < before || offset.checked_add(range.bytes()).is_none() {
            return Err(invalid());
        }
        index.runs.push(Run {
            range,
            generation: generation as usize,
            offset,
        });
    }
    Ok(index)
}

fn invalid() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

fn write_words<const N: usize>(out: &mut impl Write, words: [u64; N]) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_common::PAGE_SIZE;
    use proptest::prelude::*;

    #[test]
    fn runs_that_are_not_an_index_are_refused() {
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
        #[test]
        fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Catalog::read(&mut &bytes[..]);
        }
    }
}
