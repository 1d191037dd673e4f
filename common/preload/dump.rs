//! Preloaded into the `criu dump` of a hand-over, ahead of libc. It makes CRIU see no populated pages, so
//! that CRIU spends no time on memory while the tree is frozen. The sender copies the memory itself. The
//! sender is also the page server of this dump, so the dump cannot succeed without the sender.
//!
//! CRIU finds pages in two ways, `PAGEMAP_SCAN` on the pagemap of a process and `SEEK_DATA` on a shared
//! segment. Both return no pages here. CRIU also finds guard regions with `PAGEMAP_SCAN`, which are state of the
//! mappings: those are returned.
//!
//! The library also notifies the sender when the whole tree is stopped, that is, when CRIU opens the first
//! `smaps`, before CRIU's own code is in any process. The sender then lists the mappings, and CRIU waits for
//! that.
//!
//! For `smaps` the kernel counts all pages of a process, which CRIU does not use. If the sender has left a
//! `smaps-PID` without these counts beside this library, CRIU reads that file instead.
//!
//! All other calls are passed to the kernel unchanged. The library runs within CRIU, not within the sender.

#![no_std]

mod base;

use base::{__errno_location, number, syscall};
use base::{AF_UNIX, Address, O_CLOEXEC, SOCK_SEQPACKET, close, connect, recv, socket};
use core::ffi::{c_char, c_int, c_long, c_ulong, c_void};
use core::sync::atomic::{AtomicBool, Ordering};

const PAGEMAP_SCAN: c_ulong = 0xc060_6610;
const SEEK_DATA: c_int = 3;
const ENXIO: c_int = 6;
const AT_FDCWD: c_int = -100;

/// Name of the socket, beside this library, on which the sender is notified that the tree is stopped.
const SOCKET: &[u8] = b"stopped.socket\0";

static NOTIFIED: AtomicBool = AtomicBool::new(false);

/// Number of the system call `ioctl`.
#[cfg(target_arch = "x86_64")]
const IOCTL: c_long = 16;
#[cfg(target_arch = "aarch64")]
const IOCTL: c_long = 29;

/// Category of pages in guard regions (Linux 6.15).
const PAGE_IS_GUARD: u64 = 1 << 8;

/// `struct pm_scan_arg`, without its last field.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
}

impl ScanArg {
    /// Whether the scan is for guard regions.
    fn wants_guards(&self) -> bool {
        self.category_mask & !self.category_inverted & PAGE_IS_GUARD != 0
    }
}

unsafe extern "C" {
    fn readlink(path: *const u8, buffer: *mut u8, size: usize) -> isize;
    fn getenv(name: *const u8) -> *const u8;
}

/// The mode is optional in C, which in every ABI of Linux is the same as four arguments.
///
/// # Safety
/// As for `openat`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: u32,
) -> c_int {
    // SAFETY: the path of the caller is NUL-terminated.
    if unsafe { equals(path.cast(), b"smaps\0") } {
        if !NOTIFIED.swap(true, Ordering::Relaxed) {
            notify_sender();
        }
        let stub = open_smaps_stub(dir, flags);
        if stub >= 0 {
            return stub;
        }
    }
    // SAFETY: the arguments are those of the caller.
    unsafe { syscall(number::OPENAT, dir, path, flags, mode) as c_int }
}

/// # Safety
/// As for `openat`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: u32) -> c_int {
    // SAFETY: the contract is the same.
    unsafe { openat64(dir, path, flags, mode) }
}

/// Returns whether a string equals `expected`, which is NUL-terminated.
///
/// # Safety
/// `string` must be NUL-terminated.
unsafe fn equals(string: *const u8, expected: &[u8]) -> bool {
    // SAFETY: a byte is read only if none before it was the terminator.
    (0..expected.len()).all(|at| unsafe { *string.add(at) } == expected[at])
}

/// Notifies the sender that the tree is stopped, and waits until the sender replies or exits. If the sender
/// does not listen, the dump only takes longer.
fn notify_sender() {
    let mut path = [0; 108];
    let Some(address) = beside_library(&mut path, SOCKET).and_then(Address::new) else {
        return;
    };
    // SAFETY: the structures are local and initialised, and the descriptor is closed once.
    unsafe {
        let peer = socket(AF_UNIX, SOCK_SEQPACKET | O_CLOEXEC, 0);
        if connect(peer, &raw const address, size_of::<Address>() as u32) == 0 {
            let mut reply = 0u8;
            recv(peer, (&raw mut reply).cast(), 1, 0);
        }
        close(peer);
    }
}

/// Opens the `smaps-PID` of the process whose `/proc/PID` is open as `dir`; negative if the sender left none.
fn open_smaps_stub(dir: c_int, flags: c_int) -> c_int {
    const PREFIX: &[u8] = b"smaps-";
    let mut target = [0; 64];
    let Some(target) = link_target(dir, &mut target) else {
        return -1;
    };
    let digits = target
        .iter()
        .rev()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    let pid = &target[target.len() - digits..];
    let mut name = [0; 32];
    let len = PREFIX.len() + pid.len();
    // The terminator needs one byte more.
    if pid.is_empty() || len >= name.len() {
        return -1;
    }
    name[..PREFIX.len()].copy_from_slice(PREFIX);
    name[PREFIX.len()..len].copy_from_slice(pid);
    let mut path = [0; 108];
    match beside_library(&mut path, &name[..=len]) {
        // SAFETY: the path is local and NUL-terminated.
        Some(path) => unsafe {
            syscall(number::OPENAT, AT_FDCWD, path.as_ptr(), flags, 0) as c_int
        },
        None => -1,
    }
}

/// Returns the path of a file in the directory of this library, from the value of `LD_PRELOAD`; `None` if it
/// is too long. `name` is NUL-terminated.
fn beside_library<'a>(path: &'a mut [u8; 108], name: &[u8]) -> Option<&'a [u8]> {
    // SAFETY: the argument is NUL-terminated.
    let library = unsafe { getenv(c"LD_PRELOAD".as_ptr().cast()) };
    if library.is_null() {
        return None;
    }
    let mut dir = 0;
    for at in 0..path.len() - name.len() {
        // SAFETY: a byte is read only if none before it was the terminator.
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

/// The third argument is optional in C, which in every ABI of Linux is the same as three arguments.
///
/// # Safety
/// As for `ioctl`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    if request & 0xffff_ffff == PAGEMAP_SCAN && !argument.is_null() {
        // SAFETY: with this request, the argument points to such a structure.
        let scan = unsafe { &mut *argument.cast::<ScanArg>() };
        // A scan of an empty range only checks whether the kernel supports the request.
        if scan.start != scan.end && !scan.wants_guards() {
            scan.walk_end = scan.end;
            return 0;
        }
    }
    // SAFETY: the arguments are those of the caller.
    unsafe { syscall(IOCTL, fd, request, argument) as c_int }
}

/// # Safety
/// As for `lseek`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lseek(fd: c_int, offset: i64, whence: c_int) -> i64 {
    if whence == SEEK_DATA && is_segment(fd) {
        // SAFETY: libc returns the address of the errno of this thread.
        unsafe { *__errno_location() = ENXIO };
        return -1;
    }
    // SAFETY: the arguments are those of the caller.
    unsafe { syscall(number::LSEEK, fd, offset, whence) }
}

/// # Safety
/// As for `lseek`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lseek64(fd: c_int, offset: i64, whence: c_int) -> i64 {
    // SAFETY: the contract is the same.
    unsafe { lseek(fd, offset, whence) }
}

/// Returns whether a descriptor is of a segment without a name in a file system (anonymous shared memory,
/// memfd, System V), whose pages the sender copies. A deleted file of a tmpfs is not such a segment.
fn is_segment(fd: c_int) -> bool {
    let mut target = [0; 64];
    let target = link_target(fd, &mut target).unwrap_or_default();
    [
        &b"/memfd:"[..],
        b"/dev/zero (deleted)",
        b"/SYSV",
        b"/anon_hugepage",
    ]
    .iter()
    .any(|prefix| target.starts_with(prefix))
}

/// Returns the target of a descriptor's link in `/proc`, truncated to the buffer.
fn link_target(fd: c_int, target: &mut [u8; 64]) -> Option<&[u8]> {
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
    // The kernel does not accept leading zeros.
    let mut from = digits;
    while from < path.len() - 2 && path[from] == b'0' {
        from += 1;
    }
    path.copy_within(from.., digits);
    // SAFETY: both buffers are local, and the path is NUL-terminated.
    let len = unsafe { readlink(path.as_ptr(), target.as_mut_ptr(), target.len()) };
    target.get(..usize::try_from(len).ok()?)
}
