//! Case 2: memory that compresses well, a little or not at all, over a slow link.

use crate::report::Table;
use crate::{Bench, exists, transfer};
use pageferry_tests::Victim;
use pageferry_tests::daemon::{Daemon, until};
use pageferry_tests::net::Net;
use pageferry_tests::servers::Redis;
use std::error::Error;
use std::fs;
use std::process::Command;
use tempfile::TempDir;

const MODES: [&str; 3] = ["none", "zstd:1", "auto"];

/// Size of each process, in MiB.
const SIZE: u32 = 512;

/// A program whose heap contains typical data: a map of objects with numbers, words and timestamps.
const HEAP: &str = r#"
import java.io.File;
import java.util.*;
public class Heap {
    record Order(long id, int customer, double price, String article, long at, byte[] signature) {}
    public static void main(String[] args) throws Exception {
        long most = Long.parseLong(args[0]) << 20;
        Random random = new Random(1);
        Map<Long, Order> orders = new HashMap<>();
        Runtime runtime = Runtime.getRuntime();
        for (long id = 1; runtime.totalMemory() - runtime.freeMemory() < most; id++) {
            byte[] signature = new byte[64];
            random.nextBytes(signature);
            String article = "article-" + random.nextInt(100000);
            long at = 1700000000000L + id * 37 + random.nextInt(30);
            orders.put(id, new Order(id, random.nextInt(50000), random.nextDouble() * 100, article, at, signature));
        }
        new File(args[1]).createNewFile();
        while (true) {
            Thread.sleep(60000);
            if (orders.isEmpty()) return;
        }
    }
}
"#;

/// Processes to send.
enum Target {
    Redis(Redis),
    Java(
        Daemon,
        #[expect(dead_code, reason = "its files are there as long")] TempDir,
    ),
    Random(Victim),
}

impl Target {
    fn text() -> Self {
        let redis = Redis::start();
        redis.fill_with_text(SIZE);
        Self::Redis(redis)
    }

    fn java() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let (source, ready) = (dir.path().join("Heap.java"), dir.path().join("ready"));
        fs::write(&source, HEAP).expect("it is ours");
        let mut java = Command::new("java");
        java.args(["-XX:+UseSerialGC", &format!("-Xmx{}m", SIZE + SIZE / 4)]);
        java.arg(source).arg(SIZE.to_string()).arg(&ready);
        let daemon = Daemon::detached(&java);
        until("the heap is full", || exists(&ready));
        Self::Java(daemon, dir)
    }

    fn pid(&self) -> i32 {
        match self {
            Self::Redis(redis) => redis.pid(),
            Self::Java(daemon, _) => daemon.pid(),
            Self::Random(victim) => victim.pid(),
        }
    }
}

/// Measures case 2.
pub(crate) fn measure(bench: &Bench, tables: &mut Vec<Table>) -> Result<(), Box<dyn Error>> {
    let net = Net::up("1gbit");
    let targets = [
        ("redis with text", Target::text()),
        ("JVM heap", Target::java()),
        (
            "random",
            Target::Random(Victim::detached(&format!("heap={SIZE}"))),
        ),
    ];
    for place in &bench.places {
        let title = format!("Over 1 Gbit/s, images on {}", place.name);
        let columns = ["memory, --compress", "s", "MB on the wire", "MB of pages"];
        let mut table = Table::new(&format!("link-{}", place.name), &title, &columns);
        for (kind, target) in &targets {
            for _ in 0..bench.runs {
                for mode in MODES {
                    let options = ["--rounds", "1", "--compress", mode];
                    let done = transfer::ours(target.pid(), place, Some(&net), &[], &options);
                    let report = done.report.expect("it is ours");
                    let wire = report.rounds[0].bytes_wire as f64 / 1e6;
                    let values = [done.seconds, wire, done.bytes / 1e6];
                    table.add(&format!("{kind}, {mode}"), &values);
                }
            }
            let [none, zstd, auto] =
                MODES.map(|mode| table.get(&format!("{kind}, {mode}"), 0).median());
            table.find(format!(
                "{kind}: auto takes {:.3} times the better of the other two's time, and is {:.1} times as \
                 fast as none.",
                auto / none.min(zstd),
                none / auto,
            ));
        }
        table.bars(&bench.plot(&table.name), 0)?;
        tables.push(table);
    }
    Ok(())
}
