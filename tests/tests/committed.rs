//! Exactly one copy of a moved process runs, whatever is killed, replaced or copied at the destination after the
//! commit.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tests::criu::Criu;
use pageferry_tests::daemon::{kill_one, kill_tree, until};
use pageferry_tests::gate::{Action, Call, Gate, Object};
use pageferry_tests::memory;
use pageferry_tests::pair::{receive_command, send_command};
use pageferry_tests::paused::{
    COMMIT, Move, RESTORED, RUNNING, assert_failed, assert_resolved, resolve,
};
use pageferry_tests::program::Program;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// A move whose commit is on the disk, and whose copy CRIU holds back: CRIU is stopped. Returns CRIU, too.
fn committed_and_held_back(criu: &Criu) -> (Move, i32) {
    let mut moving = Move::pause(criu, RESTORED, &[]);
    let restoring = moving.restoring_criu();
    signal(restoring, Signal::SIGSTOP);
    moving.link.forward();
    moving.await_outcome("committed");
    // Durable now, and CRIU may go on: the thread that drives CRIU no longer waits for the decision.
    let receive = moving.receive();
    until("CRIU may go on", || {
        let calls = threads_named(receive, "restore")
            .into_iter()
            .map(|thread| fs::read_to_string(thread.join("syscall")).unwrap_or_default());
        let calls: Vec<_> = calls.collect();
        match calls.iter().any(|call| !is_futex(call)) {
            true => Ok(()),
            false => Err(format!("{calls:?}")),
        }
    });
    (moving, restoring)
}

/// Returns whether the content of a `syscall` file shows a wait for a futex.
fn is_futex(call: &str) -> bool {
    call.starts_with(&format!("{} ", libc::SYS_futex))
}

/// Returns the directories in `/proc` of the threads of a process that have this name.
fn threads_named(pid: i32, name: &str) -> Vec<PathBuf> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let threads = threads.map(|thread| thread.path());
    let is_named = |thread: &PathBuf| {
        let comm = fs::read_to_string(thread.join("comm")).unwrap_or_default();
        comm.trim_end() == name
    };
    threads.filter(is_named).collect()
}

/// Waits until CRIU has caught all processes of the copy outside of its restorer: it traces them, and only that
/// keeps them from running.
fn await_pre_resume(moving: &Move) {
    until("CRIU has caught the copy", || {
        let copy = moving.copy();
        let waits = |&pid: &i32| {
            let call = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
            is_futex(&call) || !memory::is_stopped(pid)
        };
        match copy.len() == moving.tree.len() && !copy.iter().any(waits) {
            true => Ok(()),
            false => Err(format!("{copy:?}")),
        }
    });
}

/// Waits until no process of a copy is stopped.
fn await_running(copy: &[i32]) {
    until("the copy runs", || {
        let stopped = copy.iter().any(|&pid| memory::is_stopped(pid));
        (!stopped).then_some(()).ok_or_else(String::new)
    });
}

/// Starts a receiver again after its death, resolves what is in doubt, and asserts that the copy runs there.
fn assert_runs_at_the_receiver(mut moving: Move) -> Move {
    moving.finish().assert_failed(6, &["send --resolve"]);
    moving.restart_receive();
    assert_resolved(&resolve(moving.pid, &[]), "is gone");
    assert!(!moving.assert_one_copy());
    moving.await_outcome("running");
    moving
}

/// The copy would wait in CRIU's restorer for ever, and the source would be killed for it.
#[test]
fn copy_that_waits_in_the_restorer_is_restored_again() {
    let Some(criu) = Criu::stable("a copy whose CRIU is killed") else {
        return;
    };
    let (mut moving, restoring) = committed_and_held_back(&criu);
    let waiting = moving.copy();
    moving.kill_receive();
    kill_one(restoring);
    assert!(memory::await_end(&[restoring]));
    assert!(waiting.iter().all(|&pid| memory::lives(pid)));
    let _moved = assert_runs_at_the_receiver(moving);
    assert!(memory::await_end(&waiting));
}

#[test]
fn death_of_receive_after_the_commit_neither_undoes_nor_releases_the_copy() {
    let Some(criu) = Criu::stable("a receiver that is killed after the commit") else {
        return;
    };
    // CRIU waits before or after it has caught the copy.
    for continues in [false, true] {
        let (mut moving, restoring) = committed_and_held_back(&criu);
        moving.kill_receive();
        if continues {
            signal(restoring, Signal::SIGCONT);
            await_pre_resume(&moving);
        }
        let copy = moving.copy();
        assert!(copy.iter().all(|&pid| memory::lives(pid)));
        assert!(memory::lives(restoring));
        let times = || {
            copy.iter()
                .map(|&pid| memory::run_time(pid))
                .collect::<Vec<_>>()
        };
        let before = times();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(times(), before);
        let moved = assert_runs_at_the_receiver(moving);
        assert!(memory::await_end(&[restoring]));
        match continues {
            true => assert_eq!(moved.copy(), copy),
            false => assert!(memory::await_end(&copy)),
        }
    }
}

/// `receive` is stopped while CRIU catches the copy and is killed, so that it learns of both afterwards.
#[test]
fn death_of_criu_while_it_releases_the_copy_means_that_it_runs() {
    let Some(criu) = Criu::stable("a CRIU that is killed while it releases") else {
        return;
    };
    let (mut moving, restoring) = committed_and_held_back(&criu);
    let receive = moving.receive();
    signal(receive, Signal::SIGSTOP);
    signal(restoring, Signal::SIGCONT);
    await_pre_resume(&moving);
    let copy = moving.copy();
    kill_one(restoring);
    await_running(&copy);
    signal(receive, Signal::SIGCONT);
    assert!(moving.finish().status.success());
    assert!(!moving.assert_one_copy());
    assert_eq!(moving.copy().len(), copy.len());
    assert!(copy.iter().all(|&pid| memory::lives(pid)));
    moving.await_outcome("running");
}

/// CRIU dies between the commit and the release, while `receive` lives: the move is completed all the same.
#[test]
fn death_of_criu_before_it_releases_the_copy_does_not_undo_the_commit() {
    let Some(criu) = Criu::stable("a CRIU that is killed after the commit") else {
        return;
    };
    let (mut moving, restoring) = committed_and_held_back(&criu);
    kill_one(restoring);
    assert!(moving.finish().status.success());
    assert!(!moving.assert_one_copy());
    moving.await_outcome("running");
}

#[test]
fn copy_that_ran_and_ended_is_not_restored_again() {
    let Some(criu) = Criu::stable("a copy that ends early") else {
        return;
    };
    let (mut moving, restoring) = committed_and_held_back(&criu);
    moving.kill_receive();
    signal(restoring, Signal::SIGCONT);
    await_pre_resume(&moving);
    let copy = moving.copy();
    kill_one(restoring);
    await_running(&copy);
    // As if it had ended by itself.
    copy.iter().for_each(|&pid| kill_one(pid));
    assert!(memory::await_end(&copy));
    moving.finish().assert_failed(6, &["send --resolve"]);
    moving.restart_receive();
    assert_resolved(&resolve(moving.pid, &[]), "is gone");
    assert_eq!(moving.copy(), [0; 0]);
    moving.await_outcome("running");
    moving.victim.await_end();
}

/// Another receiver cannot know what became of the migration: it must not be believed that it never ran.
#[test]
fn receiver_with_another_directory_does_not_answer_for_a_migration() {
    let Some(criu) = Criu::stable("a receiver with another directory") else {
        return;
    };
    let mut moving = Move::in_doubt(&criu, RUNNING, &[]);
    moving.await_outcome("running");
    let copy = moving.copy();
    assert_eq!(copy.len(), moving.tree.len());
    moving.kill_receive();
    let elsewhere = tempfile::tempdir().unwrap();
    let own = std::mem::replace(&mut moving.dir, elsewhere);
    moving.restart_receive();
    moving.link.reopen();
    assert_failed(&resolve(moving.pid, &[]), 6, "no such migration");
    memory::assert_held(&moving.tree);
    moving.kill_receive();
    moving.dir = own;
    moving.restart_receive();
    assert_resolved(&resolve(moving.pid, &[]), "is gone");
    assert!(!moving.assert_one_copy());
}

/// What an earlier receiver wrote may not be on the disk yet: the source is killed for this answer.
#[test]
fn outcome_that_was_read_is_durable_before_it_is_answered() {
    let Some(criu) = Criu::stable("an outcome that is read again") else {
        return;
    };
    let mut moving = Move::in_doubt(&criu, RUNNING, &[]);
    moving.await_outcome("running");
    moving.kill_receive();
    moving.restart_receive();
    let synced = Call::exit(Action::Sync, Object::Path("outcome.json"));
    let gate = Gate::attach(moving.receive(), &[synced]);
    moving.link.reopen();
    let mut send = send_command();
    let resolving = Program::start(send.args(["--resolve", &moving.pid.to_string()]));
    assert!(gate.is_reached_within(Duration::from_secs(10)));
    // The receiver is stopped there, and has not answered.
    memory::assert_held(&moving.tree);
    gate.release();
    assert_resolved(&resolving.finish(), "is gone");
    assert!(!moving.assert_one_copy());
}

#[test]
fn copied_directory_is_not_a_receiver() {
    let Some(criu) = Criu::stable("a copied directory") else {
        return;
    };
    let mut moving = Move::in_doubt(&criu, COMMIT, &[]);
    let root = tempfile::tempdir().unwrap();
    let copy = root.path().join("copy");
    let status = Command::new("cp")
        .arg("-a")
        .arg(moving.dir.path())
        .arg(&copy)
        .status();
    assert!(status.unwrap().success());
    let mut receive = receive_command();
    receive.args(["--listen", "0", "--dir"]).arg(&copy);
    assert_failed(&Program::start(&mut receive).finish(), 7, "identity.json");
    moving.link.reopen();
    assert_resolved(&resolve(moving.pid, &[]), "continues here");
    assert!(moving.assert_one_copy());
    kill_tree(moving.pid);
}

/// At once if the receiver is told to exit, else when the next one starts.
#[test]
fn killed_receive_leaves_no_copy_of_an_undecided_move() {
    let Some(criu) = Criu::stable("what a killed receiver leaves") else {
        return;
    };
    for ends in [Signal::SIGKILL, Signal::SIGTERM] {
        let mut moving = Move::pause(&criu, RESTORED, &[]);
        let (restoring, receive) = (moving.restoring_criu(), moving.receive());
        let copy = moving.copy();
        assert_eq!(copy.len(), moving.tree.len());
        signal(receive, ends);
        assert!(memory::await_end(&[receive]));
        moving.link.cut();
        assert!(!moving.finish().status.success());
        if ends == Signal::SIGKILL {
            // CRIU holds the copy back until a receiver ends both.
            assert!(memory::lives(restoring));
            moving.restart_receive();
        }
        assert!(memory::await_end(&copy));
        assert!(memory::await_end(&[restoring]));
        assert!(moving.assert_one_copy());
    }
}
