//! The directory that a process is restored from before its memory is there.
//!
//! Beside CRIU's images of state it has pagemaps that say of nearly every page of private memory
//! that it is elsewhere: it is fetched when it is touched, or in the background. The rest is in the
//! parent, the last round. Making it takes time for entries, not for pages.

use super::chain::{Cursor, images, levels};
use super::format::PagemapEntry;
use super::writer::{DirWriter, WriteError};
use super::{DirName, FileError, failed};
use pageferry_common::psi::Place;
use pageferry_common::{BUFFER_PAGES, ImageId, PAGE_SIZE, PageRange, PageSet, StateName};
use prost::Message;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Longest record of an image of state that is looked into, bytes: a process with a million mappings
/// has less.
const RECORD_MAX: u32 = 64 << 20;

/// Most pages in an entry of those that are fetched later, as many as are given at once. CRIU's
/// daemon has a buffer for the longest entry, and fails if one has 2 GiB.
const FETCH_PAGES: u64 = BUFFER_PAGES as u64;

const MAP_PRIVATE: u32 = 0x02;
const MAP_ANONYMOUS: u32 = 0x20;
const MAP_LOCKED: u32 = 0x2000;
const MAP_HUGETLB: u32 = 0x4_0000;
/// Bits of a mapping's status: the vDSO, and the data beside it.
const VDSO: u32 = 1 << 3;
const VVAR: u32 = 1 << 12;

/// CRIU's image of a process's memory, as far as it matters.
#[derive(Clone, PartialEq, Message)]
struct Mm {
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<Vma>,
}

#[derive(Clone, PartialEq, Message)]
struct Vma {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    #[prost(uint32, required, tag = "6")]
    flags: u32,
    #[prost(uint32, required, tag = "7")]
    status: u32,
}

impl Vma {
    /// Whether CRIU has its pages fetched: the restored process asks for those alone.
    fn is_lazy(&self) -> bool {
        let with = MAP_PRIVATE | MAP_ANONYMOUS;
        self.flags & (with | MAP_LOCKED | MAP_HUGETLB) == with && self.status & (VDSO | VVAR) == 0
    }
}

/// CRIU's image of a thread: only where its stack is.
#[derive(Clone, PartialEq, Message)]
struct Core {
    #[prost(message, optional, tag = "2")]
    x86: Option<ThreadInfo>,
}

#[derive(Clone, PartialEq, Message)]
struct ThreadInfo {
    #[prost(message, optional, tag = "2")]
    registers: Option<Registers>,
}

#[derive(Clone, PartialEq, Message)]
struct Registers {
    #[prost(uint64, required, tag = "20")]
    sp: u64,
}

/// Makes the directory beside `round`, a complete final round that CRIU's images of state are in.
/// Returns its path; `None` if these images do not tell where the stacks are (not x86-64).
///
/// # Errors
/// [`WriteError`].
pub fn prepare(home: &Path, round: u32) -> Result<Option<PathBuf>, WriteError> {
    let top = home.join(DirName::Round(round).to_string());
    let Some(stacks) = stacks(&top)? else {
        return Ok(None);
    };
    let chain = levels(&top)?;
    let mut writer = DirWriter::begin(home, DirName::Restore(round))?;
    writer.follow(DirName::Round(round))?;
    for image in images(&top)? {
        let vmas = match image {
            ImageId::Task(pid) => match record::<Mm>(&top.join(format!("mm-{pid}.img")))? {
                Some(mm) => mm.vmas,
                // A process that has ended since: CRIU restores no memory of it.
                None => continue,
            },
            ImageId::Shmem(_) => Vec::new(),
        };
        writer.open(image)?;
        let mut list = Cursor::open(&chain, image)?.expect("it was listed");
        while let Some(entry) = list.next_entry()? {
            for (range, piece) in pieces(entry.range, &vmas, &stacks) {
                match piece {
                    Piece::Copy => writer.copy(range)?,
                    Piece::As(Place::Elsewhere) => {
                        let mut rest = Some(range);
                        while let Some(range) = rest {
                            let (now, later) = range.split_at(FETCH_PAGES);
                            let range = now.expect("a range is not empty");
                            let place = Place::Elsewhere;
                            writer.put_as_is(&[PagemapEntry { range, place }], &[])?;
                            rest = later;
                        }
                    }
                    Piece::As(place) => writer.put_as_is(&[PagemapEntry { range, place }], &[])?,
                }
            }
        }
    }
    let path = writer.publish()?;
    for name in super::chain::names(&top)? {
        if StateName::new(&name).is_some() {
            let link = path.join(&name);
            fs::hard_link(top.join(&name), &link).map_err(failed("create", &link))?;
        }
    }
    Ok(Some(path))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    As(Place),
    /// Restore reads huge pages from the newest directory only.
    Copy,
}

/// Cuts a range where what becomes of its pages changes.
fn pieces(range: PageRange, vmas: &[Vma], stacks: &PageSet) -> Vec<(PageRange, Piece)> {
    let mut pieces = Vec::new();
    let mut at = range.start();
    let first = vmas.partition_point(|vma| vma.end <= at);
    for vma in &vmas[first..] {
        if vma.start >= range.end() {
            break;
        }
        let gap = PageRange::from_bounds(at, vma.start.max(at));
        pieces.extend(gap.map(|gap| (gap, Piece::As(Place::Parent))));
        let (start, end) = (vma.start.max(at), vma.end.min(range.end()));
        let Some(inside) = PageRange::from_bounds(start, end) else {
            continue;
        };
        at = end;
        if vma.flags & MAP_HUGETLB != 0 {
            pieces.push((inside, Piece::Copy));
        } else if vma.is_lazy() {
            stacks.split(inside, |range, stack| {
                let place = if stack {
                    Place::Parent
                } else {
                    Place::Elsewhere
                };
                pieces.push((range, Piece::As(place)));
            });
        } else {
            pieces.push((inside, Piece::As(Place::Parent)));
        }
    }
    let rest = PageRange::from_bounds(at, range.end());
    pieces.extend(rest.map(|rest| (rest, Piece::As(Place::Parent))));
    pieces
}

/// The pages that threads' stack pointers are in: wanted at once, whoever's they are.
fn stacks(dir: &Path) -> Result<Option<PageSet>, FileError> {
    let mut stacks = PageSet::new();
    for name in super::chain::names(dir)? {
        if !name.starts_with("core-") || !name.ends_with(".img") {
            continue;
        }
        let core = record::<Core>(&dir.join(&name))?;
        let registers = core.and_then(|core| core.x86?.registers);
        let Some(Registers { sp }) = registers else {
            return Ok(None);
        };
        if let Ok(page) = PageRange::new(sp - sp % PAGE_SIZE, 1) {
            stacks.insert(page);
        }
    }
    Ok(Some(stacks))
}

/// The one record of an image of state; `None` if there is no such image.
fn record<M: Message + Default>(path: &Path) -> Result<Option<M>, FileError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let mut read = || {
        // Two magic words, and the record's length.
        let mut head = [0; 12];
        file.read_exact(&mut head)?;
        let len = u32::from_le_bytes(head[8..].try_into().expect("four bytes"));
        if len > RECORD_MAX {
            return Err(io::Error::other(format!("a record of {len} bytes")));
        }
        let mut bytes = Vec::new();
        (&mut file).take(len.into()).read_to_end(&mut bytes)?;
        M::decode(&bytes[..]).map_err(io::Error::other)
    };
    read().map(Some).map_err(failed("understand", path))
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
    fn every_page_is_in_one_piece() {
        let anonymous = MAP_PRIVATE | MAP_ANONYMOUS;
        let vmas = [
            vma(1, 10, anonymous),
            vma(10, 12, MAP_PRIVATE),
            vma(20, 30, anonymous | MAP_HUGETLB),
            vma(30, 40, anonymous | MAP_LOCKED),
        ];
        let mut stacks = PageSet::new();
        stacks.insert(range(5, 6));
        let (here, away) = (Piece::As(Place::Parent), Piece::As(Place::Elsewhere));
        assert_eq!(
            pieces(range(2, 35), &vmas, &stacks),
            [
                (range(2, 5), away),
                (range(5, 6), here),
                (range(6, 10), away),
                (range(10, 12), here),
                (range(12, 20), here),
                (range(20, 30), Piece::Copy),
                (range(30, 35), here),
            ]
        );
        assert_eq!(
            pieces(range(50, 60), &vmas, &stacks),
            [(range(50, 60), here)]
        );
    }
}
