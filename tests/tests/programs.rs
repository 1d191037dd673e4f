//! Real programs under load, from Debian's packages: pre-copied while clients use them, then
//! compared, frozen, with what arrived; and they go on serving.

use pageferry_tests::memory;
use pageferry_tests::scenario::{assert_arrived, go_on};
use pageferry_tests::{Pair, Report};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A program of a package, killed with all its children when dropped.
struct Daemon(Child);

impl Daemon {
    fn start(command: &mut Command) -> Self {
        Self(
            command
                .process_group(0)
                .spawn()
                .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}; run scripts/setup")),
        )
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        for pid in memory::tree(self.pid()).into_iter().rev() {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let _ = self.0.wait();
    }
}

/// Runs a client program to its end; its standard output.
fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    match output.status.success() {
        true => Ok(text(output.stdout)),
        false => Err(text(output.stderr)),
    }
}

fn until<T>(what: &str, mut so: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match so() {
            Ok(done) => return done,
            Err(why) => assert!(Instant::now() < deadline, "{what}: {why}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Pre-copies a tree under load and compares its last, frozen round.
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
    let stats = assert_arrived(root, &pair, &report);
    go_on(root);
    eprintln!("{:?} {stats:?}", report.totals);
    assert!(report.rounds.len() >= 2);
    report
}

#[test]
fn redis_under_redis_benchmark() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("redis.sock");
    let redis = Daemon::start(
        Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--dir"])
            .arg(dir.path())
            .arg("--unixsocket")
            .arg(&socket)
            .stdout(Stdio::null()),
    );
    let cli = |args: &[&str]| output(Command::new("redis-cli").arg("-s").arg(&socket).args(args));
    until("redis comes up", || cli(&["ping"]).filter_ok("PONG"));
    let benchmark = |args: &[&str]| {
        let mut command = Command::new("redis-benchmark");
        command
            .arg("-s")
            .arg(&socket)
            .args(["-q", "-r", "20000"])
            .args(args);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let filled = benchmark(&["-t", "set", "-n", "40000", "-d", "2048", "-P", "16"]).status();
    assert!(filled.unwrap().success());
    cli(&["set", "known", "value"]).unwrap();
    let _load = Daemon::start(&mut benchmark(&["-t", "set,get,lpush", "-l", "-d", "100"]));
    assert_precopied(redis.pid(), &[]);
    assert_eq!(cli(&["get", "known"]).unwrap().trim(), "value");
    assert_precopied(redis.pid(), &["--compress", "zstd"]);
    assert_eq!(cli(&["get", "known"]).unwrap().trim(), "value");
}

trait FilterOk {
    fn filter_ok(self, wanted: &str) -> Result<(), String>;
}

impl FilterOk for Result<String, String> {
    fn filter_ok(self, wanted: &str) -> Result<(), String> {
        match self {
            Ok(text) if text.trim() == wanted => Ok(()),
            Ok(text) | Err(text) => Err(text),
        }
    }
}

#[test]
fn postgresql_under_pgbench() {
    let bin = Path::new("/usr/lib/postgresql/15/bin");
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    // PostgreSQL does not run as root.
    let user = nix::unistd::User::from_name("postgres")
        .unwrap()
        .expect("the package makes this user; run scripts/setup");
    nix::unistd::chown(dir.path(), Some(user.uid), Some(user.gid)).unwrap();
    let postgres = |program: &str| {
        let mut command = Command::new(bin.join(program));
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        command.current_dir("/").env("PGHOST", dir.path());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let initdb = postgres("initdb").arg("-D").arg(&data).arg("-N").status();
    assert!(initdb.unwrap().success());
    let server = Daemon::start(
        postgres("postgres")
            .arg("-D")
            .arg(&data)
            .arg("-k")
            .arg(dir.path())
            .args(["-h", "", "-c", "shared_buffers=64MB", "-c", "fsync=off"]),
    );
    let psql = |query: &str| {
        output(
            postgres("psql")
                .args(["-d", "postgres", "-Atc", query])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped()),
        )
    };
    until("PostgreSQL comes up", || psql("select 1").filter_ok("1"));
    let filled = postgres("pgbench")
        .args(["-i", "-s", "5", "postgres"])
        .status();
    assert!(filled.unwrap().success());
    let mut load = Daemon::start(postgres("pgbench").args(["-c", "4", "-T", "600", "postgres"]));
    let busy = "select count(*) > 4 from pg_stat_activity";
    until("pgbench runs", || psql(busy).filter_ok("t"));
    let report = assert_precopied(server.pid(), &[]);
    assert!(report.totals["processes"].as_u64().unwrap() >= 8);
    assert!(report.totals["segments"].as_u64().unwrap() >= 1);
    assert!(load.0.try_wait().unwrap().is_none(), "pgbench saw an error");
    drop(load);
    // What pgbench keeps consistent.
    let sums = "select (select sum(abalance) from pgbench_accounts) = \
                (select sum(delta) from pgbench_history)";
    until("the books balance", || psql(sums).filter_ok("t"));
}

#[test]
fn a_jvm() {
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
    let mut lines = BufReader::new(java.0.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    assert_precopied(java.pid(), &[]);
    // Whatever it had printed before; the last of these come after.
    for _ in 0..40 {
        assert_eq!(lines.next().unwrap().unwrap(), "right");
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
    let mut stdin = python.0.stdin.take().unwrap();
    let mut stdout = BufReader::new(python.0.stdout.take().unwrap());
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
fn a_tree_in_its_own_pid_namespace() {
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
    let round = pair.last_round(&report);
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
fn a_target_that_ends_in_the_middle() {
    let pair = Pair::start(&[]);
    let sleep = Daemon::start(Command::new("sleep").arg("1000"));
    let mut send = pair.start_send(sleep.pid(), &["--rounds", "100000"]);
    send.program()
        .await_stderr(|line| line.contains("round=3 ").then_some(()));
    drop(sleep);
    let sent = send.finish();
    assert_eq!(sent.status.code(), Some(3), "{}", sent.stderr);
}

/// Protected pages of a file mapping that are given back leave markers, which the kernel reports
/// like pages in swap.
#[test]
fn pages_of_a_file_mapping_that_are_given_back() {
    const PROGRAM: &str = "
import mmap, random, sys, tempfile
file = tempfile.TemporaryFile()
file.write(b'F' * (8 << 20))
file.flush()
memory = mmap.mmap(file.fileno(), 8 << 20, flags=mmap.MAP_PRIVATE)
for at in range(0, len(memory), 4096): memory[at:at + 4096] = b'A' * 4096
print('ready', flush=True)
while True:
    memory.madvise(mmap.MADV_DONTNEED, random.randrange(2048) * 4096, 4096)
    at = random.randrange(2048) * 4096
    memory[at:at + 8] = b'changed!'
";
    let mut python = Daemon::start(
        Command::new("python3")
            .args(["-c", PROGRAM])
            .stdout(Stdio::piped()),
    );
    let mut lines = BufReader::new(python.0.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    for _ in 0..3 {
        assert_precopied(python.pid(), &[]);
    }
}
