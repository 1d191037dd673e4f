//! Whatever happens to Pageferry, the target runs on, unharmed, and the receiver has complete rounds or none. Pages
//! that processes share, copy on write, are shared afterwards as before: the target takes no more memory.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tests::criu::{Criu, skip};
use pageferry_tests::daemon::{answered, until};
use pageferry_tests::huge::HugePages;
use pageferry_tests::kills::{kills, spread};
use pageferry_tests::ksm::{Ksm, merged_pages};
use pageferry_tests::memory::lives;
use pageferry_tests::pair::Sent;
use pageferry_tests::scenario::{
    assert_arrived_unharmed, assert_verified, has_tracker, migrations, the_migration,
};
use pageferry_tests::servers::{Postgres, Redis};
use pageferry_tests::usage::memory_of_tree;
use pageferry_tests::{Pair, Receiver, Send, Victim};
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
    let next = Receiver::start(pair.dir(), &[]);
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
        if !lives(send.program().pid()) {
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
    assert!(tree.iter().all(|&pid| !lives(pid)));
    victim.await_end();
}

/// A process with memory that it filled before it forked, and its children, which never write to it.
const PREFORKED: &str = "heap=24 text=2 children=6";

/// Asserts that the tree under `root` takes as much memory after `action` as before, within 5 %.
fn assert_stays_shared<T>(root: i32, what: &str, action: impl FnOnce() -> T) -> T {
    let before = memory_of_tree(root);
    let result = action();
    let after = memory_of_tree(root);
    assert!(
        after <= before + before / 20,
        "{what}: {before} KiB before, {after} KiB after"
    );
    result
}

#[test]
fn copies_leave_memory_shared_with_each_tracker() {
    let precopy = ["--rounds", "2"];
    let to_the_end = ["--max-downtime", "0ms", "--max-rounds", "2"];
    let comparing = ["--skip-unchanged", "--rounds", "2"];
    let mut tested = 0;
    for tracker in ["uffd", "soft-dirty", "hash"] {
        if !has_tracker(tracker) {
            continue;
        }
        for options in [&precopy[..], &to_the_end, &comparing] {
            let mut victim = Victim::start(&format!("{PREFORKED} shared=4"));
            let pair = Pair::start(&[]);
            let what = format!("{tracker} {options:?}");
            assert_stays_shared(victim.pid(), &what, || {
                let options = [&["--tracker", tracker], options].concat();
                let _ = pair.send(victim.pid(), &options).expect_report();
            });
            victim.assert_unharmed();
        }
        tested += 1;
    }
    assert!(tested >= 1, "no tracker works here");
}

/// A child that is sent alone shares pages with its parent, which is not part of the target.
#[test]
fn copy_of_one_child_leaves_its_memory_shared() {
    let mut victim = Victim::start(PREFORKED);
    let pair = Pair::start(&[]);
    let child = victim.tree()[1];
    assert_stays_shared(victim.pid(), "a child", || {
        let _ = pair.send(child, &[]).expect_report();
    });
    victim.assert_unharmed();
}

#[test]
fn child_forked_in_the_middle_of_a_round_shares_memory() {
    let mut victim = Victim::start("heap=48");
    let pair = Pair::start(&[]);
    // The highest compression level takes seconds for incompressible memory.
    let options = ["--rounds", "1", "--compress", "zstd:19"];
    let mut send = pair.start_send(victim.pid(), &options);
    let migration = the_migration(pair.dir());
    until("the round is under way", || {
        let rounds = fs::read_dir(&migration).unwrap().flatten();
        let files = rounds.flat_map(|round| fs::read_dir(round.path()).into_iter().flatten());
        let bytes = files.flatten().filter_map(|file| file.metadata().ok());
        match bytes.map(|it| it.len()).sum::<u64>() > 1 << 20 {
            true => Ok(()),
            false => Err("too little has arrived".to_owned()),
        }
    });
    let answer = victim.ask("fork");
    assert!(answer.starts_with("ok"), "{answer}");
    let tree = victim.tree();
    assert!(tree.len() == 2 && lives(send.program().pid()));
    assert_stays_shared(victim.pid(), "a fork", || {
        let _ = send.finish().expect_report();
    });
    assert_eq!(victim.tree(), tree);
    victim.assert_unharmed();
}

/// Moves a tree to a receiver on the same host, where its PIDs are taken.
fn move_in_vain(criu: &Criu, pid: i32) -> Sent {
    let dir = tempfile::tempdir().unwrap();
    let criu = criu.path().to_str().unwrap();
    let receiver = Receiver::start(dir.path(), &["--restore", "--criu", criu]);
    let once = ["--reconnect-for", "0", "--break-pipes"];
    let options = [&["--migrate", "--criu", criu][..], &once].concat();
    Send::start(receiver.address(), pid, &options).finish()
}

#[test]
fn move_that_criu_refuses_leaves_memory_shared() {
    let Some(criu) = Criu::stable("a move that CRIU refuses") else {
        return;
    };
    // CRIU refuses a process with a pipe that it shares with an outside process.
    let mut victim = Victim::start(PREFORKED);
    assert_stays_shared(victim.pid(), "a refused move", || {
        let sent = move_in_vain(&criu, victim.pid());
        sent.assert_failed(1, &["CRIU cannot dump"]);
    });
    victim.assert_unharmed();
}

#[test]
fn move_whose_restore_fails_leaves_memory_shared() {
    let Some(criu) = Criu::stable("a move whose restore fails") else {
        return;
    };
    let mut victim = Victim::detached(PREFORKED);
    assert_stays_shared(victim.pid(), "a move in vain", || {
        let sent = move_in_vain(&criu, victim.pid());
        assert!(!sent.status.success(), "{}", sent.stderr);
        assert!(
            sent.stderr.contains("CRIU cannot restore"),
            "{}",
            sent.stderr
        );
    });
    victim.check().unwrap();
}

#[test]
fn redis_shares_its_memory_with_the_child_that_saves_it() {
    let redis = Redis::start();
    redis.fill(20_000);
    // A background save takes minutes with this delay, µs for each key.
    redis
        .cli(&["config", "set", "rdb-key-save-delay", "10000"])
        .unwrap();
    redis.cli(&["bgsave"]).unwrap();
    let saving = || {
        let state = redis.cli(&["info", "persistence"]).unwrap();
        assert!(state.contains("rdb_bgsave_in_progress:1"), "{state}");
    };
    saving();
    assert_stays_shared(redis.pid(), "redis", || {
        let pair = Pair::start(&[]);
        let _ = pair.send(redis.pid(), &["--rounds", "2"]).expect_report();
        let _ = pair.send(redis.pid(), &[]).expect_report();
    });
    saving();
}

#[test]
fn postgresql_takes_no_more_memory() {
    let postgres = Postgres::start();
    // A worker that comes or goes would count.
    postgres.sql("alter system set autovacuum = off").unwrap();
    postgres.sql("select pg_reload_conf()").unwrap();
    let workers = "select count(*) from pg_stat_activity where backend_type = 'autovacuum worker'";
    until("no table is vacuumed", || {
        answered(postgres.sql(workers), "0")
    });
    let pair = Pair::start(&[]);
    assert_stays_shared(postgres.pid(), "PostgreSQL", || {
        let _ = pair
            .send(postgres.pid(), &["--rounds", "2"])
            .expect_report();
        let _ = pair.send(postgres.pid(), &[]).expect_report();
    });
    assert_eq!(postgres.sql("select 1").unwrap().trim(), "1");
}

/// Huge pages (hugetlb) are limited: a child whose copy of one is missing is killed.
#[test]
fn huge_pages_stay_shared() {
    let _pages = HugePages::reserve(4);
    let free = || {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
        let line = meminfo
            .lines()
            .find(|line| line.starts_with("HugePages_Free:"));
        line.unwrap().to_owned()
    };
    let mut victim = Victim::start("hugefork=4 heap=1 children=2");
    if !victim.skipped().is_empty() {
        skip("hugetlb pages shared by fork", &victim.skipped().join(", "));
        return;
    }
    let (pair, before) = (Pair::start(&[]), free());
    let _ = pair.send(victim.pid(), &["--rounds", "1"]).expect_report();
    let _ = pair.send(victim.pid(), &[]).expect_report();
    assert_eq!(free(), before);
    victim.assert_unharmed();
}

#[test]
fn pages_merged_by_the_kernel_stay_merged() {
    /// Most of the pages of 8 MiB; the kernel cannot merge one that is in use for a moment.
    const PAGES: u64 = 1500;
    let Some(ksm) = Ksm::start() else {
        skip("merged pages", "the kernel has no KSM");
        return;
    };
    // Victims with the same seed have the same memory.
    let mut victim = Victim::start("mergeable=8");
    let _twin = Victim::start("mergeable=8");
    until("the pages are merged", || {
        match merged_pages(victim.pid()) {
            PAGES.. => Ok(()),
            pages => Err(format!("{pages} are")),
        }
    });
    // Pages that are separated from now on stay so.
    drop(ksm);
    let pair = Pair::start(&[]);
    assert_stays_shared(victim.pid(), "merged pages", || {
        for options in [&["--rounds", "2"][..], &["--tracker", "hash"]] {
            let _ = pair.send(victim.pid(), options).expect_report();
        }
    });
    victim.assert_unharmed();
}
