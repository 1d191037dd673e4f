//! `receive verify`: checks that all entries of a chain are valid, those in the parent are resolved, and
//! sizes are right.

use crate::file_error::FileError;
use crate::image::chain::{Cursor, Levels, images, levels, names, newest_round};
use crate::image::pages_name;
use crate::with_causes;
use pageferry_common::ImageId;
use pageferry_common::criu::page_server::PageLocation;
use std::collections::BTreeSet;
use std::path::Path;

/// Result of checking a chain.
#[derive(Debug, Default)]
pub struct Verified {
    /// Number of directories in the chain.
    pub levels: usize,
    /// Number of memory images in all directories.
    pub images: usize,
    /// Number of pages in the newest directory.
    pub pages: u64,
    /// One line for each problem.
    pub problems: Vec<String>,
}

/// Checks the chain that ends in `dir`.
///
/// # Errors
/// [`FileError`] if there is no chain to check. Problems of a chain are in the result.
pub fn verify(dir: &Path) -> Result<Verified, FileError> {
    let top = newest_round(dir)?;
    let chain = levels(&top)?;
    let mut verified = Verified {
        levels: chain.len(),
        ..Verified::default()
    };
    for level in 0..chain.len() {
        let rest: Levels = chain[level..].into();
        let dir = &rest[0];
        let mut numbers = BTreeSet::new();
        for image in images(dir)? {
            verified.images += 1;
            match check_image(&rest, image, &mut numbers, &mut verified.problems) {
                Ok(pages) if level == 0 => verified.pages += pages,
                Ok(_) => {}
                Err(error) => verified.problems.push(with_causes(&error)),
            }
        }
        let expected: BTreeSet<String> = numbers.into_iter().map(pages_name).collect();
        for name in names(dir)? {
            if name.starts_with("pages-") && !expected.contains(&name) {
                let path = dir.join(name);
                let problem = format!("{} belongs to no pagemap", path.display());
                verified.problems.push(problem);
            }
        }
    }
    Ok(verified)
}

/// Checks one image at the first level of `chain`, against that level and the next. Returns the number of its
/// pages.
fn check_image(
    chain: &Levels,
    image: ImageId,
    numbers: &mut BTreeSet<u32>,
    problems: &mut Vec<String>,
) -> Result<u64, FileError> {
    let path = chain[0].join(image.pagemap_name());
    let mut problem = |what: String| problems.push(format!("{}: {what}", path.display()));
    let mut cursor = Cursor::open(chain, image)?.expect("it was listed");
    let behind: Levels = chain[1..].into();
    let mut parent = Cursor::open(&behind, image)?;
    let mut pages = 0;
    while let Some(entry) = cursor.next_entry()? {
        let range = entry.range;
        pages += range.pages();
        match entry.place {
            PageLocation::Present { .. } => {}
            PageLocation::Parent => {
                let covered = match &mut parent {
                    Some(parent) => parent.covers(range)?,
                    None => false,
                };
                if !covered {
                    problem(format!("{range} is not in the parent"));
                }
            }
            PageLocation::Elsewhere => problem(format!("{range} is missing from the chain")),
        }
    }
    let (needed, there) = cursor.extent()?;
    if needed != there {
        problem(format!(
            "its entries need {needed} bytes of pages, its pages file has {there}"
        ));
    }
    let (number, counts_agree) = cursor.pages_id();
    if !numbers.insert(number) {
        problem(format!(
            "it shares {} with another image",
            pages_name(number)
        ));
    }
    if !counts_agree {
        problem("not every entry has its page count in both fields".to_owned());
    }
    Ok(pages)
}
