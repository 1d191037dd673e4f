//! Copies of a victim on all hosts of this machine, and the records of moves that are not complete.

use crate::daemon::until;
use crate::{memory, victim};
use std::fs;

/// Returns the processes of a victim on all hosts of this machine, each with its PID in the namespace in which it
/// runs (the same as in `tree`) and whether it can run: it is neither stopped nor frozen.
///
/// # Panics
/// If the victim is not built.
#[must_use]
pub fn copies(tree: &[i32]) -> Vec<(i32, bool)> {
    let program = fs::canonicalize(victim::path()).expect("it is built");
    let pids = fs::read_dir("/proc").expect("it is mounted").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    // By its executable: during a restore its memory, such as the command line, may be incomplete.
    pids.filter(|pid| {
        let exe = fs::read_link(format!("/proc/{pid}/exe"));
        let numbers = memory::namespaced_pids(*pid).unwrap_or_default();
        let number = numbers.last().map(|&number| number.cast_signed());
        exe.is_ok_and(|exe| exe == program)
            && number.is_some_and(|number| tree.contains(&number))
            && memory::lives(*pid)
    })
    .map(|pid| (pid, !memory::is_stopped(pid) && !memory::is_frozen(pid)))
    .collect()
}

/// Returns the root of the only copy of a tree.
///
/// # Panics
/// If there is none, or more than one.
#[must_use]
pub fn the_only_copy(tree: &[i32]) -> i32 {
    one_copy_with_stopped(tree, 0)
}

/// Returns the root of the only copy of a tree, of which `stopped` processes are stopped.
///
/// # Panics
/// If there is none, or more than one.
#[must_use]
pub fn one_copy_with_stopped(tree: &[i32], stopped: usize) -> i32 {
    until("one copy runs", || {
        let copies = copies(tree);
        let suspended = copies.iter().filter(|(_, runs)| !runs).count();
        // PIDs wrap around: the root need not have the lowest.
        let is_root = |pid: i32| {
            let pids = memory::namespaced_pids(pid).unwrap_or_default();
            pids.last().map(|&pid| pid.cast_signed()) == Some(tree[0])
        };
        let root = copies.iter().find(|&&(pid, _)| is_root(pid));
        match root {
            Some(&(root, _)) if copies.len() == tree.len() && suspended == stopped => Ok(root),
            _ => Err(format!("{copies:?}")),
        }
    })
}

/// Returns whether `send` has a record of a move of this process.
#[must_use]
pub fn has_record(pid: i32) -> bool {
    let records = fs::read_dir("/run/pageferry").into_iter().flatten();
    let names = records.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut records = names.filter(|name| name.ends_with(".json"));
    records.any(|name| name.starts_with(&format!("{pid}-")))
}
