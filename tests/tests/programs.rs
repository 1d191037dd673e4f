//! Programs from Debian packages under load: pre-copied while clients use them, then frozen and compared with
//! their images; they continue to serve.

use pageferry_tests::daemon::{Daemon, until};
use pageferry_tests::huge::HugePages;
use pageferry_tests::memory;
use pageferry_tests::scenario::{assert_arrived, resume};
use pageferry_tests::servers::{Postgres, Redis};
use pageferry_tests::{Pair, Report};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// Pre-copies a tree under load, and compares its last, frozen round.
fn assert_precopied(root: i32, options: &[&str]) -> Report {
    let pair = Pair::start(&[]);
    let all = [
        &[
            "--max-downtime",
            "20ms",
            "--max-rounds",
            "6",
            "--then",
            "stop",
        ],
        options,
    ]
    .concat();
    let report = pair.send(root, &all).expect_report();
    let stats = assert_arrived(root, &report);
    resume(root);
    eprintln!("{:?} {stats:?}", report.totals);
    assert!(report.rounds.len() >= 2);
    report
}

#[test]
fn redis_under_load_is_precopied() {
    let redis = Redis::start();
    redis.fill(40_000);
    redis.cli(&["set", "known", "value"]).unwrap();
    let _load = redis.load();
    for options in [&[][..], &["--compress", "zstd"]] {
        assert_precopied(redis.pid(), options);
        let known = redis.cli(&["get", "known"]);
        assert_eq!(known.unwrap().trim(), "value");
    }
}

#[test]
fn postgresql_under_load_is_precopied() {
    let postgres = Postgres::start();
    let mut load = postgres.load();
    let report = assert_precopied(postgres.pid(), &[]);
    assert!(report.totals["processes"].as_u64().unwrap() >= 8);
    assert!(report.totals["segments"].as_u64().unwrap() >= 1);
    let ended = load.child().try_wait().unwrap();
    assert!(ended.is_none(), "pgbench saw an error");
    drop(load);
    postgres.assert_balanced();
}

#[test]
fn jvm_is_precopied() {
    const PROGRAM: &str = r#"
import java.util.*;
public class Churn {
    public static void main(String[] args) throws Exception {
        Map<Integer, byte[]> live = new HashMap<>();
        Random random = new Random(1);
        boolean ready = false;
        for (long step = 0; ; step++) {
            int key = random.nextInt(20000);
            byte[] old = live.get(key);
            if (old != null)
                for (byte b : old) if (b != (byte) key) { System.out.println("WRONG " + key); System.exit(1); }
            byte[] value = new byte[256 + random.nextInt(2048)];
            Arrays.fill(value, (byte) key);
            live.put(key, value);
            if (step == 100000) System.out.println("ready");
            if (step > 100000 && step % 100000 == 0) System.out.println("right");
        }
    }
}
"#;
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("Churn.java");
    std::fs::write(&source, PROGRAM).unwrap();
    let mut java = Daemon::start(
        Command::new("java")
            .args(["-Xmx256m", "-Xms256m"])
            .arg(&source)
            .stdout(Stdio::piped()),
    );
    let mut lines = BufReader::new(java.child().stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    assert_precopied(java.pid(), &[]);
    // Earlier lines may contain anything; those at the end were printed afterwards.
    for _ in 0..40 {
        assert_eq!(lines.next().unwrap().unwrap(), "right");
    }
}

#[test]
fn python_is_precopied() {
    const PROGRAM: &str = "
import hashlib, random, sys, threading
memory = [bytearray(random.randbytes(4096)) for _ in range(8000)]
sums = [hashlib.sha1(m).digest() for m in memory]
lock = threading.Lock()
def churn():
    while True:
        with lock:
            i = random.randrange(len(memory))
            memory[i] = bytearray(random.randbytes(4096))
            sums[i] = hashlib.sha1(memory[i]).digest()
for _ in range(2): threading.Thread(target=churn, daemon=True).start()
print('ready', flush=True)
for line in sys.stdin:
    with lock:
        print(all(hashlib.sha1(m).digest() == s for m, s in zip(memory, sums)), flush=True)
";
    let mut python = Daemon::start(
        Command::new("python3")
            .args(["-c", PROGRAM])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped()),
    );
    let mut stdin = python.child().stdin.take().unwrap();
    let mut stdout = BufReader::new(python.child().stdout.take().unwrap());
    let mut line = || {
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        line.trim().to_owned()
    };
    assert_eq!(line(), "ready");
    for options in [&[][..], &["--tracker", "hash"]] {
        assert_precopied(python.pid(), options);
        writeln!(stdin, "check").unwrap();
        assert_eq!(line(), "True");
    }
    let mut rest = String::new();
    drop(stdin);
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "");
}

#[test]
fn tree_in_its_own_pid_namespace_is_sent() {
    let script = "sleep 1000 & wait";
    let unshare = Daemon::start(Command::new("unshare").args([
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        script,
    ]));
    let root = until("it forks", || match memory::tree(unshare.pid())[..] {
        [_, root, _] => Ok(root),
        ref tree => Err(format!("{tree:?}")),
    });
    let pair = Pair::start(&[]);
    let report = pair.send(root, &["--rounds", "2"]).expect_report();
    let round = report.last_round();
    let mut images: Vec<_> = std::fs::read_dir(&round)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("pagemap-"))
        .collect();
    images.sort();
    assert_eq!(images, ["pagemap-1.img", "pagemap-2.img"]);
    let directory = report.totals["directory"].as_str().unwrap();
    let name = Path::new(directory).file_name().unwrap().to_string_lossy();
    assert!(name.starts_with("1-"), "{name}");
}

#[test]
fn target_that_exits_during_a_send_is_reported() {
    let pair = Pair::start(&[]);
    let sleep = Daemon::start(Command::new("sleep").arg("1000"));
    let mut send = pair.start_send(sleep.pid(), &["--rounds", "100000"]);
    send.program().await_round(3);
    drop(sleep);
    let sent = send.finish();
    assert_eq!(sent.status.code(), Some(3), "{}", sent.stderr);
}

/// Sends a Python program three times that discards pages of the mapping that `setup` creates (`memory`, with
/// pages of `page` bytes), and writes to others. A protected page that is discarded leaves a marker, which the
/// kernel reports like a page in swap; and a thread may be stopped after it has allocated a new page, before it
/// writes to it.
fn assert_given_back(setup: &str) {
    let program = format!(
        "
import mmap, random, tempfile
{setup}
pages = len(memory) // page
for at in range(0, len(memory), 4096): memory[at:at + 4096] = b'A' * 4096
print('ready', flush=True)
while True:
    memory.madvise(mmap.MADV_DONTNEED, random.randrange(pages) * page, page)
    at = random.randrange(pages) * page
    memory[at:at + 8] = b'changed!'
"
    );
    let mut python = Daemon::start(
        Command::new("python3")
            .args(["-c", &program])
            .stdout(Stdio::piped()),
    );
    let mut lines = BufReader::new(python.child().stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    for _ in 0..3 {
        assert_precopied(python.pid(), &[]);
    }
}

#[test]
fn discarded_pages_of_a_file_mapping_arrive() {
    assert_given_back(
        "
file = tempfile.TemporaryFile()
file.write(b'F' * (8 << 20))
file.flush()
page = 4096
memory = mmap.mmap(file.fileno(), 8 << 20, flags=mmap.MAP_PRIVATE)",
    );
}

#[test]
fn discarded_huge_pages_arrive() {
    let _pages = HugePages::reserve(128);
    assert_given_back(
        "
MAP_HUGETLB = 0x40000
page = 2 << 20
memory = mmap.mmap(-1, 256 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)",
    );
}
