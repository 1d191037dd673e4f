//! Loaded into the `criu restore` of a process that runs ahead of its memory, before libc: that shared
//! segments need not be read. `receive` has them as memfds already, complete, and they take the place of
//! those that CRIU makes.
//!
//! CRIU makes a memfd, gives it its size, and then opens its pagemap (`pagemap-shmem-ID.img`) to read its
//! pages. At that point we ask `receive`, whose socket is in the directory of images, for its memfd of
//! that id, and put it in the place of CRIU's. The pagemap is empty then, and CRIU goes on with what comes
//! after. Whether all were fetched is for `receive` to see.
//!
//! It runs as part of CRIU, in any of the processes that are being restored.

#![no_std]

mod base;

use base::{AF_UNIX, Address, O_CLOEXEC, SOCK_SEQPACKET, close, connect, socket};
use core::ffi::{c_char, c_int, c_long, c_void};
use core::sync::atomic::{AtomicI32, Ordering};

/// The socket where `receive` gives its memfds.
const SOCKET: &[u8] = b"segments.socket\0";

const SOL_SOCKET: c_int = 1;
const SCM_RIGHTS: c_int = 1;
const MSG_NOSIGNAL: c_int = 0x4000;
const MSG_CMSG_CLOEXEC: c_int = 0x4000_0000;
const O_PATH: c_int = 0o10_000_000;
const SEEK_SET: c_int = 0;
const SEEK_END: c_int = 2;
const EIO: c_int = 5;

#[cfg(target_arch = "x86_64")]
mod number {
    pub const FTRUNCATE: core::ffi::c_long = 77;
    pub const OPENAT: core::ffi::c_long = 257;
    pub const LSEEK: core::ffi::c_long = 8;
}
#[cfg(target_arch = "aarch64")]
mod number {
    pub const FTRUNCATE: core::ffi::c_long = 46;
    pub const OPENAT: core::ffi::c_long = 56;
    pub const LSEEK: core::ffi::c_long = 62;
}

/// The descriptor that CRIU gave a size last: the memfd whose pagemap it opens next.
static MEMFD: AtomicI32 = AtomicI32::new(-1);

#[repr(C)]
struct IoVec {
    base: *mut c_void,
    len: usize,
}

/// libc's `struct msghdr`, the kernel's on 64 bits.
#[repr(C)]
struct MessageHeader {
    name: *mut c_void,
    name_len: u32,
    parts: *mut IoVec,
    parts_len: usize,
    control: *mut c_void,
    control_len: usize,
    flags: c_int,
}

/// A control message with one descriptor.
#[repr(C, align(8))]
struct Rights {
    len: usize,
    level: c_int,
    kind: c_int,
    fd: c_int,
}

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn __errno_location() -> *mut c_int;
    fn send(fd: c_int, bytes: *const c_void, len: usize, flags: c_int) -> isize;
    fn recvmsg(fd: c_int, header: *mut MessageHeader, flags: c_int) -> isize;
    fn fchdir(fd: c_int) -> c_int;
    fn dup2(from: c_int, to: c_int) -> c_int;
}

/// # Safety
/// As of `ftruncate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate(fd: c_int, len: i64) -> c_int {
    MEMFD.store(fd, Ordering::Relaxed);
    // SAFETY: the arguments are the caller's.
    unsafe { syscall(number::FTRUNCATE, fd, len) as c_int }
}

/// # Safety
/// As of `ftruncate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate64(fd: c_int, len: i64) -> c_int {
    // SAFETY: the same.
    unsafe { ftruncate(fd, len) }
}

/// In C the mode is optional; no ABI of Linux tells that apart from four arguments.
///
/// # Safety
/// As of `openat`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: u32,
) -> c_int {
    // SAFETY: the caller's path is a string.
    let segment = unsafe { segment_of(path.cast()) };
    if let Some(id) = segment {
        let memfd = MEMFD.swap(-1, Ordering::Relaxed);
        if memfd >= 0 && put_in_place(dir, id, memfd).is_none() {
            // SAFETY: libc's own errno of this thread.
            unsafe { *__errno_location() = EIO };
            return -1;
        }
    }
    // SAFETY: the arguments are the caller's.
    unsafe { syscall(number::OPENAT, dir, path, flags, mode) as c_int }
}

/// # Safety
/// As of `openat`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: u32,
) -> c_int {
    // SAFETY: the same.
    unsafe { openat(dir, path, flags, mode) }
}

/// The id in the name of a segment's pagemap.
///
/// # Safety
/// `path` is a string.
unsafe fn segment_of(path: *const u8) -> Option<u64> {
    let mut at = path;
    // SAFETY: a byte is only read if all before it were others than the string's end.
    let mut next = || unsafe {
        let byte = *at;
        at = at.add(1);
        byte
    };
    for &expected in b"pagemap-shmem-" {
        if next() != expected {
            return None;
        }
    }
    let mut id = 0u64;
    loop {
        match next() {
            digit @ b'0'..=b'9' => {
                id = id.wrapping_mul(10).wrapping_add(u64::from(digit - b'0'));
            }
            b'.' => return Some(id),
            _ => return None,
        }
    }
}

/// Puts the memfd that `receive` has of a segment, if it has one, in the place of `memfd`. `None` if that
/// fails.
fn put_in_place(dir: c_int, id: u64, memfd: c_int) -> Option<()> {
    let Some(peer) = ask(dir, id) else {
        // Nobody is there to give any.
        return Some(());
    };
    let fetched = receive(peer);
    // SAFETY: it is ours.
    unsafe { close(peer) };
    let Some(fetched) = fetched? else {
        return Some(());
    };
    let fits = size(fetched) == size(memfd);
    // SAFETY: CRIU goes on to use the number, whatever is behind it. The other is ours.
    let placed = unsafe { fits && dup2(fetched, memfd) == memfd };
    // SAFETY: it is ours.
    unsafe { close(fetched) };
    placed.then_some(())
}

/// Connects to `receive` and asks for a segment; `None` if there is nobody. A socket's path has little
/// room, and cannot be said to be in a directory that is open: so we go there.
fn ask(dir: c_int, id: u64) -> Option<c_int> {
    let address = Address::of(SOCKET)?;
    // SAFETY: strings and structures are ours and whole, descriptors are closed once.
    unsafe {
        let peer = socket(AF_UNIX, SOCK_SEQPACKET | O_CLOEXEC, 0);
        let here = syscall(number::OPENAT, -100, c".".as_ptr(), O_PATH | O_CLOEXEC) as c_int;
        let connected = here >= 0
            && fchdir(dir) == 0
            && connect(peer, &raw const address, size_of::<Address>() as u32) == 0;
        fchdir(here);
        close(here);
        let question = id.to_le_bytes();
        let asked = connected && send(peer, question.as_ptr().cast(), 8, MSG_NOSIGNAL) == 8;
        if !asked {
            close(peer);
        }
        asked.then_some(peer)
    }
}

/// Receives the answer: a byte, and a descriptor if it has that segment. `None` if there is no answer.
fn receive(peer: c_int) -> Option<Option<c_int>> {
    let mut byte = 0u8;
    let mut part = IoVec {
        base: (&raw mut byte).cast(),
        len: 1,
    };
    let mut rights = Rights {
        len: 0,
        level: 0,
        kind: 0,
        fd: -1,
    };
    let mut header = MessageHeader {
        name: core::ptr::null_mut(),
        name_len: 0,
        parts: &raw mut part,
        parts_len: 1,
        control: (&raw mut rights).cast(),
        control_len: size_of::<Rights>(),
        flags: 0,
    };
    // SAFETY: all that it points to outlives the call.
    if unsafe { recvmsg(peer, &raw mut header, MSG_CMSG_CLOEXEC) } != 1 {
        return None;
    }
    let has = rights.level == SOL_SOCKET && rights.kind == SCM_RIGHTS && rights.fd >= 0;
    Some(has.then_some(rights.fd))
}


/// A descriptor's size, bytes; negative if it has none.
fn size(fd: c_int) -> c_long {
    // SAFETY: numbers only.
    unsafe {
        let size = syscall(number::LSEEK, fd, 0i64, SEEK_END);
        syscall(number::LSEEK, fd, 0i64, SEEK_SET);
        size
    }
}
