//! Performance events, for the sake of what only the first one costs.

use std::os::fd::{FromRawFd, OwnedFd};

/// While one lives, the kernel looks for events of tasks whenever it switches between them. To begin with
/// that takes it some 10 ms (it changes its own code, and waits until all processors have seen that), and
/// CRIU begins with it in the middle of every dump and every restore: its breakpoints are such events.
#[derive(Debug)]
#[must_use]
pub struct TaskEvents {
    _event: Option<OwnedFd>,
}

impl TaskEvents {
    /// From now on. Best effort: without permission, or such events, nothing changes.
    pub fn keep() -> Self {
        const PERF_TYPE_SOFTWARE: u64 = 1;
        const PERF_COUNT_SW_DUMMY: u64 = 9;
        /// Neither the kernel nor a hypervisor, which would take more permission.
        const USER_ONLY: u64 = 1 << 5 | 1 << 6;
        const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
        // The kernel's `struct perf_event_attr` of its first version: type and size, 32 bits each, what is
        // counted, and as the sixth word its flags.
        let mut attributes = [0u64; 8];
        attributes[0] = PERF_TYPE_SOFTWARE | (size_of_val(&attributes) as u64) << 32;
        attributes[1] = PERF_COUNT_SW_DUMMY;
        attributes[5] = USER_ONLY;
        let (this_thread, any_cpu, no_group): (libc::pid_t, libc::c_int, libc::c_int) = (0, -1, -1);
        // SAFETY: the kernel reads as many bytes of the structure as that says it has.
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
        // SAFETY: the kernel just made this descriptor for us; nobody else knows it.
        let event = fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        Self { _event: event }
    }
}
