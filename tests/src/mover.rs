//! Ways to move a [`Service`] from host A to host B, its address with it.

use crate::criu::{Criu, merge};
use crate::host::Host;
use crate::log;
use crate::memory;
use crate::net::{B, Net};
use crate::pair::{Receiver, Report, Sent, send_command};
use crate::program::Program;
use crate::service::Service;
use std::cell::Cell;
use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a move may take.
const PATIENCE: Duration = Duration::from_secs(900);

/// A service that runs at host B. Dropped, it is killed.
#[derive(Debug)]
pub struct Moved {
    /// For how long the mover says that nothing ran, ms.
    pub downtime_ms: f64,
    /// The same by phases, if it tells.
    pub phases: String,
    /// Of all of it, s.
    pub seconds: f64,
    _receiver: Option<Receiver>,
    _host: Host,
    _dir: TempDir,
}

/// Moves it with `send --migrate` and `receive --restore`.
///
/// # Panics
/// If it fails.
#[must_use]
pub fn pageferry(net: &Net, criu: &Criu, service: &mut dyn Service, options: &[&str]) -> Moved {
    let (host, dir) = (Host::start_in(net.enter("B")), tempdir());
    let path = criu.path().to_str().expect("it has a plain name");
    let restore = ["--restore", "--criu", path, "--insecure"];
    let mut receiver = host.receiver(&format!("{B}:7700"), dir.path(), &restore);
    let tree = memory::tree(service.daemon().pid());
    let began = Instant::now();
    let mut send = net.enter("A");
    send.arg(send_command().get_program());
    send.args(["--to", &receiver.address().to_string(), "--insecure"]);
    send.args(["--migrate", "--json", "--criu", path]);
    send.args(service.options()).args(options);
    let send = Program::start(send.arg(tree[0].to_string()));
    // Little memory is filled before the process is said to run.
    let filled = Cell::new(false);
    let heard = |line: &str, what: &str| {
        filled.set(filled.get() || log::event(line) == Some("memory_filled"));
        assert_ne!(log::event(line), Some("lazy_restore_failed"), "{line}");
        (log::event(line) == Some(what)).then_some(())
    };
    let runs = |line: &str| heard(line, "restored");
    receiver.program().await_stderr_within(PATIENCE, runs);
    net.route_to_b();
    let sent: Sent = send.finish_within(PATIENCE).into();
    let seconds = began.elapsed().as_secs_f64();
    let report = sent.expect_report();
    service.daemon().child().wait().expect("it is our child");
    assert!(!tree.iter().any(|&pid| memory::lives(pid)), "{tree:?}");
    if !filled.get() {
        let all = |line: &str| heard(line, "memory_filled");
        receiver.program().await_stderr_within(PATIENCE, all);
    }
    let (downtime_ms, phases) = downtime(&report);
    Moved {
        downtime_ms,
        phases,
        seconds,
        _receiver: Some(receiver),
        _host: host,
        _dir: dir,
    }
}

/// Moves it with `criu dump`, its memory into `criu page-server`, and `criu restore`.
///
/// # Panics
/// If it fails.
#[must_use]
pub fn plain_criu(net: &Net, criu: &Criu, service: &mut dyn Service) -> Moved {
    let (host, dir, state) = (Host::start_in(net.enter("B")), tempdir(), tempdir());
    let mut server = host.enter();
    server.arg(criu.path()).args(["page-server", "-v1", "-D"]);
    server.arg(dir.path());
    let server = Program::start(server.args(["--address", B, "--port", "7701"]));
    host.await_listener(7701);
    let tree = memory::tree(service.daemon().pid());
    let began = Instant::now();
    let mut dump = net.enter("A");
    dump.arg(criu.path())
        .args(["dump", "-v1", "-t", &tree[0].to_string()]);
    dump.arg("-D").arg(state.path()).args(["-o", "dump.log"]);
    dump.args(["--page-server", "--address", B, "--port", "7701"]);
    let dumped = Program::start(dump.args(service.options())).finish_within(PATIENCE);
    let log = |name| fs::read_to_string(state.path().join(name)).unwrap_or_default();
    assert!(dumped.status.success(), "{}", log("dump.log"));
    let served = server.finish_within(PATIENCE);
    assert!(served.status.success(), "{}", served.stderr);
    merge(state.path(), dir.path());
    service.daemon().child().wait().expect("it is our child");
    let mut restore = host.enter();
    restore
        .arg(criu.path())
        .args(["restore", "-v1", "-d", "-D"]);
    restore.arg(dir.path()).args(service.options());
    restore.arg("-o").arg(state.path().join("restore.log"));
    // What it restores would keep a pipe of ours open.
    let null = Stdio::null;
    restore.stdin(null()).stdout(null()).stderr(null());
    let restored = restore.status().expect("it is there");
    assert!(restored.success(), "{}", log("restore.log"));
    net.route_to_b();
    let seconds = began.elapsed().as_secs_f64();
    Moved {
        downtime_ms: seconds * 1e3,
        phases: String::new(),
        seconds,
        _receiver: None,
        _host: host,
        _dir: dir,
    }
}

fn tempdir() -> TempDir {
    tempfile::tempdir().expect("a temporary directory can be made")
}

/// What a report says of the downtime: all of it, and each phase.
fn downtime(report: &Report) -> (f64, String) {
    let phases = report.totals["handover"].as_object();
    let phases = phases.expect("it was a move").iter();
    let phases: Vec<_> = phases
        .filter_map(|(name, ms)| Some((name, ms.as_f64()?)))
        .collect();
    let total = phases.iter().map(|(_, ms)| ms).sum();
    let words = phases.iter().map(|(name, ms)| format!("{name} {ms:.0}"));
    (total, words.collect::<Vec<_>>().join(", "))
}
