//! Scripted clients of CRIU's page-server protocol: both header widths, old commands, chained dumps, and clients that
//! send false values or disconnect early.

use pageferry_common::criu::page_server::{self, Command, Header, PageLocation, Width};
use pageferry_common::{ImageId, PAGE_SIZE};
use pageferry_receiver::image::chain::{Cursor, levels};
use pageferry_receiver::image::format::PagemapEntry;
use pageferry_receiver::quota::Bounds;
use pageferry_receiver::refusal::Failure;
use pageferry_receiver::session::admission::Admission;
use pageferry_receiver::session::criu::receive;
use pageferry_receiver::session::{DumpParents, Limits, Migration, ServerContext};
use pageferry_receiver::storage::store::Store;
use pageferry_receiver::tools::verify::verify;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex, split};

const PAGE: usize = PAGE_SIZE as usize;
const OPEN: Command = Command::Open { answered: true };
const PRESENT: PageLocation = PageLocation::Present { lazy: false };
const LAZY: PageLocation = PageLocation::Present { lazy: true };
const TASK: ImageId = ImageId::Process(7);

/// The bytes that a client sends.
struct Script {
    width: Width,
    bytes: Vec<u8>,
}

impl Script {
    fn new(width: Width) -> Self {
        let bytes = Vec::new();
        Self { width, bytes }
    }

    fn header(mut self, command: Command, pages: u64, page: u64, image: Option<ImageId>) -> Self {
        let header = Header {
            command,
            pages,
            address: page * PAGE_SIZE,
            object: image.map_or(0, |image| page_server::object(image).unwrap()),
        };
        header.encode(self.width, &mut self.bytes);
        self
    }

    fn open(self, image: ImageId) -> Self {
        self.header(OPEN, 0, 0, Some(image))
    }

    /// Adds an entry whose pages are all filled with the byte `fill`.
    fn add(self, place: PageLocation, page: u64, pages: u64, fill: u8) -> Self {
        let mut script = self.header(Command::Add(place), pages, page, Some(TASK));
        if let PageLocation::Present { .. } = place {
            let end = script.bytes.len() + pages as usize * PAGE;
            script.bytes.resize(end, fill);
        }
        script
    }

    fn close(self) -> Self {
        self.header(Command::Close, 0, 0, None)
    }
}

/// Plays a script to a receiver in `dir`. Returns the receiver's answers, and its result.
fn play(dir: &Path, chain: bool, script: &[u8]) -> (Vec<u8>, Migration, Result<(), Failure>) {
    play_bounded(Bounds::NONE, dir, chain, script)
}

/// Does the same with limits.
fn play_bounded(
    bounds: Bounds,
    dir: &Path,
    chain: bool,
    script: &[u8],
) -> (Vec<u8>, Migration, Result<(), Failure>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (ours, theirs) = duplex(1 << 16);
        let (read, write) = split(ours);
        let context = Arc::new(ServerContext {
            store: Store::open(dir).unwrap(),
            limits: Limits {
                stall: Duration::from_secs(20),
                handshake: Duration::from_secs(20),
                buffers: 2,
                bounds,
            },
            restorer: None,
            dump_parents: match chain {
                true => DumpParents::Newest,
                false => DumpParents::None,
            },
        });
        let pending = Admission::new(1).admit(context.limits.handshake).unwrap();
        // In the server, the connection ends together with this function.
        let receiving = async { receive(read, write, pending, &context).await };
        let client = async {
            let (mut read, mut write) = split(theirs);
            let mut answers = Vec::new();
            let talk = async {
                // The receiver may close before the end of the script.
                let _ = write.write_all(script).await;
                let _ = write.shutdown().await;
            };
            let ((), _) = tokio::join!(talk, read.read_to_end(&mut answers));
            answers
        };
        let (answers, end) = tokio::join!(client, receiving);
        (answers, end.migration, end.result)
    })
}

/// Returns the entries of the process image, and the byte that fills each page.
fn contents(dump: &Path) -> (Vec<PagemapEntry>, Vec<(u64, u8)>) {
    let chain = levels(dump).unwrap();
    let mut list = Cursor::open(&chain, TASK).unwrap().unwrap();
    let mut cursor = Cursor::open(&chain, TASK).unwrap().unwrap();
    let (mut entries, mut pages) = (Vec::new(), Vec::new());
    while let Some(entry) = list.next_entry().unwrap() {
        entries.push(entry);
        let each = &mut |found: pageferry_receiver::image::chain::Located<'_>| {
            use std::os::unix::fs::FileExt;
            for page in 0..found.range.pages() {
                let mut bytes = [0; PAGE];
                let at = found.offset + page * PAGE_SIZE;
                found.file.read_exact_at(&mut bytes, at).unwrap();
                assert!(bytes.iter().all(|&byte| byte == bytes[0]));
                pages.push((found.range.start() / PAGE_SIZE + page, bytes[0]));
            }
            Ok(())
        };
        cursor.read(entry.range, each).unwrap();
    }
    (entries, pages)
}

fn assert_right(dump: &Path) {
    assert_eq!(verify(dump).unwrap().problems, [""; 0]);
}

fn dump(width: Width) -> Script {
    Script::new(width)
        .open(ImageId::Shmem(0x77))
        .open(TASK)
        .add(PRESENT, 16, 2, 1)
        .add(LAZY, 18, 1, 2)
        .add(LAZY, 20, 3000, 3)
        .close()
}

#[test]
fn both_header_widths_are_accepted() {
    for width in [Width::Narrow, Width::Wide] {
        let dir = tempfile::tempdir().unwrap();
        let (answers, migration, result) = play(dir.path(), false, &dump(width).bytes);
        result.unwrap();
        // Neither image has a parent, and everything is stored.
        assert_eq!(answers, [0, 0, 0, 0, 0, 0]);
        assert_eq!((migration.rounds, migration.data_pages), (1, 3003));
        assert!(migration.finished_frozen);
        let dump = dir.path().join("criu-1");
        assert_right(&dump);
        let (entries, pages) = contents(&dump);
        let places: Vec<_> = entries
            .iter()
            .map(|it| (it.place, it.range.pages()))
            .collect();
        assert_eq!(places, [(PRESENT, 2), (LAZY, 1), (LAZY, 3000)]);
        assert_eq!(pages.len(), 3003);
        assert!(pages[..4] == [(16, 1), (17, 1), (18, 2), (20, 3)]);
    }
}

#[test]
fn old_commands_are_accepted() {
    const ADD: u8 = 1;
    const OLD_OPEN: u8 = 3;
    let dir = tempfile::tempdir().unwrap();
    let mut script = Script::new(Width::Narrow).open(TASK).add(PRESENT, 16, 1, 9);
    // The same in the commands of CRIU 1.0.
    script.bytes[0] = OLD_OPEN;
    script.bytes[24..28].copy_from_slice(&[ADD, 0, 0, 0]);
    let (answers, _, result) = play(dir.path(), false, &script.close().bytes);
    result.unwrap();
    assert_eq!(answers, [0; 4]);
    assert_eq!(contents(&dir.path().join("criu-1")).1, [(16, 9)]);
}

#[test]
fn dumps_are_chained_only_on_request() {
    let first = Script::new(Width::Narrow)
        .header(Command::HasParent, 0, 0, Some(TASK))
        .open(TASK)
        .add(PRESENT, 16, 4, 1)
        .close();
    let second = Script::new(Width::Narrow)
        .open(ImageId::Shmem(3))
        .header(Command::HasParent, 0, 0, Some(TASK))
        .open(TASK)
        .add(PageLocation::Parent, 16, 2, 0)
        .add(PRESENT, 18, 1, 2)
        .add(PageLocation::Parent, 19, 1, 0)
        .close();
    let other = ImageId::Process(8);
    let stranger = Script::new(Width::Narrow).open(other).close();
    let dir = tempfile::tempdir().unwrap();
    for script in [&first, &stranger] {
        let (answers, migration, result) = play(dir.path(), true, &script.bytes);
        result.unwrap();
        assert!(answers.iter().all(|&byte| byte == 0), "{answers:?}");
        assert_eq!(migration.finished_frozen, answers.len() == 5);
    }
    let (answers, _, result) = play(dir.path(), true, &second.bytes);
    result.unwrap();
    assert_eq!(answers, [0, 1, 0, 0, 0, 1, 0, 0, 0, 0]);
    let last = dir.path().join("criu-3");
    assert_right(&last);
    let link = fs::read_link(last.join("parent")).unwrap();
    assert_eq!(link, Path::new("../criu-1"));
    assert_eq!(contents(&last).1, [(16, 1), (17, 1), (18, 2), (19, 1)]);

    // Without --chain-dumps no parent is offered, and an entry that refers to one is refused.
    let (answers, _, result) = play(dir.path(), false, &second.bytes);
    assert!(matches!(result, Err(Failure::Refusal(_))));
    assert_eq!(answers[..6], [0; 6]);
    assert_ne!(answers[6..], [0; 4], "that is no success");
    // So is an entry that the parent lacks.
    let beyond = Script::new(Width::Narrow).open(TASK);
    let beyond = beyond.add(PageLocation::Parent, 19, 2, 0).close();
    let (answers, _, result) = play(dir.path(), true, &beyond.bytes);
    assert!(
        result
            .unwrap_err()
            .to_string()
            .contains("not in its parent")
    );
    assert_eq!(answers[0], 1);
    assert_ne!(answers[1..], [0; 4], "that is no success");
    assert!(!dir.path().join("criu-4").exists() && !dir.path().join("criu-5").exists());
}

#[test]
fn empty_dump_succeeds_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let script = Script::new(Width::Narrow).close();
    let (answers, migration, result) = play(dir.path(), false, &script.bytes);
    result.unwrap();
    assert_eq!((answers, migration.rounds), (vec![0; 4], 0));
    assert!(!dir.path().join("criu-1").exists());
}

#[test]
fn invalid_commands_are_refused() {
    let script = || Script::new(Width::Narrow);
    for (why, script) in [
        (
            "pages of no object",
            script().add(PRESENT, 16, 1, 1).close(),
        ),
        ("an object twice", script().open(TASK).open(TASK).close()),
        (
            "backwards",
            script()
                .open(TASK)
                .add(PRESENT, 16, 2, 1)
                .add(PRESENT, 17, 1, 1)
                .close(),
        ),
        (
            "no pages",
            script()
                .open(TASK)
                .header(Command::Add(PRESENT), 0, 16, Some(TASK))
                .close(),
        ),
        (
            "it asks for pages",
            script().header(Command::Get, 1, 16, Some(TASK)),
        ),
        (
            "more pages than there are addresses",
            Script::new(Width::Wide).open(TASK).header(
                Command::Add(PageLocation::Elsewhere),
                u64::MAX / 2,
                16,
                Some(TASK),
            ),
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (answers, _, result) = play(dir.path(), false, &script.bytes);
        assert!(
            matches!(result, Err(Failure::Refusal(_))),
            "{why}: {result:?}"
        );
        assert!(!answers.ends_with(&[0; 4]), "{why}: {answers:?}");
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 2, "{why}: {left:?}");
    }
}

/// However a dump is damaged or cut off, it is either refused and leaves nothing, or accepted and complete.
#[test]
fn damaged_dumps_leave_nothing_or_a_complete_dump() {
    let script = Script::new(Width::Narrow)
        .open(TASK)
        .add(PRESENT, 16, 1, 1)
        .add(PageLocation::Elsewhere, 18, 2, 0)
        .close()
        .bytes;
    let headers = (0..48).chain(48 + PAGE..script.len());
    let damaged = headers.flat_map(|at| {
        let script = &script;
        (0..8).map(move |bit| {
            let mut script = script.clone();
            script[at] ^= 1 << bit;
            script
        })
    });
    let cut = (0..script.len())
        .step_by(7)
        .map(|len| script[..len].to_vec());
    let dir = tempfile::tempdir().unwrap();
    let (mut taken, mut refused) = (0, 0);
    for script in damaged.chain(cut) {
        let (answers, migration, result) = play(dir.path(), false, &script);
        match result {
            Ok(()) => {
                taken += 1;
                assert!(answers.ends_with(&[0; 4]));
            }
            Err(_) => {
                refused += 1;
                assert!(!migration.directory.exists());
            }
        }
        for left in fs::read_dir(dir.path()).unwrap() {
            let path = left.unwrap().path();
            if path.is_dir() {
                let problems = verify(&path).unwrap().problems;
                // Pages that the dump locates elsewhere cannot be found.
                assert!(
                    problems
                        .iter()
                        .all(|it| it.ends_with("is missing from the chain")),
                    "{problems:?}"
                );
                fs::remove_dir_all(path).unwrap();
            }
        }
    }
    assert!(taken > 50 && refused > 500, "{taken} {refused}");
}

#[test]
fn every_limit_ends_a_dump_and_leaves_nothing() {
    let no_more = Bounds::NONE;
    for (option, bounds) in [
        (
            "--max-images",
            Bounds {
                images: 1,
                ..no_more
            },
        ),
        (
            "--max-bytes",
            Bounds {
                bytes: 1 << 20,
                ..no_more
            },
        ),
        (
            "--keep-free",
            Bounds {
                keep_free: u64::MAX,
                ..no_more
            },
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let script = dump(Width::Wide).bytes;
        let (_, migration, result) = play_bounded(bounds, dir.path(), false, &script);
        let Err(Failure::Refusal(refusal)) = result else {
            panic!("{option}: {result:?}");
        };
        assert!(refusal.reason.contains(option), "{}", refusal.reason);
        assert!(!migration.directory.exists());
        let left = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 2, "the lock and the identity");
    }
}
