//! Loaded into the one `criu dump` of a hand-over, ahead of libc: that CRIU sees no populated pages,
//! and so spends no time on memory while the tree is frozen. The memory is sent by `send`, which is
//! also the page server that this CRIU waits for: without `send` its dump cannot succeed.
//!
//! CRIU finds pages in two ways, and both are answered with "none": `PAGEMAP_SCAN` on a process's
//! pagemap, and `SEEK_DATA` on a shared segment. Everything else goes to the kernel as it is.
//!
//! It runs as part of CRIU, not of `send`.

#![no_std]

mod base;

use core::ffi::{c_int, c_long, c_ulong, c_void};

const PAGEMAP_SCAN: c_ulong = 0xc060_6610;
const SEEK_DATA: c_int = 3;
const ENXIO: c_int = 6;

#[cfg(target_arch = "x86_64")]
mod number {
    pub const IOCTL: core::ffi::c_long = 16;
    pub const LSEEK: core::ffi::c_long = 8;
}
#[cfg(target_arch = "aarch64")]
mod number {
    pub const IOCTL: core::ffi::c_long = 29;
    pub const LSEEK: core::ffi::c_long = 62;
}

/// The kernel's `struct pm_scan_arg`, as far as it is touched.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
}

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn __errno_location() -> *mut c_int;
    fn readlink(path: *const u8, buffer: *mut u8, size: usize) -> isize;
}

/// In C it takes any number of arguments; no ABI of Linux tells that apart from three.
///
/// # Safety
/// As of `ioctl`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    if request & 0xffff_ffff == PAGEMAP_SCAN && !argument.is_null() {
        // SAFETY: the caller passes such a structure with this request, as the kernel wants it.
        let scan = unsafe { &mut *argument.cast::<ScanArg>() };
        // A scan of nothing asks whether the kernel has it.
        if scan.start != scan.end {
            scan.walk_end = scan.end;
            return 0;
        }
    }
    // SAFETY: the arguments are the caller's.
    unsafe { syscall(number::IOCTL, fd, request, argument) as c_int }
}

/// # Safety
/// As of `lseek`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lseek(fd: c_int, offset: i64, whence: c_int) -> i64 {
    if whence == SEEK_DATA && is_segment(fd) {
        // SAFETY: libc's own errno of this thread.
        unsafe { *__errno_location() = ENXIO };
        return -1;
    }
    // SAFETY: the arguments are the caller's.
    unsafe { syscall(number::LSEEK, fd, offset, whence) }
}

/// # Safety
/// As of `lseek`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lseek64(fd: c_int, offset: i64, whence: c_int) -> i64 {
    // SAFETY: the same.
    unsafe { lseek(fd, offset, whence) }
}

/// Whether a descriptor is of a segment without a name in any file system (anonymous shared memory,
/// memfd, System V): of those `send` has the pages. A deleted file of a tmpfs is none.
fn is_segment(fd: c_int) -> bool {
    let mut path = *b"/proc/self/fd/0000000000\0";
    let digits = b"/proc/self/fd/".len();
    let mut rest = fd;
    if fd < 0 {
        return false;
    }
    for at in (digits..path.len() - 1).rev() {
        path[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    // The kernel takes no leading zeros.
    let mut from = digits;
    while from < path.len() - 2 && path[from] == b'0' {
        from += 1;
    }
    path.copy_within(from.., digits);
    let mut target = [0u8; 64];
    // SAFETY: both are buffers of ours, the path ends with a zero.
    let len = unsafe { readlink(path.as_ptr(), target.as_mut_ptr(), target.len()) };
    let target = &target[..usize::try_from(len).unwrap_or(0)];
    [
        &b"/memfd:"[..],
        b"/dev/zero (deleted)",
        b"/SYSV",
        b"/anon_hugepage",
    ]
    .iter()
    .any(|prefix| target.starts_with(prefix))
}
