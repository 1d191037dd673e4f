//! Exit codes of `send` are the same in a plain run and in a move.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tests::criu::Criu;
use pageferry_tests::host::Host;
use pageferry_tests::link::{Link, Step};
use pageferry_tests::memory;
use pageferry_tests::pair::send_command;
use pageferry_tests::privileges::as_user;
use pageferry_tests::program::Program;
use pageferry_tests::{Pair, Receiver, Send, Victim};
use std::path::Path;

const TARGET_GONE: i32 = 3;
const NOT_PERMITTED: i32 = 5;

fn kill_process(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

fn restoring(host: &Host, criu: &Criu, dir: &Path) -> Receiver {
    let criu = criu.path().to_str().unwrap();
    host.receiver("0", dir, &["--restore", "--criu", criu])
}

/// Kills the root, or one of its children, while the final round of a plain run waits for the link. The
/// memory is larger than the buffers, so part of it is unread at that time.
#[test]
fn process_killed_in_the_frozen_round_of_a_plain_run_exits_3() {
    for index in [0, 1] {
        let victim = Victim::start("heap=64 children=1");
        let killed = victim.tree()[index];
        let pair = Pair::start(&[]);
        let pages: Step = ("pages of the final round", 5, false, 1);
        let link = Link::start(pair.address(), pages, false);
        let send = Send::start(link.address, victim.pid(), &["--max-rounds", "0"]);
        link.await_step();
        kill_process(killed);
        link.forward();
        let message = format!("process {killed} exited");
        send.finish().assert_failed(TARGET_GONE, &[&message]);
    }
}

/// Kills the root, which has several threads, or its child while CRIU keeps the tree frozen for the last round.
#[test]
fn process_killed_in_the_frozen_rounds_of_a_move_exits_3() {
    let Some(criu) = Criu::stable("a target that exits in a hand-over") else {
        return;
    };
    let during_and_last: (Step, &[&str]) = (("end of the last round", 6, false, 3), &[]);
    let only: (Step, &[&str]) = (
        ("end of the only round", 6, false, 2),
        &["--state-dump", "plain"],
    );
    for (index, (step, options)) in [(0, during_and_last), (1, during_and_last), (0, only)] {
        let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
        let receiver = restoring(&host, &criu, dir.path());
        let mut victim = Victim::detached("heap=8 children=1 dirty=20");
        let (pid, tree) = (victim.pid(), victim.tree());
        let link = Link::start(receiver.address(), step, false);
        let path = criu.path().to_str().unwrap();
        let all = [&["--migrate", "--criu", path, "--max-rounds", "1"], options].concat();
        let send = Send::start(link.address, pid, &all);
        link.await_step();
        kill_process(tree[index]);
        link.forward();
        let message = format!("process {} exited", tree[index]);
        send.finish().assert_failed(TARGET_GONE, &[&message]);
        if index == 0 {
            // The kernel kills the children with their parent.
            assert!(memory::await_end(&tree), "{}", step.0);
            victim.await_end();
        }
    }
}

#[test]
fn missing_process_exits_3_in_a_move() {
    let Some(criu) = Criu::stable("a move of a process that does not exist") else {
        return;
    };
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let receiver = restoring(&host, &criu, dir.path());
    let options = ["--migrate", "--criu", criu.path().to_str().unwrap()];
    let sent = Send::start(receiver.address(), i32::MAX, &options).finish();
    sent.assert_failed(TARGET_GONE, &["process 2147483647", "PID"]);
}

/// Root without the capabilities to trace or read a process that has more: CRIU could run, but the target is
/// out of reach.
#[test]
fn forbidden_target_exits_5_in_a_plain_run_and_in_a_move() {
    let Some(criu) = Criu::stable("a move that is forbidden") else {
        return;
    };
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let receiver = restoring(&host, &criu, dir.path());
    let mut victim = Victim::start("heap=1 shared=1");
    let path = criu.path().to_str().unwrap();
    for options in [&[][..], &["--migrate", "--criu", path]] {
        let mut send = as_user(0, &["sys_admin", "kill"]);
        send.arg(send_command().get_program());
        send.args(["--to", &receiver.address().to_string()]);
        send.arg(victim.pid().to_string()).args(options);
        let sent: pageferry_tests::pair::Sent = Program::start(&mut send).finish().into();
        sent.assert_failed(NOT_PERMITTED, &["not permitted", "CAP_SYS_PTRACE"]);
        victim.assert_unharmed();
    }
}
