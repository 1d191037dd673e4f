//! Real programs, moved: they go on at the other host with everything they knew.

use pageferry_tests::criu::Criu;
use pageferry_tests::daemon::{Daemon, until};
use pageferry_tests::host::Host;
use pageferry_tests::servers::{Postgres, Redis};
use pageferry_tests::{Receiver, Send, memory};
use std::fs;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// Where a process was moved to.
struct Moved {
    _receiver: Receiver,
    _host: Host,
    _dir: TempDir,
}

/// Moves a tree to a host of its own. The copy here is gone then.
fn move_away(criu: &Criu, daemon: &mut Daemon) -> Moved {
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let path = criu.path().to_str().unwrap();
    let mut receiver = host.receiver("0", dir.path(), &["--restore", "--criu", path]);
    let tree = memory::tree(daemon.pid());
    let options = ["--migrate", "--criu", path, "--max-downtime", "50ms"];
    let sent = Send::start(receiver.address(), daemon.pid(), &options).finish();
    assert!(sent.status.success(), "{}", sent.stderr);
    daemon.child().wait().unwrap();
    assert!(!tree.iter().any(|&pid| memory::lives(pid)));
    let there = |line: &str| line.contains("all of its memory").then_some(());
    receiver.program().await_stderr(there);
    Moved {
        _receiver: receiver,
        _host: host,
        _dir: dir,
    }
}

#[test]
fn redis() {
    for criu in Criu::all("a redis that moves") {
        let mut redis = Redis::start();
        redis.fill(20_000);
        redis.cli(&["set", "known", "value"]).unwrap();
        drop(redis.load());
        // Its clients' sockets would be connected to nobody: it has to have closed them.
        until("its clients are gone", || {
            match redis.cli(&["client", "list"])?.lines().count() {
                1 => Ok(()),
                more => Err(format!("{more} clients")),
            }
        });
        let digest = redis.cli(&["debug", "digest"]).unwrap();
        let _moved = move_away(&criu, redis.daemon());
        assert_eq!(redis.cli(&["get", "known"]).unwrap().trim(), "value");
        assert_eq!(redis.cli(&["debug", "digest"]).unwrap(), digest);
        redis.fill(1000);
    }
}

#[test]
fn postgresql() {
    for criu in Criu::all("a PostgreSQL that moves") {
        let mut postgres = Postgres::start();
        drop(postgres.load());
        postgres.assert_balanced();
        let booked = "select count(*), sum(delta) from pgbench_history";
        let before = postgres.sql(booked).unwrap();
        let _moved = move_away(&criu, postgres.daemon());
        assert_eq!(postgres.sql(booked).unwrap(), before);
        drop(postgres.load());
        postgres.assert_balanced();
    }
}

/// Waits until a program that writes a line for each check that was right has written some more, and
/// claims that none was wrong.
fn assert_goes_on(log: &Path) {
    let lines = || fs::read_to_string(log).unwrap_or_default().lines().count();
    let before = lines();
    until("it checks itself", || match lines() >= before + 5 {
        true => Ok(()),
        false => Err(fs::read_to_string(log).unwrap_or_default()),
    });
    let text = fs::read_to_string(log).unwrap();
    assert!(text.lines().all(|line| line == "right"), "{text}");
}

#[test]
fn a_jvm() {
    const PROGRAM: &str = r#"
import java.nio.file.*;
import java.util.*;
public class Churn {
    public static void main(String[] args) throws Exception {
        Map<Integer, byte[]> live = new HashMap<>();
        Random random = new Random(1);
        for (long step = 1; ; step++) {
            int key = random.nextInt(20000);
            byte[] old = live.get(key);
            String word = "right";
            if (old != null) for (byte b : old) if (b != (byte) key) word = "WRONG";
            byte[] value = new byte[256 + random.nextInt(2048)];
            Arrays.fill(value, (byte) key);
            live.put(key, value);
            if (step % 50000 == 0 || word == "WRONG")
                Files.writeString(Path.of(args[0]), word + "\n", StandardOpenOption.CREATE, StandardOpenOption.APPEND);
        }
    }
}
"#;
    for criu in Criu::all("a JVM that moves") {
        let dir = tempfile::tempdir().unwrap();
        let (source, log) = (dir.path().join("Churn.java"), dir.path().join("log"));
        fs::write(&source, PROGRAM).unwrap();
        let mut java = Command::new("java");
        java.args(["-Xmx256m", "-Xms256m"]).arg(&source).arg(&log);
        let mut java = Daemon::detached(&java);
        assert_goes_on(&log);
        let _moved = move_away(&criu, &mut java);
        assert_goes_on(&log);
    }
}

#[test]
fn python() {
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
while True:
    with lock: right = all(hashlib.sha1(m).digest() == s for m, s in zip(memory, sums))
    open(sys.argv[1], 'a').write('right\\n' if right else 'WRONG\\n')
";
    for criu in Criu::all("a python that moves") {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut python = Command::new("python3");
        python.args(["-c", PROGRAM]).arg(&log);
        let mut python = Daemon::detached(&python);
        assert_goes_on(&log);
        let _moved = move_away(&criu, &mut python);
        assert_goes_on(&log);
    }
}
