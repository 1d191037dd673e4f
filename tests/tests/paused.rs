//! A paused target, as a container that was paused: what is injected into it would never return.

use pageferry_common::proc::cgroup::{v1_mount, v2_mount};
use pageferry_tests::{Pair, Victim};
use std::fs;
use std::path::{Path, PathBuf};

/// A cgroup with a freezer. Dropping it thaws its processes, and moves them back.
struct Freezer {
    cgroup: PathBuf,
    state: &'static str,
    values: [&'static str; 2],
    member: i32,
}

impl Freezer {
    /// Makes a cgroup in the root of a hierarchy, and moves a process there. `None` if there is none.
    fn make(
        root: Option<&str>,
        state: &'static str,
        values: [&'static str; 2],
        pid: i32,
    ) -> Option<Self> {
        let cgroup =
            Path::new(root?).join(format!("pageferry-test-{}-{state}", std::process::id()));
        fs::create_dir(&cgroup).ok()?;
        fs::write(cgroup.join("cgroup.procs"), pid.to_string()).unwrap();
        Some(Self {
            cgroup,
            state,
            values,
            member: pid,
        })
    }

    fn set(&self, frozen: bool) {
        fs::write(
            self.cgroup.join(self.state),
            self.values[usize::from(frozen)],
        )
        .unwrap();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.set(false);
        let parent = self.cgroup.parent().unwrap().join("cgroup.procs");
        fs::write(parent, self.member.to_string()).unwrap();
        let _ = fs::remove_dir(&self.cgroup);
    }
}

#[test]
fn paused_target_is_refused_at_once() {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let hierarchies = [
        (v2_mount(&mounts), "cgroup.freeze", ["0", "1"]),
        (
            v1_mount(&mounts, "freezer"),
            "freezer.state",
            ["THAWED", "FROZEN"],
        ),
    ];
    let pair = Pair::start(&[]);
    let mut found = 0;
    for (root, state, values) in hierarchies {
        let mut victim = Victim::start("heap=4 dirty=20");
        let Some(freezer) = Freezer::make(root, state, values, victim.pid()) else {
            eprintln!("skipped: no cgroup with {state} can be made");
            continue;
        };
        found += 1;
        freezer.set(true);
        for options in [&["--rounds", "2"][..], &["--tracker", "hash"]] {
            let sent = pair.send(victim.pid(), options);
            assert_eq!(sent.status.code(), Some(1), "{}", sent.stderr);
            assert!(sent.stderr.contains("is paused"), "{}", sent.stderr);
        }
        freezer.set(false);
        victim.assert_unharmed();
    }
    assert!(found > 0, "this host has no freezer");
}
