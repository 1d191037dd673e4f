//! Services under a steady load that are moved to another host and observe the effect: each measures its longest
//! pause and checks its data.

use crate::daemon::{Daemon, until};
use crate::net::{Net, SERVICE};
use crate::program::Program;
use crate::servers::{self, Postgres};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

/// A service, started on host A.
pub trait Service {
    /// Returns the root of the tree to move.
    fn daemon(&mut self) -> &mut Daemon;

    /// Returns the CRIU options that the service needs.
    fn options(&self) -> &'static [&'static str];

    /// Waits until the service has done more work; returns its longest pause so far, in milliseconds.
    ///
    /// # Panics
    /// If it does no more work, or reports an error.
    fn pause(&mut self) -> u64;

    /// Checks all data of the service.
    ///
    /// # Panics
    /// If some are wrong.
    fn check(&mut self);
}

/// Names that [`start`] accepts.
pub const NAMES: [&str; 4] = ["redis", "postgresql", "jvm", "python"];

/// Starts one of [`NAMES`] with about `mib` MiB of memory; returns once it works.
///
/// # Panics
/// If it does not start to work, or the name is unknown.
#[must_use]
pub fn start(name: &str, net: &Net, mib: u32) -> Box<dyn Service> {
    match name {
        "redis" => Box::new(Redis::start(net, mib)),
        "postgresql" => Box::new(Pgbench::start(net, mib)),
        "jvm" => Box::new(Ticking::jvm(net, mib)),
        "python" => Box::new(Ticking::python(net, mib)),
        _ => panic!("there are {NAMES:?}, and no {name}"),
    }
}

/// A redis whose clients connect over the network.
struct Redis {
    server: servers::Redis,
    client: Program,
}

/// Four connections, each of which writes a key and reads another, a thousand operations a second in total. A
/// value that is read must be the last acknowledged one, or the initial one. SIGUSR1 lifts the limit. Prints the
/// number of operations and the longest latency, in milliseconds.
const REDIS_CLIENT: &str = r#"
import random, signal, socket, sys, time
rate = 1000
def without_pause(*_):
    global rate
    rate = 1e9
signal.signal(signal.SIGUSR1, without_pause)
host, keys, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
connections = [socket.create_connection((host, 6379)) for _ in range(4)]
for connection in connections: connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
connections = [(connection, connection.makefile('rb')) for connection in connections]
def command(*words):
    return b'*%d\r\n' % len(words) + b''.join(b'$%d\r\n%s\r\n' % (len(word), word) for word in words)
def name(key): return b'key:%d' % key
def first(key): return (b'value:%d' % key).ljust(size, b'\0')
def value(key, version): return b'%d/%d ' % (key, version) * 64
acked = {}
done, longest, reported, begin = 0, 0, 0, time.monotonic()
while True:
    for connection, answers in connections:
        key, before = random.randrange(keys), time.monotonic()
        connection.sendall(command(b'SET', name(key), value(key, done)))
        if answers.readline() != b'+OK\r\n': sys.exit('WRONG: not stored')
        acked[key] = done
        key = random.randrange(keys)
        known = value(key, acked[key]) if key in acked else first(key)
        connection.sendall(command(b'GET', name(key)))
        length = int(answers.readline()[1:])
        if answers.read(length + 2)[:-2] != known:
            sys.exit('WRONG: write %s of key %d is lost' % (acked.get(key), key))
        done += 1
        now = time.monotonic()
        longest = max(longest, now - before)
    # No rush after a pause to make up for it.
    begin = max(begin, now - done / rate)
    if now - reported > 0.2:
        reported = now
        print(done, int(longest * 1000), file=sys.stderr, flush=True)
    time.sleep(max(0, begin + done / rate - now))
"#;

/// Initial size of a value, in bytes.
const VALUE: u32 = 4000;

impl Redis {
    fn start(net: &Net, mib: u32) -> Self {
        let options = ["--bind", SERVICE, "--protected-mode", "no"];
        let server = servers::Redis::start_in(net.enter("A"), &options);
        let (keys, size) = ((mib * 1024 / (VALUE / 1000)).to_string(), VALUE.to_string());
        let filled = server.cli(&["debug", "populate", &keys, "key", &size]);
        filled.expect("redis can be filled");
        let mut client = net.enter("C");
        client.args(["python3", "-c", REDIS_CLIENT, SERVICE, &keys, &size]);
        let client = Program::start(&mut client);
        let mut redis = Self { server, client };
        redis.pause();
        redis
    }
}

impl Service for Redis {
    fn daemon(&mut self) -> &mut Daemon {
        self.server.daemon()
    }

    fn options(&self) -> &'static [&'static str] {
        &["--tcp-established"]
    }

    fn pause(&mut self) -> u64 {
        await_work(&mut self.client, 1000)
    }

    fn check(&mut self) {
        // By then it has read keys of every age. The pauses no longer matter, so it need not wait between two.
        let client = Pid::from_raw(self.client.pid());
        kill(client, Signal::SIGUSR1).expect("the client runs");
        await_work(&mut self.client, 10_000);
    }
}

/// Waits until a program that prints its progress has advanced by `more` steps; returns the longest pause that it
/// prints, in milliseconds.
fn await_work(program: &mut Program, more: u64) -> u64 {
    program.skip_stderr();
    let mut next = || {
        program.await_stderr(|line| {
            assert!(!line.contains("WRONG"), "{line}");
            let (count, pause) = line.split_once(' ')?;
            Some((count.parse::<u64>().ok()?, pause.parse::<u64>().ok()?))
        })
    };
    let (first, _) = next();
    loop {
        let (count, pause) = next();
        if count >= first + more {
            return pause;
        }
    }
}

/// A PostgreSQL whose shared buffers are full, with pgbench as a client over the network.
struct Pgbench {
    postgres: Postgres,
    client: Program,
    logs: TempDir,
}

impl Pgbench {
    fn start(net: &Net, mib: u32) -> Self {
        let postgres = Postgres::start_full(&net.enter("A"), SERVICE, mib);
        let logs = tempfile::tempdir().expect("a temporary directory can be made");
        let mut client = net.enter("C");
        client.args(["pgbench", "-h", SERVICE, "-U", "postgres", "-n", "-c", "4"]);
        client.args(["-R", "300", "-T", "3600", "-P", "1", "-l"]);
        client.arg(format!("--log-prefix={}/log", logs.path().display()));
        let client = Program::start(client.arg("postgres"));
        let mut pgbench = Self {
            postgres,
            client,
            logs,
        };
        pgbench.pause();
        pgbench
    }

    /// Returns pgbench's log of each transaction: its number, and its latency in µs.
    fn log(&self) -> String {
        let files = fs::read_dir(self.logs.path())
            .expect("it is ours")
            .flatten();
        let texts = files.map(|file| fs::read_to_string(file.path()).unwrap_or_default());
        texts.collect()
    }
}

impl Service for Pgbench {
    fn daemon(&mut self) -> &mut Daemon {
        self.postgres.daemon()
    }

    fn options(&self) -> &'static [&'static str] {
        &["--tcp-established"]
    }

    fn pause(&mut self) -> u64 {
        // pgbench flushes its log in blocks.
        let lines = self.log().lines().count();
        until("pgbench works", || match self.log().lines().count() {
            count if count > lines + 500 => Ok(()),
            count => Err(format!("{count} transactions, {lines} before")),
        });
        let log = self.log();
        let latencies = log.lines().filter_map(|line| {
            let mut fields = line.split(' ').skip(2);
            fields.next()?.parse::<u64>().ok()
        });
        latencies.max().unwrap_or_default() / 1000
    }

    fn check(&mut self) {
        self.pause();
        // A lost connection would leave one client less.
        let clients = "select count(*) from pg_stat_activity where application_name = 'pgbench'";
        assert_eq!(
            self.postgres.sql(clients).as_deref().map(str::trim),
            Ok("4")
        );
        self.client.kill();
        let acked = self.log().lines().count();
        let booked = self.postgres.sql("select count(*) from pgbench_history");
        let booked: usize = booked
            .expect("it answers")
            .trim()
            .parse()
            .expect("a number");
        assert!(booked >= acked, "{acked} acknowledged, {booked} booked");
        self.postgres.assert_balanced();
    }
}

/// A program that writes to one block of its memory up to a thousand times a second, and checks some others. It
/// uses the wall clock: CRIU stops the other clocks during a dump.
struct Ticking {
    daemon: Daemon,
    dir: TempDir,
}

/// Prints lines: ticks, the longest time between two ticks in ms, and the number of complete sweeps.
const PYTHON: &str = "
import random, sys, time, zlib
count, log = int(sys.argv[1]) * 16, open(sys.argv[2], 'w')
memory = [bytearray(random.randbytes(65536)) for _ in range(count)]
sums = [zlib.crc32(block) for block in memory]
ticks, sweeps, at, longest, last = 0, 0, 0, 0, time.time()
while True:
    block = random.randrange(count)
    page = random.randrange(16) * 4096
    memory[block][page:page + 4096] = random.randbytes(4096)
    sums[block] = zlib.crc32(memory[block])
    for _ in range(8):
        if zlib.crc32(memory[at]) != sums[at]: log.write('WRONG\\n')
        at += 1
        if at == count: at, sweeps = 0, sweeps + 1
    now = time.time()
    longest, last = max(longest, now - last), now
    ticks += 1
    if ticks % 100 == 0:
        log.write('%d %d %d\\n' % (ticks, longest * 1000, sweeps))
        log.flush()
    time.sleep(0.001)
";

const JAVA: &str = r#"
import java.io.*;
import java.util.Random;
import java.util.zip.CRC32;
public class Ticking {
    static long sum(byte[] block) {
        CRC32 crc = new CRC32();
        crc.update(block);
        return crc.getValue();
    }
    public static void main(String[] args) throws Exception {
        int count = Integer.parseInt(args[0]) * 16;
        PrintWriter log = new PrintWriter(new FileWriter(args[1]));
        Random random = new Random();
        byte[][] memory = new byte[count][65536];
        long[] sums = new long[count];
        for (int i = 0; i < count; i++) {
            random.nextBytes(memory[i]);
            sums[i] = sum(memory[i]);
        }
        int at = 0;
        long sweeps = 0, longest = 0, last = System.currentTimeMillis();
        byte[] page = new byte[4096];
        for (long ticks = 1; ; ticks++) {
            int block = random.nextInt(count);
            random.nextBytes(page);
            System.arraycopy(page, 0, memory[block], 4096 * random.nextInt(16), 4096);
            sums[block] = sum(memory[block]);
            for (int i = 0; i < 8; i++) {
                if (sum(memory[at]) != sums[at]) log.println("WRONG");
                if (++at == count) { at = 0; sweeps++; }
            }
            long now = System.currentTimeMillis();
            longest = Math.max(longest, now - last);
            last = now;
            if (ticks % 100 == 0) {
                log.println(ticks + " " + longest + " " + sweeps);
                log.flush();
            }
            Thread.sleep(1);
        }
    }
}
"#;

impl Ticking {
    fn python(net: &Net, mib: u32) -> Self {
        let mut python = net.enter("A");
        Self::start(python.args(["python3", "-c", PYTHON]), mib)
    }

    fn jvm(net: &Net, mib: u32) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let source = dir.path().join("Ticking.java");
        fs::write(&source, JAVA).expect("it is ours");
        let mut java = net.enter("A");
        java.arg("java").arg(format!("-Xmx{}m", mib + mib / 4 + 64));
        Self::start(java.arg(source), mib)
    }

    fn start(command: &mut Command, mib: u32) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        command.arg(mib.to_string()).arg(dir.path().join("log"));
        let daemon = Daemon::detached(command);
        let mut ticking = Self { daemon, dir };
        ticking.pause();
        ticking
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// Returns the numbers of the last line.
    fn last_line(&self) -> Result<[u64; 3], String> {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        assert!(!text.contains("WRONG"), "{text}");
        let whole = text.rsplit_once('\n').unwrap_or_default().0;
        let numbers = whole.lines().last().unwrap_or_default().split(' ');
        let numbers: Vec<_> = numbers.filter_map(|word| word.parse().ok()).collect();
        numbers.try_into().map_err(|_| "nothing yet".to_owned())
    }

    /// Waits until one of the numbers has grown by `more`.
    fn await_more(&self, which: usize, more: u64) -> u64 {
        let first = until("the program ticks", || self.last_line());
        until("the program continues", || match self.last_line()? {
            now if now[which] >= first[which] + more => Ok(now[1]),
            now => Err(format!("{now:?}")),
        })
    }
}

impl Service for Ticking {
    fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    fn options(&self) -> &'static [&'static str] {
        &[]
    }

    fn pause(&mut self) -> u64 {
        self.await_more(0, 200)
    }

    fn check(&mut self) {
        // A sweep in progress began before the call.
        self.await_more(2, 2);
    }
}
