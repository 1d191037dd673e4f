//! Compares rounds on disk with a simple model: a chain, flattened or not, contains what was put; and `verify`
//! detects every kind of damage.

use pageferry_common::wire::{Entry, EntryKind};
use pageferry_common::{ImageId, PAGE_SIZE, PageRange};
use pageferry_receiver::image::DirName;
use pageferry_receiver::image::chain::{Cursor, images, levels, newest_round};
use pageferry_receiver::image::writer::{DirWriter, WriteError};
use pageferry_receiver::tools::flatten::{Pages, flatten};
use pageferry_receiver::tools::verify::verify;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;

const PAGE: usize = PAGE_SIZE as usize;
const IMAGE: ImageId = ImageId::Process(7);

/// Maps a page number to the byte that fills the page.
type Model = BTreeMap<u64, u8>;

/// What one round does with each page: absent, data, zero, in parent, or copied.
type Steps = Vec<(u8, u8)>;

fn entry(page: u64, kind: EntryKind) -> Entry {
    let range = PageRange::new(page * PAGE_SIZE, 1).unwrap();
    Entry { range, kind }
}

fn begin(home: &Path, round: u32) -> DirWriter {
    let mut writer = DirWriter::begin(home, DirName::Round(round)).unwrap();
    if round > 1 {
        writer.follow(DirName::Round(round - 1)).unwrap();
    }
    writer.write_inventory(1000).unwrap();
    writer
}

/// Writes a round that applies `steps` to the pages from 1, in chunks of `chunk` pages.
fn put_round(home: &Path, round: u32, before: &Model, steps: &Steps, chunk: usize) -> Model {
    let mut writer = begin(home, round);
    writer.open(ImageId::Shmem(3)).unwrap();
    writer.open(IMAGE).unwrap();
    let mut after = Model::new();
    let numbered: Vec<_> = (1u64..).zip(steps).collect();
    for part in numbered.chunks(chunk) {
        let (mut entries, mut pages) = (Vec::new(), Vec::new());
        for &(page, &(what, fill)) in part {
            let known = before.get(&page);
            let (kind, content) = match (what % 5, known) {
                (0, _) => continue,
                (3, Some(&old)) => (EntryKind::Parent, old),
                (4, Some(&old)) => (EntryKind::Copy, old),
                (2, _) => (EntryKind::Zero, 0),
                _ => {
                    pages.extend([fill; PAGE]);
                    (EntryKind::Data, fill)
                }
            };
            after.insert(page, content);
            entries.push(entry(page, kind));
        }
        writer.put(&entries, &pages).unwrap();
    }
    writer.commit().unwrap();
    after
}

/// Reads the image in a directory.
fn read(dir: &Path) -> Model {
    let chain = levels(dir).unwrap();
    let mut list = Cursor::open(&chain, IMAGE).unwrap().unwrap();
    let mut cursor = Cursor::open(&chain, IMAGE).unwrap().unwrap();
    let mut model = Model::new();
    while let Some(entry) = list.next_entry().unwrap() {
        cursor
            .read(entry.range, &mut |found| {
                let mut page = [0; PAGE];
                for index in 0..found.range.pages() {
                    let at = found.offset + index * PAGE_SIZE;
                    found.file.read_exact_at(&mut page, at).unwrap();
                    assert!(page.iter().all(|&byte| byte == page[0]));
                    model.insert(found.range.start() / PAGE_SIZE + index, page[0]);
                }
                Ok(())
            })
            .unwrap();
    }
    model
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn chain_contains_what_was_put(
        rounds in prop::collection::vec(prop::collection::vec(any::<(u8, u8)>(), 0..60), 1..6),
        chunk in 1usize..20,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path();
        let mut model = Model::new();
        for (steps, round) in rounds.iter().zip(1..) {
            model = put_round(home, round, &model, steps, chunk);
            prop_assert_eq!(&read(&home.join(round.to_string())), &model);
        }
        let verified = verify(home).unwrap();
        prop_assert!(verified.problems.is_empty(), "{:?}", verified.problems);
        prop_assert_eq!((verified.levels, verified.pages), (rounds.len(), model.len() as u64));

        let flat = home.join("flat");
        flatten(home, &flat, Pages::All, |_| {}).unwrap();
        prop_assert_eq!(read(&flat), model);
        prop_assert_eq!(levels(&flat).unwrap().len(), 1);
        prop_assert!(verify(&flat).unwrap().problems.is_empty());
    }
}

#[test]
fn round_is_private_linked_and_sparse() {
    let dir = tempfile::tempdir().unwrap();
    let before = put_round(dir.path(), 1, &Model::new(), &vec![(1, 9); 4], 2);
    put_round(
        dir.path(),
        2,
        &before,
        &vec![(3, 0), (2, 0), (2, 0), (4, 0)],
        4,
    );
    let round = newest_round(dir.path()).unwrap();
    assert_eq!(round, dir.path().join("2"));
    assert_eq!(
        fs::read_link(round.join("parent")).unwrap(),
        Path::new("../1")
    );
    assert_eq!(images(&round).unwrap(), [IMAGE, ImageId::Shmem(3)]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&round), 0o700);
    for file in fs::read_dir(&round).unwrap() {
        let path = file.unwrap().path();
        assert!(path.is_dir() || mode(&path) == 0o600, "{path:?}");
    }
    let pages = fs::metadata(round.join("pages-131074.img")).unwrap();
    assert_eq!(pages.len(), 3 * PAGE_SIZE);
}

#[test]
fn uncommitted_round_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = begin(dir.path(), 1);
    writer.open(IMAGE).unwrap();
    drop(writer);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn invalid_rounds_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    put_round(dir.path(), 1, &Model::new(), &vec![(1, 9); 4], 4);
    let begin_and_open = || {
        let mut writer = begin(dir.path(), 2);
        writer.open(IMAGE).unwrap();
        writer
    };
    for (wrong, entries) in [
        ("nowhere", vec![entry(9, EntryKind::Parent)]),
        (
            "partly",
            vec![Entry {
                range: PageRange::new(4 * PAGE_SIZE, 2).unwrap(),
                kind: EntryKind::Parent,
            }],
        ),
        ("copy of nothing", vec![entry(9, EntryKind::Copy)]),
        (
            "backwards",
            vec![entry(3, EntryKind::Zero), entry(2, EntryKind::Zero)],
        ),
        (
            "twice",
            vec![entry(3, EntryKind::Zero), entry(3, EntryKind::Zero)],
        ),
    ] {
        assert!(begin_and_open().put(&entries, &[]).is_err(), "{wrong}");
    }
    let again = begin_and_open().open(IMAGE);
    assert!(matches!(again, Err(WriteError::Protocol(_))));
}

/// Damages a valid chain of two rounds, and returns the problem that `verify` reports.
fn damaged(damage: impl Fn(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let before = put_round(dir.path(), 1, &Model::new(), &vec![(1, 9); 8], 8);
    put_round(dir.path(), 2, &before, &vec![(3, 0); 8], 8);
    assert!(verify(dir.path()).unwrap().problems.is_empty());
    damage(dir.path());
    match verify(dir.path()) {
        Ok(verified) => verified.problems.join("\n"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn verify_detects_every_damage() {
    let set_len = |path: &Path, len| {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(len).unwrap();
    };
    type Damage<'a> = (&'a str, &'a dyn Fn(&Path));
    let cases: [Damage<'_>; 7] = [
        ("has 28672", &|home| {
            set_len(&home.join("1/pages-131074.img"), 7 * PAGE_SIZE);
        }),
        ("has 36864", &|home| {
            set_len(&home.join("1/pages-131074.img"), 9 * PAGE_SIZE);
        }),
        ("cannot open", &|home| {
            fs::remove_file(home.join("1/pages-131074.img")).unwrap();
        }),
        ("is not in the parent", &|home| {
            fs::remove_file(home.join("1/pagemap-7.img")).unwrap();
            fs::remove_file(home.join("1/pages-131074.img")).unwrap();
        }),
        ("cannot follow", &|home| {
            fs::rename(home.join("1"), home.join("x")).unwrap();
        }),
        ("cannot read", &|home| {
            set_len(&home.join("2/pagemap-7.img"), 21);
        }),
        ("belongs to no pagemap", &|home| {
            fs::write(home.join("2/pages-9.img"), "").unwrap();
        }),
    ];
    for (problem, damage) in cases {
        let problems = damaged(damage);
        assert!(problems.contains(problem), "{problem}: {problems}");
    }
}

#[test]
fn flatten_copies_state_images_and_overwrites_nothing() {
    let dir = tempfile::tempdir().unwrap();
    put_round(dir.path(), 1, &Model::new(), &vec![(1, 9); 2], 8);
    fs::write(dir.path().join("1/core-7.img"), "state").unwrap();
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    flatten(dir.path(), &out, Pages::All, |_| {}).unwrap();
    assert_eq!(fs::read(out.join("core-7.img")).unwrap(), b"state");
    assert!(out.join("inventory.img").exists());
    let again = flatten(dir.path(), &out, Pages::All, |_| {}).unwrap_err();
    assert_eq!(again.source.kind(), std::io::ErrorKind::DirectoryNotEmpty);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn terabytes_of_zeros_are_copied_without_being_read() {
    const PAGES: u64 = (8 << 40) / PAGE_SIZE;
    let home = tempfile::tempdir().unwrap();
    let zeros = Entry {
        range: PageRange::new(PAGE_SIZE, PAGES).unwrap(),
        kind: EntryKind::Zero,
    };
    let mut writer = begin(home.path(), 1);
    writer.open(IMAGE).unwrap();
    let last = entry(PAGES + 1, EntryKind::Data);
    writer.put(&[zeros, last], &[5; PAGE]).unwrap();
    writer.publish().unwrap();
    let mut writer = begin(home.path(), 2);
    writer.open(IMAGE).unwrap();
    let whole = Entry {
        range: PageRange::new(PAGE_SIZE, PAGES + 1).unwrap(),
        kind: EntryKind::Copy,
    };
    writer.put(&[whole], &[]).unwrap();
    let second = writer.publish().unwrap();
    assert!(verify(&second).unwrap().problems.is_empty());
    let chain = levels(&second).unwrap();
    let mut cursor = Cursor::open(&chain, IMAGE).unwrap().unwrap();
    let mut seen = 0;
    cursor
        .read(last.range, &mut |found| {
            let mut page = [0; PAGE];
            found.file.read_exact_at(&mut page, found.offset).unwrap();
            assert_eq!((found.level, page), (0, [5; PAGE]));
            seen += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(seen, 1);
}

#[test]
fn cyclic_chain_is_rejected() {
    let home = tempfile::tempdir().unwrap();
    for round in 1..=2 {
        begin(home.path(), round).publish().unwrap();
    }
    symlink("../2", home.path().join("1/parent")).unwrap();
    for round in ["1", "2"] {
        let error = levels(&home.path().join(round)).unwrap_err();
        assert_eq!(error.source.to_string(), "the chain of parents has no end");
    }
}
