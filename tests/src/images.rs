//! Reads CRIU memory images for the tests, and compares them with the memory of a frozen tree.
//!
//! It shares no code with the receiver: otherwise no test would detect an error common to both.

use crate::memory::{Need, PAGE, Snapshot, Space};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const COMMON_MAGIC: u32 = 0x5456_4319;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
const PARENT: u32 = 1;
const PRESENT: u32 = 4;

/// A difference between images and memory.
#[derive(Debug, thiserror::Error)]
pub enum Mismatch {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file breaks the format.
    #[error("{file}: {what}")]
    Malformed {
        /// The file.
        file: String,
        /// The violation.
        what: String,
    },
    /// The image of a process or segment is missing.
    #[error("{0} is missing")]
    MissingImage(String),
    /// A file belongs to no process or segment.
    #[error("{0} is one too many")]
    ExtraFile(String),
    /// A populated page is missing from the image.
    #[error("{image}: page {address:#x} is missing")]
    MissingPage {
        /// The image.
        image: String,
        /// Its address or offset.
        address: u64,
    },
    /// A page of the image differs from the memory of the process.
    #[error("{image}: page {address:#x} differs at byte {offset}")]
    WrongBytes {
        /// The image.
        image: String,
        /// Its address or offset.
        address: u64,
        /// First byte that differs.
        offset: usize,
    },
    /// A page of the image lies outside every mapping of the process.
    #[error("{image}: page {address:#x} is outside of every mapping that is dumped")]
    OutsidePage {
        /// The image.
        image: String,
        /// Its address or offset.
        address: u64,
    },
}

/// Counts of a comparison that found no difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Processes with an image.
    pub processes: usize,
    /// Segments with an image.
    pub segments: usize,
    /// Required pages.
    pub required: u64,
    /// Pages that are present but optional.
    pub optional: u64,
}

/// One record of a pagemap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Address of the first page; in a segment, its byte offset.
    pub address: u64,
    /// Number of pages.
    pub pages: u64,
    /// CRIU's flags: 1 in parent, 4 present.
    pub flags: u32,
}

/// A pagemap file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pagemap {
    /// ID of the `pages-N.img` with its pages.
    pub pages_id: u32,
    /// Its records.
    pub entries: Vec<Entry>,
}

impl Pagemap {
    /// Parses a pagemap file strictly: what the format leaves open must be as Pageferry writes it.
    ///
    /// # Errors
    /// Describes the violation.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        Self::parse_with(bytes, entry)
    }

    /// Parses a pagemap file of any CRIU version.
    ///
    /// # Errors
    /// Describes the violation.
    pub fn parse_any(bytes: &[u8]) -> Result<Self, String> {
        Self::parse_with(bytes, entry_of_any_criu)
    }

    /// Returns the entries with adjacent entries of equal flags joined: where runs are split has no meaning.
    #[must_use]
    pub fn runs(&self) -> Vec<Entry> {
        let mut runs: Vec<Entry> = Vec::new();
        for &entry in &self.entries {
            match runs.last_mut() {
                Some(run)
                    if run.flags == entry.flags
                        && run.address + run.pages * PAGE as u64 == entry.address =>
                {
                    run.pages += entry.pages;
                }
                _ => runs.push(entry),
            }
        }
        runs
    }

    fn parse_with(
        mut bytes: &[u8],
        entry: impl Fn(Record) -> Option<Entry>,
    ) -> Result<Self, String> {
        for (name, magic) in [("common", COMMON_MAGIC), ("pagemap", PAGEMAP_MAGIC)] {
            if take_u32(&mut bytes) != Some(magic) {
                return Err(format!("no {name} magic"));
            }
        }
        let head = take_record(&mut bytes)?.ok_or("no head")?;
        let [Some(pages_id), None, None, None, None] = head else {
            return Err(format!("head {head:?}"));
        };
        let pages_id = u32::try_from(pages_id).map_err(|_| "pages_id of more than 32 bits")?;
        let mut entries: Vec<Entry> = Vec::new();
        while let Some(record) = take_record(&mut bytes)? {
            let entry = entry(record).ok_or_else(|| format!("entry {record:?}"))?;
            let last_end = entries
                .last()
                .map_or(0, |last| last.address + last.pages * PAGE as u64);
            if entry.address < last_end {
                return Err(format!(
                    "entry {entry:?} lies before the end of the one before it"
                ));
            }
            entries.push(entry);
        }
        Ok(Self { pages_id, entries })
    }

    /// Encodes the file as Pageferry writes it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = [COMMON_MAGIC.to_le_bytes(), PAGEMAP_MAGIC.to_le_bytes()].concat();
        put_record(&mut bytes, &[(1, self.pages_id.into())]);
        for entry in &self.entries {
            let flags = entry.flags.into();
            put_record(
                &mut bytes,
                &[
                    (1, entry.address),
                    (2, entry.pages),
                    (4, flags),
                    (5, entry.pages),
                ],
            );
        }
        bytes
    }
}

/// Validates a record: every field is present and sane, both page counts are equal, and the pages are either
/// present or in the parent.
fn entry(record: Record) -> Option<Entry> {
    let [
        Some(address),
        Some(old_count),
        in_parent,
        Some(flags),
        Some(pages),
    ] = record
    else {
        return None;
    };
    let flags = u32::try_from(flags).ok()?;
    let sane = u32::try_from(old_count).is_ok_and(|count| u64::from(count) == pages)
        && pages > 0
        && address.is_multiple_of(PAGE as u64)
        && pages.checked_mul(PAGE as u64)?.checked_add(address)? < 1 << 62
        && (flags == PRESENT || flags == PARENT)
        && in_parent.is_none_or(|it| it == u64::from(flags == PARENT));
    sane.then_some(Entry {
        address,
        pages,
        flags,
    })
}

/// Converts a record written by CRIU itself: until 4.1 without the second page count.
fn entry_of_any_criu(record: Record) -> Option<Entry> {
    let [address, old_count, in_parent, flags, pages] = record;
    Some(Entry {
        address: address?,
        pages: pages.or(old_count)?,
        flags: match in_parent {
            Some(1) => PARENT,
            _ => u32::try_from(flags.unwrap_or(PRESENT.into())).ok()?,
        },
    })
}

/// The varint fields 1 to 5 of a message.
type Record = [Option<u64>; 5];

fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    let (head, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u32::from_le_bytes(*head))
}

fn take_varint(bytes: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first().ok_or("a number is cut off")?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a number is too long".into())
}

fn take_record(bytes: &mut &[u8]) -> Result<Option<Record>, String> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let length = take_u32(bytes).ok_or("a length is cut off")?;
    let (mut body, rest) = usize::try_from(length)
        .ok()
        .and_then(|length| bytes.split_at_checked(length))
        .ok_or("a record is cut off")?;
    *bytes = rest;
    let mut record = Record::default();
    while !body.is_empty() {
        let key = take_varint(&mut body)?;
        let value = take_varint(&mut body)?;
        let slot = usize::try_from(key >> 3)
            .ok()
            .filter(|_| key & 7 == 0)
            .and_then(|number| record.get_mut(number.checked_sub(1)?))
            .ok_or_else(|| format!("unknown field, key {key:#x}"))?;
        if slot.replace(value).is_some() {
            return Err(format!("field {} comes twice", key >> 3));
        }
    }
    Ok(Some(record))
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    bytes.push(value.to_le_bytes()[0]);
}

fn put_record(bytes: &mut Vec<u8>, fields: &[(u8, u64)]) {
    let mut body = Vec::new();
    for &(number, value) in fields {
        put_varint(&mut body, u64::from(number) << 3);
        put_varint(&mut body, value);
    }
    let length = u32::try_from(body.len()).expect("a record is short");
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&body);
}

/// An image whose pages are located, through `parent` links if there are any.
#[derive(Debug)]
struct Image {
    name: String,
    runs: Vec<Located>,
    files: Vec<File>,
}

/// Pages that are adjacent both in memory and in one pages file.
#[derive(Debug, Clone, Copy)]
struct Located {
    address: u64,
    pages: u64,
    file: usize,
    offset: u64,
}

impl Image {
    fn open(dir: &Path, name: &str, parse: Parse) -> Result<Self, Mismatch> {
        let malformed = |what: String| Mismatch::Malformed {
            file: name.into(),
            what,
        };
        let pagemap = read_pagemap(dir, name, parse)?;
        let pages_name = pages_name(pagemap.pages_id);
        let file = open(&dir.join(&pages_name))?;
        let mut image = Self {
            name: name.into(),
            runs: Vec::new(),
            files: vec![file],
        };
        let mut parent = None;
        let mut offset = 0;
        for entry in &pagemap.entries {
            if entry.flags & PRESENT != 0 {
                image.runs.push(Located {
                    address: entry.address,
                    pages: entry.pages,
                    file: 0,
                    offset,
                });
                offset += entry.pages * PAGE as u64;
                continue;
            }
            if parent.is_none() {
                let older = Self::open(&dir.join("parent"), name, parse)?;
                parent = Some((image.files.len(), older.runs));
                image.files.extend(older.files);
            }
            let (first_file, runs) = parent.as_ref().expect("was just opened");
            for address in (entry.address..)
                .step_by(PAGE)
                .zip(0..entry.pages)
                .map(|(at, _)| at)
            {
                let (run, skip) = locate(runs, address)
                    .ok_or_else(|| malformed(format!("{address:#x} is not in the parent")))?;
                image.runs.push(Located {
                    address,
                    pages: 1,
                    file: run.file + first_file,
                    offset: run.offset + skip,
                });
            }
        }
        let length = image.files[0].metadata().map(|it| it.len()).unwrap_or(0);
        if length != offset {
            let what = format!("{pages_name} has {length} bytes, its entries say {offset}");
            return Err(malformed(what));
        }
        Ok(image)
    }

    /// Reads a page; returns whether the image has it.
    fn page(&self, address: u64, page: &mut [u8; PAGE]) -> Result<bool, Mismatch> {
        let Some((run, skip)) = locate(&self.runs, address) else {
            return Ok(false);
        };
        self.files[run.file]
            .read_exact_at(page, run.offset + skip)
            .map_err(|source| Mismatch::Io {
                path: self.name.clone().into(),
                source,
            })?;
        Ok(true)
    }

    fn compare(&self, truth: &Space, stats: &mut Stats) -> Result<(), Mismatch> {
        let mut page = [0; PAGE];
        for run in &truth.runs {
            for (address, want) in (run.start..)
                .step_by(PAGE)
                .zip(run.bytes.chunks_exact(PAGE))
            {
                match (self.page(address, &mut page)?, run.need) {
                    (true, need) => {
                        self.same(address, &page, want)?;
                        match need {
                            Need::Required => stats.required += 1,
                            Need::Optional => stats.optional += 1,
                        }
                    }
                    (false, Need::Optional) => {}
                    (false, Need::Required) => {
                        return Err(Mismatch::MissingPage {
                            image: self.name.clone(),
                            address,
                        });
                    }
                }
            }
        }
        // In the other direction: the image has no other pages, except zeros where the process has none.
        for run in &self.runs {
            for address in (run.address..)
                .step_by(PAGE)
                .zip(0..run.pages)
                .map(|(at, _)| at)
            {
                if truth.page(address).is_some() {
                    continue;
                }
                if !truth.allows(address) {
                    return Err(Mismatch::OutsidePage {
                        image: self.name.clone(),
                        address,
                    });
                }
                self.page(address, &mut page)?;
                self.same(address, &page, &[0; PAGE])?;
                stats.optional += 1;
            }
        }
        Ok(())
    }

    fn same(&self, address: u64, got: &[u8; PAGE], want: &[u8]) -> Result<(), Mismatch> {
        if got == want {
            return Ok(());
        }
        Err(Mismatch::WrongBytes {
            image: self.name.clone(),
            address,
            offset: got.iter().zip(want).take_while(|(a, b)| a == b).count(),
        })
    }
}

fn locate(runs: &[Located], address: u64) -> Option<(&Located, u64)> {
    let next = runs.partition_point(|run| run.address <= address);
    let run = &runs[next.checked_sub(1)?];
    let skip = address - run.address;
    (skip < run.pages * PAGE as u64).then_some((run, skip))
}

fn open(path: &Path) -> Result<File, Mismatch> {
    File::open(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Mismatch::MissingImage(path.display().to_string()),
        _ => Mismatch::Io {
            path: path.into(),
            source,
        },
    })
}

type Parse = fn(&[u8]) -> Result<Pagemap, String>;

fn read_pagemap(dir: &Path, name: &str, parse: Parse) -> Result<Pagemap, Mismatch> {
    let path = dir.join(name);
    open(&path)?;
    let bytes = fs::read(&path).map_err(|source| Mismatch::Io { path, source })?;
    parse(&bytes).map_err(|what| Mismatch::Malformed {
        file: name.into(),
        what,
    })
}

fn process_name(vpid: u32) -> String {
    format!("pagemap-{vpid}.img")
}

fn segment_name(inode: u64) -> String {
    format!("pagemap-shmem-{inode}.img")
}

fn pages_name(pages_id: u32) -> String {
    format!("pages-{pages_id}.img")
}

/// Checks that two directories, written by any CRIU, have the same memory images: the same entries (runs may be
/// split differently) and the same pages. Returns the number of images.
///
/// # Errors
/// Describes the first difference.
pub fn same(left: &Path, right: &Path) -> Result<usize, String> {
    let images = |dir: &Path| {
        let files = memory_files(dir).map_err(|error| error.to_string())?;
        let images = files
            .into_iter()
            .filter(|name| name.starts_with("pagemap-"));
        Ok::<_, String>(images.collect::<Vec<_>>())
    };
    let names = images(left)?;
    if names != images(right)? {
        return Err(format!(
            "not the same images: {names:?}, {:?}",
            images(right)?
        ));
    }
    for name in &names {
        let load = |dir: &Path| {
            let bytes = fs::read(dir.join(name)).map_err(|error| error.to_string())?;
            let pagemap = Pagemap::parse_any(&bytes).map_err(|what| format!("{name}: {what}"))?;
            let pages = fs::read(dir.join(pages_name(pagemap.pages_id)));
            Ok::<_, String>((pagemap.runs(), pages.map_err(|error| error.to_string())?))
        };
        let (runs, pages) = load(left)?;
        let (other_runs, other_pages) = load(right)?;
        if runs != other_runs {
            return Err(format!("{name}: {runs:x?} is not {other_runs:x?}"));
        }
        if pages != other_pages {
            let at = pages
                .iter()
                .zip(&other_pages)
                .take_while(|(a, b)| a == b)
                .count();
            return Err(format!("{name}: its pages differ at byte {at:#x}"));
        }
    }
    Ok(names.len())
}

/// Page counts of a comparison of process images, written by any CRIU, with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Pages that an image must contain.
    pub in_memory: u64,
    /// Pages that the images contain.
    pub in_images: u64,
    /// Required pages that the images lack.
    pub missing: u64,
    /// Pages whose content differs from memory.
    pub differ: u64,
}

/// Compares the private memory of processes with their images, and continues after differences.
///
/// # Errors
/// The first image that cannot be read.
pub fn count(truth: &Snapshot, dir: &Path) -> Result<Counts, Mismatch> {
    let mut counts = Counts::default();
    let mut page = [0; PAGE];
    for (&vpid, space) in &truth.processes {
        let image = Image::open(dir, &process_name(vpid), Pagemap::parse_any)?;
        for run in &image.runs {
            for index in 0..run.pages {
                let address = run.address + index * PAGE as u64;
                image.page(address, &mut page)?;
                let want = space.page(address).unwrap_or(&[0; PAGE]);
                counts.in_images += 1;
                counts.differ += u64::from(page != want);
            }
        }
        for run in space.runs.iter().filter(|run| run.need == Need::Required) {
            for offset in (0..run.bytes.len() as u64).step_by(PAGE) {
                counts.in_memory += 1;
                counts.missing += u64::from(locate(&image.runs, run.start + offset).is_none());
            }
        }
    }
    Ok(counts)
}

/// Compares the images in a directory with memory, byte by byte and in both directions.
///
/// # Errors
/// The first difference.
pub fn compare(truth: &Snapshot, dir: &Path) -> Result<Stats, Mismatch> {
    let mut stats = Stats::default();
    let mut left = memory_files(dir)?;
    let processes = truth
        .processes
        .iter()
        .map(|(&vpid, space)| (process_name(vpid), space));
    let segments = truth
        .segments
        .iter()
        .map(|(&inode, space)| (segment_name(inode), space));
    for (name, space) in processes.clone().chain(segments.clone()) {
        let empty = space.runs.iter().all(|run| run.need == Need::Optional);
        if !left.remove(&name) {
            // A restore treats a missing segment image as an empty segment.
            if empty && name.starts_with("pagemap-shmem-") {
                continue;
            }
            return Err(Mismatch::MissingImage(name));
        }
        let pages = pages_name(read_pagemap(dir, &name, Pagemap::parse)?.pages_id);
        if !left.remove(&pages) {
            // The file is missing, or belongs to another image: a file has one owner.
            return Err(Mismatch::MissingImage(format!("{pages} of {name}")));
        }
        Image::open(dir, &name, Pagemap::parse)?.compare(space, &mut stats)?;
        match name.starts_with("pagemap-shmem-") {
            true => stats.segments += 1,
            false => stats.processes += 1,
        }
    }
    match left.pop_first() {
        Some(name) => Err(Mismatch::ExtraFile(name)),
        None => Ok(stats),
    }
}

/// Lists the files in a directory that the comparison accounts for: pagemaps and pages files, including
/// temporary ones that were left behind.
fn memory_files(dir: &Path) -> Result<BTreeSet<String>, Mismatch> {
    let unreadable = |source| Mismatch::Io {
        path: dir.into(),
        source,
    };
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let name = entry
            .map_err(unreadable)?
            .file_name()
            .to_string_lossy()
            .into_owned();
        if name.contains("pagemap")
            || name.contains("pages")
            || !name.ends_with(".img") && name.contains("tmp")
        {
            names.insert(name);
        }
    }
    Ok(names)
}

/// Writes a snapshot as a flat directory of images, as a correct receiver would.
///
/// # Errors
/// Errors of the file system.
pub fn write(truth: &Snapshot, dir: &Path) -> io::Result<()> {
    let processes = truth
        .processes
        .iter()
        .map(|(&vpid, space)| (process_name(vpid), space));
    let segments = truth
        .segments
        .iter()
        .map(|(&inode, space)| (segment_name(inode), space));
    for ((name, space), pages_id) in processes.chain(segments).zip(1..) {
        let required = space.runs.iter().filter(|run| run.need == Need::Required);
        let mut pages = Vec::new();
        let mut entries = Vec::new();
        for run in required {
            entries.push(Entry {
                address: run.start,
                pages: (run.bytes.len() / PAGE) as u64,
                flags: PRESENT,
            });
            pages.extend_from_slice(&run.bytes);
        }
        fs::write(dir.join(name), Pagemap { pages_id, entries }.encode())?;
        fs::write(dir.join(pages_name(pages_id)), pages)?;
    }
    Ok(())
}

/// Reads the pagemaps in a directory, by file name.
///
/// # Errors
/// The first file that cannot be read.
pub fn pagemaps(dir: &Path) -> Result<BTreeMap<String, Pagemap>, Mismatch> {
    let names = memory_files(dir)?.into_iter();
    names
        .filter(|name| name.starts_with("pagemap-"))
        .map(|name| Ok((name.clone(), read_pagemap(dir, &name, Pagemap::parse)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as CRIU 4.x documents them (criu-formats.md), with both page counts set.
    const HAND_MADE: &[u8] = &[
        0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, // magic words
        2, 0, 0, 0, 0x08, 7, // pages_id 7
        0x0e, 0, 0, 0, 0x08, 0x80, 0xa0, 0x89, 0x8e, 0xae, 0xbd, 0x15, // address
        0x10, 1, 0x20, 4, 0x28, 1, // one page, present
    ];

    #[test]
    fn documented_bytes_are_parsed_and_encoded() {
        let pagemap = Pagemap::parse(HAND_MADE).unwrap();
        let entry = Entry {
            address: 0x55ea_e1c2_5000,
            pages: 1,
            flags: 4,
        };
        assert_eq!(pagemap.pages_id, 7);
        assert_eq!(pagemap.entries, [entry]);
        assert_eq!(pagemap.encode(), HAND_MADE);
    }

    #[test]
    fn prefixes_other_than_whole_records_are_rejected() {
        for length in 0..HAND_MADE.len() {
            assert_eq!(
                Pagemap::parse(&HAND_MADE[..length]).is_ok(),
                length == 14,
                "{length}"
            );
        }
    }

    #[test]
    fn invalid_entries_are_rejected() {
        let parse = |records: &[&[(u8, u64)]]| {
            let mut bytes = HAND_MADE[..14].to_vec();
            for fields in records {
                put_record(&mut bytes, fields);
            }
            Pagemap::parse(&bytes)
        };
        let good: &[_] = &[(1, 0x1000), (2, 2), (4, 4), (5, 2)];
        assert!(parse(&[good]).is_ok());
        assert!(parse(&[good, &[(1, 0x3000), (2, 1), (4, 1), (5, 1)]]).is_ok());
        let bad: [&[&[(u8, u64)]]; 12] = [
            &[good, good],
            &[good, &[(1, 0x2000), (2, 1), (4, 4), (5, 1)]],
            &[&[(1, 0x1001), (2, 2), (4, 4), (5, 2)]],
            &[&[(1, 0x1000), (2, 2), (4, 4)]],
            &[&[(1, 0x1000), (4, 4), (5, 2)]],
            &[&[(1, 0x1000), (2, 0), (4, 4), (5, 2)]],
            &[&[(1, 0x1000), (2, 0), (4, 4), (5, 0)]],
            &[&[(1, 0x1000), (2, 2), (5, 2)]],
            &[&[(1, 0x1000), (2, 2), (4, 5), (5, 2)]],
            &[&[(1, 0x1000), (2, 2), (3, 1), (4, 4), (5, 2)]],
            &[&[(1, 0x1000), (2, 2), (4, 4), (5, 2), (6, 1)]],
            &[&[(1, 1 << 62), (2, 2), (4, 4), (5, 2)]],
        ];
        for records in bad {
            assert!(parse(records).is_err(), "{records:?}");
        }
    }

    fn one_process(pages: &[(u64, u8)]) -> Snapshot {
        let mut space = Space::default();
        space.allowed.push(0x1000..0x10000);
        for &(start, byte) in pages {
            space.runs.push(crate::memory::Run {
                start,
                need: Need::Required,
                bytes: vec![byte; PAGE],
            });
        }
        Snapshot {
            processes: BTreeMap::from([(5, space)]),
            segments: BTreeMap::new(),
        }
    }

    #[test]
    fn pages_are_found_through_the_parent() {
        let root = tempfile::tempdir().unwrap();
        let old = root.path().join("0");
        let new = root.path().join("1");
        fs::create_dir(&old).unwrap();
        fs::create_dir(&new).unwrap();
        write(&one_process(&[(0x1000, 1), (0x2000, 2), (0x3000, 3)]), &old).unwrap();
        std::os::unix::fs::symlink("../0", new.join("parent")).unwrap();
        let entry = |address, pages, flags| Entry {
            address,
            pages,
            flags,
        };
        let pagemap = Pagemap {
            pages_id: 1,
            entries: vec![entry(0x1000, 1, PRESENT), entry(0x2000, 2, PARENT)],
        };
        fs::write(new.join("pagemap-5.img"), pagemap.encode()).unwrap();
        fs::write(new.join("pages-1.img"), [9; PAGE]).unwrap();
        let truth = one_process(&[(0x1000, 9), (0x2000, 2), (0x3000, 3)]);
        assert_eq!(compare(&truth, &new).unwrap().required, 3);
        // A page that the parent lacks.
        fs::write(old.join("pagemap-5.img"), pagemap.encode()).unwrap();
        assert!(compare(&truth, &new).is_err());
    }

    #[test]
    fn missing_and_different_pages_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        write(
            &one_process(&[(0x1000, 1), (0x2000, 2), (0x4000, 0)]),
            dir.path(),
        )
        .unwrap();
        let truth = one_process(&[(0x1000, 1), (0x2000, 3), (0x3000, 4)]);
        let counts = Counts {
            in_memory: 3,
            in_images: 3,
            missing: 1,
            differ: 1,
        };
        assert_eq!(count(&truth, dir.path()).unwrap(), counts);
    }

    #[test]
    fn zeros_are_accepted_where_the_process_has_no_page() {
        let dir = tempfile::tempdir().unwrap();
        write(&one_process(&[(0x1000, 1), (0x4000, 0)]), dir.path()).unwrap();
        let stats = compare(&one_process(&[(0x1000, 1)]), dir.path()).unwrap();
        assert_eq!((stats.required, stats.optional), (1, 1));
        write(&one_process(&[(0x1000, 1), (0x4000, 2)]), dir.path()).unwrap();
        let stale = compare(&one_process(&[(0x1000, 1)]), dir.path());
        assert!(matches!(
            stale,
            Err(Mismatch::WrongBytes {
                address: 0x4000,
                offset: 0,
                ..
            })
        ));
        write(&one_process(&[(0x1000, 1), (0x20000, 0)]), dir.path()).unwrap();
        let outside = compare(&one_process(&[(0x1000, 1)]), dir.path());
        assert!(matches!(
            outside,
            Err(Mismatch::OutsidePage {
                address: 0x20000,
                ..
            })
        ));
    }
}
