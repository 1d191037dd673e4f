//! `receive` in place of `criu page-server`, with the real CRIU: the images equal those of CRIU's own server, and
//! a process restored from them checks itself.

use pageferry_tests::criu::{Criu, await_gone, merge, skip};
use pageferry_tests::huge::HugePages;
use pageferry_tests::memory::{is_stopped, lives};
use pageferry_tests::scenario::assert_verified;
use pageferry_tests::servers::{Postgres, Redis};
use pageferry_tests::{Pair, Receiver, Victim, images};
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread::JoinHandle;

/// Directory with everything that CRIU writes, except pages.
struct State(tempfile::TempDir);

impl State {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

/// Features of the victims to dump and restore.
const KINDS: [&str; 10] = [
    "heap=16 text=2 zero=1 brk=1 static dirty=20",
    "heap=8 threads=6 spin=1 signals dirty=20",
    "heap=8 children=3 grandchildren=2 dirty=20",
    "heap=4 shared=4 children=2 dirty=20",
    "heap=4 memfd=4 memfd_unmapped=2 dirty=20",
    "heap=4 sysv=4 children=1 dirty=20",
    "heap=4 fileprivate=4 readonly=1 protnone=2 dirty=20",
    "heap=4 thp=8 mlock=1 dirty=20",
    "heap=4 sparse=4096 dirty=20",
    "heap=4 guard=2 dirty=20",
];

/// Returns whether a CRIU can dump a victim of this kind.
fn can(criu: &Criu, features: &str) -> bool {
    // Up to 4.1 it takes guard regions for swapped pages, and fails to read them.
    criu.version() >= (4, 2) || !features.contains("guard")
}

fn start(features: &str) -> Victim {
    match features.contains("sysv") {
        // CRIU dumps System V segments with their namespace.
        true => Victim::detached_in(&["unshare", "--ipc"], features),
        false => Victim::detached(features),
    }
}

/// Forwards a client to two page servers, which must answer alike.
fn tee(left: SocketAddr, right: SocketAddr) -> (SocketAddr, JoinHandle<io::Result<()>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let both = std::thread::spawn(move || {
        let (client, _) = listener.accept()?;
        let (left, right) = (TcpStream::connect(left)?, TcpStream::connect(right)?);
        let answers = {
            let (mut client, mut left, mut right) =
                (client.try_clone()?, left.try_clone()?, right.try_clone()?);
            std::thread::spawn(move || {
                let mut forward = || {
                    // CRIU reads the four bytes of a status in one call.
                    let (mut answer, mut other) = ([0; 4], [0; 4]);
                    loop {
                        let n = left.read(&mut answer)?;
                        if n == 0 {
                            return Ok(());
                        }
                        right.read_exact(&mut other[..n])?;
                        assert_eq!(answer[..n], other[..n], "they answer alike");
                        client.write_all(&answer[..n])?;
                    }
                };
                let forwarded = forward();
                // If a server fails, the client must not wait for an answer.
                let _ = client.shutdown(Shutdown::Both);
                forwarded
            })
        };
        let (mut from, mut buffer) = (client, vec![0; 1 << 16]);
        loop {
            let n = from.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            for mut server in [&left, &right] {
                server.write_all(&buffer[..n])?;
            }
        }
        for server in [&left, &right] {
            server.shutdown(Shutdown::Write)?;
        }
        answers.join().expect("the answers are alike")
    });
    (address, both)
}

#[test]
fn dump_equals_that_of_crius_page_server() {
    for criu in Criu::all("a dump to both page servers") {
        for features in KINDS.iter().filter(|kind| can(&criu, kind)) {
            let victim = start(features);
            let pair = Pair::start(&["--once", "--json"]);
            let (state, theirs) = (State::new(), State::new());
            let (server, address) = criu.page_server(theirs.path(), &[]);
            let (address, both) = tee(address, pair.address());
            let dumped = criu.dump_to(address, victim.pid(), state.path(), &["--leave-running"]);
            both.join().unwrap().unwrap();
            dumped.unwrap();
            assert!(server.finish().status.success());
            let (dir, finished) = pair.finish();
            assert!(finished.status.success(), "{}", finished.stderr);
            let dump = dir.path().join("images/criu-1");
            let count = images::same(&dump, theirs.path())
                .unwrap_or_else(|error| panic!("{:?}: {features}: {error}", criu.version()));
            assert!(count >= 1);
            assert_verified(&dump);
        }
    }
}

/// Dumps a victim through `receive`, restores it, and has it check itself.
fn assert_restored(criu: &Criu, features: &str) {
    let mut victim = start(features);
    let what = format!("CRIU {:?}: {features}", criu.version());
    for skipped in victim.skipped() {
        skip(&what, skipped);
    }
    let (pid, tree) = (victim.pid(), victim.tree());
    let pair = Pair::start(&[]);
    let state = State::new();
    criu.dump_to(pair.address(), pid, state.path(), &[])
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    victim.await_end();
    await_gone(&tree);
    let dump = pair.dir().join("criu-1");
    assert_verified(&dump);
    merge(state.path(), &dump);
    let restored = criu
        .restore(&dump, pid, &[])
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    let pages = victim.report().verdict(pid);
    let pages = pages.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(pages > 1000, "{what}: {pages}");
    drop(restored);
}

#[test]
fn victim_of_every_kind_is_restored_from_a_dump() {
    for criu in Criu::all("restore through our page server") {
        for features in KINDS.iter().filter(|kind| can(&criu, kind)) {
            assert_restored(&criu, features);
        }
    }
}

#[test]
fn hugetlb_pages_are_restored() {
    for criu in Criu::all("huge pages through our page server") {
        let _pages = HugePages::reserve(16);
        assert_restored(&criu, "hugetlb=4 hugeshared=2 heap=4 dirty=20");
    }
}

#[test]
fn redis_is_restored_with_its_data() {
    for criu in Criu::all("redis through our page server") {
        let mut redis = Redis::start();
        redis.fill(10_000);
        redis.cli(&["set", "known", "value"]).unwrap();
        let digest = redis.cli(&["debug", "digest"]).unwrap();
        let (pid, pair, state) = (redis.pid(), Pair::start(&[]), State::new());
        criu.dump_to(pair.address(), pid, state.path(), &[])
            .unwrap();
        redis.daemon().child().wait().unwrap();
        let dump = pair.dir().join("criu-1");
        merge(state.path(), &dump);
        let _restored = criu.restore(&dump, pid, &[]).unwrap();
        assert_eq!(redis.cli(&["get", "known"]).unwrap().trim(), "value");
        assert_eq!(redis.cli(&["debug", "digest"]).unwrap(), digest);
    }
}

#[test]
fn postgresql_is_restored_with_consistent_tables() {
    for criu in Criu::all("PostgreSQL through our page server") {
        let mut postgres = Postgres::start();
        drop(postgres.load());
        postgres.assert_balanced();
        let booked = "select count(*), sum(delta) from pgbench_history";
        let before = postgres.sql(booked).unwrap();
        let tree = pageferry_tests::memory::tree(postgres.pid());
        let (pid, pair, state) = (postgres.pid(), Pair::start(&[]), State::new());
        criu.dump_to(pair.address(), pid, state.path(), &[])
            .unwrap();
        postgres.daemon().child().wait().unwrap();
        await_gone(&tree);
        let dump = pair.dir().join("criu-1");
        merge(state.path(), &dump);
        let _restored = criu.restore(&dump, pid, &[]).unwrap();
        assert_eq!(postgres.sql(booked).unwrap(), before);
        drop(postgres.load());
        postgres.assert_balanced();
    }
}

#[test]
fn concurrent_dumps_do_not_mix() {
    for criu in Criu::all("several dumps at once") {
        let pair = Pair::start(&[]);
        let victims: Vec<_> = (0..4)
            .map(|_| Victim::detached("heap=16 children=1 dirty=20"))
            .collect();
        let address = pair.address();
        std::thread::scope(|scope| {
            for pid in victims.iter().map(Victim::pid) {
                let criu = &criu;
                scope.spawn(move || {
                    let (state, stays) = (State::new(), ["--leave-running"]);
                    criu.dump_to(address, pid, state.path(), &stays).unwrap();
                });
            }
        });
        let mut dumped: Vec<_> = (1..=victims.len())
            .map(|number| {
                let dump = pair.dir().join(format!("criu-{number}"));
                assert_verified(&dump);
                let has =
                    |victim: &&Victim| dump.join(format!("pagemap-{}.img", victim.pid())).exists();
                victims.iter().find(has).expect("it is one of them").pid()
            })
            .collect();
        dumped.sort_unstable();
        dumped.dedup();
        assert_eq!(dumped.len(), victims.len());
        for mut victim in victims {
            victim.check().unwrap();
        }
    }
}

type Hinder = fn(&Path);

/// Ways to prevent a receiver from keeping a dump.
const HINDRANCES: [(&str, Hinder); 3] = [
    ("the disk is full", |_| {}),
    ("its directory is gone", |dir| {
        fs::remove_dir_all(dir).unwrap();
    }),
    // Detected at the very end, when everything is received.
    ("the name is taken", |dir| {
        fs::create_dir_all(dir.join("criu-1/by another")).unwrap();
    }),
];

#[test]
fn unstorable_dump_fails_and_the_target_runs_on() {
    for criu in Criu::all("dumps that fail") {
        for (why, hinder) in HINDRANCES {
            let mut victim = Victim::detached("heap=32 children=1 dirty=20");
            let small = SmallDisk::mount(if why.contains("full") { "8m" } else { "1g" });
            let dir = small.0.path().join("images");
            let mut receiver = Receiver::start(&dir, &["--keep-free", "0"]);
            hinder(&dir);
            let state = State::new();
            let dumped = criu.dump_to(receiver.address(), victim.pid(), state.path(), &[]);
            assert!(dumped.is_err(), "{why}");
            let line = receiver.program().await_event("connection_ended_early");
            assert!(line.contains("criu-1"), "{why}: {line}");
            assert!(lives(victim.pid()) && !is_stopped(victim.pid()), "{why}");
            victim.check().unwrap();
            assert!(!dir.join("criu-1/inventory.img").exists());
            assert!(!dir.join(".criu-1.tmp").exists());
        }
    }
}

#[test]
fn receiver_killed_during_a_dump_leaves_the_target_running() {
    for criu in Criu::all("a receiver killed in a dump") {
        let mut victim = Victim::detached("heap=256");
        let mut pair = Pair::start(&[]);
        let (address, pid, state) = (pair.address(), victim.pid(), State::new());
        std::thread::scope(|scope| {
            let dump = scope.spawn(|| criu.dump_to(address, pid, state.path(), &[]));
            pair.receiver().program().await_event("dump_begun");
            pair.receiver().program().kill();
            assert!(dump.join().unwrap().is_err());
        });
        assert!(lives(pid) && !is_stopped(pid));
        victim.check().unwrap();
        let dir = pair.dir().to_owned();
        assert!(!dir.join("criu-1").exists());
        // The next receiver removes the incomplete dump.
        let next = Receiver::start(&dir, &[]);
        assert!(!dir.join(".criu-1.tmp").exists());
        criu.dump_to(next.address(), pid, state.path(), &["--leave-running"])
            .unwrap();
        assert!(dir.join("criu-1").exists());
    }
}

/// A small file system, for a test that fills it.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (tmpfs, size) = (Some("tmpfs"), format!("size={size}"));
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(tmpfs, dir.path(), tmpfs, flags, Some(&*size)).expect("root may mount");
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn finished_dump_leaves_no_temporary_files() {
    let Some(criu) = Criu::stable("what a dump leaves behind") else {
        return;
    };
    let victim = Victim::detached("heap=4");
    let pair = Pair::start(&[]);
    let state = State::new();
    criu.dump_to(
        pair.address(),
        victim.pid(),
        state.path(),
        &["--leave-running"],
    )
    .unwrap();
    let mut left: Vec<_> = fs::read_dir(pair.dir())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, [".lock", "criu-1", "identity.json"]);
}
