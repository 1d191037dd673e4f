//! The common scenario: send a victim, leave it stopped, and compare the images with its memory.

use crate::daemon::until;
use crate::images::{self, Stats};
use crate::memory::{Frozen, Snapshot};
use crate::pair::{Pair, Report, receive_command};
use crate::program::{Finished, Program};
use crate::victim::Victim;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::{Path, PathBuf};

/// Runs `receive` with these arguments until it exits.
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

/// Asserts that `receive verify` finds no problem in a chain.
///
/// # Panics
/// If it finds one.
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

/// Returns whether this kernel supports a tracker; reports a skipped test if not. With
/// `PAGEFERRY_ALL_TRACKERS` (set in the VM) the kernel must support it.
///
/// # Panics
/// If it must and does not.
#[must_use]
pub fn has_tracker(tracker: &str) -> bool {
    let victim = Victim::start("heap=1");
    let pair = Pair::start(&[]);
    let sent = pair.send(victim.pid(), &["--tracker", tracker, "--rounds", "1"]);
    let missing = sent.stderr.contains("this kernel does not support");
    assert!(sent.status.success() || missing, "{}", sent.stderr);
    if missing {
        let required = std::env::var_os("PAGEFERRY_ALL_TRACKERS").is_some();
        assert!(!required, "{}", sent.stderr);
        eprintln!("SKIPPED: --tracker {tracker}: {}", sent.stderr.trim());
    }
    !missing
}

/// Asserts that the last round of `report` equals the memory of the stopped tree under `root`, byte by byte.
///
/// # Panics
/// If it does not.
pub fn assert_arrived(root: i32, report: &Report) -> Stats {
    let frozen = Frozen::from_stopped(root).expect("the tree is stopped");
    let truth = Snapshot::take(&frozen).expect("the tree's memory can be read");
    let round = report.last_round();
    assert_verified(&round);
    compare_chain(&truth, &round)
}

/// Asserts that the last round of `report` equals the memory of the stopped victim, resumes the victim, and
/// asserts that it is unharmed.
///
/// # Panics
/// If not.
pub fn assert_arrived_unharmed(victim: &mut Victim, report: &Report) {
    assert_arrived(victim.pid(), report);
    resume(victim.pid());
    victim.assert_unharmed();
}

/// Returns the directories of migrations in a receiver's `--dir`.
///
/// # Panics
/// If it cannot be read.
#[must_use]
pub fn migrations(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("the directory exists");
    let paths = entries.map(|entry| entry.expect("it can be read").path());
    paths.filter(|path| path.is_dir()).collect()
}

/// Returns the directory of the one migration in a receiver's `--dir`, once it exists.
///
/// # Panics
/// If there is not exactly one within 60 seconds.
#[must_use]
pub fn the_migration(dir: &Path) -> PathBuf {
    until("there is one migration", || match &migrations(dir)[..] {
        [migration] => Ok(migration.clone()),
        all => Err(format!("{all:?}")),
    })
}

/// Asserts that the chain that ends in `round`, written by any CRIU, equals the snapshot.
///
/// # Panics
/// If it does not.
pub fn compare_chain(truth: &Snapshot, round: &Path) -> Stats {
    let scratch = tempfile::tempdir().expect("a temporary directory can be made");
    let flat = scratch.path().join("flat");
    flatten(round, &flat);
    images::compare(truth, &flat).unwrap_or_else(|error| panic!("{error}"))
}

/// Resumes a tree that was left stopped.
pub fn resume(root: i32) {
    for pid in crate::memory::tree(root) {
        // A process that has exited meanwhile needs no signal.
        let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
    }
}

/// Sends a victim with these options, asserts that the images equal its memory, and that it resumes unharmed.
///
/// # Panics
/// If not.
pub fn assert_sent(victim: &mut Victim, options: &[&str]) -> Report {
    let pair = Pair::start(&[]);
    let report = pair
        .send(victim.pid(), &[&["--then", "stop"], options].concat())
        .expect_report();
    assert_arrived_unharmed(victim, &report);
    report
}
