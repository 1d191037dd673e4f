//! Rounds before a real `criu dump --track-mem`: rounds by Pageferry as its parent, and pre-dumps by CRIU through
//! Pageferry's page server. All of it requires a kernel with soft-dirty bits, so it runs in the VM.

use pageferry_tests::criu::{Criu, Restored, await_gone, merge, skip};
use pageferry_tests::images::{self, Counts, Pagemap};
use pageferry_tests::{Frozen, Pair, Snapshot, Victim};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Returns CRIU if it can track dirty pages here. `scripts/test` runs these tests in the VM too, and sets a
/// variable for that; the VM sets another that requires tracking.
fn criu_that_tracks(test: &str) -> Option<Criu> {
    let criu = Criu::stable(test)?;
    let dir = tempfile::tempdir().unwrap();
    let can = criu.run("check", dir.path(), &["--feature", "mem_dirty_track"]);
    if can.is_ok() {
        return Some(criu);
    }
    let required = std::env::var_os("PAGEFERRY_ALL_TRACKERS").is_some();
    assert!(!required, "{can:?}");
    match std::env::var_os("PAGEFERRY_VM_FOLLOWS") {
        Some(_) => eprintln!("{test}: in the VM"),
        None => skip(test, "this kernel has no soft-dirty bits"),
    }
    None
}

/// Returns the number of pages in the images of a dump, and how many of them are in its parent.
fn pages_and_in_parent(dump: &Path) -> (u64, u64) {
    let (mut pages, mut in_parent) = (0, 0);
    for file in fs::read_dir(dump).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        if name.starts_with("pagemap-") && !name.contains("shmem") {
            let image = Pagemap::parse_any(&fs::read(dump.join(name)).unwrap()).unwrap();
            for entry in image.entries {
                pages += entry.pages;
                in_parent += if entry.flags == 1 { entry.pages } else { 0 };
            }
        }
    }
    (pages, in_parent)
}

fn assert_right(victim: &mut Victim, restored: &Restored, what: &str) {
    let pages = victim.report().verdict(restored.root());
    let pages = pages.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(pages > 1000, "{what}: {pages}");
}

const KINDS: [&str; 2] = [
    "heap=16 zero=1 protnone=1 fileprivate=2 threads=3 dirty=5",
    "heap=8 shared=4 memfd=2 children=2 dirty=5",
];

#[test]
fn pageferry_rounds_are_a_parent_of_a_criu_dump() {
    let Some(criu) = criu_that_tracks("our rounds as parent of a dump") else {
        return;
    };
    for tracker in ["soft-dirty", "uffd"] {
        for features in KINDS {
            let what = format!("{tracker}: {features}");
            let mut victim = Victim::detached(features);
            let (pid, tree) = (victim.pid(), victim.tree());
            let pair = Pair::start(&[]);
            let options = ["--tracker", tracker, "--rounds", "3"];
            let report = pair.send(pid, &options).expect_report();
            let last = report.last_round().parent().unwrap().join("last");
            fs::create_dir(&last).unwrap();
            let pid_text = pid.to_string();
            let options = ["-t", &pid_text, "--track-mem", "--prev-images-dir", "../3"];
            let dumped = criu.run("dump", &last, &options);
            dumped.unwrap_or_else(|error| panic!("{what}: {error}"));
            let (pages, in_parent) = pages_and_in_parent(&last);
            // Nothing has reset the bits with uffd, so CRIU considers nearly all pages dirty.
            let reset = tracker == "soft-dirty";
            assert_eq!(
                in_parent > pages / 2,
                reset,
                "{what}: {in_parent} of {pages}"
            );
            victim.await_end();
            await_gone(&tree);
            let restored = criu.restore(&last, pid, &[]);
            let restored = restored.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_right(&mut victim, &restored, &what);
        }
    }
}

#[test]
fn criu_pre_dumps_are_chained_by_the_page_server() {
    let Some(criu) = criu_that_tracks("CRIU's rounds through our page server") else {
        return;
    };
    for features in KINDS {
        let mut victim = Victim::detached(features);
        let (pid, tree) = (victim.pid(), victim.tree());
        let pair = Pair::start(&["--chain-dumps"]);
        let state = tempfile::tempdir().unwrap();
        let (port, pid_text) = (pair.address().port().to_string(), pid.to_string());
        for (round, action) in ["pre-dump", "pre-dump", "dump"].into_iter().enumerate() {
            let dir = state.path().join(round.to_string());
            fs::create_dir(&dir).unwrap();
            let mut options = vec!["-t", &pid_text, "--track-mem", "--page-server"];
            options.extend(["--address", "127.0.0.1", "--port", &port]);
            let before = format!("../{}", round.wrapping_sub(1));
            if round > 0 {
                options.extend(["--prev-images-dir", &before]);
            }
            let done = criu.run(action, &dir, &options);
            done.unwrap_or_else(|error| panic!("{features}: {action} {round}: {error}"));
        }
        victim.await_end();
        await_gone(&tree);
        let last = pair.dir().join("criu-3");
        let (pages, in_parent) = pages_and_in_parent(&last);
        assert!(in_parent > pages / 2, "{features}: {in_parent} of {pages}");
        merge(&state.path().join("2"), &last);
        let restored = criu.restore(&last, pid, &[]);
        let restored = restored.unwrap_or_else(|error| panic!("{features}: {error}"));
        assert_right(&mut victim, &restored, features);
    }
}

/// Destination of CRIU's pre-dumps in the comparison.
const THROUGH: [&str; 3] = [
    "into local files",
    "through criu page-server",
    "through receive",
];

/// Pre-dumps a process with CRIU in `mode`; returns the owner of the images, and their directory.
fn pre_dump(criu: &Criu, pid: i32, mode: &str, through: &str) -> (TempDir, PathBuf) {
    let (state, images) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let pid = pid.to_string();
    let options = ["-t", &pid, "--track-mem", "--pre-dump-mode", mode];
    let run_to = |address: SocketAddr| {
        let port = address.port().to_string();
        let server = ["--page-server", "--address", "127.0.0.1", "--port", &port];
        let all = [&options[..], &server].concat();
        criu.run("pre-dump", state.path(), &all).unwrap();
    };
    match through {
        "into local files" => criu.run("pre-dump", images.path(), &options).unwrap(),
        "through criu page-server" => {
            let (server, address) = criu.page_server(images.path(), &[]);
            run_to(address);
            assert!(server.finish().status.success());
        }
        _ => {
            let pair = Pair::start(&["--once"]);
            run_to(pair.address());
            let (root, ended) = pair.finish();
            assert!(ended.status.success(), "{}", ended.stderr);
            let dir = root.path().join("images/criu-1");
            return (root, dir);
        }
    }
    let dir = images.path().to_owned();
    (images, dir)
}

/// Compares images with the memory of a process that has been idle since.
fn counts(pid: i32, dir: &Path) -> Counts {
    let truth = Snapshot::take(&Frozen::stop(pid).unwrap()).unwrap();
    images::count(&truth, dir).unwrap()
}

fn row(way: &str, counts: Counts) -> String {
    let Counts {
        in_memory,
        in_images,
        missing,
        differ,
    } = counts;
    format!("{way:52} {in_memory:>9} {in_images:>9} {missing:>8} {differ:>8}")
}

/// Pre-copies an idle process of 256 MiB in every way, and prints how many pages the images lack, and how many
/// differ from memory. Only the rows of Pageferry can fail this test: there, both must be zero.
#[test]
fn pre_dumps_compared() {
    let Some(criu) = criu_that_tracks("a comparison of pre-dumps") else {
        return;
    };
    let mut table = vec![format!(
        "{:52} {:>9} {:>9} {:>8} {:>8}",
        "way", "in memory", "in images", "missing", "differ"
    )];
    for mode in ["read", "splice"] {
        for through in THROUGH {
            let victim = Victim::detached("heap=256");
            let (_images, dir) = pre_dump(&criu, victim.pid(), mode, through);
            let way = format!("criu pre-dump, mode {mode}, {through}");
            table.push(row(&way, counts(victim.pid(), &dir)));
        }
    }
    let mut ours = Vec::new();
    for tracker in ["soft-dirty", "uffd", "hash"] {
        let victim = Victim::detached("heap=256");
        let pair = Pair::start(&[]);
        let options = ["--tracker", tracker, "--rounds", "2"];
        let report = pair.send(victim.pid(), &options).expect_report();
        let counts = counts(victim.pid(), &report.last_round());
        let way = format!("send --tracker {tracker}, 2 rounds");
        table.push(row(&way, counts));
        ours.push((way, counts));
    }
    println!("\n{}", table.join("\n"));
    for (way, counts) in ours {
        assert!(counts.in_images > 65536, "{way}: {counts:?}");
        assert_eq!((counts.missing, counts.differ), (0, 0), "{way}");
    }
}
