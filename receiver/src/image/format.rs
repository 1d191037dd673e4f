//! Codec of CRIU's memory images: records, pagemap entries, the inventory.
//!
//! An image is one or two magic words, followed by records: a `u32` length and that many bytes of protobuf.
//! There may be millions of pagemap entries, so they are coded by hand, with bounds and without allocations.

use pageferry_common::PageRange;
use pageferry_common::criu::images::Inventory;
use pageferry_common::criu::page_server::PageLocation;
use prost::Message;
use std::io::{self, BufRead, Write};

/// First word of an image.
const COMMON_MAGIC: u32 = 0x5456_4319;
/// Second word of a pagemap image.
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
/// The only word of the inventory.
const INVENTORY_MAGIC: u32 = 0x5831_3116;
/// Longest accepted record, bytes. Those of a pagemap have a few dozen.
const RECORD_MAX: u32 = 4096;

/// Entry of a pagemap: one run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagemapEntry {
    /// The pages.
    pub range: PageRange,
    /// Where they are stored.
    pub place: PageLocation,
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Writes the magic words and the head of a pagemap image.
///
/// # Errors
/// Those of `out`.
pub fn write_pagemap_head(out: &mut impl Write, pages_id: u32) -> io::Result<()> {
    out.write_all(&COMMON_MAGIC.to_le_bytes())?;
    out.write_all(&PAGEMAP_MAGIC.to_le_bytes())?;
    let mut record = Record::default();
    record.field(1, u64::from(pages_id));
    record.write(out)
}

impl PagemapEntry {
    /// Writes the entry. The page count is in both fields: that of CRIU up to 4.1 and that of 4.2.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let pages = self.range.pages();
        let mut record = Record::default();
        record.field(1, self.range.start());
        record.field(2, pages);
        if self.place == PageLocation::Parent {
            // For CRIU before 3.0.
            record.field(3, 1);
        }
        record.field(4, self.place.flags().into());
        record.field(5, pages);
        record.write(out)
    }

    /// Parses the record of an entry. Returns it, and whether both page counts are there and equal.
    fn parse(record: &[u8]) -> io::Result<(Self, bool)> {
        let (mut start, mut compat_pages, mut in_parent, mut flags, mut pages) =
            (None, None, false, None, None);
        parse_fields(record, |field, value| match field {
            1 => start = Some(value),
            2 => compat_pages = Some(value),
            3 => in_parent = value != 0,
            4 => flags = Some(value),
            5 => pages = Some(value),
            _ => {}
        })?;
        let agree = pages.is_some() && pages == compat_pages;
        let (Some(start), Some(pages)) = (start, pages.or(compat_pages)) else {
            return Err(invalid("a pagemap entry without address or page count"));
        };
        let range = PageRange::new(start, pages).map_err(|bad| invalid(bad.to_string()))?;
        let place = match flags {
            _ if in_parent => PageLocation::Parent,
            None => PageLocation::Present { lazy: false },
            Some(flags) => PageLocation::from_flags(flags)
                .ok_or_else(|| invalid(format!("a pagemap entry with flags {flags:#x}")))?,
        };
        Ok((Self { range, place }, agree))
    }
}

/// Reader of a pagemap image, from its start, entry by entry.
#[derive(Debug)]
pub struct PagemapReader<R> {
    input: R,
    pages_id: u32,
    /// End of the last entry.
    end: u64,
    counts_agree: bool,
}

impl<R: BufRead> PagemapReader<R> {
    /// Reads the magic words and the head.
    ///
    /// # Errors
    /// `InvalidData` if it is not a pagemap image; those of `input`.
    pub fn new(mut input: R) -> io::Result<Self> {
        let mut magic = [0; 8];
        input.read_exact(&mut magic)?;
        if magic[..4] != COMMON_MAGIC.to_le_bytes() || magic[4..] != PAGEMAP_MAGIC.to_le_bytes() {
            return Err(invalid("not a pagemap image"));
        }
        let mut pages_id = None;
        let head = next_record(&mut input, |head| {
            parse_fields(head, |field, value| {
                if field == 1 {
                    pages_id = u32::try_from(value).ok();
                }
            })
        })?;
        head.ok_or_else(|| invalid("a pagemap without a head"))?;
        Ok(Self {
            input,
            pages_id: pages_id.ok_or_else(|| invalid("a pagemap head without a pages id"))?,
            end: 0,
            counts_agree: true,
        })
    }

    /// Returns the number in the name of the pages file.
    #[must_use]
    pub fn pages_id(&self) -> u32 {
        self.pages_id
    }

    /// Returns whether all entries so far have their page count in both fields, so that every CRIU can read
    /// them.
    #[must_use]
    pub fn counts_agree(&self) -> bool {
        self.counts_agree
    }

    /// Reads the next entry; `None` at the end. Entries ascend and do not overlap.
    ///
    /// # Errors
    /// `InvalidData` for a bad entry; those of `input`.
    pub fn next_entry(&mut self) -> io::Result<Option<PagemapEntry>> {
        let Some((entry, agree)) = next_record(&mut self.input, PagemapEntry::parse)? else {
            return Ok(None);
        };
        self.counts_agree &= agree;
        if entry.range.start() < self.end {
            return Err(invalid(format!(
                "entry {} overlaps or descends",
                entry.range
            )));
        }
        self.end = entry.range.end();
        Ok(Some(entry))
    }
}

/// Writes the inventory of a pre-dump: enough for `criu dump` to take the directory as a parent.
/// `uptime_us` is the source host's uptime when the tree was frozen, µs.
///
/// # Errors
/// Those of `out`.
pub fn write_inventory(out: &mut impl Write, uptime_us: u64) -> io::Result<()> {
    out.write_all(&INVENTORY_MAGIC.to_le_bytes())?;
    Record(Inventory::of_pre_dump(uptime_us).encode_to_vec()).write(out)
}

/// Protobuf message under construction. All fields are varints.
#[derive(Default)]
struct Record(Vec<u8>);

impl Record {
    fn field(&mut self, number: u8, value: u64) {
        self.varint(u64::from(number) << 3);
        self.varint(value);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let len = u32::try_from(self.0.len()).expect("our records have a few dozen bytes");
        out.write_all(&len.to_le_bytes())?;
        out.write_all(&self.0)
    }
}

/// Parses the next record; `None` at the end of the image. A record that is complete in the buffer is not
/// copied.
fn next_record<T>(
    input: &mut impl BufRead,
    parse: impl FnOnce(&[u8]) -> io::Result<T>,
) -> io::Result<Option<T>> {
    // An error is returned again below.
    let buffer = input.fill_buf().unwrap_or_default();
    if let Some((len, rest)) = buffer.split_first_chunk() {
        let len = u32::from_le_bytes(*len) as usize;
        if let (true, Some(record)) = (len <= RECORD_MAX as usize, rest.get(..len)) {
            let parsed = parse(record)?;
            input.consume(size_of::<u32>() + len);
            return Ok(Some(parsed));
        }
    }
    read_record(input)?.map(|record| parse(&record)).transpose()
}

/// Reads a record that may span several buffers.
fn read_record(input: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut len = [0; 4];
    let first = loop {
        match input.read(&mut len) {
            Ok(0) => return Ok(None),
            Ok(bytes) => break bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    };
    input.read_exact(&mut len[first..])?;
    let len = u32::from_le_bytes(len);
    if len > RECORD_MAX {
        return Err(invalid(format!("a record of {len} bytes")));
    }
    let mut record = vec![0; len as usize];
    input.read_exact(&mut record)?;
    Ok(Some(record))
}

/// Calls `each` with the number and value of each varint in a protobuf message; skips other fields.
fn parse_fields(record: &[u8], mut each: impl FnMut(u64, u64)) -> io::Result<()> {
    let mut rest = record;
    while !rest.is_empty() {
        let key = parse_varint(&mut rest)?;
        let skip = match key & 7 {
            0 => {
                each(key >> 3, parse_varint(&mut rest)?);
                0
            }
            1 => 8,
            2 => parse_varint(&mut rest)?,
            5 => 4,
            other => return Err(invalid(format!("a field of wire type {other}"))),
        };
        let skip = usize::try_from(skip).unwrap_or(usize::MAX);
        rest = rest
            .get(skip..)
            .ok_or_else(|| invalid("a truncated field"))?;
    }
    Ok(())
}

fn parse_varint(rest: &mut &[u8]) -> io::Result<u64> {
    let mut value = 0u64;
    for (index, &byte) in rest.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            *rest = &rest[index + 1..];
            return Ok(value);
        }
    }
    Err(invalid("a number that is truncated or longer than 64 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PRESENT: PageLocation = PageLocation::Present { lazy: false };

    fn entry(start: u64, pages: u64, place: PageLocation) -> PagemapEntry {
        let range = PageRange::new(start, pages).unwrap();
        PagemapEntry { range, place }
    }

    fn image(records: &[&[u8]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_pagemap_head(&mut bytes, 7).unwrap();
        for record in records {
            bytes.extend_from_slice(&(record.len() as u32).to_le_bytes());
            bytes.extend_from_slice(record);
        }
        bytes
    }

    fn entries(bytes: &[u8]) -> io::Result<Vec<PagemapEntry>> {
        let mut reader = PagemapReader::new(bytes)?;
        let mut all = Vec::new();
        while let Some(entry) = reader.next_entry()? {
            all.push(entry);
        }
        Ok(all)
    }

    #[test]
    fn written_images_have_these_bytes() {
        let mut bytes = Vec::new();
        write_pagemap_head(&mut bytes, 1).unwrap();
        entry(0x1000, 1, PRESENT).write(&mut bytes).unwrap();
        entry(0x2000, 0x80, PageLocation::Parent)
            .write(&mut bytes)
            .unwrap();
        let expected = [
            &b"\x19\x43\x56\x54\x25\x40\x08\x56"[..],
            b"\x02\0\0\0\x08\x01",
            b"\x09\0\0\0\x08\x80\x20\x10\x01\x20\x04\x28\x01",
            b"\x0d\0\0\0\x08\x80\x40\x10\x80\x01\x18\x01\x20\x01\x28\x80\x01",
        ];
        assert_eq!(bytes, expected.concat());
        let mut inventory = Vec::new();
        write_inventory(&mut inventory, 5).unwrap();
        assert_eq!(
            inventory,
            b"\x16\x31\x31\x58\x06\0\0\0\x08\x02\x40\x05\x48\x02"
        );
    }

    #[test]
    fn entries_of_every_criu_version_are_read() {
        let old = b"\x08\x80\xa0\x89\x8e\xae\xbd\x15\x10\x01\x20\x04";
        let new = b"\x08\x80\xc0\x89\x8e\xae\xbd\x15\x10\x00\x20\x04\x28\x01";
        let ancient = b"\x08\x80\xe0\x89\x8e\xae\xbd\x15\x10\x02\x18\x01";
        let read = entries(&image(&[old, new, ancient])).unwrap();
        let places: Vec<_> = read.iter().map(|e| (e.range.pages(), e.place)).collect();
        assert_eq!(
            places,
            [(1, PRESENT), (1, PRESENT), (2, PageLocation::Parent)]
        );
    }

    #[test]
    fn length_limit_of_a_record_is_the_same_however_it_is_buffered() {
        // Unknown fields, and a known one at the end.
        let record = |len: usize| [&b"\x78\x01".repeat(len / 2 - 1)[..], b"\x08\x07"].concat();
        for (len, fine) in [
            (RECORD_MAX as usize, true),
            (RECORD_MAX as usize + 2, false),
        ] {
            let mut bytes = (len as u32).to_le_bytes().to_vec();
            bytes.extend(record(len));
            for buffered in [1, 16, 4 * len] {
                let mut input = io::BufReader::with_capacity(buffered, &bytes[..]);
                let read = next_record(&mut input, |record| Ok(record.len()));
                assert_eq!(read.ok(), fine.then_some(Some(len)), "{len} by {buffered}");
            }
        }
    }

    #[test]
    fn bad_entries_are_refused() {
        let good = b"\x08\x80\x20\x10\x01\x20\x04".as_slice();
        assert!(entries(&image(&[good])).is_ok());
        for bad in [
            image(&[good, good]),
            image(&[b"\x08\x81\x20\x10\x01"]),
            image(&[b"\x08\x80\x20\x10\x00"]),
            image(&[b"\x10\x01"]),
            image(&[b"\x08\x80\x20\x10\x01\x20\x05"]),
            image(&[&[0xff; 11]]),
            image(&[&[0; 5000]]),
            image(&[b"\x12\xff\xff\xff\xff\x0f"]),
            b"\x19\x43\x56\x54\x25\x40\x08\x57".to_vec(),
        ] {
            assert!(entries(&bad).is_err(), "{bad:02x?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = entries(&image(&[&bytes]));
            let mut tail = image(&[]);
            tail.extend(bytes);
            let _ = entries(&tail);
        }

        #[test]
        fn written_entries_are_read_back(
            raw in prop::collection::vec((0u64..9, 1u64..1 << 33, 0u64..4), 0..20),
        ) {
            let mut at = 0x1000;
            let mut bytes = image(&[]);
            let mut all = Vec::new();
            for (gap, pages, place) in raw {
                let place = PageLocation::from_flags([1, 2, 4, 6][place as usize]).unwrap();
                let entry = entry(at + gap * 4096, pages, place);
                at = entry.range.end();
                entry.write(&mut bytes).unwrap();
                all.push(entry);
            }
            prop_assert_eq!(entries(&bytes).unwrap(), all);
        }
    }
}
