//! A target that works against the sender harms neither the sender's host nor itself.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tests::Pair;
use pageferry_tests::daemon::until;
use pageferry_tests::memory;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

/// A target whose code another process changes while it is frozen (`victim/hostile.c`).
struct Hostile {
    partner: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
    target: i32,
}

impl Hostile {
    fn start(arguments: &[&str]) -> Self {
        let mut partner = Command::new(env!("PAGEFERRY_HOSTILE_BUILT"))
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(partner.stdout.take().unwrap()).lines();
        let first = lines.next().unwrap().unwrap();
        let target = first.strip_prefix("target ").unwrap().parse().unwrap();
        Self {
            partner,
            lines,
            target,
        }
    }

    fn count(&mut self) -> u64 {
        kill(Pid::from_raw(self.target), Signal::SIGUSR1).unwrap();
        let line = self.lines.next().unwrap().unwrap();
        line.strip_prefix("count ").unwrap().parse().unwrap()
    }

    fn assert_unharmed(&mut self) {
        let before = self.count();
        assert!(memory::lives(self.target));
        while self.count() == before {}
        // Its own handler blocks a signal for a moment.
        until("nothing of the sender is left", || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", self.target)).unwrap();
            let clean = ["TracerPid:\t0\n", "SigBlk:\t0000000000000000\n"];
            match clean.iter().all(|field| status.contains(field)) {
                true => Ok(()),
                false => Err(status),
            }
        });
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        let _ = self.partner.kill();
        let _ = self.partner.wait();
    }
}

/// The injected call never returns: it has a deadline, and the target is restored.
#[test]
fn target_that_loops_in_place_of_a_call_is_sent_and_runs_on() {
    let mut hostile = Hostile::start(&["loop"]);
    let pair = Pair::start(&[]);
    // Each tries anew.
    for _ in 0..6 {
        let sent = pair.send(hostile.target, &["--tracker", "uffd", "--rounds", "2"]);
        assert!(sent.status.success(), "{}", sent.stderr);
        hostile.assert_unharmed();
    }
}

/// The filter of the target is suspended for the intended call only.
#[test]
fn target_does_not_escape_its_seccomp_filter() {
    let dir = tempfile::tempdir().unwrap();
    let forbidden = dir.path().join("forbidden");
    let mut hostile = Hostile::start(&["mkdir", forbidden.to_str().unwrap()]);
    let pair = Pair::start(&[]);
    for _ in 0..10 {
        let sent = pair.send(hostile.target, &["--tracker", "uffd", "--rounds", "2"]);
        assert!(sent.status.success(), "{}", sent.stderr);
        hostile.assert_unharmed();
        assert!(!forbidden.exists());
    }
}
