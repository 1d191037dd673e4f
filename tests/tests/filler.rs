//! The filler process of a lazy restore is killed: another one takes over, and if that is impossible, the
//! copy is killed. It never reads zeros.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tests::copies::{copies, the_only_copy};
use pageferry_tests::criu::Criu;
use pageferry_tests::daemon::until;
use pageferry_tests::host::Host;
use pageferry_tests::memory;
use pageferry_tests::random::XorShift64;
use pageferry_tests::{Receiver, Send, Victim};
use std::fs;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::sleep;
use std::time::Duration;
use tempfile::TempDir;

const VICTIM: &str = "heap=256 dirty=20";

/// Role of a process of a lazy restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Filler,
    Keeper,
}

/// Number of keepers beside the filler.
const KEEPERS: usize = 3;

/// Returns the processes that fill or keep the memory of what is restored from `dir`.
fn holders(dir: &Path) -> Vec<(i32, Role)> {
    let dir = dir.to_str().unwrap().as_bytes();
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let holders = pids.filter_map(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let has = |word: &[u8]| line.windows(word.len()).any(|part| part == word);
        let role = match fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim() {
            "lazy-keeper" => Role::Keeper,
            _ => Role::Filler,
        };
        (has(b"__fill") && has(dir)).then_some((pid, role))
    });
    holders.collect()
}

/// Returns the PIDs of those that have this role.
fn of_role(dir: &Path, role: Role) -> Vec<i32> {
    let holders = holders(dir).into_iter();
    holders.filter(|it| it.1 == role).map(|it| it.0).collect()
}

/// Returns whether a process has a userfaultfd.
fn has_uffd(pid: i32) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    fds.flatten().any(|fd| {
        let link = fs::read_link(fd.path());
        link.is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
    })
}

fn signal(pids: &[i32], signal: Signal) {
    for &pid in pids {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// Kills several processes before any of them can act on the death of another.
fn kill_at_once(pids: &[i32]) {
    signal(pids, Signal::SIGSTOP);
    signal(pids, Signal::SIGKILL);
}

/// A copy that runs, and whose memory is missing: its filler is stopped.
struct Moved {
    victim: Victim,
    /// Its processes at the source.
    tree: Vec<i32>,
    receiver: Receiver,
    dir: TempDir,
    _host: Host,
}

/// Moves a victim.
fn moved(criu: &Criu, features: &str) -> Moved {
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let path = criu.path().to_str().unwrap();
    let options = ["--restore=lazy", "--criu", path];
    let receiver = host.receiver("0", dir.path(), &options);
    let mut victim = Victim::detached(features);
    let (pid, tree) = (victim.pid(), victim.tree());
    let options = ["--migrate", "--criu", path, "--max-rounds", "0"];
    let send = Send::start(receiver.address(), pid, &options);
    // The keepers run before the filler takes a userfaultfd.
    let filler = until("the filler has a userfaultfd", || {
        let mut fillers = of_role(dir.path(), Role::Filler).into_iter();
        fillers
            .find(|&pid| has_uffd(pid))
            .ok_or("not yet".to_owned())
    });
    // CRIU may need it for a moment until the copy runs.
    let (moved_tx, moved_rx) = mpsc::channel();
    let slow = std::thread::spawn(move || {
        let stop = Duration::from_millis(300);
        signal(&[filler], Signal::SIGSTOP);
        while moved_rx.recv_timeout(stop) == Err(RecvTimeoutError::Timeout) {
            signal(&[filler], Signal::SIGCONT);
            sleep(Duration::from_micros(200));
            signal(&[filler], Signal::SIGSTOP);
        }
    });
    let sent = send.finish();
    moved_tx.send(()).unwrap();
    slow.join().unwrap();
    assert!(sent.status.success(), "{}", sent.stderr);
    victim.await_end();
    Moved {
        victim,
        tree,
        receiver,
        dir,
        _host: host,
    }
}

impl Moved {
    fn pids(&self, role: Role) -> Vec<i32> {
        of_role(self.dir.path(), role)
    }

    fn filler(&self) -> i32 {
        until(
            "there is one filler",
            || match self.pids(Role::Filler)[..] {
                [filler] => Ok(filler),
                ref fillers => Err(format!("{fillers:?}")),
            },
        )
    }

    /// Returns the filler that has replaced another.
    fn filler_after(&self, old: i32) -> i32 {
        until("the filler is replaced", || match self.filler() {
            filler if filler == old => Err("not yet".to_owned()),
            filler => Ok(filler),
        })
    }

    fn copy(&self) -> i32 {
        the_only_copy(&[self.tree[0]])
    }

    /// Asserts that less than a quarter of the copy's memory is there.
    fn assert_mostly_missing(&self) {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.copy())).unwrap();
        let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
        assert!(pages < 64 * 256, "{pages}");
    }

    /// Asserts that all memory of the copy is right, and is filled in the end.
    fn assert_right(&mut self) {
        let copy = self.copy();
        let pages = self.victim.report().verdict(copy).unwrap();
        assert!(pages > 1000, "{pages}");
        self.assert_filled();
        self.victim.report().verdict(copy).unwrap();
    }

    /// Asserts that the filler and its keepers exit, which they do when all is filled.
    fn assert_filled(&self) {
        until("all memory is filled", || {
            match holders(self.dir.path())[..] {
                [] => Ok(()),
                ref holders => Err(format!("{holders:?}")),
            }
        });
    }

    /// Waits until there are as many keepers as at first.
    fn await_keepers(&self) {
        until("the keepers are replaced", || {
            match self.pids(Role::Keeper).len() {
                KEEPERS => Ok(()),
                number => Err(number.to_string()),
            }
        });
    }

    /// Asserts that the copy is killed.
    fn assert_killed(&self) {
        until("the copy is killed", || match copies(&self.tree)[..] {
            [] => Ok(()),
            ref copies => Err(format!("{copies:?}")),
        });
    }
}

#[test]
fn killed_filler_is_replaced() {
    let Some(criu) = Criu::stable("killing the filler") else {
        return;
    };
    let mut moved = moved(&criu, VICTIM);
    moved.assert_mostly_missing();
    signal(&[moved.filler()], Signal::SIGKILL);
    moved.assert_right();
    moved.receiver.program().await_event("filler_replaced");
    moved.receiver.program().await_event("memory_filled");
}

#[test]
fn any_three_holders_may_die_at_once() {
    let Some(criu) = Criu::stable("killing the filler and its keepers") else {
        return;
    };
    let mut moved = moved(&criu, VICTIM);
    let keepers = moved.pids(Role::Keeper);
    assert_eq!(keepers.len(), KEEPERS);
    // One by one: another keeper replaces it.
    for keeper in keepers {
        signal(&[keeper], Signal::SIGKILL);
        moved.await_keepers();
    }
    moved.assert_mostly_missing();
    let old = moved.filler();
    let keepers = moved.pids(Role::Keeper);
    kill_at_once(&[&[old], &keepers[1..]].concat());
    let new = moved.filler_after(old);
    signal(&[new], Signal::SIGSTOP);
    moved.await_keepers();
    // All keepers: the filler replaces them.
    kill_at_once(&moved.pids(Role::Keeper));
    signal(&[new], Signal::SIGCONT);
    moved.assert_right();
    moved.receiver.program().await_event("memory_filled");
}

#[test]
fn killed_fillers_are_replaced_while_mappings_change() {
    let Some(criu) = Criu::stable("killing fillers of memory that changes") else {
        return;
    };
    let mut random = XorShift64::new(7);
    for features in [
        "heap=256 chaos dirty=50",
        "heap=128 children=2 chaos dirty=50",
    ] {
        let mut moved = moved(&criu, features);
        for _ in 0..10 {
            let filler = moved.filler();
            signal(&[filler], Signal::SIGCONT);
            sleep(Duration::from_micros(random.next_u64() % 8_000));
            signal(&[filler], Signal::SIGKILL);
        }
        let copy = moved.copy();
        moved.victim.report().verdict(copy).unwrap();
        moved.assert_filled();
        moved.victim.report().verdict(copy).unwrap();
        moved.receiver.program().await_event("memory_filled");
    }
}

#[test]
fn filler_is_replaced_after_the_death_of_the_receiver() {
    let Some(criu) = Criu::stable("killing the filler and the receiver") else {
        return;
    };
    let mut moved = moved(&criu, VICTIM);
    // The program under test is a child of nsenter.
    let receiver = memory::tree(moved.receiver.program().pid())[1];
    // It dies with a message of the new filler's unread.
    signal(&[receiver], Signal::SIGSTOP);
    moved.assert_mostly_missing();
    let old = moved.filler();
    signal(&[old], Signal::SIGKILL);
    let new = moved.filler_after(old);
    signal(&[receiver], Signal::SIGKILL);
    assert!(memory::await_end(&[receiver]));
    signal(&[new], Signal::SIGKILL);
    moved.assert_right();
}

#[test]
fn copy_is_killed_if_no_filler_can_take_over() {
    let Some(criu) = Criu::stable("killing the filler and removing images") else {
        return;
    };
    let mut moved = moved(&criu, VICTIM);
    moved.assert_mostly_missing();
    for entry in fs::read_dir(moved.dir.path()).unwrap().flatten() {
        let _ = fs::remove_dir_all(entry.path());
    }
    signal(&[moved.filler()], Signal::SIGKILL);
    moved.assert_killed();
    moved.receiver.program().await_event("filler_failed");
    moved.receiver.program().await_event("lazy_restore_failed");
    moved.assert_filled();
}

#[test]
fn copy_is_killed_if_all_holders_die_at_once() {
    let Some(criu) = Criu::stable("killing all that hold the memory") else {
        return;
    };
    let mut moved = moved(&criu, VICTIM);
    let holders = holders(moved.dir.path());
    let pids: Vec<_> = holders.iter().map(|&(pid, _)| pid).collect();
    assert_eq!(pids.len(), 1 + KEEPERS, "{holders:?}");
    kill_at_once(&pids);
    moved.assert_killed();
    moved.receiver.program().await_event("lazy_restore_failed");
}
