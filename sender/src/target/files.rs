//! What a tree needs of the file system where it runs on.

use pageferry_common::needed_files::{FILES_MAX, NeededFile};
use pageferry_common::proc::maps::{self, Mapping};
use pageferry_common::wire::message::STRING_MAX;
use std::collections::BTreeSet;
use std::fs;
use std::io;

/// The executables and libraries that the processes have mapped, as many as a receiver compares. None of a
/// process that sees other file systems than we: its container's image is not ours to compare.
#[must_use]
pub fn needed_files(pids: impl Iterator<Item = i32>) -> Vec<NeededFile> {
    let mut paths = BTreeSet::new();
    for pid in pids {
        // One that is gone meanwhile needs none.
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
        tracing::warn!(left_out, "not all files that it needs are compared");
    }
    let files = files.filter_map(|path| {
        let file = NeededFile::at(&path);
        // CRIU knows what to do about it, or says so.
        file.inspect_err(|error| tracing::debug!(path, %error, "not compared"))
            .ok()
    });
    files.collect()
}

fn sees_our_files(pid: i32) -> io::Result<bool> {
    let of = |pid: &str| -> io::Result<_> {
        let namespace = fs::read_link(format!("/proc/{pid}/ns/mnt"))?;
        Ok((namespace, fs::read_link(format!("/proc/{pid}/root"))?))
    };
    Ok(of(&pid.to_string())? == of("self")?)
}

/// The path in a line of `/proc/PID/maps` if it is code of a file that has one.
#[must_use]
pub fn executable(line: &[u8]) -> Option<&str> {
    let mapping = Mapping::parse(line).filter(|mapping| mapping.execute)?;
    // Paths may be any bytes, but for us they are text.
    let path = str::from_utf8(mapping.name).ok()?;
    let plain = path.starts_with('/') && !path.ends_with(" (deleted)") && !path.contains('\\');
    plain.then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn code_of_files_is_needed() {
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
        assert!(own.iter().all(|file| file.problem_here().is_none()));
    }

    #[test]
    fn a_path_too_long_to_be_told_is_left_out() {
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
        // The program itself is mapped by the time that it has been started.
        assert!(
            needed.iter().all(|file| file.path.len() <= STRING_MAX),
            "{needed:?}"
        );
    }
}
