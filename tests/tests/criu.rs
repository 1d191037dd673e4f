//! Images by Pageferry are images of CRIU: `crit` decodes them, and `criu restore` restores a process from a
//! chain of rounds and CRIU's own state images of the same frozen moment.

use pageferry_tests::criu::{Criu, await_gone, merge};
use pageferry_tests::daemon::until;
use pageferry_tests::memory::{is_stopped, lives};
use pageferry_tests::scenario::{assert_arrived, resume};
use pageferry_tests::{Pair, Victim};
use std::fs;
use std::process::Command;

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
    let home = report.last_round().parent().unwrap().to_owned();
    let mut kinds = [0; 3];
    for round in 1..=report.rounds.len() {
        for image in fs::read_dir(home.join(round.to_string())).unwrap() {
            let image = image.unwrap().path();
            let name = image.file_name().unwrap().to_string_lossy().into_owned();
            if name.starts_with("pages-") || !name.ends_with(".img") {
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
                // The head, then the entries of the process.
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
fn criu_restores_a_chain_of_rounds() {
    for criu in Criu::all("restore from a chain of our rounds") {
        for features in [
            "heap=16 text=2 zero=1 sparse=32 protnone=1 readonly=1 fileprivate=2 dirty=20",
            "heap=8 threads=6 spin=1 dirty=20",
            "heap=8 shared=4 memfd=2 children=2 dirty=20",
        ] {
            let mut victim = Victim::detached(features);
            let (pid, tree) = (victim.pid(), victim.tree());
            let pair = Pair::start(&[]);
            let options = ["--max-downtime", "0ms", "--max-rounds", "3"];
            let options = [&options[..], &["--then", "stop"]].concat();
            let report = pair.send(pid, &options).expect_report();
            assert_arrived(pid, &report);
            let round = report.last_round();
            assert!(round.join("parent").exists());

            // State images by CRIU, of the moment in which the last round was read.
            let state = tempfile::tempdir().unwrap();
            criu.run("dump", state.path(), &["-t", &pid.to_string()])
                .unwrap();
            victim.await_end();
            await_gone(&tree);
            merge(state.path(), &round);

            let _restored = criu.restore(&round, pid, &[]).unwrap();
            // CRIU has sent the signal; only polling shows when the process has exited.
            until(
                "it is stopped, as when it was dumped",
                || match is_stopped(pid) {
                    true => Ok(()),
                    false => Err(format!("it lives: {}", lives(pid))),
                },
            );
            resume(pid);
            let verdict = victim.report().verdict(pid);
            let pages = verdict.unwrap_or_else(|error| panic!("{features}: {error}"));
            assert!(pages > 1000, "{pages}");
        }
    }
}
