//! Mounts the cgroup v2 hierarchy where no other program sees it.

use super::check;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null;

/// Returns the root directory of a detached mount of the cgroup v2 hierarchy. Paths below it are those of
/// `/proc/PID/cgroup`. Closing the descriptor unmounts it.
///
/// # Errors
/// `ENODEV` if the kernel has no cgroup v2, `EPERM` without `CAP_SYS_ADMIN`.
pub fn mount_v2() -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string. The call returns a new descriptor, which nothing else owns.
    let context = unsafe {
        let fd = libc::syscall(libc::SYS_fsopen, c"cgroup2".as_ptr(), libc::FSOPEN_CLOEXEC);
        OwnedFd::from_raw_fd(check(fd)? as i32)
    };
    let context = context.as_raw_fd();
    let create = libc::FSCONFIG_CMD_CREATE;
    // SAFETY: this command takes no key and no value.
    check(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context,
            create,
            null::<u8>(),
            null::<u8>(),
            0,
        )
    })?;
    let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    // SAFETY: the call takes no pointers. It returns a new descriptor, which nothing else owns.
    unsafe {
        let fd = libc::syscall(
            libc::SYS_fsmount,
            context,
            libc::FSMOUNT_CLOEXEC,
            attributes,
        );
        Ok(OwnedFd::from_raw_fd(check(fd)? as i32))
    }
}
