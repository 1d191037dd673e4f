//! The files that the target needs at its destination.

use pageferry_common::needed_files::{FILES_MAX, NeededFile};
use pageferry_common::proc::maps::{self, Mapping};
use pageferry_common::wire::STRING_MAX;
use std::collections::BTreeSet;
use std::fs;
use std::io;

/// Returns the executables and libraries that the processes have mapped, at most as many as a receiver
/// compares. Leaves out processes with other file systems than the sender, because the files of a container
/// cannot be compared.
#[must_use]
pub fn needed_files(pids: impl Iterator<Item = i32>) -> Vec<NeededFile> {
    let mut paths = BTreeSet::new();
    for pid in pids {
        // A process that has exited needs no files.
        if sees_our_files(pid).unwrap_or(false) {
            let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
            paths.extend(maps::lines(&maps).filter_map(executable).map(str::to_owned));
        }
    }
    let found = paths.len();
    paths.retain(|path| path.len() <= STRING_MAX);
    let files = paths.into_iter().take(FILES_MAX as usize);
    if files.len() < found {
        let left_out = found - files.len();
        tracing::warn!(
            event = "files_not_compared",
            left_out,
            "some files that the target needs are not compared"
        );
    }
    let files = files.filter_map(|path| {
        let file = NeededFile::read(&path);
        // If it cannot do without the file, CRIU reports that.
        file.inspect_err(|error| tracing::debug!(path, %error, "file not compared"))
            .ok()
    });
    files.collect()
}

/// Returns whether the process has the mount namespace and the root directory of this program.
fn sees_our_files(pid: i32) -> io::Result<bool> {
    let of = |pid: &str| -> io::Result<_> {
        let namespace = fs::read_link(format!("/proc/{pid}/ns/mnt"))?;
        Ok((namespace, fs::read_link(format!("/proc/{pid}/root"))?))
    };
    Ok(of(&pid.to_string())? == of("self")?)
}

/// Returns the path in a line of `/proc/PID/maps` that maps code of a file with a path.
#[must_use]
pub fn executable(line: &[u8]) -> Option<&str> {
    let mapping = Mapping::parse(line).filter(|mapping| mapping.execute)?;
    // The wire carries paths as text; others are left out.
    let path = str::from_utf8(mapping.name).ok()?;
    let plain = path.starts_with('/') && !path.ends_with(" (deleted)") && !path.contains('\\');
    plain.then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn mapped_code_is_needed() {
        let line = "7f00-7f01 r-xp 00001000 08:01 17                 /usr/lib/a b.so";
        assert_eq!(executable(line.as_bytes()), Some("/usr/lib/a b.so"));
        for other in [
            "7f00-7f01 r--p 00000000 08:01 17 /usr/lib/x.so",
            "7f00-7f01 r-xp 00000000 08:01 17 /usr/lib/x.so (deleted)",
            "7f00-7f01 r-xp 00000000 00:00 0 [vdso]",
            "7f00-7f01 r-xp 00000000 00:00 0 ",
            "",
        ] {
            assert_eq!(executable(other.as_bytes()), None, "{other}");
        }
        let own = needed_files(std::iter::once(std::process::id().cast_signed()));
        assert!(own.iter().any(|file| file.path.contains("libc")), "{own:?}");
        assert!(own.iter().all(|file| file.local_problem().is_none()));
    }

    #[test]
    fn path_too_long_for_the_wire_is_left_out() {
        let dir = std::env::temp_dir().join(format!("pageferry-deep-{}", std::process::id()));
        let deep = (0..6).fold(dir.clone(), |path, _| path.join("d".repeat(200)));
        fs::create_dir_all(&deep).unwrap();
        let program = deep.join("sleep");
        fs::copy("/bin/sleep", &program).unwrap();
        let mut child = Command::new(&program).arg("60").spawn().unwrap();
        let needed = needed_files(std::iter::once(child.id().cast_signed()));
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_dir_all(dir).unwrap();
        // Command::spawn returns after exec: the program is mapped.
        assert!(
            needed.iter().all(|file| file.path.len() <= STRING_MAX),
            "{needed:?}"
        );
    }
}
