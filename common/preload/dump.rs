//! Loaded into the one `criu dump` of a hand-over, ahead of libc: that CRIU sees no populated pages,
//! and so spends no time on memory while the tree is frozen. The memory is sent by `send`, which is
//! also the page server that this CRIU waits for: without `send` its dump cannot succeed.
//!
//! CRIU finds pages in two ways, and both are answered with "none": `PAGEMAP_SCAN` on a process's
//! pagemap, and `SEEK_DATA` on a shared segment.
//!
//! It also tells `send` when the whole tree has come to a stop: when CRIU opens the first process's
//! `smaps`, before its own code gets into any process. `send` lists the mappings, and then CRIU goes on.
//! To make a process's `smaps` the kernel counts all its pages, which CRIU does not look at: if `send` has
//! left a `smaps-PID` without them beside this library, CRIU gets that.
//!
//! Everything else goes to the kernel as it is.
//!
//! It runs as part of CRIU, not of `send`.

#![no_std]

mod base;

use base::{AF_UNIX, Address, O_CLOEXEC, SOCK_SEQPACKET, close, connect, recv, socket};
use core::ffi::{c_char, c_int, c_long, c_ulong, c_void};
use core::sync::atomic::{AtomicBool, Ordering};


const PAGEMAP_SCAN: c_ulong = 0xc060_6610;
const SEEK_DATA: c_int = 3;
const ENXIO: c_int = 6;
const AT_FDCWD: c_int = -100;

/// The socket where `send` is told that the tree has come to a stop: beside this library.
const SOCKET: &[u8] = b"stopped.socket\0";

static TOLD: AtomicBool = AtomicBool::new(false);

#[cfg(target_arch = "x86_64")]
mod number {
    pub const IOCTL: core::ffi::c_long = 16;
    pub const LSEEK: core::ffi::c_long = 8;
    pub const OPENAT: core::ffi::c_long = 257;
}
#[cfg(target_arch = "aarch64")]
mod number {
    pub const IOCTL: core::ffi::c_long = 29;
    pub const LSEEK: core::ffi::c_long = 62;
    pub const OPENAT: core::ffi::c_long = 56;
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
    fn getenv(name: *const u8) -> *const u8;
}

/// In C the mode is optional; no ABI of Linux tells that apart from four arguments.
///
/// # Safety
/// As of `openat`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: u32,
) -> c_int {
    // SAFETY: the caller's path is a string.
    if unsafe { is(path.cast(), b"smaps\0") } {
        if !TOLD.swap(true, Ordering::Relaxed) {
            tell();
        }
        let short = short_smaps(dir, flags);
        if short >= 0 {
            return short;
        }
    }
    // SAFETY: the arguments are the caller's.
    unsafe { syscall(number::OPENAT, dir, path, flags, mode) as c_int }
}

/// # Safety
/// As of `openat`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: u32,
) -> c_int {
    // SAFETY: the same.
    unsafe { openat64(dir, path, flags, mode) }
}

/// Whether a string is `expected`, which ends with a zero.
///
/// # Safety
/// `string` is one.
unsafe fn is(string: *const u8, expected: &[u8]) -> bool {
    // SAFETY: a byte is only read if all before it were others than the string's end.
    (0..expected.len()).all(|at| unsafe { *string.add(at) } == expected[at])
}

/// Tells `send` that the tree has come to a stop, and waits for its word, or its end. If nobody is there,
/// all that is lost is time.
fn tell() {
    let mut path = [0; 108];
    let Some(address) = beside_library(&mut path, SOCKET).and_then(Address::of) else {
        return;
    };
    // SAFETY: structures are ours and whole; the descriptor is closed once.
    unsafe {
        let peer = socket(AF_UNIX, SOCK_SEQPACKET | O_CLOEXEC, 0);
        if connect(peer, &raw const address, size_of::<Address>() as u32) == 0 {
            let mut word = 0u8;
            recv(peer, (&raw mut word).cast(), 1, 0);
        }
        close(peer);
    }
}

/// Opens what `send` has left of the process whose `/proc/PID` is open as `dir`; negative if that is nothing.
fn short_smaps(dir: c_int, flags: c_int) -> c_int {
    const PREFIX: &[u8] = b"smaps-";
    let mut target = [0; 64];
    let Some(target) = target_of(dir, &mut target) else {
        return -1;
    };
    let digits = target.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    let pid = &target[target.len() - digits..];
    let mut name = [0; 32];
    let len = PREFIX.len() + pid.len();
    // With its end.
    if pid.is_empty() || len >= name.len() {
        return -1;
    }
    name[..PREFIX.len()].copy_from_slice(PREFIX);
    name[PREFIX.len()..len].copy_from_slice(pid);
    let mut path = [0; 108];
    match beside_library(&mut path, &name[..=len]) {
        // SAFETY: the path is ours, and ends with a zero.
        Some(path) => unsafe {
            syscall(number::OPENAT, AT_FDCWD, path.as_ptr(), flags, 0) as c_int
        },
        None => -1,
    }
}

/// The path of a file in the directory of this library; `None` if it is too long. `name` ends with a zero.
fn beside_library<'a>(path: &'a mut [u8; 108], name: &[u8]) -> Option<&'a [u8]> {
    // SAFETY: it is a string, or none.
    let library = unsafe { getenv(c"LD_PRELOAD".as_ptr().cast()) };
    if library.is_null() {
        return None;
    }
    let mut dir = 0;
    for at in 0..path.len() - name.len() {
        // SAFETY: a byte is only read if none before it was the string's end.
        match unsafe { *library.add(at) } {
            0 => break,
            byte => path[at] = byte,
        }
        if path[at] == b'/' {
            dir = at + 1;
        }
    }
    path[dir..dir + name.len()].copy_from_slice(name);
    Some(&path[..dir + name.len()])
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
    let mut target = [0; 64];
    let target = target_of(fd, &mut target).unwrap_or_default();
    [
        &b"/memfd:"[..],
        b"/dev/zero (deleted)",
        b"/SYSV",
        b"/anon_hugepage",
    ]
    .iter()
    .any(|prefix| target.starts_with(prefix))
}

/// What `/proc` says that a descriptor is of, as far as there is room.
fn target_of(fd: c_int, target: &mut [u8; 64]) -> Option<&[u8]> {
    let mut path = *b"/proc/self/fd/0000000000\0";
    let digits = b"/proc/self/fd/".len();
    let mut rest = fd;
    if fd < 0 {
        return None;
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
    // SAFETY: both are buffers of ours, the path ends with a zero.
    let len = unsafe { readlink(path.as_ptr(), target.as_mut_ptr(), target.len()) };
    target.get(..usize::try_from(len).ok()?)
}
