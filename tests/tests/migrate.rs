//! `send --migrate`: the process continues at the receiver with its data intact. `faults` has a fault at every
//! step.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tests::copies::{one_copy_with_stopped, the_only_copy};
use pageferry_tests::criu::{Criu, skip};
use pageferry_tests::daemon::{Daemon, until};
use pageferry_tests::host::Host;
use pageferry_tests::huge::HugePages;
use pageferry_tests::images;
use pageferry_tests::link::Link;
use pageferry_tests::memory;
use pageferry_tests::pair::{receive_command, send_command};
use pageferry_tests::program::Finished;
use pageferry_tests::program::Program;
use pageferry_tests::scenario::receive;
use pageferry_tests::{Receiver, Send, Victim};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

fn migrate(criu: &Criu, to: SocketAddr, pid: i32, options: &[&str]) -> Send {
    let criu = criu.path().to_str().unwrap();
    let all = [&["--migrate", "--criu", criu], options].concat();
    Send::start(to, pid, &all)
}

fn restoring(host: &Host, criu: &Criu, port: &str, dir: &Path) -> Receiver {
    restoring_with("--restore", host, criu, port, dir)
}

fn restoring_with(how: &str, host: &Host, criu: &Criu, port: &str, dir: &Path) -> Receiver {
    let criu = criu.path().to_str().unwrap();
    host.receiver(port, dir, &[how, "--criu", criu])
}

fn assert_moved(criu: &Criu, features: &str, how: &str, options: &[&str]) {
    let what = format!("CRIU {:?}: {features} {how} {options:?}", criu.version());
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let mut receiver = restoring_with(how, &host, criu, "0", dir.path());
    let mut victim = match features.contains("sysv") {
        // CRIU dumps System V segments with their namespace.
        true => Victim::detached_in(&["unshare", "--ipc"], features),
        false => Victim::detached(features),
    };
    let (pid, tree) = (victim.pid(), victim.tree());
    let sent = migrate(criu, receiver.address(), pid, options).finish();
    assert!(sent.status.success(), "{what}: {}", sent.stderr);
    let report = sent.expect_report();
    let handover = &report.totals["handover"];
    assert!(handover["restore_ms"].as_f64().unwrap() > 0.0, "{handover}");
    // The local copy is gone when send exits.
    assert!(!tree.iter().any(|&pid| memory::lives(pid)), "{what}");
    victim.await_end();
    let copy = the_only_copy(&tree);
    let root = memory::tree(copy)[0];
    let pages = victim.report().verdict(root);
    let pages = pages.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(pages > 1000, "{what}: {pages}");
    if how == "--restore=lazy" {
        receiver.program().await_event("memory_filled");
        let verdict = victim.report().verdict(root);
        verdict.unwrap_or_else(|error| panic!("{what}, later: {error}"));
        assert_ahead_of_memory(&report, features.contains("memfd"));
    }
}

/// Asserts that CRIU did not read all of the memory, so that some was left to fill; and no shared memory at all,
/// if every segment is a memfd, which CRIU can adopt.
fn assert_ahead_of_memory(report: &pageferry_tests::Report, has_memfds: bool) {
    let home = Path::new(report.totals["directory"].as_str().unwrap());
    let pages = |dir: &str, shared: bool| -> u64 {
        let pagemaps = images::pagemaps(&home.join(dir)).unwrap();
        let entries = pagemaps
            .iter()
            .filter(|(name, _)| name.contains("shmem") == shared)
            .flat_map(|(_, pagemap)| &pagemap.entries);
        entries.map(|entry| entry.pages).sum()
    };
    let last = report.rounds.len().to_string();
    let restored = format!("restore-{last}");
    let (all, given) = (pages(&last, false), pages(&restored, false));
    assert!(given + 500 < all, "{given} of {all}");
    if has_memfds {
        assert!(pages(&last, true) > 1000);
        assert_eq!(pages(&restored, true), 0);
    }
}

#[test]
fn processes_of_every_kind_move() {
    for criu in Criu::all("migrations") {
        for features in [
            "heap=32 text=2 zero=1 brk=1 static fileprivate=2 protnone=1 sparse=64 dirty=20",
            "heap=8 threads=6 spin=1 signals dirty=20",
            "heap=8 children=3 grandchildren=2 shared=4 memfd=2 memfd_unmapped=1 dirty=20",
            "heap=4 sysv=4 children=1 dirty=20",
            "heap=4 thp=8 mlock=1 dirty=20",
        ] {
            for how in ["--restore=eager", "--restore=lazy"] {
                assert_moved(&criu, features, how, &[]);
            }
        }
        let tree = "heap=8 children=2 shared=4 dirty=20";
        for options in [
            &["--state-dump", "plain"][..],
            &["--tracker", "hash"],
            &["--compress", "zstd"],
            &["--max-rounds", "0"],
        ] {
            assert_moved(&criu, tree, "--restore", options);
        }
        let _pages = HugePages::reserve(16);
        for how in ["--restore=eager", "--restore=lazy"] {
            assert_moved(&criu, "hugetlb=4 heap=4 dirty=20", how, &[]);
        }
    }
}

/// CRIU before 4.2 does not know guard regions.
#[test]
fn guard_regions_move_or_the_move_is_refused() {
    const FEATURES: &str = "guard=1 heap=4 children=1 dirty=20";
    for criu in Criu::all("guard regions") {
        let mut victim = Victim::detached(FEATURES);
        if !victim.skipped().is_empty() {
            skip("guard regions", &victim.skipped().join(", "));
            return;
        }
        if criu.version() >= (4, 2) {
            drop(victim);
            for how in ["--restore=eager", "--restore=lazy"] {
                assert_moved(&criu, FEATURES, how, &[]);
            }
            continue;
        }
        let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
        let receiver = restoring(&host, &criu, "0", dir.path());
        let refused = migrate(&criu, receiver.address(), victim.pid(), &[]).finish();
        refused.assert_failed(1, &["guard regions", "CRIU 4.2 or later"]);
        victim.check().unwrap();
    }
}

/// Pages are moved, discarded, mapped, unmapped and forked before they are filled.
#[test]
fn memory_is_filled_while_mappings_change() {
    let Some(criu) = Criu::stable("filling memory that changes") else {
        return;
    };
    for _ in 0..5 {
        let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
        let mut receiver = restoring_with("--restore=lazy", &host, &criu, "0", dir.path());
        let mut victim = Victim::detached("heap=64 chaos dirty=50");
        let pid = victim.pid();
        // All pages are of the same round, so that none is filled first.
        let send = migrate(&criu, receiver.address(), pid, &["--max-rounds", "0"]);
        // The filler runs only a fraction of the time.
        let filler = until("memory is filled", || {
            let tree = memory::tree(receiver.program().pid());
            let mut fillers = tree.into_iter().filter(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                line.windows(6).any(|word| word == b"__fill")
            });
            fillers.next().ok_or_else(|| "not yet".to_owned())
        });
        let slow = std::thread::spawn(move || {
            let filler = Pid::from_raw(filler);
            let signal = |signal| kill(filler, signal).is_ok();
            let ms = std::time::Duration::from_millis;
            let mut stops = 0;
            // The filler exits when it is done.
            while signal(nix::sys::signal::SIGSTOP) {
                std::thread::sleep(ms(3));
                signal(nix::sys::signal::SIGCONT);
                std::thread::sleep(ms(1));
                stops += 1;
            }
            stops
        });
        let sent = send.finish();
        assert!(sent.status.success(), "{}", sent.stderr);
        receiver.program().await_event("memory_filled");
        assert!(slow.join().unwrap() > 10);
        victim.await_end();
        // Its children come and go.
        let copy = the_only_copy(&[pid]);
        victim.report().verdict(copy).unwrap();
    }
}

/// After one round of a running tree comes one during CRIU's dump, then the last.
const LAST: u32 = 3;

fn kill_receive(receiver: &mut Receiver) {
    // The program under test is a child of nsenter.
    let tree = memory::tree(receiver.program().pid());
    pageferry_tests::daemon::kill_one(tree[1]);
    assert!(memory::await_end(&tree[1..2]));
}

fn resolve(pid: i32) -> Finished {
    resolve_within(pid, "60s")
}

fn resolve_within(pid: i32, time: &str) -> Finished {
    let mut send = send_command();
    send.args(["--resolve", &pid.to_string(), "--timeout", time]);
    Program::start(&mut send).finish()
}

#[test]
fn interrupted_hand_over_leaves_the_target_running() {
    let Some(criu) = Criu::stable("a hand-over that is interrupted") else {
        return;
    };
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let receiver = restoring(&host, &criu, "0", dir.path());
    let mut victim = Victim::detached("heap=512 dirty=1");
    // CRIU is busy for a while sending pages that are discarded.
    let options = ["--state-dump", "plain", "--max-rounds", "1"];
    let mut send = migrate(&criu, receiver.address(), victim.pid(), &options);
    send.program().await_event("round_done");
    until("CRIU traces it", || {
        let status = fs::read_to_string(format!("/proc/{}/status", victim.pid()));
        match status.unwrap_or_default().contains("TracerPid:\t0\n") {
            true => Err("it is not traced".to_owned()),
            false => Ok(()),
        }
    });
    let program = Pid::from_raw(send.program().pid());
    kill(program, Signal::SIGINT).unwrap();
    let sent = send.finish();
    assert_eq!(sent.status.code(), Some(130), "{}", sent.stderr);
    assert_eq!(the_only_copy(&[victim.pid()]), victim.pid());
    victim.check().unwrap();
}

/// The one case that one side cannot decide: the answer is lost, and the receiver cannot be asked.
#[test]
fn local_copy_stays_stopped_until_an_unknown_outcome_is_resolved() {
    let Some(criu) = Criu::stable("a hand-over in doubt") else {
        return;
    };
    // Either the answer is lost, or the request.
    let steps = [
        (("the answer", 17, true, LAST), true),
        (("the question", 16, false, LAST), false),
    ];
    for (step, moves) in steps {
        let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
        let receiver = restoring(&host, &criu, "0", dir.path());
        let mut victim = Victim::detached("heap=8 children=2 dirty=20");
        let (pid, tree) = (victim.pid(), victim.tree());
        // A process that was stopped before stays stopped afterwards.
        let signal = |pid, signal| kill(Pid::from_raw(pid), signal).unwrap();
        signal(tree[2], Signal::SIGSTOP);
        until("it is stopped", || match memory::is_stopped(tree[2]) {
            true => Ok(()),
            false => Err("it runs".to_owned()),
        });
        let link = Link::start(receiver.address(), step, false);
        let options = [
            "--max-rounds",
            "1",
            "--timeout",
            "1s",
            "--reconnect-for",
            "0",
        ];
        let send = migrate(&criu, link.address, pid, &options);
        link.await_step();
        link.close();
        link.cut();
        let sent = send.finish();
        assert_eq!(sent.status.code(), Some(6), "{}", sent.stderr);
        let advice = format!("send --resolve {pid}");
        assert!(sent.stderr.contains(&advice), "{}", sent.stderr);
        memory::assert_held(&tree);
        // While the receiver cannot be asked, nothing is decided.
        let failed = resolve_within(pid, "1s");
        assert_eq!(failed.status.code(), Some(6), "{}", failed.stderr);
        memory::assert_held(&tree);

        link.reopen();
        let resolved = resolve_within(pid, "60s");
        assert!(resolved.status.success(), "{}", resolved.stderr);
        assert!(
            resolved
                .stderr
                .contains(if moves { "is gone" } else { "continues here" })
        );
        let copy = one_copy_with_stopped(&tree, 1);
        assert_eq!(copy != pid, moves);
        if moves {
            victim.await_end();
        }
        let mut copies = memory::tree(copy).into_iter();
        let stands = copies.find(|&pid| memory::is_stopped(pid));
        signal(stands.unwrap(), Signal::SIGCONT);
        victim.report().verdict(copy).unwrap();
    }
}

/// A receiver that dies between decision and restore is replaced by its successor.
#[test]
fn committed_process_that_does_not_run_is_restored_again() {
    let Some(criu) = Criu::stable("a restore that is made good") else {
        return;
    };
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let mut receiver = restoring(&host, &criu, "0", dir.path());
    let mut victim = Victim::detached("heap=8 dirty=20");
    let pid = victim.pid();
    let report = migrate(&criu, receiver.address(), pid, &[])
        .finish()
        .expect_report();
    victim.await_end();
    let copy = the_only_copy(&[pid]);
    kill_receive(&mut receiver);
    // As if it had died just after it ended a copy that had never run.
    pageferry_tests::daemon::kill_one(copy);
    assert!(memory::await_end(&[copy]));
    let outcome = Path::new(report.totals["directory"].as_str().unwrap()).join("outcome.json");
    assert_eq!(fs::read_to_string(&outcome).unwrap().trim(), r#""running""#);
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let boot_id = boot_id.trim_end();
    let committed = format!(r#"{{"committed":{{"copy":null,"options":0,"boot_id":"{boot_id}"}}}}"#);
    fs::write(&outcome, committed).unwrap();
    let _receiver = restoring(&host, &criu, "0", dir.path());
    let copy = the_only_copy(&[pid]);
    victim.report().verdict(copy).unwrap();
    until("the outcome is recorded", || {
        match fs::read_to_string(&outcome) {
            Ok(text) if text.trim() == r#""running""# => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

/// If the receiver can record neither outcome, it neither runs nor aborts the copy, and reports neither.
#[test]
fn unwritable_outcome_leaves_the_local_copy() {
    let Some(criu) = Criu::stable("an outcome that cannot be written") else {
        return;
    };
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let receiver = restoring(&host, &criu, "0", dir.path());
    let mut victim = Victim::detached("heap=8 children=1 dirty=20");
    let (pid, tree) = (victim.pid(), victim.tree());
    let link = Link::start(receiver.address(), ("commit", 16, false, LAST), false);
    let options = [
        "--max-rounds",
        "1",
        "--timeout",
        "1s",
        "--reconnect-for",
        "0",
    ];
    let send = migrate(&criu, link.address, pid, &options);
    link.await_step();
    let homes = fs::read_dir(dir.path()).unwrap().flatten();
    let mut outcomes = homes.map(|home| home.path().join("outcome.json"));
    let outcome = outcomes.find(|path| path.exists()).unwrap();
    let outcome = outcome.to_str().unwrap();
    let mount = |options: &[&str]| {
        let mut command = host.enter();
        let done = command.args(options).arg(outcome).status().unwrap();
        assert!(done.success(), "{options:?}");
    };
    mount(&["mount", "--bind", outcome]);
    mount(&["mount", "-o", "remount,bind,ro"]);
    link.forward();
    let sent = send.finish();
    assert_eq!(sent.status.code(), Some(6), "{}", sent.stderr);
    memory::assert_held(&tree);
    mount(&["umount"]);
    let resolved = resolve(pid);
    assert!(resolved.status.success(), "{}", resolved.stderr);
    assert!(
        resolved.stderr.contains("continues here"),
        "{}",
        resolved.stderr
    );
    let copy = the_only_copy(&tree);
    assert_eq!(copy, pid);
    victim.report().verdict(copy).unwrap();
}

/// A CRIU that hangs kills no process, and blocks none.
#[test]
fn hanging_restore_is_aborted() {
    let Some(criu) = Criu::stable("a restore that hangs") else {
        return;
    };
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let path = criu.path().to_str().unwrap();
    let options = ["--restore", "--restore-timeout", "1s", "--criu", path];
    let mut receiver = host.receiver("0", dir.path(), &options);
    let mut victim = Victim::detached("heap=8 children=1 dirty=20");
    let (pid, tree) = (victim.pid(), victim.tree());
    let link = Link::start(receiver.address(), ("restore", 14, false, LAST), false);
    let send = migrate(&criu, link.address, pid, &["--max-rounds", "1"]);
    link.await_step();
    // The processes of the waiting restore. (The program under test is a child of nsenter.)
    let programs = memory::tree(receiver.program().pid());
    let waiting: Vec<_> = programs[2..].to_vec();
    assert!(!waiting.is_empty());
    for &pid in &waiting {
        let pid = Pid::from_raw(pid);
        kill(pid, Signal::SIGSTOP).unwrap();
    }
    link.forward();
    let sent = send.finish();
    assert_eq!(sent.status.code(), Some(4), "{}", sent.stderr);
    let advice = "--restore-timeout";
    assert!(sent.stderr.contains(advice), "{}", sent.stderr);
    assert!(memory::await_end(&waiting));
    assert_eq!(the_only_copy(&tree), pid);
    victim.report().verdict(pid).unwrap();
}

#[test]
fn process_moves_over_tls() {
    let Some(criu) = Criu::stable("an encrypted move") else {
        return;
    };
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let certs = dir.path().join("certs");
    let made = receive(&[&"certs", &certs, &"--host", &"127.0.0.1"]);
    assert!(made.status.success(), "{}", made.stderr);
    let with_certificate = |mut command: Command, name: &str| {
        let (cert, key) = (format!("{name}.pem"), format!("{name}.key"));
        for (variable, file) in [("CA", "ca.pem"), ("CERT", &cert), ("KEY", &key)] {
            command.env(format!("PAGEFERRY_TLS_{variable}"), certs.join(file));
        }
        command
    };
    let path = criu.path().to_str().unwrap();
    let mut there = host.enter();
    there.arg(receive_command().get_program());
    let there = with_certificate(there, "receive");
    let images = dir.path().join("images");
    let receiver = Receiver::run(there, "0", &images, &["--restore", "--criu", path]);
    let mut victim = Victim::detached("heap=8 threads=2 shared=2 dirty=20");
    let (pid, tree) = (victim.pid(), victim.tree());
    let mut here = with_certificate(send_command(), "send");
    here.args(["--to", &receiver.address().to_string(), "--migrate"]);
    let sent = Program::start(here.args(["--criu", path, &pid.to_string()])).finish();
    assert!(sent.status.success(), "{}", sent.stderr);
    victim.await_end();
    victim.report().verdict(the_only_copy(&tree)).unwrap();
}

#[test]
fn process_moves_back_and_forth() {
    let Some(criu) = Criu::stable("migrations back and forth") else {
        return;
    };
    // PAGEFERRY_MOVES sets another number.
    let moves = std::env::var("PAGEFERRY_MOVES").map_or(10, |text| text.parse().unwrap());
    let hosts = [Host::start(), Host::start()];
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let receivers: Vec<_> = (0..2)
        .map(|at| restoring(&hosts[at], &criu, "0", dirs[at].path()))
        .collect();
    let mut victim = Victim::detached("heap=8 children=1 shared=2 threads=2 dirty=20");
    let tree = victim.tree();
    let mut copy = victim.pid();
    for number in 0..moves {
        let to = receivers[number % 2].address();
        let mut send = send_command();
        if number > 0 {
            // The process is on that host, in its PID namespace.
            let program = send.get_program().to_owned();
            send = hosts[(number - 1) % 2].enter();
            send.arg(program);
        }
        let criu = criu.path().to_str().unwrap();
        send.args(["--to", &to.to_string(), "--migrate", "--criu", criu]);
        let sent = Program::start(send.arg(victim.pid().to_string())).finish();
        assert!(sent.status.success(), "move {number}: {}", sent.stderr);
        if number == 0 {
            victim.await_end();
        }
        let before = copy;
        copy = the_only_copy(&tree);
        assert_ne!(copy, before);
        let verdict = victim.report().verdict(copy);
        verdict.unwrap_or_else(|error| panic!("move {number}: {error}"));
    }
}

#[test]
fn impossible_move_is_reported_before_anything_is_frozen() {
    let Some(criu) = Criu::stable("migrations that cannot be") else {
        return;
    };
    let (victim, dir) = (Victim::detached("heap=4"), tempfile::tempdir().unwrap());
    let keeps = Receiver::start(dir.path(), &[]);
    let refused = migrate(&criu, keeps.address(), victim.pid(), &[]).finish();
    assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("receive --restore"),
        "{}",
        refused.stderr
    );
    let none = ["--migrate", "--criu", "/bin/true"];
    let refused = Send::start(keeps.address(), victim.pid(), &none).finish();
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        refused.stderr.contains("CRIU 4.1 or later"),
        "{}",
        refused.stderr
    );
    // Its commands and answers.
    let mut tied = Victim::start("heap=4 dirty=20");
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let receiver = restoring(&host, &criu, "0", dir.path());
    let failed = migrate(&criu, receiver.address(), tied.pid(), &[]).finish();
    let own = format!("also open in process {}", std::process::id());
    failed.assert_failed(1, &["descriptor 0 of process", &own, "--break-pipes"]);
    // CRIU refuses one that an outside process reads and writes, all the same.
    let failed = migrate(&criu, receiver.address(), tied.pid(), &["--break-pipes"]).finish();
    assert_eq!(failed.status.code(), Some(1), "{}", failed.stderr);
    assert!(
        failed.stderr.contains("CRIU cannot dump"),
        "{}",
        failed.stderr
    );
    tied.assert_unharmed();
    assert_eq!(resolve(tied.pid()).status.code(), Some(1));
}

/// All files that the process needs and the destination lacks are reported before anything is sent.
#[test]
fn missing_and_different_files_are_named() {
    let Some(criu) = Criu::stable("files that are not there") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let copy = |of: &str, sub: &str| {
        let sub = dir.path().join(sub);
        fs::create_dir(&sub).unwrap();
        let path = sub.join("program");
        fs::copy(of, &path).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (missing, other) = (copy("/bin/sh", "a"), copy("/bin/sleep", "b"));
    let script = format!("{other} 1000 & wait");
    let tree = Daemon::start(Command::new(&missing).args(["-c", &script]));
    until("both run", || match memory::tree(tree.pid())[..] {
        [_, sleep] if fs::read_link(format!("/proc/{sleep}/exe")).unwrap() == Path::new(&other) => {
            Ok(())
        }
        ref tree => Err(format!("{tree:?}")),
    });
    let (host, images) = (Host::start(), tempfile::tempdir().unwrap());
    let a = dir.path().join("a");
    for mount in [
        ["-t", "tmpfs", "none", a.to_str().unwrap()],
        ["--bind", "--", "/bin/true", &other],
    ] {
        assert!(
            host.enter()
                .arg("mount")
                .args(mount)
                .status()
                .unwrap()
                .success()
        );
    }
    let receiver = restoring(&host, &criu, "0", images.path());
    let refused = migrate(&criu, receiver.address(), tree.pid(), &["--break-pipes"]).finish();
    assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
    for what in [
        format!("{missing} is missing"),
        format!("{other} has a different size"),
    ] {
        assert!(refused.stderr.contains(&what), "{}", refused.stderr);
    }
    assert!(!refused.stderr.contains("libc"), "{}", refused.stderr);
    // Nothing was sent, and nothing is stopped.
    let homes = fs::read_dir(images.path()).unwrap().flatten();
    for home in homes.filter(|home| home.path().is_dir()) {
        let mut rounds = fs::read_dir(home.path()).unwrap().flatten();
        assert!(!rounds.any(|entry| entry.path().is_dir()));
    }
    assert!(memory::tree(tree.pid()).len() == 2);
}

#[test]
fn options_after_dashes_are_passed_to_criu() {
    let Some(criu) = Criu::stable("options for CRIU") else {
        return;
    };
    let host = Host::start();
    let path = criu.path().to_str().unwrap();
    let restoring_with = |option: &str, dir: &Path| {
        let options = ["--restore", "--criu", path, "--", option];
        host.receiver("0", dir, &options)
    };
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let wrong = restoring_with("--no-such-option", dirs[0].path());
    let receiver = restoring_with("--tcp-close", dirs[1].path());
    let mut victim = Victim::detached("heap=4 dirty=20");
    let tree = victim.tree();
    for (to, option, code, words) in [
        (&receiver, "--leave-running", 2, "is reserved"),
        (&receiver, "nonsense", 2, "\"nonsense\""),
        (&receiver, "--no-such-option", 1, "CRIU"),
        (&wrong, "--tcp-close", 4, "CRIU"),
    ] {
        let failed = migrate(&criu, to.address(), victim.pid(), &["--", option]).finish();
        assert_eq!(failed.status.code(), Some(code), "{}", failed.stderr);
        assert!(failed.stderr.contains(words), "{}", failed.stderr);
        victim.report().verdict(tree[0]).unwrap();
    }
    let options = ["--manage-cgroups", "--", "--ghost-limit", "8M"];
    let sent = migrate(&criu, receiver.address(), victim.pid(), &options).finish();
    assert!(sent.status.success(), "{}", sent.stderr);
    victim.await_end();
    assert_ne!(the_only_copy(&tree), tree[0]);
}
