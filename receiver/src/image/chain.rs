//! Reading a chain of directories: each has a `parent` link to the one before.

use super::format::{PagemapEntry, PagemapReader};
use super::{INVENTORY, PARENT, pages_name};
use crate::file_error::{FileError, failed};
use pageferry_common::criu::page_server::PageLocation;
use pageferry_common::{ImageId, PageRange};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest chain that is followed: more rounds than any sensible migration has.
const DEPTH_MAX: usize = 4096;

/// Returns `dir` itself if it holds images, else its newest complete round.
///
/// # Errors
/// [`FileError`] if it cannot be read or holds neither.
pub fn newest_round(dir: &Path) -> Result<PathBuf, FileError> {
    if dir.join(INVENTORY).exists() || !images(dir)?.is_empty() {
        return Ok(dir.to_owned());
    }
    let rounds = names(dir)?
        .into_iter()
        .filter_map(|name| name.parse::<u32>().ok());
    match rounds.max() {
        Some(round) => Ok(dir.join(round.to_string())),
        None => Err(failed("find a round in", dir)(
            io::ErrorKind::NotFound.into(),
        )),
    }
}

/// Directories of a chain, newest first.
pub type Levels = Arc<[PathBuf]>;

/// Returns the chain of `dir`: follows the `parent` links.
///
/// # Errors
/// [`FileError`] if a link is dangling, or the links form a cycle.
pub fn levels(dir: &Path) -> Result<Levels, FileError> {
    let mut levels = vec![dir.to_owned()];
    let mut seen = BTreeSet::new();
    loop {
        let last = levels.last().expect("it begins with `dir`");
        let link = last.join(PARENT);
        match fs::symlink_metadata(&link) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(levels.into()),
            Err(error) => return Err(failed("follow", &link)(error)),
            Ok(_) => {}
        }
        let parent = fs::canonicalize(&link).map_err(failed("follow", &link))?;
        if levels.len() == DEPTH_MAX || !seen.insert(parent.clone()) {
            let cycle = io::Error::other("the chain of parents has no end");
            return Err(failed("follow", &link)(cycle));
        }
        levels.push(parent);
    }
}

/// Returns the memory images in a directory, in ascending order.
///
/// # Errors
/// [`FileError`] if it cannot be listed.
pub fn images(dir: &Path) -> Result<Vec<ImageId>, FileError> {
    let names = names(dir)?;
    let mut images: Vec<_> = names
        .iter()
        .filter_map(|name| ImageId::from_pagemap_name(name))
        .collect();
    images.sort_unstable();
    Ok(images)
}

/// Returns the names in a directory. Skips those that are not UTF-8: they are foreign.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>, FileError> {
    let entries = fs::read_dir(dir).map_err(failed("list", dir))?;
    entries
        .filter_map(|entry| match entry {
            Ok(entry) => entry.file_name().into_string().ok().map(Ok),
            Err(error) => Some(Err(failed("list", dir)(error))),
        })
        .collect()
}

/// Cursor through one image at all levels of a chain. It only moves forward, like CRIU's own reader, so its
/// memory does not grow with the image.
#[derive(Debug)]
pub struct Cursor {
    levels: Levels,
    /// Level that this cursor reads.
    level: usize,
    image: ImageId,
    path: PathBuf,
    entries: PagemapReader<BufReader<File>>,
    pages: File,
    current: Option<PagemapEntry>,
    /// Offset of the pages of `current` in the pages file, bytes, if they are present there.
    offset: u64,
    parent: Parent,
}

/// Location of pages in a chain.
#[derive(Debug, Clone, Copy)]
pub struct Located<'a> {
    /// The pages.
    pub range: PageRange,
    /// Pages file that has them.
    pub file: &'a File,
    /// Offset of the first page in the file, bytes.
    pub offset: u64,
    /// Whether a restored process may run before it has them.
    pub lazy: bool,
    /// Level of the directory that has them; 0 is the newest.
    pub level: usize,
}

/// The same image in the directory behind.
#[derive(Debug)]
enum Parent {
    /// Not needed yet.
    Unopened,
    None,
    Open(Box<Cursor>),
}

impl Cursor {
    /// Opens an image in the first of `levels`; `None` if that does not have it.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn open(levels: &Levels, image: ImageId) -> Result<Option<Self>, FileError> {
        Self::open_level(levels, 0, image)
    }

    fn open_level(
        levels: &Levels,
        level: usize,
        image: ImageId,
    ) -> Result<Option<Self>, FileError> {
        let Some(dir) = levels.get(level) else {
            return Ok(None);
        };
        let path = dir.join(image.pagemap_name());
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", &path)(error)),
        };
        let entries = PagemapReader::new(BufReader::new(file)).map_err(failed("read", &path))?;
        let pages_path = dir.join(pages_name(entries.pages_id()));
        let pages = File::open(&pages_path).map_err(failed("open", &pages_path))?;
        Ok(Some(Self {
            levels: Arc::clone(levels),
            level,
            image,
            path,
            entries,
            pages,
            current: None,
            offset: 0,
            parent: Parent::Unopened,
        }))
    }

    /// Reads the next entry of the newest level; `None` at the end.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn next_entry(&mut self) -> Result<Option<PagemapEntry>, FileError> {
        if let Some(before) = self.current
            && matches!(before.place, PageLocation::Present { .. })
        {
            self.offset += before.range.bytes();
        }
        self.current = self
            .entries
            .next_entry()
            .map_err(failed("read", &self.path))?;
        Ok(self.current)
    }

    /// Returns the number of bytes that the entries read so far have in the pages file, and the length of the
    /// file.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn extent(&self) -> Result<(u64, u64), FileError> {
        let metadata = self.pages.metadata().map_err(failed("read", &self.path))?;
        Ok((self.offset, metadata.len()))
    }

    /// Returns the offset of the last entry's pages in the pages file, bytes, if they are present there.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the pages file of the newest level.
    #[must_use]
    pub fn into_pages(self) -> File {
        self.pages
    }

    /// Returns the number of the pages file, and whether all entries so far have their page count in both
    /// fields.
    #[must_use]
    pub fn pages_id(&self) -> (u32, bool) {
        (self.entries.pages_id(), self.entries.counts_agree())
    }

    /// Returns whether every page of `range` is in an entry of the newest level. Calls must ascend.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn covers(&mut self, range: PageRange) -> Result<bool, FileError> {
        let mut at = range.start();
        while at < range.end() {
            match self.entry_at(at)? {
                Some(entry) => at = entry.range.end(),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Calls `each` for all pages of `range`, wherever in the chain they are. Calls must ascend.
    ///
    /// # Errors
    /// [`FileError`], also if a page is missing in the chain; that of `each`.
    pub fn read(
        &mut self,
        range: PageRange,
        each: &mut dyn FnMut(Located<'_>) -> Result<(), FileError>,
    ) -> Result<(), FileError> {
        let mut rest = Some(range);
        while let Some(wanted) = rest {
            let found = self.entry_at(wanted.start())?;
            let Some((entry, piece)) =
                found.and_then(|entry| Some((entry, entry.range.intersect(wanted)?)))
            else {
                return Err(self.missing(wanted));
            };
            match entry.place {
                PageLocation::Present { lazy } => each(Located {
                    range: piece,
                    file: &self.pages,
                    offset: self.offset + (piece.start() - entry.range.start()),
                    lazy,
                    level: self.level,
                })?,
                PageLocation::Parent => match self.parent()? {
                    Some(parent) => parent.read(piece, each)?,
                    None => return Err(self.missing(piece)),
                },
                PageLocation::Elsewhere => return Err(self.missing(piece)),
            }
            rest = PageRange::from_bounds(piece.end(), range.end());
        }
        Ok(())
    }

    /// Returns the entry that contains `address`, if any.
    fn entry_at(&mut self, address: u64) -> Result<Option<PagemapEntry>, FileError> {
        while self
            .current
            .is_none_or(|entry| entry.range.end() <= address)
        {
            if self.next_entry()?.is_none() {
                return Ok(None);
            }
        }
        Ok(self.current.filter(|entry| entry.range.start() <= address))
    }

    /// Returns a cursor at the level behind, if that has the image.
    fn parent(&mut self) -> Result<Option<&mut Cursor>, FileError> {
        if matches!(self.parent, Parent::Unopened) {
            self.parent = match Cursor::open_level(&self.levels, self.level + 1, self.image)? {
                Some(cursor) => Parent::Open(Box::new(cursor)),
                None => Parent::None,
            };
        }
        match &mut self.parent {
            Parent::Open(cursor) => Ok(Some(cursor)),
            Parent::None | Parent::Unopened => Ok(None),
        }
    }

    fn missing(&self, range: PageRange) -> FileError {
        let what = format!("pages {range} are missing from the chain");
        failed("resolve", &self.path)(io::Error::new(io::ErrorKind::InvalidData, what))
    }
}
