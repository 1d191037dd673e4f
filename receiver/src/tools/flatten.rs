//! `receive flatten`: merges a chain into one self-contained directory.

use crate::file_error::{FileError, failed};
use crate::image::chain::{Cursor, images, levels, names, newest_round};
use crate::image::image_writer::{ImageWriter, LazyPages};
use crate::image::{FIRST_PAGES_ID, PARENT};
use pageferry_common::ImageId;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Counts of a merged chain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flattened {
    /// Number of directories in the chain.
    pub levels: usize,
    /// Number of memory images.
    pub images: usize,
    /// Number of pages in them.
    pub pages: u64,
}

/// Pages to merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// All pages.
    All,
    /// Only pages that a restored process cannot run without. Holes replace the others.
    NotLazy,
}

/// Merges the chain that ends in `dir` into the new directory `out`. Copies other files than memory images as
/// they are. Calls `progress` at the beginning of every image.
///
/// # Errors
/// [`FileError`]; `out` does not appear then.
pub fn flatten(
    dir: &Path,
    out: &Path,
    pages: Pages,
    mut progress: impl FnMut(ImageId),
) -> Result<Flattened, FileError> {
    let top = newest_round(dir)?;
    let chain = levels(&top)?;
    check_new(out)?;
    let mut tmp = out.as_os_str().to_owned();
    tmp.push(format!(".tmp-{}", std::process::id()));
    let tmp = PathBuf::from(tmp);
    DirBuilder::new()
        .mode(0o700)
        .create(&tmp)
        .map_err(failed("create", &tmp))?;
    let unfinished = Unfinished(&tmp);

    let images = images(&top)?;
    let lazy = match pages {
        Pages::All => LazyPages::Copy,
        Pages::NotLazy => LazyPages::Skip,
    };
    let mut done = Flattened {
        levels: chain.len(),
        images: images.len(),
        pages: 0,
    };
    for (number, &image) in images.iter().enumerate() {
        progress(image);
        // One cursor lists the entries, the other reads their pages, which are at other levels, too.
        let mut list = Cursor::open(&chain, image)?.expect("it was listed");
        let mut cursor = Cursor::open(&chain, image)?.expect("it was listed");
        let mut writer = ImageWriter::create(&tmp, image, FIRST_PAGES_ID + number as u32)?;
        while let Some(entry) = list.next_entry()? {
            writer.copy(&mut cursor, entry.range, lazy)?;
            done.pages += entry.range.pages();
        }
        writer.close()?;
    }
    for name in names(&top)? {
        let memory = ImageId::from_pagemap_name(&name).is_some() || name.starts_with("pages-");
        let from = top.join(&name);
        if !memory && name != PARENT && from.is_file() {
            fs::copy(&from, tmp.join(&name)).map_err(failed("copy", &from))?;
        }
    }
    fs::rename(&tmp, out).map_err(failed("create", out))?;
    std::mem::forget(unfinished);
    Ok(done)
}

/// Checks that `out` is missing or empty.
fn check_new(out: &Path) -> Result<(), FileError> {
    match fs::read_dir(out) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("use", out)(error)),
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(failed("use", out)(io::ErrorKind::DirectoryNotEmpty.into())),
        },
    }
}

/// Removes the temporary directory if merging fails.
struct Unfinished<'a>(&'a Path);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        // Best effort: the name shows that it is temporary.
        let _ = fs::remove_dir_all(self.0);
    }
}
