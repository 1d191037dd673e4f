//! Shared segments of a migration, as the processes will have them: memfds, filled as rounds arrive, that
//! CRIU takes instead of reading the images. Without that the time to restore would grow with them.
//!
//! They are memory that the restored processes need anyway. Any that cannot be kept (no memory, no name)
//! is read from the images, and so is all that comes when little memory is left.

use crate::file_error::{FileError, failed};
use crate::image::index::{Catalog, Index, Pages};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pageferry_common::criu::images::records;
use pageferry_common::proc::meminfo::MemInfo;
use pageferry_common::wire::{Entry, EntryKind};
use pageferry_common::{ImageId, MemfdName, PageRange};
use prost::Message;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// How many bytes are kept before it is looked again how much memory is left.
const LOOK_AFTER: u64 = 16 << 20;

/// CRIU's image of all memfds.
const MEMFDS: &str = "memfd.img";

/// What CRIU's image says of one memfd, as far as it matters.
#[derive(Clone, PartialEq, Message)]
pub(super) struct MemfdInode {
    #[prost(string, required, tag = "1")]
    name: String,
    #[prost(uint64, required, tag = "4")]
    size: u64,
    #[prost(uint32, required, tag = "5")]
    shmid: u32,
    #[prost(uint32, required, tag = "6")]
    pub(super) seals: u32,
    #[prost(uint32, optional, tag = "8")]
    hugetlb_flag: Option<u32>,
}

/// The segments of a migration whose rounds arrive.
#[derive(Debug)]
pub struct Segments {
    memfds: BTreeMap<u64, Memfd>,
    /// Whose pages come now, if they are kept.
    open: Option<u64>,
    /// Bytes that may be kept before the next look.
    until_look: u64,
    is_short: fn() -> bool,
}

impl Default for Segments {
    fn default() -> Self {
        Self {
            memfds: BTreeMap::new(),
            open: None,
            until_look: 0,
            is_short: memory_is_short,
        }
    }
}

#[derive(Debug)]
struct Memfd {
    name: MemfdName,
    file: File,
}

impl Memfd {
    fn new(name: &MemfdName) -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(name.as_str(), flags)?);
        let name = name.clone();
        Ok(Self { name, file })
    }
}

impl Segments {
    /// What is put from now on belongs to an image; whether that has a parent.
    pub fn open(&mut self, image: ImageId, has_parent: bool) {
        self.open = match image {
            ImageId::Shmem(id) => Some(id),
            ImageId::Process(_) => None,
        };
        // What came before of one that has no parent is of another, or of no use.
        if let (Some(id), false) = (self.open, has_parent) {
            self.memfds.remove(&id);
        }
    }

    /// The open image is of a segment of that name. One is kept from its first round on; the id of one that
    /// is not kept and has a parent is returned, see [`Segments::recover`].
    pub fn name(&mut self, name: &MemfdName, has_parent: bool) -> Option<u64> {
        let id = self.open?;
        match self.memfds.get(&id) {
            Some(known) if known.name == *name => {}
            Some(_) => drop(self.memfds.remove(&id)),
            None if has_parent => return Some(id),
            None => match Memfd::new(name) {
                Ok(memfd) => drop(self.memfds.insert(id, memfd)),
                Err(error) => {
                    tracing::warn!(id, %error, "a shared segment will be read when restoring");
                }
            },
        }
        None
    }

    /// Keeps a segment from now on whose rounds so far were not kept: `pages` has them.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn recover(
        &mut self,
        id: u64,
        name: &MemfdName,
        index: &Index,
        pages: &Pages,
    ) -> Result<(), FileError> {
        let at = Path::new(name.as_str());
        let memfd = Memfd::new(name).map_err(failed("make", at))?;
        let mut buffer = vec![0; 1 << 20];
        for range in index.ranges() {
            let mut rest = Some(range);
            while let Some(range) = rest {
                let read = pages.read(range.start(), &mut buffer)?;
                let (now, later) = range.split_at(read);
                let Some(now) = now else {
                    return Err(failed("fill", at)(io::ErrorKind::UnexpectedEof.into()));
                };
                if self.has_no_room(now.bytes()) {
                    let short = io::Error::other("little memory is left");
                    return Err(failed("fill", at)(short));
                }
                let content = &buffer[..now.bytes() as usize];
                let write = memfd.file.write_all_at(content, now.start());
                write.map_err(failed("fill", at))?;
                rest = later;
            }
        }
        self.memfds.insert(id, memfd);
        Ok(())
    }

    /// Whether there is too little memory to keep so many bytes.
    fn has_no_room(&mut self, bytes: u64) -> bool {
        match self.until_look.checked_sub(bytes) {
            Some(rest) => {
                self.until_look = rest;
                false
            }
            None => {
                let short = (self.is_short)();
                if !short {
                    self.until_look = LOOK_AFTER;
                }
                short
            }
        }
    }

    /// Keeps a chunk of the open image.
    pub fn put(&mut self, entries: &[Entry], pages: &[u8]) {
        let Some(id) = self.open.filter(|id| self.memfds.contains_key(id)) else {
            return;
        };
        if self.has_no_room(pages.len() as u64) {
            tracing::warn!(
                id,
                "little memory is left: a shared segment will be read when restoring"
            );
            self.memfds.remove(&id);
            return;
        }
        let memfd = &self.memfds[&id];
        let mut rest = pages;
        let kept = entries.iter().try_for_each(|entry| match entry.kind {
            EntryKind::Data => {
                let (now, later) = rest.split_at(entry.range.bytes() as usize);
                rest = later;
                memfd.file.write_all_at(now, entry.range.start())
            }
            EntryKind::Zero => punch(&memfd.file, entry.range),
            EntryKind::Parent | EntryKind::Copy => Ok(()),
        });
        if let Err(error) = kept {
            tracing::warn!(id, %error, "a shared segment will be read when restoring");
            self.memfds.remove(&id);
        }
    }

    /// Those that CRIU would make when it restores from `round`, that of `catalog`, each as it would be
    /// with its pages.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn finish(&mut self, round: &Path, catalog: &Catalog) -> Result<Prefilled, FileError> {
        let mut ready = BTreeMap::new();
        let path = round.join(MEMFDS);
        let records = records::<MemfdInode>(&path).map_err(failed("understand", &path))?;
        for memfd in records {
            let id = u64::from(memfd.shmid);
            let ours = self.memfds.remove(&id);
            let Some(ours) = ours.filter(|ours| ours.name.as_str() == memfd.name) else {
                continue;
            };
            if memfd.hugetlb_flag.unwrap_or(0) != 0 || memfd.size == 0 {
                continue;
            }
            let Some(index) = catalog.get(ImageId::Shmem(id)) else {
                continue;
            };
            match complete(&ours.file, &memfd, index) {
                Ok(()) => drop(ready.insert(id, ours.file)),
                Err(error) => {
                    tracing::warn!(id, %error, "a shared segment is read when restoring");
                }
            }
        }
        self.memfds.clear();
        Ok(Prefilled(ready))
    }
}

/// Whether less than a quarter of this host's memory is left for others.
fn memory_is_short() -> bool {
    MemInfo::read().is_ok_and(is_short)
}

fn is_short(memory: MemInfo) -> bool {
    match (memory.available, memory.total) {
        (Some(available), Some(total)) => available < total / 4,
        _ => false,
    }
}

/// Gives a memfd its size, takes away the pages that the last round does not list any more, and seals it
/// if no seal may be added: that is all that tells a memfd that was never to have any.
fn complete(file: &File, memfd: &MemfdInode, pages: &Index) -> io::Result<()> {
    let mut end = 0;
    for range in pages.ranges() {
        if let Some(gap) = PageRange::from_bounds(end, range.start()) {
            punch(file, gap)?;
        }
        end = range.end();
    }
    file.set_len(end)?;
    file.set_len(memfd.size)?;
    let seals = SealFlag::from_bits_truncate(memfd.seals.cast_signed());
    if seals == SealFlag::F_SEAL_SEAL {
        fcntl(file, FcntlArg::F_ADD_SEALS(seals))?;
    }
    Ok(())
}

fn punch(file: &File, range: PageRange) -> io::Result<()> {
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (start, bytes) = (range.start().cast_signed(), range.bytes().cast_signed());
    Ok(fallocate(file, hole, start, bytes)?)
}

/// Segments with all their pages, by their ids.
#[derive(Debug, Default)]
pub struct Prefilled(pub(super) BTreeMap<u64, File>);

impl Prefilled {
    /// Whether a segment is among them: its images need not be read.
    #[must_use]
    pub fn has(&self, id: u64) -> bool {
        self.0.contains_key(&id)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::image::DirName;
    use crate::image::chain::levels;
    use crate::image::writer::DirWriter;
    use pageferry_common::PAGE_SIZE;
    use proptest::prelude::*;
    use std::fs;

    const PAGE: usize = PAGE_SIZE as usize;
    pub(in crate::restore) const ID: u64 = 7;
    const NAME: &str = "/dev/zero";

    /// One round: each page is not there (0), data, zero (2), or kept if it was there (3).
    pub(in crate::restore) fn put_round(
        home: &Path,
        segments: &mut Segments,
        round: u32,
        old: &[Option<u8>],
        steps: &[u8],
    ) -> Vec<Option<u8>> {
        let mut writer = DirWriter::begin(home, DirName::Round(round)).unwrap();
        if round > 1 {
            writer.follow(DirName::Round(round - 1)).unwrap();
        }
        writer.write_inventory(1).unwrap();
        let image = ImageId::Shmem(ID);
        let has_parent = writer.open(image).unwrap();
        segments.open(image, has_parent);
        segments.name(&MemfdName::new(NAME).unwrap(), has_parent);
        let mut new = vec![None; steps.len()];
        for (page, &step) in steps.iter().enumerate() {
            let (kind, content) = match (step % 6, old.get(page).copied().flatten()) {
                (0, _) => continue,
                (2, _) => (EntryKind::Zero, 0),
                (3.., Some(old)) => (EntryKind::Parent, old),
                _ => (EntryKind::Data, step),
            };
            let range = PageRange::new(page as u64 * PAGE_SIZE, 1).unwrap();
            let data = vec![content; if kind == EntryKind::Data { PAGE } else { 0 }];
            let entries = [Entry { range, kind }];
            writer.put(&entries, &data).unwrap();
            segments.put(&entries, &data);
            new[page] = Some(content);
        }
        writer.commit().unwrap();
        new
    }

    fn memfd_image(memfd: &MemfdInode) -> Vec<u8> {
        let record = memfd.encode_to_vec();
        let mut image = b"magicTWO".to_vec();
        image.extend((record.len() as u32).to_le_bytes());
        image.extend(record);
        image
    }

    pub(in crate::restore) fn memfd(pages: usize) -> MemfdInode {
        MemfdInode {
            name: NAME.to_owned(),
            size: (pages * PAGE) as u64,
            shmid: ID as u32,
            seals: 0,
            hugetlb_flag: None,
        }
    }

    pub(in crate::restore) fn finish(
        home: &Path,
        segments: &mut Segments,
        round: u32,
        memfd: &MemfdInode,
    ) -> Prefilled {
        let top = home.join(round.to_string());
        fs::write(top.join(MEMFDS), memfd_image(memfd)).unwrap();
        let mut catalog = Catalog::default();
        (0..round).for_each(|_| catalog.advance(home).unwrap());
        segments.finish(&top, &catalog).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn a_segment_is_what_the_last_round_says(
            rounds in prop::collection::vec(prop::collection::vec(any::<u8>(), 8), 1..5),
        ) {
            let home = tempfile::tempdir().unwrap();
            let mut segments = Segments::default();
            let mut model = Vec::new();
            for (round, steps) in (1u32..).zip(&rounds) {
                model = put_round(home.path(), &mut segments, round, &model, steps);
            }
            // As long as the pages, or longer.
            let memfd = memfd(model.len() + 2);
            let ready = finish(home.path(), &mut segments, rounds.len() as u32, &memfd);
            prop_assert!(ready.has(ID));
            let mut content = vec![1; (model.len() + 2) * PAGE];
            ready.0[&ID].read_exact_at(&mut content, 0).unwrap();
            for (index, page) in content.chunks(PAGE).enumerate() {
                let byte = model.get(index).copied().flatten().unwrap_or(0);
                prop_assert!(page.iter().all(|&found| found == byte), "page {index}");
            }
            prop_assert_eq!(ready.0[&ID].metadata().unwrap().len(), memfd.size);
        }
    }

    #[test]
    fn only_what_criu_would_make_alike_is_given() {
        let (good, steps) = (memfd(8), [1; 8]);
        for (memfd, fine) in [
            (good.clone(), true),
            (
                MemfdInode {
                    name: "other".to_owned(),
                    ..good.clone()
                },
                false,
            ),
            (
                MemfdInode {
                    hugetlb_flag: Some(21 << 26),
                    ..good.clone()
                },
                false,
            ),
            (
                MemfdInode {
                    shmid: 8,
                    ..good.clone()
                },
                false,
            ),
            (
                MemfdInode {
                    size: 0,
                    ..good.clone()
                },
                false,
            ),
        ] {
            let home = tempfile::tempdir().unwrap();
            let mut segments = Segments::default();
            put_round(home.path(), &mut segments, 1, &[], &steps);
            let ready = finish(home.path(), &mut segments, 1, &memfd);
            assert_eq!(ready.has(ID), fine, "{memfd:?}");
        }
        // One that was not kept from its beginning.
        let home = tempfile::tempdir().unwrap();
        let old = put_round(home.path(), &mut Segments::default(), 1, &[], &steps);
        let mut segments = Segments::default();
        put_round(home.path(), &mut segments, 2, &old, &[3; 8]);
        assert!(finish(home.path(), &mut segments, 2, &good).is_empty());
    }

    #[test]
    fn nothing_is_kept_when_little_memory_is_left() {
        let home = tempfile::tempdir().unwrap();
        let mut segments = Segments {
            is_short: || true,
            ..Segments::default()
        };
        put_round(home.path(), &mut segments, 1, &[], &[1; 8]);
        assert!(finish(home.path(), &mut segments, 1, &memfd(8)).is_empty());
        let (chain, image) = (levels(&home.path().join("1")).unwrap(), ImageId::Shmem(ID));
        let index = Index::load(&chain, image).unwrap().unwrap();
        let pages = Pages::open(&chain, image, index.clone()).unwrap();
        let name = MemfdName::new(NAME).unwrap();
        let recovered = segments.recover(ID, &name, &index, &pages);
        assert!(
            recovered
                .unwrap_err()
                .source
                .to_string()
                .contains("little memory")
        );
        let memory = |available| MemInfo {
            total: Some(4000),
            available,
        };
        assert!(is_short(memory(Some(999))) && !is_short(memory(Some(1000))));
        assert!(!is_short(memory(None)));
    }
}
