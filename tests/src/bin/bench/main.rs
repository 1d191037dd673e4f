//! Measures Pageferry and CRIU on this machine: `scripts/bench.sh`.

mod ballast;
mod clients;
mod growth;
mod limits;
mod link;
mod precopy;
mod report;
mod transfer;

use ballast::Ballast;
use pageferry_tests::Victim;
use pageferry_tests::certs::Certs;
use pageferry_tests::criu::Criu;
use report::Table;
use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Directory of the images.
pub struct Place {
    name: &'static str,
    dir: PathBuf,
}

impl Place {
    fn tempdir(&self) -> TempDir {
        tempfile::tempdir_in(&self.dir).expect("a directory can be made there")
    }

    /// Occupies memory for images of this many bytes.
    fn ballast(&self, bytes: u64) -> Ballast {
        Ballast::new(&self.dir, bytes)
    }
}

/// Parameters of all cases.
pub struct Bench {
    runs: usize,
    places: Vec<Place>,
    criu: Criu,
    /// Size of transferred processes, in MiB.
    sizes: Vec<u64>,
    /// Size of the largest process in the growth case, in GiB.
    growth: u64,
    out: PathBuf,
}

impl Bench {
    fn plot(&self, name: &str) -> PathBuf {
        self.out.join(format!("{name}.svg"))
    }
}

/// A case: its name, and the function that measures it.
type Case = (
    &'static str,
    fn(&Bench, &mut Vec<Table>) -> Result<(), Box<dyn Error>>,
);

const CASES: [Case; 6] = [
    ("full", full),
    ("tls", tls),
    ("link", link::measure),
    ("precopy", precopy::measure),
    ("small", precopy::small_writes),
    ("growth", growth::measure),
];

fn main() -> Result<(), Box<dyn Error>> {
    let variable = |name: &str, default: &str| env::var(name).unwrap_or_else(|_| default.into());
    let wanted: Vec<String> = env::args().skip(1).collect();
    let alone = wanted == [limits::ALONE];
    if let Some(unknown) = wanted
        .iter()
        .find(|name| !alone && CASES.iter().all(|(known, _)| known != name))
    {
        let known: Vec<_> = CASES.iter().map(|(name, _)| *name).collect();
        return Err(format!("there is no case {unknown}, but {}", known.join(" ")).into());
    }
    let sizes = variable("MIB", "1024 4096 8192");
    let sizes: Result<_, _> = sizes.split_whitespace().map(str::parse).collect();
    let bench = Bench {
        runs: variable("RUNS", "5").parse()?,
        places: vec![
            Place {
                name: "tmpfs",
                dir: variable("TMPFS", "/dev/shm").into(),
            },
            Place {
                name: "disk",
                dir: env::temp_dir(),
            },
        ],
        criu: Criu::stable("the benchmark").ok_or("run scripts/install-criu")?,
        sizes: sizes?,
        growth: variable("GROWTH_GIB", "16").parse()?,
        out: variable("OUT", "target/bench").into(),
    };
    if alone {
        return limits::alone(&bench);
    }
    fs::create_dir_all(&bench.out)?;
    let mut tables = Vec::new();
    for (name, measure) in CASES {
        if wanted.is_empty() || wanted.iter().any(|it| it == name) {
            measure(&bench, &mut tables)?;
            // The results so far are kept even if a later case fails.
            report::write(
                &bench.out,
                &variable("MACHINE", "an unknown machine"),
                &tables,
            )?;
        }
    }
    print!("{}", fs::read_to_string(bench.out.join("results.md"))?);
    Ok(())
}

/// Case 1: all memory of a process over loopback, with Pageferry and with CRIU.
fn full(bench: &Bench, tables: &mut Vec<Table>) -> Result<(), Box<dyn Error>> {
    const RATE: usize = 0;
    const FROZEN: usize = 1;
    const CPU: usize = 2;
    let limits = limits::measure()?;
    for place in &bench.places {
        let title = format!("All memory over loopback, images on {}", place.name);
        let columns = [
            "process, with",
            "MB/s",
            "frozen, ms",
            "CPU s/GiB, both ends",
            "peak RSS of the source, MiB",
            "peak RSS of the destination, MiB",
        ];
        let mut table = Table::new(&format!("full-{}", place.name), &title, &columns);
        for mib in &bench.sizes {
            let victim = Victim::detached(&format!("heap={mib}"));
            let transfer = |with| match with {
                "CRIU" => transfer::criu(&bench.criu, victim.pid(), place),
                _ => transfer::ours(victim.pid(), place, None, &[], &["--rounds", "1"]),
            };
            for _ in 0..bench.runs {
                // The ways alternate, so that other load on the machine affects both.
                for with in ["pageferry", "CRIU"] {
                    let _ballast = place.ballast(mib * MIB);
                    let done = transfer(with);
                    let [source, destination] = done.usage;
                    let rss = |bytes| bytes as f64 / MIB as f64;
                    let values = [
                        done.bytes / 1e6 / done.seconds,
                        done.frozen_ms,
                        (source.cpu + destination.cpu) / (done.bytes / GIB as f64),
                        rss(source.peak_rss),
                        rss(destination.peak_rss),
                    ];
                    table.add(&format!("{mib} MiB, {with}"), &values);
                }
            }
            let of = |column, with| table.get(&format!("{mib} MiB, {with}"), column).median();
            let ratio = |column| of(column, "pageferry") / of(column, "CRIU");
            let write = format!("write and fsync, {}", place.name);
            let slowest = ["process_vm_readv", "TCP over loopback (iperf3)", &write]
                .map(|stage| limits.get(stage, 0).median())
                .into_iter()
                .fold(f64::MAX, f64::min);
            let finding = format!(
                "{mib} MiB: {:.1} times CRIU's throughput, {:.0} % of what the slowest stage does alone, \
                 {:.2} times CRIU's CPU time, frozen for 1/{:.0} of CRIU's time.",
                ratio(RATE),
                of(RATE, "pageferry") / slowest * 100.0,
                ratio(CPU),
                1.0 / ratio(FROZEN),
            );
            table.find(finding);
        }
        table.bars(&bench.plot(&table.name), RATE)?;
        tables.push(table);
    }
    tables.push(limits);
    Ok(())
}

/// Measures the cost of TLS.
fn tls(bench: &Bench, tables: &mut Vec<Table>) -> Result<(), Box<dyn Error>> {
    let certs = Certs::new();
    let victim = Victim::detached("heap=1024");
    for place in &bench.places {
        let title = format!(
            "1 GiB over loopback, in the clear and with TLS, images on {}",
            place.name
        );
        let columns = ["how", "MB/s", "CPU s/GiB, both ends"];
        let mut table = Table::new(&format!("tls-{}", place.name), &title, &columns);
        for _ in 0..bench.runs {
            for how in ["in the clear", "TLS"] {
                let options = |end| match how {
                    "TLS" => certs.options(end),
                    _ => Vec::new(),
                };
                let (here, there) = (options("send"), options("receive"));
                let _ballast = place.ballast(GIB);
                let one = [&["--rounds", "1"], &pageferry_tests::certs::strs(&here)[..]].concat();
                let done = transfer::ours(victim.pid(), place, None, &there, &one);
                let [source, destination] = done.usage;
                let cpu = (source.cpu + destination.cpu) / (done.bytes / GIB as f64);
                table.add(how, &[done.bytes / 1e6 / done.seconds, cpu]);
            }
        }
        tables.push(table);
    }
    Ok(())
}

/// Finds a number by this name at any depth.
fn find(value: &serde_json::Value, name: &str) -> f64 {
    fn search(value: &serde_json::Value, name: &str) -> Option<f64> {
        match value {
            serde_json::Value::Object(map) => map
                .get(name)
                .and_then(serde_json::Value::as_f64)
                .or_else(|| map.values().find_map(|it| search(it, name))),
            serde_json::Value::Array(list) => list.iter().find_map(|it| search(it, name)),
            _ => None,
        }
    }
    search(value, name).unwrap_or_else(|| panic!("{name} is not in {value}"))
}

/// Returns whether a file exists.
fn exists(path: &Path) -> Result<(), String> {
    match path.exists() {
        true => Ok(()),
        false => Err("not yet".to_owned()),
    }
}
