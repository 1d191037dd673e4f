//! Pipes and FIFOs that processes outside the target's tree use, too. CRIU moves the target's end of one, and the
//! other end stays behind: the copy dies of SIGPIPE, or reads the end of the file.

use pageferry_common::proc::read_lossy;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// A pipe with an end outside of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutsidePipe {
    /// Process of the tree.
    pub pid: i32,
    /// Its descriptor.
    pub fd: i32,
    /// What the descriptor refers to: `pipe:[INODE]`, or the path of a FIFO.
    pub pipe: PathBuf,
    /// PID of a process outside of the tree that has the pipe open.
    pub other: i32,
    /// Name of that process.
    pub name: String,
}

impl fmt::Display for OutsidePipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            pid,
            fd,
            pipe,
            other,
            name,
        } = self;
        let (pipe, name) = (pipe.display().to_string(), name.escape_debug());
        let pipe = pipe.escape_debug();
        write!(
            f,
            "descriptor {fd} of process {pid} ({pipe}, also open in process {other}, {name})"
        )
    }
}

/// Returns the pipes and FIFOs of a tree that other processes of this host have open, one for each pipe. Looks at
/// the descriptors of all processes that this program may inspect, and only if the tree has a pipe.
#[must_use]
pub fn outside_pipes(tree: &[i32]) -> Vec<OutsidePipe> {
    let mut pipes = BTreeMap::new();
    for &pid in tree {
        for (fd, target) in descriptors(pid) {
            if is_pipe(pid, fd, &target) {
                pipes.entry(target).or_insert((pid, fd));
            }
        }
    }
    if pipes.is_empty() {
        return Vec::new();
    }
    let inside: BTreeSet<i32> = tree.iter().copied().collect();
    let own = std::process::id().cast_signed();
    let mut found = Vec::new();
    for other in processes() {
        if inside.contains(&other) || other == own {
            continue;
        }
        for (_, target) in descriptors(other) {
            if let Some((pid, fd)) = pipes.remove(&target) {
                let name = read_lossy(format!("/proc/{other}/comm")).unwrap_or_default();
                found.push(OutsidePipe {
                    pid,
                    fd,
                    pipe: target,
                    other,
                    name: name.trim_end().to_owned(),
                });
            }
        }
    }
    found.sort_by_key(|pipe| (pipe.pid, pipe.fd));
    found
}

/// Returns whether a descriptor refers to a pipe or a FIFO. Follows the link only where that cannot block.
fn is_pipe(pid: i32, fd: i32, target: &Path) -> bool {
    let target = target.as_os_str().as_bytes();
    // Other files without a path: sockets, event descriptors, memfds.
    let is_path = target.starts_with(b"/");
    target.starts_with(b"pipe:[")
        || is_path
            && fs::metadata(format!("/proc/{pid}/fd/{fd}"))
                .is_ok_and(|file| file.file_type().is_fifo())
}

/// Returns the descriptors of a process and what they refer to; nothing if it cannot be inspected.
fn descriptors(pid: i32) -> Vec<(i32, PathBuf)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    let descriptor = |entry: fs::DirEntry| {
        let fd = number(&entry.file_name())?;
        Some((fd, fs::read_link(entry.path()).ok()?))
    };
    entries
        .filter_map(|entry| descriptor(entry.ok()?))
        .collect()
}

fn processes() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    entries
        .filter_map(|entry| number(&entry.ok()?.file_name()))
        .collect()
}

fn number(name: &OsStr) -> Option<i32> {
    name.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    fn start(input: Stdio, output: Stdio) -> Child {
        let mut sleep = Command::new("sleep");
        sleep.arg("1000").stdin(input).stdout(output);
        sleep.spawn().unwrap()
    }

    /// The pipe of a tree that one other process has open, once it is found: a process that is being started has
    /// the descriptors of its parent for a moment, and may be found instead. (The test's own parents have other
    /// pipes of the tree open.)
    fn shared_by(tree: &[i32], other: i32) -> OutsidePipe {
        let began = std::time::Instant::now();
        loop {
            let pipes = outside_pipes(tree);
            if let Some(pipe) = pipes.iter().find(|pipe| pipe.other == other) {
                return pipe.clone();
            }
            assert!(began.elapsed().as_secs() < 10, "{pipes:?}");
        }
    }

    #[test]
    fn pipe_between_two_trees_is_found_and_one_within_a_tree_is_not() {
        let (read, write) = std::io::pipe().unwrap();
        let mut reader = start(read.into(), Stdio::null());
        let mut writer = start(Stdio::null(), write.into());
        let [one, two] = [reader.id(), writer.id()].map(u32::cast_signed);
        let pipe = shared_by(&[one], two);
        let together = outside_pipes(&[one, two]);
        for child in [&mut reader, &mut writer] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(together.iter().all(|other| other.pipe != pipe.pipe));
        assert_eq!((pipe.pid, pipe.fd, pipe.other), (one, 0, two));
        assert!(pipe.to_string().contains("also open in process"));
    }

    #[test]
    fn fifo_is_found_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let open = || {
            let both = fs::OpenOptions::new().read(true).write(true).open(&path);
            Stdio::from(both.unwrap())
        };
        let mut one = start(open(), Stdio::null());
        let mut two = start(open(), Stdio::null());
        let found = shared_by(&[one.id().cast_signed()], two.id().cast_signed());
        for child in [&mut one, &mut two] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!((&found.pipe, found.fd), (&path, 0));
    }
}
