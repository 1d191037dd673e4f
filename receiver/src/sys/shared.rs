//! Processes that share one table of descriptors and a few words of memory, so that what one of them holds
//! survives it.

use nix::errno::Errno;
use pageferry_common::sys::pidfd;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::AtomicU64;

/// Words of shared memory: less than a page.
pub type Words = [AtomicU64; 32];

/// Message that the kernel writes to shared memory: a `struct uffd_msg`, a word of a stream, or a control
/// message with a descriptor.
pub type Message = [AtomicU64; 4];

/// Exit code of a child that panicked, as of any Rust program.
const PANICKED: i32 = 101;

/// Maps zeroed words that the children of [`spawn`] share. They stay mapped until the process exits.
///
/// # Errors
/// The kernel's, if there is no memory.
pub fn words() -> io::Result<&'static Words> {
    let (access, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_ANONYMOUS,
    );
    // SAFETY: a new mapping overlaps no other memory.
    let at = unsafe { libc::mmap(ptr::null_mut(), size_of::<Words>(), access, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping is long enough, aligned to a page, zeroed (a valid value of every word), and never
    // unmapped. The words are atomic, so other processes may change them.
    Ok(unsafe { &*at.cast() })
}

/// Populates and locks the words in the memory of this process, so that the kernel can write to them without
/// a page fault, which fails in a process that is being killed. It may be forbidden; then a lost message is a
/// matter of bad luck with a page being moved at that moment.
pub fn lock(words: &'static Words) {
    // SAFETY: locking changes no content.
    unsafe { libc::mlock(words.as_ptr().cast(), size_of_val(words)) };
}

/// Reads at most `len` bytes from a descriptor straight to shared memory. Returns their number.
///
/// # Errors
/// Those of `read(2)`.
///
/// # Panics
/// If `len` is more than a message has.
pub fn read(fd: BorrowedFd<'_>, to: &Message, len: usize) -> io::Result<usize> {
    assert!(len <= size_of_val(to), "a message has room for it");
    // SAFETY: the kernel writes at most `len` bytes to `to`, which is as long, and whose words are atomic.
    let read = unsafe { libc::read(fd.as_raw_fd(), to.as_ptr().cast_mut().cast(), len) };
    Ok(Errno::result(read)?.cast_unsigned())
}

/// Receives one byte from a Unix stream and the control message with it straight to shared memory, for
/// [`received_fd`]. Returns the number of bytes.
///
/// # Errors
/// Those of `recvmsg(2)`.
pub fn receive_fd(socket: BorrowedFd<'_>, to: &Message) -> io::Result<usize> {
    let mut byte = 0u8;
    let mut part = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // SAFETY: a msghdr of zeros is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = to.as_ptr().cast_mut().cast();
    // SAFETY: this computes a length.
    header.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as usize;
    assert!(header.msg_controllen <= size_of_val(to));
    // SAFETY: the kernel writes one byte to `byte`, and at most `msg_controllen` bytes to `to`, which is
    // longer, and whose words are atomic.
    let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    Ok(Errno::result(len)?.cast_unsigned())
}

/// Returns the descriptor in what [`receive_fd`] has received; `None` if there was none.
#[must_use]
pub fn received_fd(message: [u64; 4]) -> Option<RawFd> {
    // It follows the 16 bytes of a cmsghdr.
    let bytes = message[2].to_ne_bytes();
    let fd = RawFd::from_ne_bytes(bytes[..4].try_into().expect("four bytes"));
    (fd > 0).then_some(fd)
}

/// Returns a descriptor of the shared table by its number. Another process may have opened it.
#[must_use]
pub fn held(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: the table belongs to all of its processes, and this borrows what one of them has opened. A
    // number that is not open makes the calls on it fail.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Closes a descriptor of the shared table, for all of its processes.
pub fn close(fd: RawFd) {
    // SAFETY: nothing in these processes owns it: they refer to it by its number only.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}

/// Returns the number of a new descriptor that becomes readable when this process dies.
///
/// # Errors
/// Those of `pidfd_open(2)`.
pub fn own_pidfd() -> io::Result<RawFd> {
    let own = std::process::id().cast_signed();
    pidfd::open(own).map(IntoRawFd::into_raw_fd)
}

/// Lets the kernel reap all children of this process and of the children of [`spawn`].
pub fn ignore_children() {
    // SAFETY: SIG_IGN is not a function that could be called at a bad time.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Runs a function in a child process, which exits with its result. The child has a copy of the memory of
/// this process, which must have one thread only, and shares its table of descriptors: whatever one of them
/// opens or closes from now on, the other has opened or closed.
///
/// # Errors
/// Those of `clone(2)`.
pub fn spawn(run: impl FnOnce() -> i32) -> io::Result<()> {
    let flags = libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: as fork: the child has its own memory and stack. This process has one thread, so that no other
    // one can have left a lock held in the child.
    let pid = Errno::result(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })?;
    if pid == 0 {
        let code = catch_unwind(AssertUnwindSafe(run)).unwrap_or(PANICKED);
        // Never back up the stack: the destructors there would close what the parent still uses.
        // SAFETY: it ends this process, whose memory nothing shares but words that are always valid.
        unsafe { libc::_exit(code) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::Ordering::SeqCst;

    #[test]
    fn messages_and_descriptors_arrive_in_shared_memory() {
        let words = words().unwrap();
        lock(words);
        let message: &Message = words[4..8].try_into().unwrap();
        let content = || message.each_ref().map(|word| word.load(SeqCst));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&7u64.to_ne_bytes()).unwrap();
        assert_eq!(read(ours.as_fd(), message, 8).unwrap(), 8);
        assert_eq!(content(), [7, 0, 0, 0]);

        message.iter().for_each(|word| word.store(0, SeqCst));
        theirs.write_all(&[0]).unwrap();
        assert_eq!(receive_fd(ours.as_fd(), message).unwrap(), 1);
        assert_eq!(received_fd(content()), None);
        let file = tempfile::tempfile().unwrap();
        pageferry_common::sys::fdpass::send(theirs.as_fd(), &[0], Some(file.as_fd())).unwrap();
        assert_eq!(receive_fd(ours.as_fd(), message).unwrap(), 1);
        let fd = received_fd(content()).unwrap();
        assert!(nix::sys::stat::fstat(held(fd)).is_ok());
        close(fd);
        drop(theirs);
        assert_eq!(receive_fd(ours.as_fd(), message).unwrap(), 0);
    }
}
