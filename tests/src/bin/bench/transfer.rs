//! One transfer of a process's memory: with Pageferry, or with `criu dump` into `criu page-server`.

use crate::{Place, find};
use pageferry_tests::certs::strs;
use pageferry_tests::criu::Criu;
use pageferry_tests::net::{B, Net};
use pageferry_tests::pair::{Receiver, Report, receive_command, send_command};
use pageferry_tests::program::{Finished, Program};
use pageferry_tests::usage::Usage;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Timeout of a transfer.
const LONG: Duration = Duration::from_secs(1800);

/// Measurements of a transfer.
pub(crate) struct Transfer {
    /// Seconds from the start of the program at the source until everything is durable at the destination.
    pub seconds: f64,
    /// Bytes of pages in the images.
    pub bytes: f64,
    /// Longest time for which the process was frozen, in ms.
    pub frozen_ms: f64,
    /// Resources of the programs at the source and the destination.
    pub usage: [Usage; 2],
    /// Report of `send`.
    pub report: Option<Report>,
}

/// Transfers with Pageferry, over loopback or from host A to host B.
pub(crate) fn ours(
    pid: i32,
    place: &Place,
    net: Option<&Net>,
    there: &[String],
    here: &[&str],
) -> Transfer {
    let dir = place.tempdir();
    let through = |host, program: Command| match net {
        Some(net) => {
            let mut command = net.enter(host);
            command.arg(program.get_program()).arg("--insecure");
            command
        }
        None => program,
    };
    let port = match net {
        Some(_) => format!("{B}:7700"),
        None => "0".to_owned(),
    };
    let options = [&["--once"], &strs(there)[..]].concat();
    let receiver = Receiver::run(through("B", receive_command()), &port, dir.path(), &options);
    let mut send = through("A", send_command());
    send.args(["--to", &receiver.address().to_string(), "--json"]);
    send.args(here).arg(pid.to_string());
    let began = Instant::now();
    let sent = succeeded(Program::start(&mut send).finish_within(LONG));
    let seconds = began.elapsed().as_secs_f64();
    let received = succeeded(receiver.finish());
    let report: Report = serde_json::from_str(&sent.stdout).expect("it reports");
    let frozen = report.rounds.iter().map(|round| round.frozen_ms);
    Transfer {
        seconds,
        bytes: page_bytes(dir.path()),
        frozen_ms: frozen.fold(0.0, f64::max),
        usage: [sent.usage, received.usage],
        report: Some(report),
    }
}

/// Transfers with CRIU, over loopback. Its server exits before the images are durable: they are synced after.
pub(crate) fn criu(criu: &Criu, pid: i32, place: &Place) -> Transfer {
    let (dir, state) = (place.tempdir(), place.tempdir());
    let (server, address) = criu.page_server(dir.path(), &[]);
    let mut dump = criu.command("dump", state.path());
    dump.args(["--leave-running", "--page-server", "-t", &pid.to_string()]);
    dump.args([
        "--address",
        "127.0.0.1",
        "--port",
        &address.port().to_string(),
    ]);
    let began = Instant::now();
    let dumped = succeeded(Program::start(&mut dump).finish_within(LONG));
    let served = succeeded(server.finish_within(LONG));
    for file in files(dir.path()) {
        let file = fs::File::open(file).expect("it is there");
        file.sync_all().expect("it is a file");
    }
    Transfer {
        seconds: began.elapsed().as_secs_f64(),
        bytes: page_bytes(dir.path()),
        frozen_ms: frozen_ms(state.path()),
        usage: [dumped.usage, served.usage],
        report: None,
    }
}

fn succeeded(finished: Finished) -> Finished {
    assert!(finished.status.success(), "{}", finished.stderr);
    finished
}

fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).expect("it is there").flatten() {
        match entry.path().is_dir() {
            true => files.extend(self::files(&entry.path())),
            false => files.push(entry.path()),
        }
    }
    files
}

fn page_bytes(dir: &Path) -> f64 {
    let pages = files(dir).into_iter().filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("pages-")
    });
    let bytes = pages.map(|path| path.metadata().map_or(0, |it| it.len()));
    bytes.sum::<u64>() as f64
}

/// Reads the freeze time from the statistics that CRIU writes.
fn frozen_ms(state: &Path) -> f64 {
    let mut crit = Command::new("crit");
    let shown = Program::start(crit.arg("show").arg(state.join("stats-dump"))).finish();
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).expect("crit reads it");
    find(&shown, "frozen_time") / 1e3
}
