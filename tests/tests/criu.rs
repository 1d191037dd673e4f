//! Our images are CRIU's: `crit` decodes them, and `criu restore` brings a process back from a
//! chain of our rounds and CRIU's own state images of the same frozen moment.

use pageferry_tests::memory::{self, is_stopped};
use pageferry_tests::scenario::{assert_arrived, go_on};
use pageferry_tests::{Pair, Victim};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The real CRIU: `$PAGEFERRY_CRIU`, or where `scripts/install-criu` puts it.
fn criu() -> PathBuf {
    if let Some(path) = std::env::var_os("PAGEFERRY_CRIU") {
        return path.into();
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache");
    let path = cache.unwrap_or_else(home).join("pageferry-criu/criu");
    assert!(path.exists(), "no CRIU: run scripts/install-criu");
    path
}

fn run(command: &mut Command, log: &Path) {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let log = fs::read_to_string(log).unwrap_or_default();
    let log = log.lines().rev().take(15).collect::<Vec<_>>().join("\n");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{stderr}\nlog, last line first:\n{log}",
        output.status
    );
}

/// What only `/proc` tells.
fn until(what: &str, so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !so() {
        assert!(Instant::now() < deadline, "not so: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn images(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    entries
        .filter(|path| path.extension().is_some_and(|e| e == "img"))
        .collect()
}

fn is_memory(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_string_lossy();
    name.starts_with("pages-") || name.starts_with("pagemap-")
}

#[test]
fn crit_decodes_every_image() {
    let mut victim = Victim::start("heap=4 zero=1 shared=2 memfd=1 sysv=1 children=2 dirty=20");
    let pair = Pair::start(&[]);
    let report = pair
        .send(
            victim.pid(),
            &["--max-downtime", "0ms", "--max-rounds", "3"],
        )
        .expect_report();
    let home = pair.last_round(&report).parent().unwrap().to_owned();
    let mut kinds = [0; 3];
    for round in 1..=report.rounds.len() {
        for image in images(&home.join(round.to_string())) {
            let name = image.file_name().unwrap().to_string_lossy().into_owned();
            if name.starts_with("pages-") {
                continue;
            }
            let output = Command::new("crit").arg("show").arg(&image).output();
            let output = output.expect("crit is there: run scripts/setup");
            let text = String::from_utf8(output.stdout).unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name}: {error}");
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            let (magic, kind) = match name.as_str() {
                "inventory.img" => ("INVENTORY", 0),
                _ if name.starts_with("pagemap-shmem-") => ("PAGEMAP", 1),
                _ => ("PAGEMAP", 2),
            };
            assert_eq!(json["magic"], magic, "{name}");
            let entries = json["entries"].as_array().unwrap();
            assert!(!entries.is_empty(), "{name}");
            if kind == 2 {
                // The head, and then what the process has.
                assert!(entries[0]["pages_id"].is_u64());
                assert!(entries[1]["nr_pages"].as_u64().unwrap() > 0);
            }
            kinds[kind] += 1;
        }
    }
    let rounds = report.rounds.len();
    // The board that victims share with their children is a segment too.
    assert!(
        kinds[0] == rounds && kinds[1] >= 3 * rounds && kinds[2] == 3 * rounds,
        "{kinds:?}"
    );
    victim.assert_unharmed();
}

#[test]
fn criu_restores_from_a_chain_of_our_rounds() {
    let criu = criu();
    for features in [
        "heap=16 text=2 zero=1 sparse=32 protnone=1 readonly=1 fileprivate=2 dirty=20",
        "heap=8 threads=6 spin=1 dirty=20",
        "heap=8 shared=4 memfd=2 children=2 dirty=20",
    ] {
        let mut victim = Victim::detached(features);
        let pid = victim.pid();
        let tree = victim.tree();
        let pair = Pair::start(&[]);
        let options = [
            "--max-downtime",
            "0ms",
            "--max-rounds",
            "3",
            "--then",
            "stop",
        ];
        let report = pair.send(pid, &options).expect_report();
        assert_arrived(pid, &pair, &report);
        let round = pair.last_round(&report);
        assert!(round.join("parent").exists());

        // CRIU's part, of the very moment that our last round was taken in.
        let scratch = tempfile::tempdir().unwrap();
        let state = scratch.path().join("state");
        fs::create_dir(&state).unwrap();
        let log = state.join("dump.log");
        let mut dump = Command::new(&criu);
        dump.args([
            "dump",
            "-v1",
            "-o",
            "dump.log",
            "-t",
            &pid.to_string(),
            "-D",
        ]);
        run(dump.arg(&state), &log);
        victim.await_end();
        // Children are reaped by others; until then their PIDs are taken.
        until("the tree is gone", || {
            tree.iter()
                .all(|pid| !Path::new("/proc").join(pid.to_string()).exists())
        });
        for image in images(&state).iter().filter(|path| !is_memory(path)) {
            fs::copy(image, round.join(image.file_name().unwrap())).unwrap();
        }

        let mut restore = Command::new(&criu);
        restore.args(["restore", "-d", "-v1", "-o", "restore.log", "-D"]);
        run(restore.arg(&round), &round.join("restore.log"));
        assert!(
            memory::lives(pid) && is_stopped(pid),
            "it was stopped when it was dumped"
        );
        go_on(pid);
        let verdict = victim.report().verdict(pid);
        for pid in memory::tree(pid).into_iter().rev() {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let pages = verdict.unwrap_or_else(|error| panic!("{features}: {error}"));
        assert!(pages > 1000, "{pages}");
    }
}
