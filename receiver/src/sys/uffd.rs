//! userfaultfd as received from CRIU: a thread of a restored process that touches a missing page waits until
//! the receiver has filled it.

use nix::errno::Errno;
use pageferry_common::sys::uffd::Userfaultfd;
use pageferry_common::{PAGE_SIZE, PageRange};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;

/// Size of `struct uffd_msg`, in bytes.
const EVENT_BYTES: usize = 32;

/// Maximum number of events read at once.
const EVENTS_MAX: usize = 16;

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

/// The registered memory of a restored process.
#[derive(Debug)]
pub struct Uffd(Userfaultfd);

/// Change to the registered memory. Except for a fault, the thread that caused it continues once the event
/// was read.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// The process forked. The child has memory of its own, registered in the same way.
    Fork(Uffd),
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

impl Uffd {
    /// Wraps a userfaultfd whose creator has done the handshake with the kernel.
    #[must_use]
    pub fn after_handshake(fd: OwnedFd) -> Self {
        Self(Userfaultfd::after_handshake(fd))
    }

    /// Returns the events since the last call, without blocking.
    ///
    /// # Errors
    /// Errors of `read`, and an event of an unknown kind.
    pub fn events(&self) -> io::Result<Vec<Event>> {
        let mut events = Vec::new();
        let mut buffer = [0; EVENT_BYTES * EVENTS_MAX];
        let len = match nix::unistd::read(&self.0, &mut buffer) {
            Ok(len) => len,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(events),
            Err(error) => return Err(error.into()),
        };
        let (messages, _) = buffer[..len].as_chunks::<EVENT_BYTES>();
        for message in messages {
            let word = |at: usize| {
                let bytes = message[at..at + 8].try_into().expect("eight bytes");
                u64::from_ne_bytes(bytes)
            };
            let event = match message[0] {
                EVENT_PAGEFAULT => Event::Fault(word(16) & !(PAGE_SIZE - 1)),
                EVENT_FORK => {
                    let fd = i32::from_ne_bytes(message[8..12].try_into().expect("four bytes"));
                    // SAFETY: reading the event has created this descriptor, and nothing else owns it.
                    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                    Event::Fork(Self::after_handshake(fd))
                }
                EVENT_REMAP => Event::Remap {
                    from: word(8),
                    to: word(16),
                    len: word(24),
                },
                EVENT_REMOVE | EVENT_UNMAP => Event::Gone {
                    start: word(8),
                    end: word(16),
                },
                other => {
                    let what = format!("unexpected userfaultfd event {other:#x}");
                    return Err(io::Error::other(what));
                }
            };
            events.push(event);
        }
        Ok(events)
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
