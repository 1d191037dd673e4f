//! Directory for a lazy restore: CRIU's images of state, and of memory only what CRIU itself must restore.
//!
//! Nearly all private memory is left out, and the filler process fills it in ([`crate::restore::filler`]).
//! The time to make the directory grows with the number of pagemap entries, not of pages.

use crate::file_error::{FileError, failed};
use crate::image::DirName;
use crate::image::catalog::Catalog;
use crate::image::chain::{Levels, levels, names};
use crate::image::format::PagemapEntry;
use crate::image::index::{Index, Pages};
use crate::image::writer::{DirWriter, WriteError};
use crate::restore::segments::{Prefilled, Segments};
use pageferry_common::criu::images::{Core, Mm, Stack, Vma, records};
use pageferry_common::criu::page_server::PageLocation;
use pageferry_common::{CHUNK_SIZE, ImageId, PAGE_SIZE, PageRange, PageSet, StateName};
use prost::Message;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Most pages that are copied into the directory, 16 MiB. If there are more, they are entries in the parent:
/// then CRIU reads all pagemaps of the chain, which takes time that grows with memory.
const COPIED_MAX: u64 = 4096;

/// Directory for a lazy restore.
#[derive(Debug)]
pub struct Prepared {
    /// Its path.
    pub dir: PathBuf,
    /// Segments that CRIU takes from memory; their pagemaps are empty.
    pub segments: Prefilled,
}

/// Makes the directory beside the newest round of `catalog`, which must be a complete final round with CRIU's
/// images of state. `segments` are the shared segments that are in memory. Returns `None` if the images do
/// not show where the stacks are (not x86-64).
///
/// # Errors
/// [`WriteError`].
pub fn prepare(
    home: &Path,
    catalog: &Catalog,
    segments: &mut Segments,
) -> Result<Option<Prepared>, WriteError> {
    let round = DirName::Round(catalog.rounds());
    let top = home.join(round.to_string());
    let Some(mut images) = split_images(&top, catalog)? else {
        return Ok(None);
    };
    let segments = segments.finish(&top, catalog)?;
    for image in &mut images {
        if matches!(image.id, ImageId::Shmem(id) if segments.get(id).is_some()) {
            image.at_once.clear();
        }
    }
    let mut writer = DirWriter::begin(home, DirName::Restore(catalog.rounds()))?;
    let at_once = images.iter().flat_map(|image| &image.at_once);
    let copied = at_once.map(|(range, _)| range.pages()).sum::<u64>() <= COPIED_MAX;
    if !copied {
        writer.follow(round)?;
    }
    let chain = levels(&top)?;
    for image in images {
        put_image(&mut writer, &chain, image, copied)?;
    }
    let dir = writer.publish()?;
    link_state(&top, &dir)?;
    Ok(Some(Prepared { dir, segments }))
}

/// Writes the pages of an image that CRIU restores itself: a copy of each if `copied`, else entries in the
/// parent.
fn put_image(
    writer: &mut DirWriter,
    chain: &Levels,
    image: Image<'_>,
    copied: bool,
) -> Result<(), WriteError> {
    writer.open(image.id)?;
    if image.at_once.is_empty() {
        return Ok(());
    }
    let pages = Pages::open(chain, image.id, image.index.clone())?;
    for (range, huge) in image.at_once {
        if copied || huge {
            copy(writer, &pages, range)?;
        } else {
            let place = PageLocation::Parent;
            writer.put_as_is(&[PagemapEntry { range, place }], &[])?;
        }
    }
    Ok(())
}

/// Writes a copy of pages.
fn copy(writer: &mut DirWriter, pages: &Pages, range: PageRange) -> Result<(), WriteError> {
    let mut buffer = vec![0; range.bytes().min(CHUNK_SIZE as u64) as usize];
    let mut rest = Some(range);
    while let Some(now) = rest {
        let len = buffer.len().min(now.bytes() as usize);
        let read = pages.read(now.start(), &mut buffer[..len])?;
        let (now, later) = now.split_at(read);
        let range = now.expect("it is in the index");
        let place = PageLocation::Present { lazy: false };
        let data = &buffer[..range.bytes() as usize];
        writer.put_as_is(&[PagemapEntry { range, place }], data)?;
        rest = later;
    }
    Ok(())
}

/// Links CRIU's images of state into another directory.
fn link_state(from: &Path, to: &Path) -> Result<(), FileError> {
    for name in names(from)? {
        if StateName::new(&name).is_some() {
            let link = to.join(&name);
            fs::hard_link(from.join(&name), &link).map_err(failed("create", &link))?;
        }
    }
    Ok(())
}

/// Pages that a process misses after a lazy restore.
#[derive(Debug)]
pub struct PendingPages {
    /// All pages of its image.
    pub pages: Rc<Pages>,
    /// Those that are missing, ascending.
    pub missing: Vec<PageRange>,
}

/// Returns the pages that each process misses after a lazy restore from `round`, the newest of `catalog`, by
/// PID; `None` where [`prepare`] returns that.
///
/// # Errors
/// [`FileError`].
pub fn pending_pages(
    round: &Path,
    catalog: Catalog,
) -> Result<Option<BTreeMap<i32, PendingPages>>, FileError> {
    let Some(images) = split_images(round, &catalog)? else {
        return Ok(None);
    };
    let chain = levels(round)?;
    let later = images.into_iter().map(|image| (image.id, image.later));
    let mut later: BTreeMap<_, _> = later.collect();
    let mut pending = BTreeMap::new();
    for (id, index) in catalog.into_images() {
        if let (ImageId::Process(pid), Some(missing)) = (id, later.remove(&id)) {
            let pages = Rc::new(Pages::open(&chain, id, index)?);
            pending.insert(pid.cast_signed(), PendingPages { pages, missing });
        }
    }
    Ok(Some(pending))
}

/// Pages of one image, by when they are needed.
#[derive(Debug)]
struct Image<'a> {
    id: ImageId,
    index: &'a Index,
    /// Pages that CRIU restores itself, and whether they are huge.
    at_once: Vec<(PageRange, bool)>,
    /// Pages that the filler process fills in.
    later: Vec<PageRange>,
}

/// Splits all images of the round in `top`; returns `None` if CRIU's images do not show where the stacks are.
fn split_images<'a>(top: &Path, catalog: &'a Catalog) -> Result<Option<Vec<Image<'a>>>, FileError> {
    let Some(stacks) = stacks(top)? else {
        return Ok(None);
    };
    let mut split = Vec::new();
    for (id, index) in catalog.images() {
        let vmas = match id {
            ImageId::Process(pid) => match record::<Mm>(&top.join(format!("mm-{pid}.img")))? {
                Some(mm) => mm.vmas,
                // The process has exited since: CRIU restores no memory of it.
                None => continue,
            },
            ImageId::Shmem(_) => Vec::new(),
        };
        let (mut at_once, mut later) = (Vec::new(), Vec::new());
        for range in index.ranges() {
            cut(range, &vmas, &stacks, |range, needed| match needed {
                Needed::Later => later.push(range),
                Needed::AtOnce { huge } => at_once.push((range, huge)),
            });
        }
        split.push(Image {
            id,
            index,
            at_once,
            later,
        });
    }
    Ok(Some(split))
}

/// When pages are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needed {
    /// By CRIU, while it restores. It reads huge pages from the newest directory only.
    AtOnce { huge: bool },
    /// By the process, when it touches them.
    Later,
}

/// Cuts a range where it changes when its pages are needed, and calls `each` for each piece. Pages outside of
/// all mappings count as needed at once.
fn cut(range: PageRange, vmas: &[Vma], stacks: &PageSet, mut each: impl FnMut(PageRange, Needed)) {
    const AT_ONCE: Needed = Needed::AtOnce { huge: false };
    let mut at = range.start();
    let first = vmas.partition_point(|vma| vma.end <= at);
    for vma in &vmas[first..] {
        if vma.start >= range.end() {
            break;
        }
        let gap = PageRange::from_bounds(at, vma.start.max(at));
        gap.into_iter().for_each(|gap| each(gap, AT_ONCE));
        let (start, end) = (vma.start.max(at), vma.end.min(range.end()));
        let Some(inside) = PageRange::from_bounds(start, end) else {
            continue;
        };
        at = end;
        if vma.flags & Vma::MAP_HUGETLB != 0 {
            each(inside, Needed::AtOnce { huge: true });
        } else if vma.is_lazy() {
            stacks.split(inside, |range, stack| {
                each(range, if stack { AT_ONCE } else { Needed::Later });
            });
        } else {
            each(inside, AT_ONCE);
        }
    }
    let rest = PageRange::from_bounds(at, range.end());
    rest.into_iter().for_each(|rest| each(rest, AT_ONCE));
}

/// Returns the pages that the stack pointers of all threads point into. CRIU restores them itself, in each
/// process that has a page there. `None` if the images do not show them.
fn stacks(dir: &Path) -> Result<Option<PageSet>, FileError> {
    let mut stacks = PageSet::new();
    for name in names(dir)? {
        if !name.starts_with("core-") || !name.ends_with(".img") {
            continue;
        }
        let core = record::<Core>(&dir.join(&name))?;
        let sp = match core.as_ref().map(Core::stack) {
            Some(Stack::At(sp)) => sp,
            Some(Stack::Exited) => continue,
            Some(Stack::Unknown) | None => return Ok(None),
        };
        if let Ok(page) = PageRange::new(sp - sp % PAGE_SIZE, 1) {
            stacks.insert(page);
        }
    }
    Ok(Some(stacks))
}

/// Returns the first record of an image of state; `None` if the image is missing.
fn record<M: Message + Default>(path: &Path) -> Result<Option<M>, FileError> {
    let records = records(path).map_err(failed("parse", path))?;
    Ok(records.into_iter().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::from_bounds(start * PAGE_SIZE, end * PAGE_SIZE).unwrap()
    }

    fn vma(start: u64, end: u64, flags: u32) -> Vma {
        Vma {
            start: start * PAGE_SIZE,
            end: end * PAGE_SIZE,
            flags,
            status: 1,
        }
    }

    #[test]
    fn every_page_is_in_exactly_one_piece() {
        let anonymous = Vma::MAP_PRIVATE | Vma::MAP_ANONYMOUS;
        let vmas = [
            vma(1, 10, anonymous),
            vma(10, 12, Vma::MAP_PRIVATE),
            vma(20, 30, anonymous | Vma::MAP_HUGETLB),
            vma(30, 40, anonymous | Vma::MAP_LOCKED),
        ];
        let mut stacks = PageSet::new();
        stacks.insert(range(5, 6));
        let (now, later) = (Needed::AtOnce { huge: false }, Needed::Later);
        let pieces = |range| {
            let mut all = Vec::new();
            cut(range, &vmas, &stacks, |range, needed| {
                all.push((range, needed));
            });
            all
        };
        assert_eq!(
            pieces(range(2, 35)),
            [
                (range(2, 5), later),
                (range(5, 6), now),
                (range(6, 10), later),
                (range(10, 12), now),
                (range(12, 20), now),
                (range(20, 30), Needed::AtOnce { huge: true }),
                (range(30, 35), now),
            ]
        );
        assert_eq!(pieces(range(50, 60)), [(range(50, 60), now)]);
    }
}
