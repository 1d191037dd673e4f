//! CRIU's page-server protocol in both directions: receiving dumps, and serving pages.

use super::{Input, PAGE, STALL, context, run, scratch};
use pageferry_common::criu::page_server::{Command, HEADER_MAX, Header, PageLocation, Width};
use pageferry_common::{CHUNK_PAGES, ImageId, PAGE_SIZE, PageRange};
use pageferry_receiver::image::DirName;
use pageferry_receiver::image::format::PagemapEntry;
use pageferry_receiver::image::writer::DirWriter;
use pageferry_receiver::session::admission::Admission;
use pageferry_receiver::session::page_client::Served;
use pageferry_receiver::session::{DumpParents, ServerContext, SessionEnd, criu};
use pageferry_receiver::tools::verify::verify;
use std::cell::LazyCell;
use std::sync::Arc;

/// Bits of the first byte.
mod how {
    pub(super) const WIDE: u8 = 1;
    pub(super) const CHAIN: u8 = 2;
    /// Requests pages.
    pub(super) const GIVE: u8 = 4;
}

/// Maximum number of pages after one header.
const PAGES_MAX: u64 = 16;

/// Reads headers of the width that the first byte selects. They either request pages or belong to two dumps; for
/// dumps, the second byte is the number of headers of the first.
pub fn page_server(input: &[u8]) {
    let mut input = Input(input);
    let how = input.byte();
    let width = match how & how::WIDE {
        0 => Width::Narrow,
        _ => Width::Wide,
    };
    if how & how::GIVE != 0 {
        return give(width, input.0);
    }
    let first = usize::from(input.byte()) * width.header_len();
    let home = scratch();
    let dump_parents = match how & how::CHAIN {
        0 => DumpParents::None,
        _ => DumpParents::Newest,
    };
    let context = Arc::new(context(home.path(), dump_parents));
    for headers in [input.take(first), input.0] {
        take(&context, &with_pages(width, headers));
    }
}

/// Returns the headers, each followed by as many pages as it announces, unless there are too many.
fn with_pages(width: Width, headers: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (fill, header) in headers.chunks(width.header_len()).enumerate() {
        bytes.extend_from_slice(header);
        if header.len() < width.header_len() {
            break;
        }
        let Ok(header) = Header::decode(header, width) else {
            continue;
        };
        // Commands of old CRIU versions are decoded as their current equivalents.
        let mut again = Vec::new();
        header.encode(width, &mut again);
        assert_eq!(Header::decode(&again, width), Ok(header));
        if let (Command::Add(PageLocation::Present { .. }), 0..=PAGES_MAX) =
            (header.command, header.pages)
        {
            bytes.resize(bytes.len() + header.pages as usize * PAGE, fill as u8);
        }
    }
    bytes
}

fn take(context: &Arc<ServerContext>, bytes: &[u8]) {
    let mut answers = Vec::new();
    let pending = Admission::new(1).admit(STALL).expect("it is the only one");
    let received = criu::receive(bytes, &mut answers, pending, context);
    let SessionEnd { migration, result } = run(received);
    match result {
        Ok(()) => assert!(answers.ends_with(&[0; 4])),
        Err(_) => assert!(!migration.directory.exists()),
    }
    assert_eq!(migration.directory.exists(), migration.rounds == 1);
    if migration.rounds == 1 {
        let problems = verify(&migration.directory).expect("it is there").problems;
        // Pages that the dump locates elsewhere cannot be found here.
        let elsewhere = |problem: &String| problem.ends_with("is missing from the chain");
        assert!(problems.iter().all(elsewhere), "{problems:?}");
    }
}

/// Processes with a few pages, each filled with a byte derived from its address.
const PIDS: [u32; 2] = [7, 300];
const RUNS: [(u64, u64); 3] = [(16, 3), (19, 1), (40, 2)];

fn fill_of(page: u64) -> u8 {
    page as u8 ^ 0x55
}

thread_local! {
    static SERVED: LazyCell<Served> = const { LazyCell::new(served) };
}

fn served() -> Served {
    let home = scratch();
    let mut writer = DirWriter::begin(home.path(), DirName::Round(1)).expect("it is new");
    writer.write_inventory(1).expect("there is room");
    for pid in PIDS {
        writer.open(ImageId::Process(pid)).expect("it is new");
        for (lazy, (page, pages)) in [true, false, true].into_iter().zip(RUNS) {
            let range = PageRange::new(page * PAGE_SIZE, pages).expect("it is one");
            let data = (page..page + pages).flat_map(|page| [fill_of(page); PAGE]);
            let place = PageLocation::Present { lazy };
            let entries = [PagemapEntry { range, place }];
            let put = writer.put_as_is(&entries, &data.collect::<Vec<_>>());
            put.expect("they ascend");
        }
    }
    writer.publish().expect("there is room");
    // The open files need no names.
    Served::load(home.path()).expect("it was just written")
}

fn give(width: Width, requests: &[u8]) {
    let mut answers = Vec::new();
    // A client may request anything.
    let _ = SERVED.with(|served| served.serve(requests, &mut answers));
    let widths = [width, Width::Narrow, Width::Wide];
    let fine = widths.into_iter().any(|width| are_right(width, &answers));
    assert!(fine, "these are no pages of ours");
}

fn are_right(width: Width, mut answers: &[u8]) -> bool {
    // The last four bytes are a status.
    while answers.len() > size_of::<i32>() {
        let Some((header, rest)) = answers.split_at_checked(width.header_len()) else {
            return false;
        };
        let Ok(header) = Header::decode(header, width) else {
            return false;
        };
        let first = header.address / PAGE_SIZE;
        let known = |page| RUNS.iter().any(|&(at, len)| (at..at + len).contains(&page));
        let Some((pages, rest)) = rest.split_at_checked(header.pages as usize * PAGE) else {
            return false;
        };
        let right = (first..).zip(pages.chunks(PAGE));
        let right = right
            .into_iter()
            .all(|(page, bytes)| known(page) && bytes.iter().all(|&byte| byte == fill_of(page)));
        let is_answer = matches!(
            header.command,
            Command::Add(PageLocation::Present { lazy: false })
        );
        let of_ours = PIDS.iter().any(|&pid| header.object == u64::from(pid));
        if !(right && is_answer && of_ours && (1..=CHUNK_PAGES as u64).contains(&header.pages)) {
            return false;
        }
        answers = rest;
    }
    debug_assert!(width.header_len() <= HEADER_MAX);
    answers.is_empty() || answers == [0; 4]
}
