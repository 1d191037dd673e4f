//! The history of a victim with the feature `history`: on which host it did each of its steps.
//!
//! Each process of the tree has a file that all copies on this machine map. The number of steps done is private
//! memory of the process, and moves along. A copy that finds its next step done already reports an error, which
//! every later check returns.

use crate::daemon::until;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Steps in a row that were done on one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stay {
    /// Inode number of the PID namespace, which stands for a host.
    pub host: u32,
    /// Number of steps.
    pub steps: usize,
}

/// Returns the PID namespace of a process, which stands for its host.
///
/// # Panics
/// If the process is gone.
#[must_use]
pub fn host_of(pid: i32) -> u32 {
    let namespace = fs::metadata(format!("/proc/{pid}/ns/pid")).expect("the process lives");
    namespace
        .ino()
        .try_into()
        .expect("the kernel numbers namespaces in 32 bits")
}

/// Reads the histories in a victim's directory, one for each process.
///
/// # Errors
/// If a step is missing between others.
pub fn histories(dir: &Path) -> Result<Vec<Vec<Stay>>, String> {
    let entries = fs::read_dir(dir).map_err(|error| error.to_string())?;
    let paths = entries.flatten().map(|entry| entry.path());
    let paths = paths.filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("history-")
    });
    let read = |path: &Path| fs::read(path).map_err(|error| error.to_string());
    let mut histories = Vec::new();
    for path in paths {
        let stays = stays(&read(&path)?);
        histories.push(stays.map_err(|why| format!("{}: {why}", path.display()))?);
    }
    match histories.is_empty() {
        true => Err("there is no history".to_owned()),
        false => Ok(histories),
    }
}

fn stays(bytes: &[u8]) -> Result<Vec<Stay>, String> {
    let mut hosts = bytes
        .chunks_exact(4)
        .map(|step| u32::from_le_bytes(step.try_into().expect("chunks of 4")));
    let mut stays: Vec<Stay> = Vec::new();
    let mut steps = 0;
    for host in hosts.by_ref().take_while(|&host| host != 0) {
        steps += 1;
        match stays.last_mut() {
            Some(stay) if stay.host == host => stay.steps += 1,
            _ => stays.push(Stay { host, steps: 1 }),
        }
    }
    match hosts.any(|host| host != 0) {
        true => Err(format!("step {steps} is missing")),
        false => Ok(stays),
    }
}

/// Asserts that the histories in a victim's directory lead through these hosts, and go on at the last.
///
/// # Panics
/// If not.
pub fn assert_one_history(dir: &Path, hosts: &[u32]) {
    let read = || histories(dir).unwrap_or_else(|why| panic!("{why}"));
    let before = read();
    for history in &before {
        let through: Vec<_> = history.iter().map(|stay| stay.host).collect();
        assert_eq!(through, hosts, "{history:?}");
    }
    let last = |history: &[Stay]| history.last().map_or(0, |stay| stay.steps);
    until("the history goes on", || {
        let now = read();
        let stands = now
            .iter()
            .zip(&before)
            .any(|(now, before)| last(now) <= last(before));
        match stands {
            true => Err(format!("{now:?}")),
            false => Ok(()),
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hosts: &[u32]) -> Vec<u8> {
        hosts.iter().flat_map(|host| host.to_le_bytes()).collect()
    }

    #[test]
    fn steps_in_a_row_on_a_host_are_one_stay() {
        let stay = |host, steps| Stay { host, steps };
        let read = stays(&bytes(&[7, 7, 9, 9, 9, 0, 0])).unwrap();
        assert_eq!(read, [stay(7, 2), stay(9, 3)]);
        assert_eq!(stays(&bytes(&[0, 0])), Ok(Vec::new()));
    }

    #[test]
    fn missing_step_is_reported() {
        let why = stays(&bytes(&[7, 0, 9])).unwrap_err();
        assert_eq!(why, "step 1 is missing");
    }
}
