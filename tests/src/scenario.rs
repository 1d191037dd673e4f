//! What most tests do: send a victim, leave it stopped, and compare what arrived with what it holds.

use crate::images::{self, Stats};
use crate::memory::{Frozen, Snapshot};
use crate::pair::{Pair, Report, receive_command};
use crate::program::{Finished, Program};
use crate::victim::Victim;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::Path;

/// Runs `receive` with these arguments to its end.
///
/// # Panics
/// If it is not built, or hangs.
#[must_use]
pub fn receive(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Finished {
    let mut command = receive_command();
    arguments.iter().for_each(|argument| {
        command.arg(argument);
    });
    Program::start(&mut command).finish()
}

/// Claims that `receive verify` finds nothing wrong with a chain.
///
/// # Panics
/// If it does.
pub fn assert_verified(dir: &Path) {
    let verified = receive(&[&"verify", &dir]);
    assert!(verified.status.success(), "{}", verified.stderr);
}

/// Merges the chain that ends in `dir` into `out`.
///
/// # Panics
/// If `receive flatten` fails.
pub fn flatten(dir: &Path, out: &Path) {
    let flattened = receive(&[&"flatten", &dir, &out]);
    assert!(flattened.status.success(), "{}", flattened.stderr);
}

/// Whether this kernel has a tracker; if not, says so by name. Where `PAGEFERRY_ALL_TRACKERS` is
/// set (in the VM), it must.
///
/// # Panics
/// If it must, and has not.
#[must_use]
pub fn has_tracker(tracker: &str) -> bool {
    let victim = Victim::start("heap=1");
    let pair = Pair::start(&[]);
    let sent = pair.send(victim.pid(), &["--tracker", tracker, "--rounds", "1"]);
    let missing = sent.stderr.contains("this kernel has no");
    assert!(sent.status.success() || missing, "{}", sent.stderr);
    if missing {
        let required = std::env::var_os("PAGEFERRY_ALL_TRACKERS").is_some();
        assert!(!required, "{}", sent.stderr);
        eprintln!("SKIPPED: --tracker {tracker}: {}", sent.stderr.trim());
    }
    !missing
}

/// Claims that the last round that `report` tells of is the memory of the stopped tree under `root`,
/// byte by byte.
///
/// # Panics
/// If it is not.
pub fn assert_arrived(root: i32, report: &Report) -> Stats {
    let frozen = Frozen::already(root).expect("the tree is stopped");
    let truth = Snapshot::take(&frozen).expect("the tree's memory can be read");
    let round = report.last_round();
    assert_verified(&round);
    compare_chain(&truth, &round)
}

/// Claims that the chain that ends in `round`, of whichever CRIU, holds the truth.
///
/// # Panics
/// If it does not.
pub fn compare_chain(truth: &Snapshot, round: &Path) -> Stats {
    let scratch = tempfile::tempdir().expect("a temporary directory can be made");
    let flat = scratch.path().join("flat");
    flatten(round, &flat);
    images::compare(truth, &flat).unwrap_or_else(|error| panic!("{error}"))
}

/// Lets a tree that was left stopped go on.
pub fn go_on(root: i32) {
    for pid in crate::memory::tree(root) {
        // One that has ended meanwhile needs nothing.
        let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
    }
}

/// Sends a victim with these options, and claims that what arrived is what it holds, and that it
/// goes on unharmed.
///
/// # Panics
/// If not.
pub fn assert_sent(victim: &mut Victim, options: &[&str]) -> Report {
    let pair = Pair::start(&[]);
    let report = pair
        .send(victim.pid(), &[&["--then", "stop"], options].concat())
        .expect_report();
    assert_arrived(victim.pid(), &report);
    go_on(victim.pid());
    victim.assert_unharmed();
    report
}
