//! Shared segments of a migration in memory: memfds, filled as rounds arrive, that CRIU takes instead of
//! reading the images. Without them, the time to restore would grow with the size of the segments.
//!
//! They take memory that the restored processes need anyway. A segment that cannot be kept in memory (because
//! it has no name, or not enough memory is available) is read from the images when restoring.

use crate::file_error::{FileError, failed};
use crate::image::catalog::Catalog;
use crate::image::index::{Index, Pages};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pageferry_common::criu::images::{MemfdInode, records};
use pageferry_common::proc::meminfo::MemInfo;
use pageferry_common::wire::{Entry, EntryKind};
use pageferry_common::{ImageId, MemfdName, PageRange};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes written to memfds between two checks of the available memory.
const CHECK_INTERVAL: u64 = 16 << 20;

/// Size of the buffer that recovered segments are read through, bytes.
const RECOVERY_BUFFER: usize = 1 << 20;

/// Name of CRIU's image of all memfds.
const MEMFDS: &str = "memfd.img";

/// Segments of a migration, while its rounds arrive.
#[derive(Debug)]
pub struct Segments {
    memfds: BTreeMap<u64, Memfd>,
    /// Segment of the open image.
    open: Option<u64>,
    /// Bytes that may be written before the next check of the available memory.
    until_check: u64,
    is_short: fn() -> bool,
}

impl Default for Segments {
    fn default() -> Self {
        Self {
            memfds: BTreeMap::new(),
            open: None,
            until_check: 0,
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

    /// Writes a chunk. Pages that are in the parent are in the memfd already.
    fn put(&self, entries: &[Entry], pages: &[u8]) -> io::Result<()> {
        let mut rest = pages;
        for entry in entries {
            match entry.kind {
                EntryKind::Data => {
                    let (now, later) = rest.split_at(entry.range.bytes() as usize);
                    rest = later;
                    self.file.write_all_at(now, entry.range.start())?;
                }
                EntryKind::Zero => punch(&self.file, entry.range)?,
                EntryKind::Parent | EntryKind::Copy => {}
            }
        }
        Ok(())
    }
}

impl Segments {
    /// Opens an image: chunks put from now on belong to it. `has_parent` is whether the round before has the
    /// image, too.
    pub fn open(&mut self, image: ImageId, has_parent: bool) {
        self.open = match image {
            ImageId::Shmem(id) => Some(id),
            ImageId::Process(_) => None,
        };
        // Without a parent, an earlier memfd with this id is of another segment, or useless.
        if let (Some(id), false) = (self.open, has_parent) {
            self.memfds.remove(&id);
        }
    }

    /// Sets the name of the segment of the open image, and keeps the segment in memory from its first round
    /// on. Returns the segment's id if that is impossible because the segment has a parent and no memfd:
    /// [`Segments::recover`] can then create one.
    pub fn set_name(&mut self, name: &MemfdName, has_parent: bool) -> Option<u64> {
        let id = self.open?;
        match self.memfds.get(&id) {
            Some(memfd) if memfd.name == *name => {}
            Some(_) => drop(self.memfds.remove(&id)),
            None if has_parent => return Some(id),
            None => match Memfd::new(name) {
                Ok(memfd) => drop(self.memfds.insert(id, memfd)),
                Err(error) => warn_not_kept(id, &error),
            },
        }
        None
    }

    /// Keeps a segment in memory from now on. Its earlier rounds arrived over another connection: reads their
    /// content from `pages`.
    ///
    /// # Errors
    /// [`FileError`], also if not enough memory is available.
    pub fn recover(
        &mut self,
        id: u64,
        name: &MemfdName,
        index: &Index,
        pages: &Pages,
    ) -> Result<(), FileError> {
        let at = Path::new(name.as_str());
        let memfd = Memfd::new(name).map_err(failed("create", at))?;
        let mut buffer = vec![0; RECOVERY_BUFFER];
        for range in index.ranges() {
            let mut rest = Some(range);
            while let Some(range) = rest {
                let read = pages.read(range.start(), &mut buffer)?;
                let (now, later) = range.split_at(read);
                let Some(now) = now else {
                    return Err(failed("fill", at)(io::ErrorKind::UnexpectedEof.into()));
                };
                if !self.reserve(now.bytes()) {
                    let short = io::Error::new(
                        io::ErrorKind::OutOfMemory,
                        "not enough memory is available",
                    );
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

    /// Returns whether enough memory is available to keep this number of bytes more. Looks at the available
    /// memory only once for every [`CHECK_INTERVAL`].
    fn reserve(&mut self, bytes: u64) -> bool {
        match self.until_check.checked_sub(bytes) {
            Some(rest) => {
                self.until_check = rest;
                true
            }
            None if (self.is_short)() => false,
            None => {
                self.until_check = CHECK_INTERVAL;
                true
            }
        }
    }

    /// Puts a chunk of the open image, if its segment is kept in memory.
    pub fn put(&mut self, entries: &[Entry], pages: &[u8]) {
        let Some(id) = self.open.filter(|id| self.memfds.contains_key(id)) else {
            return;
        };
        let result = match self.reserve(pages.len() as u64) {
            true => self.memfds[&id].put(entries, pages),
            false => Err(io::Error::new(
                io::ErrorKind::OutOfMemory,
                "not enough memory is available",
            )),
        };
        if let Err(error) = result {
            warn_not_kept(id, &error);
            self.memfds.remove(&id);
        }
    }

    /// Returns the segments that CRIU would create as memfds when it restores from `round`, the newest of
    /// `catalog`: each with its size and pages.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn finish(&mut self, round: &Path, catalog: &Catalog) -> Result<Prefilled, FileError> {
        let mut memfds = std::mem::take(&mut self.memfds);
        let mut ready = BTreeMap::new();
        let path = round.join(MEMFDS);
        let records = records::<MemfdInode>(&path).map_err(failed("parse", &path))?;
        for inode in records {
            let id = u64::from(inode.shmid);
            let Some(memfd) = memfds.remove(&id) else {
                continue;
            };
            let is_huge = inode.hugetlb_flag.unwrap_or(0) != 0;
            if memfd.name.as_str() != inode.name || is_huge || inode.size == 0 {
                continue;
            }
            let Some(index) = catalog.get(ImageId::Shmem(id)) else {
                continue;
            };
            match complete(&memfd.file, &inode, index) {
                Ok(()) => drop(ready.insert(id, memfd.file)),
                Err(error) => warn_not_kept(id, &error),
            }
        }
        Ok(Prefilled(ready))
    }
}

fn warn_not_kept(id: u64, error: &io::Error) {
    tracing::warn!(
        event = "segment_not_cached",
        id,
        %error,
        "shared segment not kept in memory: it is read from its image when restoring"
    );
}

/// Returns whether less than a quarter of this host's memory is available.
fn memory_is_short() -> bool {
    MemInfo::read().is_ok_and(is_short)
}

fn is_short(memory: MemInfo) -> bool {
    match (memory.available, memory.total) {
        (Some(available), Some(total)) => available < total / 4,
        _ => false,
    }
}

/// Completes a memfd: sets its size, removes pages that the last round does not list any more, and seals it
/// if the original forbids adding seals. (A memfd that was created without `MFD_ALLOW_SEALING` has that seal
/// alone. CRIU adds any other seals itself.)
fn complete(file: &File, inode: &MemfdInode, pages: &Index) -> io::Result<()> {
    let mut end = 0;
    for range in pages.ranges() {
        if let Some(gap) = PageRange::from_bounds(end, range.start()) {
            punch(file, gap)?;
        }
        end = range.end();
    }
    file.set_len(end)?;
    file.set_len(inode.size)?;
    let seals = SealFlag::from_bits_truncate(inode.seals.cast_signed());
    if seals == SealFlag::F_SEAL_SEAL {
        fcntl(file, FcntlArg::F_ADD_SEALS(seals))?;
    }
    Ok(())
}

/// Punches a hole, which reads as zeros.
fn punch(file: &File, range: PageRange) -> io::Result<()> {
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (start, bytes) = (range.start().cast_signed(), range.bytes().cast_signed());
    Ok(fallocate(file, hole, start, bytes)?)
}

/// Segments with all their pages, as memfds, by segment id.
#[derive(Debug, Default)]
pub struct Prefilled(BTreeMap<u64, File>);

impl Prefilled {
    /// Returns the memfd of a segment; with one, the segment's image need not be read.
    #[must_use]
    pub fn get(&self, id: u64) -> Option<&File> {
        self.0.get(&id)
    }

    /// Returns whether it has no segments.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the number of segments.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
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
    use prost::Message;
    use std::fs;

    const PAGE: usize = PAGE_SIZE as usize;
    pub(in crate::restore) const ID: u64 = 7;
    const NAME: &str = "/dev/zero";

    /// Writes one round. `step % 6` says what becomes of each page: missing (0), zero (2), in the parent if
    /// that has it (3 and more), or data. Returns the expected content.
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
        segments.set_name(&MemfdName::new(NAME).unwrap(), has_parent);
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
        fn segment_equals_the_last_round(
            rounds in prop::collection::vec(prop::collection::vec(any::<u8>(), 8), 1..5),
        ) {
            let home = tempfile::tempdir().unwrap();
            let mut segments = Segments::default();
            let mut model = Vec::new();
            for (round, steps) in (1u32..).zip(&rounds) {
                model = put_round(home.path(), &mut segments, round, &model, steps);
            }
            // Longer than its last page.
            let memfd = memfd(model.len() + 2);
            let prefilled = finish(home.path(), &mut segments, rounds.len() as u32, &memfd);
            prop_assert!(prefilled.get(ID).is_some());
            let mut content = vec![1; (model.len() + 2) * PAGE];
            prefilled.0[&ID].read_exact_at(&mut content, 0).unwrap();
            for (index, page) in content.chunks(PAGE).enumerate() {
                let byte = model.get(index).copied().flatten().unwrap_or(0);
                prop_assert!(page.iter().all(|&found| found == byte), "page {index}");
            }
            prop_assert_eq!(prefilled.0[&ID].metadata().unwrap().len(), memfd.size);
        }
    }

    #[test]
    fn only_segments_that_criu_would_create_alike_are_prefilled() {
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
            let prefilled = finish(home.path(), &mut segments, 1, &memfd);
            assert_eq!(prefilled.get(ID).is_some(), fine, "{memfd:?}");
        }
        // A segment that was not kept from its first round on.
        let home = tempfile::tempdir().unwrap();
        let old = put_round(home.path(), &mut Segments::default(), 1, &[], &steps);
        let mut segments = Segments::default();
        put_round(home.path(), &mut segments, 2, &old, &[3; 8]);
        assert!(finish(home.path(), &mut segments, 2, &good).is_empty());
    }

    #[test]
    fn no_segment_is_kept_when_little_memory_is_available() {
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
        assert_eq!(
            recovered.unwrap_err().source.kind(),
            io::ErrorKind::OutOfMemory
        );
        let memory = |available| MemInfo {
            total: Some(4000),
            available,
        };
        assert!(is_short(memory(Some(999))) && !is_short(memory(Some(1000))));
        assert!(!is_short(memory(None)));
    }
}
