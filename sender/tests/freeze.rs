//! Freezes real processes: nothing about them changes except the time.

use pageferry_sender::freeze::{FreezeError, Freezer, Then, TreeError};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn freezer() -> Freezer {
    Freezer::start(Path::new(env!("CARGO_BIN_EXE_send"))).unwrap()
}

/// A tree of shells: a parent, a child and a grandchild, all in different system calls.
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

/// Polls a condition that only `/proc` shows.
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
fn tree_is_frozen_completely_and_resumes() {
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
fn dropped_guard_or_dead_sender_releases_the_tree() {
    let tree = Tree::start();
    let mut freezer = freezer();
    drop(freezer.freeze(tree.pid()).unwrap());
    assert_ne!(state(tree.pid()), 't');
    // The guard is leaked, then the socket is closed: the state after a SIGKILL.
    std::mem::forget(freezer.freeze(tree.pid()).unwrap());
    assert_eq!(state(tree.pid()), 't');
    drop(freezer);
    assert_ne!(state(tree.pid()), 't');
}

#[test]
fn userfaultfd_leaves_no_trace_and_interrupted_calls_restart() {
    let tree = Tree::start();
    let mut freezer = freezer();
    let before = {
        let frozen = freezer.freeze(tree.pid()).unwrap();
        let processes = frozen.processes().to_vec();
        frozen.thaw(Then::Run).unwrap();
        processes
    };
    let asleep = |pid: i32| until("asleep", || state(pid) == 'S');
    // The process that was started last loads its libraries first, in other calls.
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
    // Each thread is in the same call as before, with the same arguments and stack.
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
            // (A sleep continues as restart_syscall, with another number.)
            assert_eq!(call(&number), call(&calls[index]));
        }
    }
}

#[test]
fn released_tree_stays_stopped_or_is_killed() {
    let mut tree = Tree::start();
    let mut freezer = freezer();
    let mut frozen = freezer.freeze(tree.pid()).unwrap();
    let pids: Vec<i32> = frozen.processes().iter().map(|p| p.pid).collect();
    // A sender that fails or dies now leaves it running.
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
fn unfreezable_process_is_named() {
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
