//! Processes that are paused: those in a frozen cgroup, such as those of a paused container. They cannot be
//! traced as others: a call that is injected into one never returns, and CRIU waits for it for ever.

use super::{TreeError, process_list};
use pageferry_common::proc::cgroup::{v1_mount, v1_path, v2_mount, v2_path};
use pageferry_common::proc::read_lossy;
use std::fs;

/// Checks that no process of the tree under `root` is paused. A tree that is paused later is found by the
/// deadlines of what waits for it.
///
/// # Errors
/// [`TreeError::Paused`].
pub fn check_not_paused(root: i32) -> Result<(), TreeError> {
    let mounts = read_lossy("/proc/self/mountinfo").unwrap_or_default();
    let (v1, v2) = (v1_mount(&mounts, "freezer"), v2_mount(&mounts));
    for process in process_list(root) {
        let cgroups = read_lossy(format!("/proc/{}/cgroup", process.pid)).unwrap_or_default();
        let frozen_v2 = v2.zip(v2_path(&cgroups)).filter(|(mount, cgroup)| {
            let events = fs::read_to_string(format!("{mount}{cgroup}/cgroup.events"));
            events.is_ok_and(|events| events.lines().any(|line| line == "frozen 1"))
        });
        let frozen_v1 = v1.zip(v1_path(&cgroups, "freezer"));
        let frozen_v1 = frozen_v1.filter(|(mount, cgroup)| {
            let state = fs::read_to_string(format!("{mount}{cgroup}/freezer.state"));
            state.is_ok_and(|state| state.trim_end() != "THAWED")
        });
        if let Some((_, cgroup)) = frozen_v2.or(frozen_v1) {
            return Err(TreeError::Paused {
                pid: process.pid,
                cgroup: cgroup.to_owned(),
            });
        }
    }
    Ok(())
}
