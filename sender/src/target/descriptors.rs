//! What the descriptors of a process reveal about its memory: segments that no process maps, and direct I/O.

use crate::target::segment::SegmentKey;
use crate::target::vma::{Device, KernelMounts};
use pageferry_common::proc::read_lossy;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What the descriptors of a process reveal.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// Segments that the process has open, mapped or not.
    pub segments: Vec<(SegmentKey, File)>,
    /// Whether devices may write to its memory: it has an `O_DIRECT` file, or an io_uring with registered
    /// buffers.
    pub direct_io: bool,
}

/// Looks through the descriptors of a process. One that is closed meanwhile is not an error.
///
/// # Errors
/// Errors of `/proc`; `NotFound` or `ESRCH` if the process is gone. Every error counts, because a descriptor
/// that cannot be inspected might hold memory.
pub fn descriptors(pid: i32, mounts: &KernelMounts) -> io::Result<Descriptors> {
    let mut found = Descriptors::default();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let path = entry.path();
        let target = match fs::read_link(&path) {
            // The kernel does not report the path of a file if it is longer than a page.
            Err(error) if error.raw_os_error() == Some(libc::ENAMETOOLONG) => Ok("/".into()),
            other => other,
        };
        let Some(target) = unless_closed(target)? else {
            continue;
        };
        let target = target.as_os_str().as_encoded_bytes();
        if target.starts_with(b"/memfd:") {
            found.segments.extend(open_segment(&path, mounts)?);
        } else if target.starts_with(b"/") || target == b"anon_inode:[io_uring]" {
            let info = entry.file_name();
            let info = info.to_string_lossy();
            let info = unless_closed(read_lossy(format!("/proc/{pid}/fdinfo/{info}")))?;
            found.direct_io |= info.is_some_and(|info| does_direct_io(&info));
        }
    }
    Ok(found)
}

/// Opens the segment behind a descriptor; `None` if it is not a segment, or was closed.
fn open_segment(path: &Path, mounts: &KernelMounts) -> io::Result<Option<(SegmentKey, File)>> {
    // The type is checked before it is opened: a FIFO can have the name of a memfd, and opening it would
    // block.
    let Some(metadata) = unless_closed(fs::metadata(path))? else {
        return Ok(None);
    };
    let device = Device::from_raw(metadata.dev());
    if !mounts.holds(device) {
        return Ok(None);
    }
    let inode = metadata.ino();
    let file = unless_closed(File::open(path))?;
    Ok(file.map(|file| (SegmentKey { device, inode }, file)))
}

/// Returns `None` for the error that the kernel reports for a descriptor that was closed.
fn unless_closed<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns whether a device can write to memory through the descriptor whose `/proc/PID/fdinfo/N` has this
/// content.
#[must_use]
pub fn does_direct_io(info: &str) -> bool {
    info.lines().any(|line| {
        let Some((field, value)) = line.split_once(':') else {
            return false;
        };
        match field {
            "flags" => {
                i32::from_str_radix(value.trim(), 8).is_ok_and(|flags| flags & libc::O_DIRECT != 0)
            }
            "UserBufs" => value.trim().parse().is_ok_and(|buffers: u64| buffers > 0),
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn fdinfo_reveals_direct_io() {
        assert!(does_direct_io("pos:\t0\nflags:\t0140002\n"));
        assert!(!does_direct_io("pos:\t0\nflags:\t0100002\n"));
        assert!(does_direct_io("UserFiles:\t0\nUserBufs:\t3\n"));
        assert!(!does_direct_io("UserBufs:\t0\n"));
    }

    #[test]
    fn file_with_a_path_longer_than_a_page_is_no_error() {
        use nix::fcntl::{OFlag, open, openat};
        use nix::sys::stat::{Mode, mkdirat};
        let root = std::env::temp_dir().join(format!("pageferry-long-{}", std::process::id()));
        fs::create_dir(&root).unwrap();
        let mut dir = open(&root, OFlag::O_DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..17 {
            let name = "d".repeat(250);
            mkdirat(&dir, name.as_str(), Mode::S_IRWXU).unwrap();
            dir = openat(&dir, name.as_str(), OFlag::O_DIRECTORY, Mode::empty()).unwrap();
        }
        let mounts = KernelMounts::probe().unwrap();
        let found = descriptors(std::process::id() as i32, &mounts);
        drop(dir);
        fs::remove_dir_all(&root).unwrap();
        found.unwrap();
    }

    #[test]
    fn memfd_is_found_by_its_descriptor() {
        let mounts = KernelMounts::probe().unwrap();
        let flags = nix::sys::memfd::MFdFlags::empty();
        let mut memfd = File::from(nix::sys::memfd::memfd_create("x", flags).unwrap());
        memfd.write_all(b"hello").unwrap();
        let inode = memfd.metadata().unwrap().ino();
        let found = descriptors(std::process::id() as i32, &mounts).unwrap();
        assert!(found.segments.iter().any(|(key, _)| key.inode == inode));
    }
}
