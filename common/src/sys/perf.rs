//! Performance events. They are not read: keeping one open saves time elsewhere.

use std::os::fd::{FromRawFd, OwnedFd};

/// Keeps per-task performance events enabled in the kernel.
///
/// To enable them, the kernel patches its own code and waits for all processors, which takes about 10 ms. It
/// does so for the first event, and CRIU creates one in the middle of every dump and restore, because its
/// breakpoints are such events. If one exists already, that time is saved.
#[derive(Debug)]
#[must_use]
pub struct TaskEvents {
    _event: Option<OwnedFd>,
}

impl TaskEvents {
    /// Creates an event. If the kernel does not permit or support it, nothing changes.
    pub fn keep() -> Self {
        const PERF_TYPE_SOFTWARE: u64 = 1;
        const PERF_COUNT_SW_DUMMY: u64 = 9;
        /// Excludes the kernel and the hypervisor, which would need more permission.
        const USER_ONLY: u64 = 1 << 5 | 1 << 6;
        const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
        // First version of `struct perf_event_attr`: type and size (32 bits each), the counter, and the flags
        // in the sixth word.
        let mut attributes = [0u64; 8];
        attributes[0] = PERF_TYPE_SOFTWARE | (size_of_val(&attributes) as u64) << 32;
        attributes[1] = PERF_COUNT_SW_DUMMY;
        attributes[5] = USER_ONLY;
        let (this_thread, any_cpu, no_group): (libc::pid_t, libc::c_int, libc::c_int) = (0, -1, -1);
        // SAFETY: the kernel reads as many bytes of the structure as its size field contains.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                attributes.as_ptr(),
                this_thread,
                any_cpu,
                no_group,
                PERF_FLAG_FD_CLOEXEC,
            )
        };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
        // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
        let event = fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        Self { _event: event }
    }
}
