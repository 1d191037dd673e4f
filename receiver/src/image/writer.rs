//! Writer of one directory of images, a round or a dump, which appears complete or not at all.
//!
//! Everything is written to `.NAME.tmp`. A commit syncs every file and the directory, renames the directory
//! to `NAME`, and syncs the directory above. A writer that is dropped before that removes its directory.

use super::chain::{Cursor, Levels, levels};
use super::durable::{create_image, sync, sync_all};
use super::format::{self, PagemapEntry};
use super::image_writer::ImageWriter;
use super::{DirName, FIRST_PAGES_ID, INVENTORY, PARENT};
use crate::file_error::{FileError, failed};
use crate::quota::{Bounds, Quota};
use pageferry_common::criu::page_server::PageLocation;
use pageferry_common::wire::{Entry, EntryKind};
use pageferry_common::{ImageId, PageRange, StateName};
use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use super::image_writer::WriteError;

/// Writer of one directory.
#[derive(Debug)]
pub struct DirWriter {
    /// Directory above.
    home: PathBuf,
    name: DirName,
    tmp: PathBuf,
    quota: Arc<Quota>,
    /// Chain behind this directory, its parent first.
    parents: Levels,
    /// Images that were opened.
    written: BTreeSet<ImageId>,
    open: Option<ImageWriter>,
    committed: bool,
}

impl DirWriter {
    /// Creates the directory `name` in `home`.
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

    /// Charges everything that is written to a quota.
    #[must_use]
    pub fn with_quota(mut self, quota: &Arc<Quota>) -> Self {
        self.quota = Arc::clone(quota);
        self
    }

    /// Makes `parent`, a complete directory in the same `home`, the parent of this one. Images that are open
    /// already get none.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn follow(&mut self, parent: DirName) -> Result<(), WriteError> {
        self.parents = levels(&self.home.join(parent.to_string()))?;
        let link = self.tmp.join(PARENT);
        symlink(format!("../{parent}"), &link).map_err(failed("create", &link))?;
        Ok(())
    }

    /// Writes the inventory of a pre-dump. `uptime_us` is the uptime of the source host when its tree was
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

    /// Opens an image, which must be new in this directory: all that is put from now on belongs to it.
    /// Returns whether the parent has the image, too.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn open(&mut self, image: ImageId) -> Result<bool, WriteError> {
        self.close_image()?;
        self.quota.charge_image(self.written.len())?;
        let pages_id = FIRST_PAGES_ID + self.written.len() as u32;
        if !self.written.insert(image) {
            return Err(WriteError::Protocol(format!("{image} was sent twice")));
        }
        let parent = Cursor::open(&self.parents, image)?;
        let has_parent = parent.is_some();
        self.open = Some(ImageWriter::create(&self.tmp, image, pages_id)?.with_parent(parent));
        Ok(has_parent)
    }

    /// Writes a chunk of the open image: entries behind all entries before, and the pages of those that have
    /// data.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn put(&mut self, entries: &[Entry], pages: &[u8]) -> Result<(), WriteError> {
        const PRESENT: PageLocation = PageLocation::Present { lazy: false };
        self.quota.charge_entries(entries.len(), pages.len())?;
        let quota = Arc::clone(&self.quota);
        let mut rest = pages;
        for entry in entries {
            let image = self.image_at(entry.range)?;
            match entry.kind {
                EntryKind::Data => {
                    let (now, later) = rest.split_at(entry.range.bytes() as usize);
                    rest = later;
                    image.put_present(entry.range, PRESENT, now)?;
                }
                EntryKind::Zero => image.put_zero(entry.range)?,
                EntryKind::Copy => image.copy_from_parent(entry.range, &quota)?,
                EntryKind::Parent => image.put_in_parent(entry.range)?,
            }
        }
        Ok(())
    }

    /// Writes pagemap entries of the open image as they are, behind all entries before, and the pages of
    /// those that are present.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn put_as_is(&mut self, entries: &[PagemapEntry], pages: &[u8]) -> Result<(), WriteError> {
        self.quota.charge_entries(entries.len(), pages.len())?;
        let mut rest = pages;
        for &PagemapEntry { range, place } in entries {
            let image = self.image_at(range)?;
            match place {
                PageLocation::Present { .. } => {
                    let (now, later) = rest.split_at(range.bytes() as usize);
                    rest = later;
                    image.put_present(range, place, now)?;
                }
                PageLocation::Parent => image.put_in_parent(range)?,
                PageLocation::Elsewhere => image.put_entry(range, place)?,
            }
        }
        Ok(())
    }

    /// Returns the open image, ready for an entry of `range`.
    fn image_at(&mut self, range: PageRange) -> Result<&mut ImageWriter, WriteError> {
        let Some(image) = &mut self.open else {
            return Err(WriteError::Protocol("pages without an image".to_owned()));
        };
        image.advance_to(range)?;
        Ok(image)
    }

    /// Makes the directory durable, and gives it its name. Returns its path.
    ///
    /// # Errors
    /// [`WriteError`]; the directory does not appear then.
    pub fn commit(mut self) -> Result<PathBuf, WriteError> {
        self.close_image()?;
        sync_all(&self.tmp)?;
        let home = self.home.clone();
        let path = self.publish()?;
        sync(&home)?;
        Ok(path)
    }

    /// Gives the directory its name, without making it durable. Returns its path.
    ///
    /// # Errors
    /// [`WriteError`]; the directory does not appear then.
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

/// Appends a piece to one of CRIU's images of state in a complete directory. The first piece replaces an
/// existing image.
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
    let file = OpenOptions::new().append(true).open(&path);
    file.and_then(|mut file| file.write_all(piece))
        .map_err(failed("write", &path))
}
