//! Small records: CRIU's replies, pagemaps, and records that Pageferry reads back.

use super::Input;
use pageferry_common::criu::{Event, Options};
use pageferry_common::needed_files::{BUILD_ID_MAX, build_id};
use pageferry_common::{ImageId, MemfdName, MigrationId, StateName, Token};
use pageferry_receiver::image::DirName;
use pageferry_receiver::image::catalog::Catalog;
use pageferry_receiver::image::format::{PagemapEntry, PagemapReader, write_pagemap_head};
use pageferry_receiver::restore::Outcome;
use pageferry_receiver::server::detect::{Dialect, detect};
use pageferry_sender::handover::record::Record;
use std::io::{BufRead, BufReader};

/// The first byte selects a parser for the rest.
pub fn records(input: &[u8]) {
    let mut input = Input(input);
    let what = input.byte();
    let bytes = input.0;
    match what % 8 {
        0 => pagemap(bytes),
        1 => catalog(bytes),
        2 => drop(Event::parse(bytes)),
        3 => outcome(bytes),
        4 => record(bytes),
        5 => names(&String::from_utf8_lossy(bytes)),
        6 => {
            let id = build_id(bytes);
            assert!(id.is_none_or(|id| id.len() <= BUILD_ID_MAX));
        }
        _ => numbers(bytes),
    }
}

/// Returns the number of the pages file, the entries, and whether both page counts of all entries agree; `None`
/// if the bytes are not a pagemap.
fn read(input: impl BufRead) -> Option<(u32, Vec<PagemapEntry>, bool)> {
    let mut reader = PagemapReader::new(input).ok()?;
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry().ok()? {
        entries.push(entry);
    }
    Some((reader.pages_id(), entries, reader.counts_agree()))
}

fn pagemap(bytes: &[u8]) {
    let whole = read(bytes);
    // The size of the reads does not matter.
    for capacity in [1, 5, 64] {
        assert_eq!(read(BufReader::with_capacity(capacity, bytes)), whole);
    }
    let Some((pages_id, entries, _)) = whole else {
        return;
    };
    let mut again = Vec::new();
    write_pagemap_head(&mut again, pages_id).expect("a vector takes everything");
    for entry in &entries {
        entry.write(&mut again).expect("a vector takes everything");
    }
    assert_eq!(read(&again[..]), Some((pages_id, entries, true)));
}

fn catalog(bytes: &[u8]) {
    let mut rest = bytes;
    let Ok(catalog) = Catalog::read(&mut rest) else {
        return;
    };
    let write = |catalog: &Catalog| {
        let mut written = Vec::new();
        catalog
            .write(&mut written)
            .expect("a vector takes everything");
        written
    };
    let written = write(&catalog);
    let again = Catalog::read(&mut &written[..]).expect("we wrote it");
    assert_eq!(write(&again), written);
}

fn outcome(bytes: &[u8]) {
    let Ok(outcome) = serde_json::from_slice::<Outcome>(bytes) else {
        return;
    };
    let written = serde_json::to_vec(&outcome).expect("it is plain data");
    let again: Outcome = serde_json::from_slice(&written).expect("we wrote it");
    assert_eq!(again, outcome);
    if let Outcome::Committed(committed) = outcome {
        numbers(&committed.options.to_le_bytes());
    }
}

fn record(bytes: &[u8]) {
    let Ok(record) = serde_json::from_slice::<Record>(bytes) else {
        return;
    };
    let written = serde_json::to_vec(&record).expect("it is plain data");
    let again: Record = serde_json::from_slice(&written).expect("we wrote it");
    assert_eq!(again.claim(), record.claim());
    if let Some(claim) = record.claim() {
        assert_eq!(Token::from_hex(&claim.token.to_hex()), Some(claim.token));
    }
}

fn names(text: &str) {
    if let Some(id) = MigrationId::from_hex(text) {
        assert!(id.to_string().eq_ignore_ascii_case(text));
    }
    if let Some(token) = Token::from_hex(text) {
        assert!(token.to_hex().eq_ignore_ascii_case(text));
    }
    if let Some(image) = ImageId::from_pagemap_name(text) {
        assert_eq!(image.pagemap_name(), text);
    }
    if let Some(dir) = DirName::parse(text) {
        assert!(dir.to_string() == text || dir.temporary() == text);
    }
    if let Some(name) = StateName::new(text) {
        assert!(!name.as_str().contains(['/', '\0']) && name.as_str() != "..");
        assert_eq!(ImageId::from_pagemap_name(text), None);
    }
    if let Some(name) = MemfdName::new(text) {
        assert!(name.as_str() == text && text.len() <= MemfdName::MAX);
    }
}

fn numbers(bytes: &[u8]) {
    let Some(&first) = bytes.first_chunk() else {
        return;
    };
    match detect(first) {
        Dialect::Native => assert_eq!(&first, b"PFRY"),
        Dialect::Tls => assert_eq!(first[0], 0x16),
        Dialect::Criu | Dialect::Unknown => {}
    }
    let bits = u32::from_le_bytes(first);
    if let Some(options) = Options::from_bits(bits) {
        assert_eq!(options.bits(), bits);
    }
}
