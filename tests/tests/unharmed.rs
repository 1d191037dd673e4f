//! Whatever happens to Pageferry, the target runs on, unharmed, and the receiver has complete rounds or none.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tests::kills::{kills, spread};
use pageferry_tests::scenario::{
    assert_arrived_unharmed, assert_verified, migrations, the_migration,
};
use pageferry_tests::{Pair, Victim};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

/// Default number of kills: few, because a slow disk makes each take long.
const KILLS: u32 = 50;

#[test]
fn send_killed_at_any_time_leaves_no_trace() {
    let mut victim = Victim::start(
        "heap=24 threads=12 spin=2 signals children=2 shared=2 seccomp=filter dirty=50",
    );
    let pair = Pair::start(&["--max-senders", "64"]);
    // The duration of an undisturbed send bounds the times of the kills.
    let begun = std::time::Instant::now();
    let alone = pair.send(
        victim.pid(),
        &["--max-downtime", "0ms", "--max-rounds", "4"],
    );
    let _ = alone.expect_report();
    let whole = begun.elapsed();
    for step in 0..kills(KILLS) {
        let options = ["--max-downtime", "0ms", "--max-rounds", "4"];
        let mut send = pair.start_send(victim.pid(), &options);
        std::thread::sleep(whole.mul_f64(spread(step)));
        send.program().kill();
        drop(send);
        if step % 20 == 0 {
            victim.assert_unharmed();
        }
    }
    victim.assert_unharmed();
    for migration in migrations(pair.dir()) {
        let rounds = fs::read_dir(&migration).unwrap().flatten();
        let complete = rounds.filter(|e| e.file_name().to_string_lossy().parse::<u32>().is_ok());
        if complete.count() > 0 {
            assert_verified(&migration);
        }
    }
    // It can still be sent.
    let report = pair.send(victim.pid(), &["--then", "stop"]).expect_report();
    assert_arrived_unharmed(&mut victim, &report);
}

#[test]
fn interrupted_send_exits_130_and_leaves_the_target_running() {
    let mut victim = Victim::start("heap=64 threads=4 dirty=100");
    let pair = Pair::start(&[]);
    let options = ["--rounds", "1000", "--reconnect-for", "0"];
    let mut send = pair.start_send(victim.pid(), &options);
    send.program().await_round(2);
    kill(Pid::from_raw(send.program().pid()), Signal::SIGINT).unwrap();
    let sent = send.finish();
    assert_eq!(sent.status.code(), Some(130), "{}", sent.stderr);
    assert!(sent.stderr.contains("interrupted"), "{}", sent.stderr);
    victim.assert_unharmed();
}

#[test]
fn dead_receiver_fails_the_send_but_not_the_target() {
    let mut victim = Victim::start("heap=64 dirty=100");
    let mut pair = Pair::start(&[]);
    let options = ["--rounds", "1000", "--reconnect-for", "0"];
    let mut send = pair.start_send(victim.pid(), &options);
    send.program().await_round(2);
    pair.receiver().program().kill();
    let sent = send.finish();
    assert_eq!(sent.status.code(), Some(1), "{}", sent.stderr);
    assert!(sent.stderr.contains("the target runs"), "{}", sent.stderr);
    victim.assert_unharmed();
    let migration = &the_migration(pair.dir());
    assert_verified(migration);
}

#[test]
fn restarted_receiver_discards_the_incomplete_round() {
    let victim = Victim::start("heap=64 dirty=100");
    let mut pair = Pair::start(&[]);
    let options = ["--rounds", "1000", "--reconnect-for", "0"];
    let mut send = pair.start_send(victim.pid(), &options);
    send.program().await_round(3);
    pair.receiver().program().kill();
    let _ = send.finish();
    let migration = the_migration(pair.dir());
    let incomplete = |path: &Path| {
        let names = fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name());
        names
            .filter(|n| n.to_string_lossy().ends_with(".tmp"))
            .count()
    };
    let next = pageferry_tests::Receiver::start(pair.dir(), &[]);
    drop(next);
    assert_eq!(incomplete(&migration), 0);
    assert!(migration.join("3").is_dir());
    assert_verified(&migration);
}

#[test]
fn garbage_on_the_port_harms_no_migration() {
    let mut victim = Victim::start("heap=16 dirty=50");
    let mut pair = Pair::start(&["--timeout", "2s"]);
    let address = pair.receiver().address();
    let mut idle = Vec::new();
    let mut send = pair.start_send(victim.pid(), &["--rounds", "20"]);
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"PFRY",
        b"PFRYxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        &[0xff; 4096],
        &[4, 0, 0, 0, 0, 0, 0, 0],
        b"",
    ] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(garbage).unwrap();
        if garbage == b"PFRY" || garbage.is_empty() {
            // Keeps the connection open without sending more.
            idle.push(stream);
        } else {
            stream
                .set_read_timeout(Some(Duration::from_secs(20)))
                .unwrap();
            // Refused: the connection is closed, perhaps after a frame with the reason.
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            assert!(
                answer.is_empty() || answer.starts_with(b"PFRY"),
                "{answer:?}"
            );
        }
    }
    send.program().await_round(10);
    let report = send.finish().expect_report();
    assert_eq!(report.rounds.len(), 20);
    let directory = report.totals["directory"].as_str().unwrap();
    assert_verified(Path::new(directory));
    victim.assert_unharmed();
    pair.receiver().program().await_event("connection_refused");
}

#[test]
fn concurrent_senders_do_not_mix() {
    let pair = Pair::start(&[]);
    let victims: Vec<_> = (1..5)
        .map(|seed| {
            Victim::start(&format!(
                "--seed {seed} heap=16 shared=2 children=1 dirty=30"
            ))
        })
        .collect();
    let sends: Vec<_> = victims
        .iter()
        .map(|victim| pair.start_send(victim.pid(), &["--then", "stop"]))
        .collect();
    for (mut victim, send) in victims.into_iter().zip(sends) {
        let report = send.finish().expect_report();
        assert_arrived_unharmed(&mut victim, &report);
    }
}

#[test]
fn chaotic_target_survives_twenty_rounds() {
    for tracker in ["uffd", "hash"] {
        let mut victim =
            Victim::start("heap=8 shared=1 children=2 chaos threads=4 execloop=20 dirty=50");
        let pair = Pair::start(&[]);
        let options = ["--tracker", tracker, "--rounds", "20"];
        let report = pair.send(victim.pid(), &options).expect_report();
        assert_eq!(report.rounds.len(), 20);
        assert_verified(Path::new(report.totals["directory"].as_str().unwrap()));
        victim.assert_unharmed();
        // The last, frozen round is correct after whatever came before.
        assert_eq!(victim.ask("stop-writing"), "ok");
        let report = pair
            .send(victim.pid(), &["--tracker", tracker, "--then", "stop"])
            .expect_report();
        assert_arrived_unharmed(&mut victim, &report);
    }
}

#[test]
fn tree_changes_between_rounds_are_followed() {
    let mut victim = Victim::start("heap=8 shared=1 children=1 dirty=20");
    let pair = Pair::start(&[]);
    let mut send = pair.start_send(victim.pid(), &["--max-downtime", "0ms", "--then", "stop"]);
    // Commands until the send exits: each is valid at any time.
    for command in [
        "remap",
        "move",
        "grow",
        "fork",
        "shrink",
        "reap",
        "discard 100",
    ] {
        if let Ok(answer) = victim.try_ask(command) {
            assert!(answer.starts_with("ok"), "{command}: {answer}");
        }
        if !pageferry_tests::memory::lives(send.program().pid()) {
            break;
        }
    }
    let report = send.finish().expect_report();
    assert_arrived_unharmed(&mut victim, &report);
}

#[test]
fn round_may_last_longer_than_the_timeout() {
    let mut victim = Victim::start("heap=48");
    let pair = Pair::start(&[]);
    // The highest compression level takes seconds for incompressible memory.
    let slow = ["--timeout", "1s", "--compress", "zstd:19", "--then", "stop"];
    let send = pair.start_send(victim.pid(), &slow);
    let report = send.finish_within(Duration::from_secs(300)).expect_report();
    assert!(report.rounds[0].seconds > 1.0, "{:?}", report.rounds);
    assert_arrived_unharmed(&mut victim, &report);
}

#[test]
fn killed_tree_is_gone_when_send_exits() {
    let mut victim = Victim::start("heap=4 children=3 threads=4");
    let pair = Pair::start(&[]);
    let tree = victim.tree();
    let sent = pair.send(victim.pid(), &["--then", "kill"]);
    let _ = sent.expect_report();
    assert!(tree.iter().all(|&pid| !pageferry_tests::memory::lives(pid)));
    victim.await_end();
}
