//! userfaultfd as received from CRIU: a thread of a restored process that touches a missing page waits until
//! the receiver has filled it.

use super::shared::{self, Message};
use nix::errno::Errno;
use pageferry_common::sys::uffd::Userfaultfd;
use pageferry_common::{PAGE_SIZE, PageRange};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;

/// Size of `struct uffd_msg`, in bytes.
const EVENT_BYTES: usize = 32;

/// Number of pages at the bottom of the address space of which the kernel may keep some unmapped.
const LOW_PAGES: u64 = 32;

/// `struct uffdio_copy`.
#[repr(C)]
struct UffdioCopy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    /// Number of bytes copied, or a negated errno.
    copied: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct UffdioZeropage {
    start: u64,
    len: u64,
    mode: u64,
    zeroed: i64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct UffdioWriteprotect {
    start: u64,
    len: u64,
    mode: u64,
}

/// The registered memory of a restored process. Its descriptor is in a table that processes share
/// ([`super::shared`]), so it stays open until [`Uffd::close`].
#[derive(Debug)]
pub struct Uffd(ManuallyDrop<Userfaultfd>);

/// Change to the registered memory. Except for a fault, the thread that caused it continues once the event
/// was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// The process forked. The child has memory of its own, registered in the same way, with this descriptor.
    Fork(RawFd),
    /// A mapping was moved.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A range was discarded or unmapped.
    Gone {
        /// Address of the first byte.
        start: u64,
        /// Address behind the last byte.
        end: u64,
    },
}

impl Event {
    /// Parses the `struct uffd_msg` of [`Uffd::read`].
    ///
    /// # Errors
    /// An event of an unknown kind.
    pub fn parse(message: [u64; 4]) -> io::Result<Self> {
        let [kind, one, two, three] = message;
        match kind.to_ne_bytes()[0] {
            EVENT_PAGEFAULT => Ok(Self::Fault(two & !(PAGE_SIZE - 1))),
            EVENT_FORK => {
                let bytes = one.to_ne_bytes();
                let fd = RawFd::from_ne_bytes(bytes[..4].try_into().expect("four bytes"));
                Ok(Self::Fork(fd))
            }
            EVENT_REMAP => Ok(Self::Remap {
                from: one,
                to: two,
                len: three,
            }),
            EVENT_REMOVE | EVENT_UNMAP => Ok(Self::Gone {
                start: one,
                end: two,
            }),
            other => {
                let what = format!("unexpected userfaultfd event {other:#x}");
                Err(io::Error::other(what))
            }
        }
    }
}

impl Uffd {
    /// Wraps a userfaultfd in the shared table, whose creator has done the handshake with the kernel.
    #[must_use]
    pub fn held(fd: RawFd) -> Self {
        // SAFETY: it is never dropped, only closed by `close`.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Self(ManuallyDrop::new(Userfaultfd::after_handshake(fd)))
    }

    /// Closes it, for all processes that share the table. The last close of a userfaultfd unregisters the
    /// memory.
    pub fn close(self) {
        drop(ManuallyDrop::into_inner(self.0));
    }

    /// Returns the number of its descriptor.
    #[must_use]
    pub fn number(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }

    /// Reads the next event straight to shared memory, without blocking: it is there even if this process
    /// dies at once. Returns the number of bytes.
    ///
    /// # Errors
    /// Those of `read(2)`; `EAGAIN` if there is no event.
    pub fn read(&self, to: &Message) -> io::Result<usize> {
        shared::read(self.0.as_fd(), to, EVENT_BYTES)
    }

    /// Wakes all threads that wait for a page: each faults again, and its event can be read again.
    pub fn wake_all(&self) {
        // The kernel refuses a range that exceeds the address space at either end, whose limits differ. Each
        // of these ranges is inside or outside of it.
        let low = (1..LOW_PAGES).map(|page| (page * PAGE_SIZE, 1));
        let high = (LOW_PAGES.ilog2()..49).map(|bits| ((1 << bits) - 1, 1 << bits));
        let high = high.map(|(page, pages): (u64, u64)| (page * PAGE_SIZE, pages));
        for range in low.chain(high).map(|(at, pages)| PageRange::new(at, pages)) {
            // Outside.
            let _ = range.map(|range| self.wake(range));
        }
    }

    /// Returns whether the memory still exists: the process has neither exited nor executed a program.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        // Lifts a write protection that no page has, at an address that every kernel accepts.
        let mut protect = UffdioWriteprotect {
            start: 1 << 40,
            len: PAGE_SIZE,
            mode: 0,
        };
        // SAFETY: UFFDIO_WRITEPROTECT reads one uffdio_writeprotect, which has the layout of
        // UffdioWriteprotect. The memory is registered for missing pages only, so nothing is protected.
        let result = Errno::result(unsafe {
            libc::ioctl(self.number(), UFFDIO_WRITEPROTECT, &raw mut protect)
        });
        // While a mapping changes, the result is EAGAIN.
        result != Err(Errno::ESRCH)
    }

    /// Copies pages to a range of missing pages. Returns the number of bytes copied, also if there was an
    /// error.
    pub fn copy(&self, to: u64, pages: &[u8]) -> (u64, io::Result<()>) {
        let mut copy = UffdioCopy {
            to,
            from: pages.as_ptr() as u64,
            len: pages.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: UFFDIO_COPY reads and writes one uffdio_copy, which has the layout of UffdioCopy, and reads
        // `len` bytes from `pages`. It writes to the memory of the restored process only.
        let result = Errno::result(unsafe {
            libc::ioctl(self.0.as_fd().as_raw_fd(), UFFDIO_COPY, &raw mut copy)
        });
        let result = result.map(drop).map_err(io::Error::from);
        (copy.copied.max(0).cast_unsigned(), result)
    }

    /// Fills a range of missing pages with zeros.
    ///
    /// # Errors
    /// `EEXIST` if a page is not missing, `EAGAIN` if an event has to be read first.
    pub fn zero(&self, range: PageRange) -> io::Result<()> {
        let mut zero = UffdioZeropage {
            start: range.start(),
            len: range.bytes(),
            mode: 0,
            zeroed: 0,
        };
        // SAFETY: UFFDIO_ZEROPAGE reads and writes one uffdio_zeropage, which has the layout of
        // UffdioZeropage. It writes to the memory of the restored process only.
        Errno::result(unsafe {
            libc::ioctl(self.0.as_fd().as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut zero)
        })?;
        Ok(())
    }

    /// Wakes the threads that wait for a page of this range which is no longer missing.
    ///
    /// # Errors
    /// `EINVAL` if the range is not registered.
    pub fn wake(&self, range: PageRange) -> io::Result<()> {
        self.0.wake(range)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
