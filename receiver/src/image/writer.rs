//! Writes one directory of images, a round or a dump: complete, or not at all.
//!
//! Everything goes into `.NAME.tmp`; the commit syncs every file and the directory, renames it to
//! `NAME`, and syncs the directory above. Dropped before that, it takes its directory with it.

use super::chain::{Cursor, Levels, levels};
use super::format::{self, PagemapEntry};
use super::{DirName, FIRST_PAGES_ID, INVENTORY, PARENT, pages_name};
use crate::file_error::{FileError, failed};
use crate::quota::{Bounds, Quota, QuotaError};
use crate::sys::writeback;
use nix::unistd::{Whence, lseek};
use pageferry_common::criu::page_server::PageLocation;
use pageferry_common::wire::{Entry, EntryKind};
use pageferry_common::{CHUNK_PAGES, CHUNK_SIZE, ImageId, PAGE_SIZE, PageRange, StateName};
use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Why a directory cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The disk, or what is on it.
    #[error(transparent)]
    Storage(#[from] FileError),
    /// It would be too much.
    #[error(transparent)]
    Quota(#[from] QuotaError),
    /// What was sent makes no image.
    #[error("{0}")]
    Protocol(String),
}

/// Bytes of a pages file that are left to the kernel before the disk is to have them. What gathers until the
/// round's end would have to be waited for there.
const WRITEBACK: u64 = 32 << 20;

/// What pages are that are simply there.
const PRESENT: PageLocation = PageLocation::Present { lazy: false };

/// One directory in the making.
#[derive(Debug)]
pub struct DirWriter {
    /// The directory above.
    home: PathBuf,
    name: DirName,
    tmp: PathBuf,
    quota: Arc<Quota>,
    /// The chain behind this one, its parent first.
    parents: Levels,
    written: BTreeSet<ImageId>,
    open: Option<ImageWriter>,
    committed: bool,
}

impl DirWriter {
    /// Begins the directory `name` in `home`.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn begin(home: &Path, name: DirName) -> Result<Self, WriteError> {
        let tmp = home.join(name.temporary());
        DirBuilder::new()
            .mode(0o700)
            .create(&tmp)
            .map_err(failed("create", &tmp))?;
        Ok(Self {
            home: home.to_owned(),
            name,
            tmp,
            quota: Quota::new(Bounds::NONE, home),
            parents: Levels::default(),
            written: BTreeSet::new(),
            open: None,
            committed: false,
        })
    }

    /// Has it take no more than there is in a quota.
    #[must_use]
    pub fn within(mut self, quota: &Arc<Quota>) -> Self {
        self.quota = Arc::clone(quota);
        self
    }

    /// Puts `parent`, complete and in the same directory above, behind this one. What was opened
    /// before has no parent.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn follow(&mut self, parent: DirName) -> Result<(), WriteError> {
        self.parents = levels(&self.home.join(parent.to_string()))?;
        let link = self.tmp.join(PARENT);
        symlink(format!("../{parent}"), &link).map_err(failed("create", &link))?;
        Ok(())
    }

    /// Adds the inventory of a pre-dump. `uptime_us` is the source host's uptime when its tree was
    /// frozen, µs.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn write_inventory(&mut self, uptime_us: u64) -> Result<(), WriteError> {
        let path = self.tmp.join(INVENTORY);
        format::write_inventory(&mut create_image(&path)?, uptime_us)
            .map_err(failed("write", &path))?;
        Ok(())
    }

    /// What is put from now on belongs to this image, which must be new in this directory. Returns
    /// whether its parent has it.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn open(&mut self, image: ImageId) -> Result<bool, WriteError> {
        self.close_image()?;
        self.quota.image(self.written.len())?;
        let pages_id = FIRST_PAGES_ID + self.written.len() as u32;
        if !self.written.insert(image) {
            return Err(WriteError::Protocol(format!("{image} was sent twice")));
        }
        let mut writer = ImageWriter::create(&self.tmp, image, pages_id)?;
        writer.parent = Cursor::open(&self.parents, image)?;
        let has_parent = writer.parent.is_some();
        self.open = Some(writer);
        Ok(has_parent)
    }

    /// Adds a chunk to the open image: entries behind all before them, and the pages of those that
    /// have data.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn put(&mut self, entries: &[Entry], pages: &[u8]) -> Result<(), WriteError> {
        self.quota.entries(entries.len(), pages.len())?;
        let quota = Arc::clone(&self.quota);
        let mut rest = pages;
        for entry in entries {
            let image = self.image_at(entry.range)?;
            match entry.kind {
                EntryKind::Data => {
                    let (now, later) = rest.split_at(entry.range.bytes() as usize);
                    rest = later;
                    image.present(entry.range, PRESENT, now)?;
                }
                EntryKind::Zero => {
                    image.offset += entry.range.bytes();
                    image.entry(entry.range, PRESENT)?;
                }
                EntryKind::Copy => image.copy_from_parent(entry.range, &quota)?,
                EntryKind::Parent => image.in_parent(entry.range)?,
            }
        }
        Ok(())
    }

    /// Adds pagemap entries to the open image as they are, behind all before them, and the pages of
    /// those that are present.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn put_as_is(&mut self, entries: &[PagemapEntry], pages: &[u8]) -> Result<(), WriteError> {
        self.quota.entries(entries.len(), pages.len())?;
        let mut rest = pages;
        for &PagemapEntry { range, place } in entries {
            let image = self.image_at(range)?;
            match place {
                PageLocation::Present { .. } => {
                    let (now, later) = rest.split_at(range.bytes() as usize);
                    rest = later;
                    image.present(range, place, now)?;
                }
                PageLocation::Parent => image.in_parent(range)?,
                PageLocation::Elsewhere => image.entry(range, place)?,
            }
        }
        Ok(())
    }

    /// The open image, with its end moved behind `range`.
    fn image_at(&mut self, range: PageRange) -> Result<&mut ImageWriter, WriteError> {
        let Some(image) = &mut self.open else {
            return Err(WriteError::Protocol("pages without an image".to_owned()));
        };
        if range.start() < image.end {
            let what = format!("{range} of {} comes after its end", image.image);
            return Err(WriteError::Protocol(what));
        }
        image.end = range.end();
        Ok(image)
    }

    /// Makes the directory durable and lets it appear under its name. Returns its path.
    ///
    /// # Errors
    /// [`WriteError`]; it does not appear then.
    pub fn commit(mut self) -> Result<PathBuf, WriteError> {
        self.close_image()?;
        sync_all(&self.tmp)?;
        let home = self.home.clone();
        let path = self.publish()?;
        sync(&home)?;
        Ok(path)
    }

    /// Lets the directory appear under its name, whether or not it would survive a power failure. Returns its
    /// path.
    ///
    /// # Errors
    /// [`WriteError`]; it does not appear then.
    pub fn publish(mut self) -> Result<PathBuf, WriteError> {
        self.close_image()?;
        let path = self.home.join(self.name.to_string());
        fs::rename(&self.tmp, &path).map_err(failed("rename", &self.tmp))?;
        self.committed = true;
        Ok(path)
    }

    fn close_image(&mut self) -> Result<(), WriteError> {
        match self.open.take() {
            Some(image) => Ok(image.close()?),
            None => Ok(()),
        }
    }
}

/// Appends a piece to one of CRIU's images of state in a complete directory; the first piece takes
/// the place of what was there.
///
/// # Errors
/// [`FileError`].
pub fn write_state(
    dir: &Path,
    name: &StateName,
    first: bool,
    piece: &[u8],
) -> Result<(), FileError> {
    let path = dir.join(name.as_str());
    if first {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("replace", &path)(error));
            }
            Ok(()) | Err(_) => drop(create_image(&path)?),
        }
    }
    let append = || {
        let mut file = OpenOptions::new().append(true).open(&path)?;
        file.write_all(piece)
    };
    append().map_err(failed("write", &path))
}

/// Makes every file in a directory, and the directory, durable: several at once, for each waits for the file
/// system's journal, which then writes for all of them what it would write for one.
///
/// # Errors
/// [`FileError`].
pub fn sync_all(dir: &Path) -> Result<(), FileError> {
    const AT_ONCE: usize = 16;
    let mut entries = fs::read_dir(dir).map_err(failed("list", dir))?;
    let first: Vec<_> = entries.by_ref().take(AT_ONCE).collect();
    let others = 1..first.len();
    // Not a list of all: a peer says how many there are.
    let entries = Mutex::new(first.into_iter().chain(entries));
    let next = || {
        let mut entries = entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.next()
    };
    let work = || {
        while let Some(entry) = next() {
            let found = entry.and_then(|entry| Ok((entry.file_type()?, entry.path())));
            match found.map_err(failed("list", dir))? {
                (kind, path) if kind.is_file() => sync(&path)?,
                // The link to the parent.
                _ => {}
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let others: Vec<_> = others
            .filter_map(|_| thread::Builder::new().spawn_scoped(scope, work).ok())
            .collect();
        let mut done = work();
        for other in others {
            done = done.and(other.join().expect("syncing does not panic"));
        }
        done
    })?;
    sync(dir)
}

/// Makes a file, or what is in a directory, durable.
///
/// # Errors
/// [`FileError`].
pub fn sync(path: &Path) -> Result<(), FileError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(failed("sync", path))
}

/// Creates an image file that only its owner can read: memory is full of secrets.
pub(crate) fn create_image(path: &Path) -> Result<File, FileError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed("create", path))
}

impl Drop for DirWriter {
    fn drop(&mut self) {
        if !self.committed {
            // What cannot be removed now is removed at the next start.
            let _ = fs::remove_dir_all(&self.tmp);
        }
    }
}

/// One image in the making: a pagemap and its pages file.
#[derive(Debug)]
pub(crate) struct ImageWriter {
    image: ImageId,
    pagemap: BufWriter<File>,
    pagemap_path: PathBuf,
    pages: File,
    pages_path: PathBuf,
    /// The same image in the parent.
    parent: Option<Cursor>,
    /// One past the last page announced.
    end: u64,
    /// Where the next present page goes in the pages file. Zero pages only move it: the file is
    /// sparse there.
    offset: u64,
    /// How much of the file the kernel was told to write to the disk.
    on_its_way: u64,
    /// The last entry, as long as the next might extend it.
    pending: Option<PagemapEntry>,
    /// What is copied goes through here.
    scratch: Vec<u8>,
}

impl ImageWriter {
    /// Creates an image in `dir`.
    pub(crate) fn create(dir: &Path, image: ImageId, pages_id: u32) -> Result<Self, FileError> {
        let pagemap_path = dir.join(image.pagemap_name());
        let pages_path = dir.join(pages_name(pages_id));
        let mut pagemap = BufWriter::new(create_image(&pagemap_path)?);
        format::write_pagemap_head(&mut pagemap, pages_id)
            .map_err(failed("write", &pagemap_path))?;
        Ok(Self {
            image,
            pagemap,
            pages: create_image(&pages_path)?,
            pagemap_path,
            pages_path,
            parent: None,
            end: 0,
            offset: 0,
            on_its_way: 0,
            pending: None,
            scratch: Vec::new(),
        })
    }

    fn unresolved(&self, range: PageRange) -> WriteError {
        WriteError::Protocol(format!("{range} of {} is not in its parent", self.image))
    }

    fn copy_from_parent(&mut self, range: PageRange, quota: &Quota) -> Result<(), WriteError> {
        let mut parent = self.parent.take().ok_or_else(|| self.unresolved(range))?;
        let mut rest = Some(range);
        // Few bytes of the peer's may stand for many here.
        while let Some(all) = rest {
            let (now, later) = all.split_at(CHUNK_PAGES as u64);
            if let Some(now) = now {
                quota.bytes(now.bytes())?;
                self.copy(&mut parent, now, |_| true)?;
            }
            rest = later;
        }
        self.parent = Some(parent);
        Ok(())
    }

    fn in_parent(&mut self, range: PageRange) -> Result<(), WriteError> {
        let covered = match &mut self.parent {
            Some(parent) => parent.covers(range)?,
            None => false,
        };
        match covered {
            true => Ok(self.entry(range, PageLocation::Parent)?),
            false => Err(self.unresolved(range)),
        }
    }

    fn present(
        &mut self,
        range: PageRange,
        place: PageLocation,
        pages: &[u8],
    ) -> Result<(), FileError> {
        self.append(pages)?;
        self.entry(range, place)
    }

    fn append(&mut self, pages: &[u8]) -> Result<(), FileError> {
        self.pages
            .write_all_at(pages, self.offset)
            .map_err(failed("write", &self.pages_path))?;
        self.offset += pages.len() as u64;
        let written = self.offset - self.on_its_way;
        if written >= WRITEBACK {
            writeback::begin(&self.pages, self.on_its_way, written);
            self.on_its_way = self.offset;
        }
        Ok(())
    }

    fn entry(&mut self, range: PageRange, place: PageLocation) -> Result<(), FileError> {
        if let Some(before) = self.pending {
            if before.place == place
                && let Some(range) = before.range.joined(range)
            {
                self.pending = Some(PagemapEntry { range, place });
                return Ok(());
            }
            before
                .write(&mut self.pagemap)
                .map_err(failed("write", &self.pagemap_path))?;
        }
        self.pending = Some(PagemapEntry { range, place });
        Ok(())
    }

    /// Stores pages of the chain again. Zero pages become holes, and so do those that are not
    /// `wanted`, which is asked whether they are lazy.
    pub(crate) fn copy(
        &mut self,
        from: &mut Cursor,
        range: PageRange,
        wanted: fn(bool) -> bool,
    ) -> Result<(), FileError> {
        let mut buffer = std::mem::take(&mut self.scratch);
        let len = CHUNK_SIZE.min(range.bytes() as usize);
        buffer.resize(buffer.len().max(len), 0);
        from.read(range, &mut |found| {
            let mut done = 0;
            if !wanted(found.lazy) {
                done = found.range.bytes();
                self.offset += done;
            }
            while done < found.range.bytes() {
                let rest = found.range.bytes() - done;
                let hole = hole_at(found.file, found.offset + done, rest)
                    .map_err(failed("read a pages file for", &self.pages_path))?;
                if hole > 0 {
                    self.offset += hole;
                    done += hole;
                    continue;
                }
                let len = rest.min(buffer.len() as u64);
                let part = &mut buffer[..len as usize];
                found
                    .file
                    .read_exact_at(part, found.offset + done)
                    .map_err(failed("read a pages file for", &self.pages_path))?;
                let (pages, _) = part.as_chunks::<{ PAGE_SIZE as usize }>();
                for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
                    match is_zero(&run[0]) {
                        true => self.offset += run.as_flattened().len() as u64,
                        false => self.append(run.as_flattened())?,
                    }
                }
                done += len;
            }
            self.entry(found.range, PageLocation::Present { lazy: found.lazy })
        })?;
        self.scratch = buffer;
        Ok(())
    }

    pub(crate) fn close(mut self) -> Result<(), FileError> {
        let at_pagemap = failed("write", &self.pagemap_path);
        let finish = |pagemap: &mut BufWriter<File>, last: Option<PagemapEntry>| {
            last.map_or(Ok(()), |entry| entry.write(pagemap))?;
            pagemap.flush()
        };
        finish(&mut self.pagemap, self.pending).map_err(at_pagemap)?;
        self.pages
            .set_len(self.offset)
            .map_err(failed("write", &self.pages_path))
    }
}

/// How many bytes of whole pages there are from `offset` on, at most `most`, that a file has no data of. Of pages
/// announced as zero there may be terabytes, which cost their sender nothing.
fn hole_at(file: &File, offset: u64, most: u64) -> io::Result<u64> {
    if file.metadata()?.len() < offset + most {
        // Reading says what is wrong.
        return Ok(0);
    }
    let data = match lseek(file, offset.cast_signed(), Whence::SeekData) {
        Ok(data) => data.cast_unsigned(),
        Err(nix::Error::ENXIO) => offset + most,
        Err(error) => return Err(error.into()),
    };
    let hole = (data - offset).min(most);
    Ok(hole - hole % PAGE_SIZE)
}

fn is_zero(page: &[u8; PAGE_SIZE as usize]) -> bool {
    *page == [0; PAGE_SIZE as usize]
}
