//! Freezing real processes: nothing of theirs changes but the time.

use pageferry_sender::freeze::{FreezeError, Freezer, Then, TreeError};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn freezer() -> Freezer {
    Freezer::start(Path::new(env!("CARGO_BIN_EXE_send"))).unwrap()
}

/// A shell tree: a parent, a child and a grandchild, all in different system calls.
struct Tree(Child);

impl Tree {
    fn start() -> Self {
        let script = "sh -c 'sleep 1000 & echo ready; wait' & wait";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self(child)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let mut freezer = freezer();
        if let Ok(frozen) = freezer.freeze(self.pid()) {
            let _ = frozen.thaw(Then::Kill);
        }
        let _ = self.0.wait();
    }
}

fn state(pid: i32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
}

/// What only `/proc` tells.
fn until(what: &str, so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !so() {
        assert!(Instant::now() < deadline, "not {what}");
        std::thread::yield_now();
    }
}

fn waits_in(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap()
}

#[test]
fn a_tree_is_stopped_whole_and_runs_on() {
    let tree = Tree::start();
    let mut freezer = freezer();
    for _ in 0..3 {
        let frozen = freezer.freeze(tree.pid()).unwrap();
        let pids: Vec<i32> = frozen.processes().iter().map(|p| p.pid).collect();
        assert_eq!(pids.len(), 3);
        assert_eq!(pids[0], tree.pid());
        assert!(pids.iter().all(|&pid| state(pid) == 't'));
        frozen.thaw(Then::Run).unwrap();
        assert!(pids.iter().all(|&pid| state(pid) != 't'));
    }
}

#[test]
fn a_dropped_guard_and_a_dead_sender_let_the_tree_run() {
    let tree = Tree::start();
    let mut freezer = freezer();
    drop(freezer.freeze(tree.pid()).unwrap());
    assert_ne!(state(tree.pid()), 't');
    // A guard that nobody drops, and then the socket closes: as a SIGKILL would leave it.
    std::mem::forget(freezer.freeze(tree.pid()).unwrap());
    assert_eq!(state(tree.pid()), 't');
    drop(freezer);
    assert_ne!(state(tree.pid()), 't');
}

#[test]
fn a_userfaultfd_leaves_no_trace_and_interrupted_calls_are_restarted() {
    let tree = Tree::start();
    let mut freezer = freezer();
    let before = {
        let frozen = freezer.freeze(tree.pid()).unwrap();
        let processes = frozen.processes().to_vec();
        frozen.thaw(Then::Run).unwrap();
        processes
    };
    let asleep = |pid: i32| until("asleep", || state(pid) == 'S');
    // The last of them has just been started: it loads its libraries first, in other calls.
    let called = |pid: i32| waits_in(pid).split(' ').next().and_then(|n| n.parse().ok());
    let waits = [
        libc::SYS_wait4,
        libc::SYS_rt_sigsuspend,
        libc::SYS_clock_nanosleep,
        libc::SYS_restart_syscall,
    ];
    for process in &before {
        until("waiting", || {
            state(process.pid) == 'S' && called(process.pid).is_some_and(|n| waits.contains(&n))
        });
    }
    let descriptors = |pid: i32| {
        let mut names: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    let status = |pid: i32, field: &str| {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        text.lines()
            .find(|l| l.starts_with(field))
            .map(str::to_owned)
    };
    let fds: Vec<_> = before.iter().map(|p| descriptors(p.pid)).collect();
    let masks: Vec<_> = before.iter().map(|p| status(p.pid, "SigBlk")).collect();
    let calls: Vec<_> = before.iter().map(|p| waits_in(p.pid)).collect();
    for _ in 0..20 {
        let mut frozen = freezer.freeze(tree.pid()).unwrap();
        for process in frozen.processes().to_vec() {
            frozen.userfaultfd(process.pid).unwrap().unwrap();
        }
        frozen.thaw(Then::Run).unwrap();
    }
    // Each sits in the very call it sat in, with the same arguments and stack.
    for (index, process) in before.iter().enumerate() {
        let pid = process.pid;
        asleep(pid);
        assert_eq!(descriptors(pid), fds[index]);
        assert_eq!(status(pid, "SigBlk"), masks[index]);
        let call = |text: &str| {
            text.split(' ')
                .skip(1)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let number = waits_in(pid);
        assert!(number.starts_with(|c: char| c.is_ascii_digit()), "{number}");
        if !calls[index].starts_with("230 ") {
            // (A sleep goes on as restart_syscall, by its own number.)
            assert_eq!(call(&number), call(&calls[index]));
        }
    }
}

#[test]
fn stopped_stays_stopped_and_killed_dies() {
    let mut tree = Tree::start();
    let mut freezer = freezer();
    let mut frozen = freezer.freeze(tree.pid()).unwrap();
    let pids: Vec<i32> = frozen.processes().iter().map(|p| p.pid).collect();
    // A sender that fails now, or dies, leaves it running.
    frozen.sigstop().unwrap();
    drop(frozen);
    for &pid in &pids {
        until("running", || !matches!(state(pid), 'T' | 't'));
    }
    let mut frozen = freezer.freeze(tree.pid()).unwrap();
    frozen.sigstop().unwrap();
    frozen.thaw(Then::Stop).unwrap();
    assert!(pids.iter().all(|&pid| state(pid) == 'T'));
    // A stopped tree can be frozen too, and is stopped again afterwards.
    let frozen = freezer.freeze(tree.pid()).unwrap();
    frozen.thaw(Then::Run).unwrap();
    for &pid in &pids {
        until("stopped again", || state(pid) == 'T');
    }
    freezer
        .freeze(tree.pid())
        .unwrap()
        .thaw(Then::Kill)
        .unwrap();
    tree.0.wait().unwrap();
}

#[test]
fn what_cannot_be_frozen_is_named() {
    let mut freezer = freezer();
    let none = freezer.freeze(i32::MAX - 1);
    assert!(matches!(
        none.unwrap_err(),
        FreezeError::Tree(TreeError::NoProcess(_))
    ));
    let own = freezer.freeze(std::process::id() as i32);
    assert!(matches!(
        own.unwrap_err(),
        FreezeError::Tree(TreeError::OwnTree(_))
    ));
    let tree = Tree::start();
    let mut other = self::freezer();
    let frozen = other.freeze(tree.pid()).unwrap();
    let traced = freezer.freeze(tree.pid()).unwrap_err();
    let FreezeError::Tree(TreeError::Traced { name, .. }) = traced else {
        panic!("{traced}");
    };
    assert_eq!(name, "send");
    frozen.thaw(Then::Run).unwrap();
}
