//! Directories of images from another writer, complete or not.

use super::{Input, PAGE, scratch};
use pageferry_common::criu::images::children_are_waited_for;
use pageferry_common::{ImageId, PAGE_SIZE};
use pageferry_receiver::image::catalog::Catalog;
use pageferry_receiver::image::chain::{Cursor, Levels, images as images_in, levels, newest_round};
use pageferry_receiver::image::index::{Index, Pages};
use pageferry_receiver::restore::lazy::prepare;
use pageferry_receiver::restore::segments::Segments;
use pageferry_receiver::session::page_client::Served;
use pageferry_receiver::tools::flatten::{Pages as Which, flatten};
use pageferry_receiver::tools::verify::verify;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;

/// Possible file names in a directory.
const NAMES: [&str; 12] = [
    "pagemap-7.img",
    "pagemap-8.img",
    "pagemap-shmem-3.img",
    "pages-1.img",
    "pages-2.img",
    "parent",
    "inventory.img",
    "core-7.img",
    "mm-7.img",
    "mm-8.img",
    "memfd.img",
    "core-8.img",
];

/// Possible targets of a parent link.
const PARENTS: [&str; 4] = ["../1", "../2", ".", "../9"];

/// Maximum number of pages read one at a time.
const PAGES_MAX: u64 = 64;

/// Reads a migration of two rounds. The input is a list of files: a name (one bit selects the round), the length
/// of the content (u16), and the content. A pages file has one page for each byte of its content, filled with
/// that byte.
pub fn images(input: &[u8]) {
    let home = scratch();
    let rounds = [home.path().join("1"), home.path().join("2")];
    for round in &rounds {
        fs::create_dir(round).expect("it is new");
    }
    let mut input = Input(input);
    while !input.is_empty() {
        let which = usize::from(input.byte());
        let path = rounds[which >> 7].join(NAMES[(which & 0x7f) % NAMES.len()]);
        put(&path, input.counted());
    }
    look_at(home.path(), &rounds[1]);
}

fn put(path: &Path, content: &[u8]) {
    let name = path.file_name().expect("it has one");
    let _ = fs::remove_file(path);
    let written = if name == "parent" {
        let parent = usize::from(content.first().copied().unwrap_or(0));
        symlink(PARENTS[parent % PARENTS.len()], path)
    } else if name.as_encoded_bytes().starts_with(b"pages-") {
        let pages = content.iter().flat_map(|&byte| [byte; PAGE]);
        fs::write(path, pages.collect::<Vec<_>>())
    } else {
        fs::write(path, content)
    };
    written.expect("there is room");
}

fn look_at(home: &Path, newest: &Path) {
    let _ = children_are_waited_for(newest);
    let _ = Served::load(home);
    // Even if only an older round has images, the newest one is found.
    let _ = newest_round(home).expect("there are rounds");
    let mut catalog = Catalog::default();
    let advanced = catalog.advance(home).and_then(|()| catalog.advance(home));
    if advanced.is_ok() {
        let _ = prepare(home, &catalog, &mut Segments::default());
    }
    let chain = newest_round(newest).and_then(|_| levels(newest));
    let Ok(chain) = chain else {
        assert!(verify(newest).is_err());
        return;
    };
    let verified = verify(newest).expect("there is a chain");
    let whole = verified.problems.is_empty();
    let images = images_in(newest).expect("it can be listed");
    for &image in &images {
        let pages = by_cursor(&chain, image);
        let index = by_index(&chain, image);
        if whole {
            let pages = pages.as_ref().expect("nothing is wrong with it");
            let index = index.as_ref().expect("nothing is wrong with it");
            assert_eq!(pages, index);
        }
    }
    let out = home.join("flat");
    let flattened = flatten(newest, &out, Which::All, |_| {});
    assert_eq!(flattened.is_ok(), out.exists());
    if whole {
        let flattened = flattened.expect("nothing is wrong with it");
        assert_eq!(
            (flattened.images, flattened.pages),
            (images.len(), verified.pages)
        );
        let flat = verify(&out).expect("it is there");
        assert_eq!((flat.problems, flat.pages), (Vec::new(), verified.pages));
        let flat = levels(&out).expect("it is one");
        for image in images {
            assert_eq!(by_cursor(&flat, image), by_cursor(&chain, image));
        }
    }
}

/// Returns the first byte of each of the first pages, read in ascending order.
fn by_cursor(chain: &Levels, image: ImageId) -> Option<Vec<(u64, u8)>> {
    use std::os::unix::fs::FileExt;
    let mut list = Cursor::open(chain, image).ok()??;
    let mut cursor = Cursor::open(chain, image).ok()??;
    let mut seen = Vec::new();
    let mut read = |file: &File, at: u64, page: u64| -> Option<()> {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).ok()?;
        seen.push((page, byte[0]));
        Some(())
    };
    let mut fine = true;
    while let Some(entry) = list.next_entry().ok()? {
        let each = cursor.read(entry.range, &mut |found| {
            for page in 0..found.range.pages().min(PAGES_MAX) {
                let at = page * PAGE_SIZE;
                fine &= read(found.file, found.offset + at, found.range.start() + at).is_some();
            }
            Ok(())
        });
        each.ok()?;
    }
    fine.then_some(seen)
}

/// Returns the same, read through an index.
fn by_index(chain: &Levels, image: ImageId) -> Option<Vec<(u64, u8)>> {
    let index = Index::load(chain, image).ok()??;
    let ranges: Vec<_> = index.ranges().collect();
    let pages = Pages::open(chain, image, index).ok()?;
    let mut seen = Vec::new();
    let mut buffer = [0; PAGE];
    for range in ranges {
        for page in 0..range.pages().min(PAGES_MAX) {
            let at = range.start() + page * PAGE_SIZE;
            if pages.read(at, &mut buffer).ok()? != 1 {
                return None;
            }
            seen.push((at, buffer[0]));
        }
    }
    Some(seen)
}
