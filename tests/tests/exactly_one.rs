//! Exactly one copy of a moved process runs, whatever is killed, cut, signalled or started again at the
//! source.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tests::Victim;
use pageferry_tests::copies::{copies, has_record, the_only_copy};
use pageferry_tests::criu::Criu;
use pageferry_tests::daemon::{kill_one, kill_tree, until};
use pageferry_tests::host::Host;
use pageferry_tests::memory;
use pageferry_tests::pair::send_command;
use pageferry_tests::paused::{
    COMMIT, Move, RESTORED, RUNNING, assert_failed, assert_resolved, migrate, resolve,
};
use pageferry_tests::program::Program;
use std::fs;

/// Its tracer is gone, so the target has run since its state was dumped: a copy would be a second history.
#[test]
fn target_whose_criu_was_killed_after_the_dump_is_not_moved() {
    let Some(criu) = Criu::stable("a CRIU that is killed") else {
        return;
    };
    let mut moving = Move::pause(&criu, RESTORED, &[]);
    let programs = memory::tree(moving.send.as_ref().unwrap().pid());
    let name = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let dumping: Vec<_> = programs
        .into_iter()
        .filter(|pid| name(pid).starts_with("criu"))
        .collect();
    assert_eq!(dumping.len(), 1);
    kill_one(dumping[0]);
    assert!(memory::await_end(&dumping));
    let before = memory::run_time(moving.pid);
    until("the target runs", || {
        match memory::run_time(moving.pid) > before {
            true => Ok(()),
            false => Err("it does not".to_owned()),
        }
    });
    moving.link.forward();
    moving.finish().assert_failed(1, &["CRIU exited"]);
    assert!(moving.assert_one_copy());
    assert!(!memory::is_frozen(moving.pid));
}

#[test]
fn signal_does_not_resume_a_target_in_doubt() {
    let Some(criu) = Criu::stable("signals to a target in doubt") else {
        return;
    };
    let mut moving = Move::in_doubt(&criu, RUNNING, &[]);
    // As the kernel does to an orphaned process group with stopped processes.
    for &pid in &moving.tree {
        kill(Pid::from_raw(pid), Signal::SIGCONT).unwrap();
    }
    memory::assert_held(&moving.tree);
    moving.link.reopen();
    assert_resolved(&resolve(moving.pid, &[]), "is gone");
    assert!(!moving.assert_one_copy());
}

#[test]
fn hand_over_is_handled_by_one_program_at_a_time() {
    let Some(criu) = Criu::stable("two programs for one hand-over") else {
        return;
    };
    let mut moving = Move::pause(&criu, COMMIT, &[]);
    let sender = moving.send.as_ref().unwrap().pid();
    let busy = format!("process {sender} is handling");
    assert_failed(&resolve(moving.pid, &[]), 1, &busy);
    memory::assert_held(&moving.tree);
    moving.link.forward();
    assert!(moving.finish().status.success());
    assert!(!moving.assert_one_copy());
    assert_failed(&resolve(moving.pid, &[]), 1, "no record");
}

#[test]
fn target_in_doubt_is_not_moved_again() {
    let Some(criu) = Criu::stable("a second move of a target in doubt") else {
        return;
    };
    let mut moving = Move::in_doubt(&criu, COMMIT, &[]);
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let path = criu.path().to_str().unwrap();
    let third = host.receiver("0", dir.path(), &["--restore", "--criu", path]);
    // Neither the tree, nor a part of it.
    for pid in [moving.pid, moving.tree[1]] {
        let again = Program::start(&mut migrate(&criu, third.address(), pid)).finish();
        let advice = format!("send --resolve {}", moving.pid);
        assert_failed(&again, 6, &advice);
    }
    let migrations = fs::read_dir(dir.path()).unwrap().flatten();
    assert_eq!(migrations.filter(|entry| entry.path().is_dir()).count(), 0);
    memory::assert_held(&moving.tree);
    moving.link.reopen();
    assert_resolved(&resolve(moving.pid, &[]), "continues here");
    assert!(moving.assert_one_copy());
    let moved = Program::start(&mut migrate(&criu, third.address(), moving.pid)).finish();
    assert!(moved.status.success(), "{}", moved.stderr);
    assert!(!moving.assert_one_copy());
}

#[test]
fn record_of_a_tree_that_is_gone_is_removed() {
    let Some(criu) = Criu::stable("stale records") else {
        return;
    };
    let mut moving = Move::in_doubt(&criu, COMMIT, &[]);
    kill_tree(moving.pid);
    moving.victim.await_end();
    assert!(memory::await_end(&moving.tree));
    assert!(has_record(moving.pid));
    let hold = moving.hold.take().unwrap();
    assert!(hold.exists());
    let mut next = Victim::detached("heap=4 dirty=20");
    let address = moving.receiver.address();
    let moved = Program::start(&mut migrate(&criu, address, next.pid())).finish();
    assert!(moved.status.success(), "{}", moved.stderr);
    assert!(!has_record(moving.pid));
    assert!(!hold.exists());
    next.await_end();
    let copy = the_only_copy(&[next.pid()]);
    next.report().verdict(copy).unwrap();
}

#[test]
fn record_is_found_in_every_environment() {
    let Some(criu) = Criu::stable("another XDG_RUNTIME_DIR") else {
        return;
    };
    let runtime = tempfile::tempdir().unwrap();
    let environment = [("XDG_RUNTIME_DIR", runtime.path())];
    let mut moving = Move::in_doubt(&criu, COMMIT, &environment);
    moving.link.reopen();
    assert_resolved(&resolve(moving.pid, &[]), "continues here");
    assert!(moving.assert_one_copy());
}

#[test]
fn interrupted_moves_are_listed() {
    let Some(criu) = Criu::stable("a list of interrupted moves") else {
        return;
    };
    let mut moving = Move::pause(&criu, COMMIT, &[]);
    let sender = moving.send.as_ref().unwrap().pid();
    let list = |options: &[&str]| {
        let mut send = send_command();
        let listed = Program::start(send.args(["--resolve", "--list"]).args(options)).finish();
        assert!(listed.status.success(), "{}", listed.stderr);
        let line = format!("process {} (victim) to {}", moving.pid, moving.link.address);
        let mut lines = listed.stdout.lines().map(str::to_owned);
        lines
            .find(|text| text.starts_with(&line))
            .unwrap_or_default()
    };
    let listed = list(&[]);
    for words in [
        "3 of 3 processes exist here".to_owned(),
        format!("process {sender} is handling it"),
    ] {
        assert!(listed.contains(&words), "{listed}");
    }
    moving.send.as_mut().unwrap().kill_and_wait();
    let listed = list(&[]);
    assert!(listed.contains("no program is handling it"), "{listed}");
    moving.link.cut();
    assert_resolved(&resolve(moving.pid, &[]), "continues here");
    assert!(moving.assert_one_copy());
    let mut send = send_command();
    assert_failed(&Program::start(send.arg("--resolve")).finish(), 2, "--list");
}

#[test]
fn operator_decides_only_if_the_receiver_does_not() {
    let Some(criu) = Criu::stable("a decision of the operator") else {
        return;
    };
    let mut moving = Move::in_doubt(&criu, COMMIT, &[]);
    let taken = resolve(moving.pid, &["--timeout", "1s", "--take-back"]);
    assert_resolved(&taken, "continues here");
    assert!(moving.assert_one_copy());

    let mut moving = Move::in_doubt(&criu, RUNNING, &[]);
    moving.link.reopen();
    let taken = resolve(moving.pid, &["--take-back"]);
    assert_failed(&taken, 1, "runs there");
    memory::assert_held(&moving.tree);
    moving.link.close();
    let given = resolve(moving.pid, &["--timeout", "1s", "--give-up"]);
    assert_resolved(&given, "is gone here");
    assert!(!moving.assert_one_copy());
    assert!(moving.dir.path().exists());
    assert_eq!(copies(&moving.tree).len(), moving.tree.len());
}
