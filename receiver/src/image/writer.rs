//! Writes one directory of images, a round or a dump: complete, or not at all.
//!
//! Everything goes into `.NAME.tmp`; the commit syncs every file and the directory, renames it to
//! `NAME`, and syncs the directory above. Dropped before that, it takes its directory with it.

use super::chain::Cursor;
use super::chain::{Levels, levels};
pub(crate) use super::durable::create_image;
pub use super::durable::{sync, sync_all};
use super::format::{self, PagemapEntry};
use super::image_writer::ImageWriter;
use super::{DirName, FIRST_PAGES_ID, INVENTORY, PARENT};
use crate::file_error::{FileError, failed};
use crate::quota::{Bounds, Quota, QuotaError};
use crate::refusal::Refusal;
use pageferry_common::criu::page_server::PageLocation;
use pageferry_common::wire::{self, Entry, EntryKind};
use pageferry_common::{ImageId, PageRange, StateName};
use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

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

impl From<WriteError> for Refusal {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Storage(file) => file.into(),
            WriteError::Quota(quota) => quota.into(),
            WriteError::Protocol(what) => Self::new(wire::RefuseCode::Protocol, what),
        }
    }
}

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

impl Drop for DirWriter {
    fn drop(&mut self) {
        if !self.committed {
            // What cannot be removed now is removed at the next start.
            let _ = fs::remove_dir_all(&self.tmp);
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
