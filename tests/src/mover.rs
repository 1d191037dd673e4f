//! Ways to move a [`Service`] and its address from host A to host B.

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

/// Timeout of a move.
const PATIENCE: Duration = Duration::from_secs(900);

/// A service that runs on host B. Dropping it kills it.
#[derive(Debug)]
pub struct Moved {
    /// Time in which no copy ran, as the mover reports it, in milliseconds.
    pub downtime_ms: f64,
    /// The downtime by phase, if the mover reports it.
    pub phases: String,
    /// Duration of the whole move, in seconds.
    pub seconds: f64,
    _receiver: Option<Receiver>,
    _host: Host,
    _dir: TempDir,
}

/// Moves a service with `send --migrate` and `receive --restore`.
///
/// # Panics
/// If the move fails.
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
    // What a service writes to its test stays behind.
    send.args(["--migrate", "--break-pipes", "--json", "--criu", path]);
    send.args(service.options()).args(options);
    let send = Program::start(send.arg(tree[0].to_string()));
    // A small process may be filled before the receiver reports that it runs.
    let filled = Cell::new(false);
    let is_event = |line: &str, what: &str| {
        filled.set(filled.get() || log::event(line) == Some("memory_filled"));
        assert_ne!(log::event(line), Some("lazy_restore_failed"), "{line}");
        (log::event(line) == Some(what)).then_some(())
    };
    let runs = |line: &str| is_event(line, "restored");
    receiver.program().await_stderr_within(PATIENCE, runs);
    net.route_to_b();
    let sent: Sent = send.finish_within(PATIENCE).into();
    let seconds = began.elapsed().as_secs_f64();
    let report = sent.expect_report();
    service.daemon().child().wait().expect("it is our child");
    assert!(!tree.iter().any(|&pid| memory::lives(pid)), "{tree:?}");
    if !filled.get() {
        let all = |line: &str| is_event(line, "memory_filled");
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

/// Moves a service with `criu dump`, with its memory sent to `criu page-server`, and `criu restore`.
///
/// # Panics
/// If the move fails.
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
    // A restored process would inherit a pipe and keep it open.
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

/// Returns the total downtime of a report, in milliseconds, and a text with each phase.
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
