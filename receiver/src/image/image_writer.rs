//! Writer of one image: a pagemap and its pages file.

use super::chain::{Cursor, Located};
use super::durable::create_image;
use super::format::{self, PagemapEntry};
use super::pages_name;
use crate::file_error::{FileError, failed};
use crate::quota::{Quota, QuotaError};
use crate::refusal::Refusal;
use crate::sys::writeback;
use nix::unistd::{Whence, lseek};
use pageferry_common::criu::page_server::PageLocation;
use pageferry_common::wire::RefuseCode;
use pageferry_common::{CHUNK_SIZE, ImageId, PAGE_SIZE, PageRange};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of a pages file after which the kernel is asked to write them to the disk. The sync at the end of
/// the round would wait for all that gathers until then.
const WRITEBACK_INTERVAL: u64 = 32 << 20;

/// Pages of the parent that are copied, and charged, at a time. Each piece of a hole costs two system calls, and a
/// hole may be terabytes, so this is much more than a chunk.
const COPY_PAGES: u64 = (32 << 20) / PAGE_SIZE;

/// Reason why images cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The disk, or what is on it.
    #[error(transparent)]
    Storage(#[from] FileError),
    /// The quota is used up.
    #[error(transparent)]
    Quota(#[from] QuotaError),
    /// The peer's entries do not make an image.
    #[error("{0}")]
    Protocol(String),
}

impl From<WriteError> for Refusal {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Storage(file) => file.into(),
            WriteError::Quota(quota) => quota.into(),
            WriteError::Protocol(what) => Self::new(RefuseCode::Protocol, what),
        }
    }
}

/// What to copy of lazy pages: those that a restored process may run without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LazyPages {
    Copy,
    /// Leave a hole in the pages file instead.
    Skip,
}

/// Writer of one image.
#[derive(Debug)]
pub(crate) struct ImageWriter {
    image: ImageId,
    pagemap: BufWriter<File>,
    pagemap_path: PathBuf,
    pages: File,
    pages_path: PathBuf,
    /// The same image in the parent.
    parent: Option<Cursor>,
    /// End of the last entry.
    end: u64,
    /// Offset of the next present page in the pages file. Zero pages only advance it: the file is sparse
    /// there.
    offset: u64,
    /// Offset up to which the kernel was asked to write the file to the disk.
    writeback: u64,
    /// Last entry, not written yet because the next may extend it.
    pending: Option<PagemapEntry>,
    /// Buffer for copied pages.
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
            writeback: 0,
            pending: None,
            scratch: Vec::new(),
        })
    }

    /// Sets the same image in the parent, which entries may refer to.
    pub(super) fn with_parent(mut self, parent: Option<Cursor>) -> Self {
        self.parent = parent;
        self
    }

    /// Checks that an entry of `range` is behind all before.
    pub(super) fn advance_to(&mut self, range: PageRange) -> Result<(), WriteError> {
        if range.start() < self.end {
            let what = format!(
                "{range} of {} overlaps or precedes the entry before",
                self.image
            );
            return Err(WriteError::Protocol(what));
        }
        self.end = range.end();
        Ok(())
    }

    /// Writes an entry of pages that are stored here.
    pub(super) fn put_present(
        &mut self,
        range: PageRange,
        place: PageLocation,
        pages: &[u8],
    ) -> Result<(), FileError> {
        self.append(pages)?;
        self.put_entry(range, place)
    }

    /// Writes an entry of zero pages, which are a hole in the pages file.
    pub(super) fn put_zero(&mut self, range: PageRange) -> Result<(), FileError> {
        self.offset += range.bytes();
        self.put_entry(range, PageLocation::Present { lazy: false })
    }

    /// Writes an entry of pages that the parent has.
    pub(super) fn put_in_parent(&mut self, range: PageRange) -> Result<(), WriteError> {
        let covered = match &mut self.parent {
            Some(parent) => parent.covers(range)?,
            None => false,
        };
        match covered {
            true => Ok(self.put_entry(range, PageLocation::Parent)?),
            false => Err(self.unresolved(range)),
        }
    }

    /// Stores pages of the parent again.
    pub(super) fn copy_from_parent(
        &mut self,
        range: PageRange,
        quota: &Quota,
    ) -> Result<(), WriteError> {
        let mut parent = self.parent.take().ok_or_else(|| self.unresolved(range))?;
        let mut rest = Some(range);
        // Charged piece by piece: a few bytes from the peer may stand for many here.
        while let Some(all) = rest {
            let (now, later) = all.split_at(COPY_PAGES);
            if let Some(now) = now {
                quota.charge_bytes(now.bytes())?;
                self.copy(&mut parent, now, LazyPages::Copy)?;
            }
            rest = later;
        }
        self.parent = Some(parent);
        Ok(())
    }

    fn unresolved(&self, range: PageRange) -> WriteError {
        WriteError::Protocol(format!("{range} of {} is not in its parent", self.image))
    }

    /// Writes an entry, joined with the one before if possible.
    pub(super) fn put_entry(
        &mut self,
        range: PageRange,
        place: PageLocation,
    ) -> Result<(), FileError> {
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

    /// Appends to the pages file.
    fn append(&mut self, pages: &[u8]) -> Result<(), FileError> {
        self.pages
            .write_all_at(pages, self.offset)
            .map_err(failed("write", &self.pages_path))?;
        self.offset += pages.len() as u64;
        let written = self.offset - self.writeback;
        if written >= WRITEBACK_INTERVAL {
            writeback::begin(&self.pages, self.writeback, written);
            self.writeback = self.offset;
        }
        Ok(())
    }

    /// Stores pages of a chain again. Zero pages become holes.
    pub(crate) fn copy(
        &mut self,
        from: &mut Cursor,
        range: PageRange,
        lazy: LazyPages,
    ) -> Result<(), FileError> {
        let mut buffer = std::mem::take(&mut self.scratch);
        let len = CHUNK_SIZE.min(range.bytes() as usize);
        buffer.resize(buffer.len().max(len), 0);
        from.read(range, &mut |found| {
            match found.lazy && lazy == LazyPages::Skip {
                true => self.offset += found.range.bytes(),
                false => self.copy_pages(&found, &mut buffer)?,
            }
            self.put_entry(found.range, PageLocation::Present { lazy: found.lazy })
        })?;
        self.scratch = buffer;
        Ok(())
    }

    /// Appends a copy of pages of another pages file.
    fn copy_pages(&mut self, found: &Located<'_>, buffer: &mut [u8]) -> Result<(), FileError> {
        let mut done = 0;
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
        Ok(())
    }

    /// Writes the last entry, and sets the length of the pages file.
    pub(crate) fn close(mut self) -> Result<(), FileError> {
        let last = self.pending.take();
        last.map_or(Ok(()), |entry| entry.write(&mut self.pagemap))
            .and_then(|()| self.pagemap.flush())
            .map_err(failed("write", &self.pagemap_path))?;
        self.pages
            .set_len(self.offset)
            .map_err(failed("write", &self.pages_path))
    }
}

/// Returns the number of bytes of whole pages from `offset` on, at most `limit`, that are a hole in a file.
/// Reading through a hole takes time, and pages announced as zero may be terabytes, which cost their sender
/// nothing.
fn hole_at(file: &File, offset: u64, limit: u64) -> io::Result<u64> {
    if file.metadata()?.len() < offset + limit {
        // The file is too short, which reading reports.
        return Ok(0);
    }
    let data = match lseek(file, offset.cast_signed(), Whence::SeekData) {
        Ok(data) => data.cast_unsigned(),
        Err(nix::Error::ENXIO) => offset + limit,
        Err(error) => return Err(error.into()),
    };
    let hole = (data - offset).min(limit);
    Ok(hole - hole % PAGE_SIZE)
}

fn is_zero(page: &[u8; PAGE_SIZE as usize]) -> bool {
    *page == [0; PAGE_SIZE as usize]
}
