//! Writes one image.

use super::chain::Cursor;
use super::durable::create_image;
use super::format::{self, PagemapEntry};
use super::pages_name;
use super::writer::WriteError;
use crate::file_error::{FileError, failed};
use crate::quota::Quota;
use crate::sys::writeback;
use nix::unistd::{Whence, lseek};
use pageferry_common::criu::page_server::PageLocation;
use pageferry_common::{CHUNK_PAGES, CHUNK_SIZE, ImageId, PAGE_SIZE, PageRange};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of a pages file that are left to the kernel before the disk is to have them. What gathers until the
/// round's end would have to be waited for there.
const WRITEBACK: u64 = 32 << 20;

/// One image in the making: a pagemap and its pages file.
#[derive(Debug)]
pub(crate) struct ImageWriter {
    pub(super) image: ImageId,
    pagemap: BufWriter<File>,
    pagemap_path: PathBuf,
    pages: File,
    pages_path: PathBuf,
    /// The same image in the parent.
    pub(super) parent: Option<Cursor>,
    /// One past the last page announced.
    pub(super) end: u64,
    /// Where the next present page goes in the pages file. Zero pages only move it: the file is
    /// sparse there.
    pub(super) offset: u64,
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

    pub(super) fn copy_from_parent(
        &mut self,
        range: PageRange,
        quota: &Quota,
    ) -> Result<(), WriteError> {
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

    pub(super) fn in_parent(&mut self, range: PageRange) -> Result<(), WriteError> {
        let covered = match &mut self.parent {
            Some(parent) => parent.covers(range)?,
            None => false,
        };
        match covered {
            true => Ok(self.entry(range, PageLocation::Parent)?),
            false => Err(self.unresolved(range)),
        }
    }

    pub(super) fn present(
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

    pub(super) fn entry(&mut self, range: PageRange, place: PageLocation) -> Result<(), FileError> {
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
