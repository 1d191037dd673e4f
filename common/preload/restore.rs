//! Preloaded into the `criu restore` of a lazy restore, ahead of libc. It makes CRIU use the memfds of the
//! receiver as shared segments instead of reading the segments from images. The receiver has already filled
//! these memfds.
//!
//! CRIU creates a memfd, sets its size, and then opens its pagemap (`pagemap-shmem-ID.img`) to read its
//! pages. At that point the library requests the memfd of that id from the receiver, whose socket is in the
//! directory of images, and replaces CRIU's memfd with it. The pagemap is empty, so CRIU continues with the
//! next step. The receiver checks whether all memfds were fetched.
//!
//! The library runs within CRIU, in any of the processes that are being restored.

#![no_std]

mod base;

use base::{__errno_location, number, syscall};
use base::{AF_UNIX, Address, O_CLOEXEC, SOCK_SEQPACKET, close, connect, socket};
use core::ffi::{c_char, c_int, c_long, c_void};
use core::sync::atomic::{AtomicI32, Ordering};

/// Name of the socket on which the receiver serves memfds.
const SOCKET: &[u8] = b"segments.socket\0";

const SOL_SOCKET: c_int = 1;
const SCM_RIGHTS: c_int = 1;
const MSG_NOSIGNAL: c_int = 0x4000;
const MSG_CMSG_CLOEXEC: c_int = 0x4000_0000;
const O_PATH: c_int = 0o10_000_000;
const SEEK_SET: c_int = 0;
const SEEK_END: c_int = 2;
const EIO: c_int = 5;

/// Number of the system call `ftruncate`.
#[cfg(target_arch = "x86_64")]
const FTRUNCATE: c_long = 77;
#[cfg(target_arch = "aarch64")]
const FTRUNCATE: c_long = 46;

/// Descriptor whose size CRIU set last, which is the memfd whose pagemap CRIU opens next.
static MEMFD: AtomicI32 = AtomicI32::new(-1);

#[repr(C)]
struct IoVec {
    base: *mut c_void,
    len: usize,
}

/// `struct msghdr` on 64-bit architectures.
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

/// Control message with one descriptor.
#[repr(C, align(8))]
struct Rights {
    len: usize,
    level: c_int,
    kind: c_int,
    fd: c_int,
}

unsafe extern "C" {
    fn send(fd: c_int, bytes: *const c_void, len: usize, flags: c_int) -> isize;
    fn recvmsg(fd: c_int, header: *mut MessageHeader, flags: c_int) -> isize;
    fn fchdir(fd: c_int) -> c_int;
    fn dup2(from: c_int, to: c_int) -> c_int;
}

/// # Safety
/// As for `ftruncate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate(fd: c_int, len: i64) -> c_int {
    MEMFD.store(fd, Ordering::Relaxed);
    // SAFETY: the arguments are those of the caller.
    unsafe { syscall(FTRUNCATE, fd, len) as c_int }
}

/// # Safety
/// As for `ftruncate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate64(fd: c_int, len: i64) -> c_int {
    // SAFETY: the contract is the same.
    unsafe { ftruncate(fd, len) }
}

/// The mode is optional in C, which in every ABI of Linux is the same as four arguments.
///
/// # Safety
/// As for `openat`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: u32) -> c_int {
    // SAFETY: the path of the caller is NUL-terminated.
    let segment = unsafe { segment_id(path.cast()) };
    if let Some(id) = segment {
        let memfd = MEMFD.swap(-1, Ordering::Relaxed);
        if memfd >= 0 && replace_memfd(dir, id, memfd).is_none() {
            // SAFETY: libc returns the address of the errno of this thread.
            unsafe { *__errno_location() = EIO };
            return -1;
        }
    }
    // SAFETY: the arguments are those of the caller.
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
    // SAFETY: the contract is the same.
    unsafe { openat(dir, path, flags, mode) }
}

/// Returns the id in a path that is the name of the pagemap of a segment.
///
/// # Safety
/// `path` must be NUL-terminated.
unsafe fn segment_id(path: *const u8) -> Option<u64> {
    let mut at = path;
    // SAFETY: a byte is read only if none before it was the terminator.
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

/// Replaces `memfd` with the memfd of the receiver for a segment, if the receiver has one. Returns `None` on
/// failure.
fn replace_memfd(dir: c_int, id: u64, memfd: c_int) -> Option<()> {
    let Some(peer) = request(dir, id) else {
        // The receiver serves no memfds.
        return Some(());
    };
    let fetched = recv_memfd(peer);
    // SAFETY: the descriptor is owned here, and closed once.
    unsafe { close(peer) };
    let Some(fetched) = fetched? else {
        return Some(());
    };
    let fits = size(fetched) == size(memfd);
    // SAFETY: CRIU keeps using the number, which may refer to any memfd. The other descriptor is owned here.
    let replaced = unsafe { fits && dup2(fetched, memfd) == memfd };
    // SAFETY: the descriptor is owned here, and closed once.
    unsafe { close(fetched) };
    replaced.then_some(())
}

/// Connects to the receiver and requests a segment; `None` if the receiver does not listen. The path of a
/// socket is limited to 108 bytes and cannot be relative to an open directory, so the working directory is
/// changed meanwhile.
fn request(dir: c_int, id: u64) -> Option<c_int> {
    let address = Address::new(SOCKET)?;
    // SAFETY: strings and structures are local and initialised, and descriptors are closed once.
    unsafe {
        let peer = socket(AF_UNIX, SOCK_SEQPACKET | O_CLOEXEC, 0);
        let previous = syscall(number::OPENAT, -100, c".".as_ptr(), O_PATH | O_CLOEXEC) as c_int;
        let connected = previous >= 0
            && fchdir(dir) == 0
            && connect(peer, &raw const address, size_of::<Address>() as u32) == 0;
        fchdir(previous);
        close(previous);
        let request = id.to_le_bytes();
        let sent = connected && send(peer, request.as_ptr().cast(), 8, MSG_NOSIGNAL) == 8;
        if !sent {
            close(peer);
        }
        sent.then_some(peer)
    }
}

/// Receives the response: one byte, and a descriptor if the receiver has the segment. `None` if there is no
/// response.
fn recv_memfd(peer: c_int) -> Option<Option<c_int>> {
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
    // SAFETY: everything that the header points to outlives the call.
    if unsafe { recvmsg(peer, &raw mut header, MSG_CMSG_CLOEXEC) } != 1 {
        return None;
    }
    let has_memfd = rights.level == SOL_SOCKET && rights.kind == SCM_RIGHTS && rights.fd >= 0;
    Some(has_memfd.then_some(rights.fd))
}

/// Returns the size of the file of a descriptor, bytes; negative on failure.
fn size(fd: c_int) -> c_long {
    // SAFETY: `lseek` accesses no memory.
    unsafe {
        let size = syscall(number::LSEEK, fd, 0i64, SEEK_END);
        syscall(number::LSEEK, fd, 0i64, SEEK_SET);
        size
    }
}
