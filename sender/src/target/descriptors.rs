//! What the descriptors of a process tell of its memory.

use crate::target::segment::SegmentKey;
use crate::target::vma::{Device, KernelMounts};
use pageferry_common::proc::read_lossy;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

/// What a process's descriptors tell of its memory.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// Segments it holds open, mapped or not.
    pub segments: Vec<(SegmentKey, File)>,
    /// It lets devices write into its memory: `O_DIRECT` files, io_uring's registered buffers.
    pub direct_io: bool,
}

/// Looks through the descriptors of a process. One that is closed meanwhile is no error.
///
/// # Errors
/// Those of `/proc`; `NotFound` or `ESRCH` if it is gone. What is not looked through might hold memory.
pub fn descriptors(pid: i32, mounts: &KernelMounts) -> io::Result<Descriptors> {
    let mut found = Descriptors::default();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let path = entry.path();
        let Ok(target) = fs::read_link(&path) else {
            continue;
        };
        let target = target.as_os_str().as_encoded_bytes();
        if target.starts_with(b"/memfd:") {
            // Looked at before it is opened: a FIFO may have any name, and would block.
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            let device = Device::from_raw(metadata.dev());
            if !mounts.holds(device) {
                continue;
            }
            match File::open(&path) {
                Ok(file) => {
                    let inode = metadata.ino();
                    found.segments.push((SegmentKey { device, inode }, file));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        } else if target.starts_with(b"/") || target == b"anon_inode:[io_uring]" {
            let info = entry.file_name();
            let info = info.to_string_lossy();
            let info = read_lossy(format!("/proc/{pid}/fdinfo/{info}")).unwrap_or_default();
            found.direct_io |= writes_past_page_tables(&info);
        }
    }
    Ok(found)
}

/// Whether `/proc/PID/fdinfo/N` tells of a descriptor through which a device writes memory.
#[must_use]
pub fn writes_past_page_tables(info: &str) -> bool {
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
    fn direct_io_shows_in_fdinfo() {
        assert!(writes_past_page_tables("pos:\t0\nflags:\t0140002\n"));
        assert!(!writes_past_page_tables("pos:\t0\nflags:\t0100002\n"));
        assert!(writes_past_page_tables("UserFiles:\t0\nUserBufs:\t3\n"));
        assert!(!writes_past_page_tables("UserBufs:\t0\n"));
    }

    #[test]
    fn a_memfd_is_found_by_its_descriptor() {
        let mounts = KernelMounts::probe().unwrap();
        let flags = nix::sys::memfd::MFdFlags::empty();
        let mut memfd = File::from(nix::sys::memfd::memfd_create("x", flags).unwrap());
        memfd.write_all(b"hello").unwrap();
        let inode = memfd.metadata().unwrap().ino();
        let found = descriptors(std::process::id() as i32, &mounts).unwrap();
        assert!(found.segments.iter().any(|(key, _)| key.inode == inode));
    }
}
