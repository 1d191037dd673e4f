//! userfaultfd as CRIU hands it over: a restored process touches a page that is not there, waits, and
//! its page is put there from outside.

use pageferry_common::{PAGE_SIZE, PageRange};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;

/// Bytes of one event, as the kernel writes them.
const EVENT_LEN: usize = 32;

/// Most events taken at once.
const EVENTS: usize = 16;

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    /// Bytes copied, or the error as a negative number.
    copied: i64,
}

#[repr(C)]
struct ZeroPage {
    start: u64,
    len: u64,
    mode: u64,
    zeroed: i64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// The memory of some process, as far as it was registered.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

/// What happened to that memory. But for a fault, the process goes on when it has been read.
#[derive(Debug)]
pub enum Event {
    /// Somebody waits for the page at this address.
    Fault(u64),
    /// There is a child, with memory of its own that is registered alike.
    Fork(Uffd),
    /// What was at one address is at another, bytes.
    Remap {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// Its length.
        len: u64,
    },
    /// What was there is gone (given back, or unmapped).
    Gone {
        /// The first byte.
        start: u64,
        /// One past the last.
        end: u64,
    },
}

impl Uffd {
    /// One that has agreed with the kernel on its features.
    #[must_use]
    pub fn ready(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// What has happened since it was asked last; nothing is waited for.
    ///
    /// # Errors
    /// The kernel's.
    pub fn events(&self) -> io::Result<Vec<Event>> {
        let mut events = Vec::new();
        let mut buffer = [0; EVENT_LEN * EVENTS];
        let len = match nix::unistd::read(&self.0, &mut buffer) {
            Ok(len) => len,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(events),
            Err(error) => return Err(error.into()),
        };
        let (messages, _) = buffer[..len].as_chunks::<EVENT_LEN>();
        for message in messages {
            let word = |at: usize| {
                let bytes = message[at..at + 8].try_into().expect("eight bytes");
                u64::from_ne_bytes(bytes)
            };
            let event = match message[0] {
                EVENT_PAGEFAULT => Event::Fault(word(16) & !(PAGE_SIZE - 1)),
                EVENT_FORK => {
                    let fd = i32::from_ne_bytes(message[8..12].try_into().expect("four bytes"));
                    // SAFETY: the kernel made this descriptor for us as we read of it.
                    Event::Fork(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
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
                    let what = format!("userfaultfd event {other:#x} was never asked for");
                    return Err(io::Error::other(what));
                }
            };
            events.push(event);
        }
        Ok(events)
    }

    /// Puts pages where none are. Returns how many bytes it could before an error, and that.
    pub fn copy(&self, to: u64, pages: &[u8]) -> (u64, io::Result<()>) {
        let mut copy = Copy {
            to,
            from: pages.as_ptr() as u64,
            len: pages.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: UFFDIO_COPY reads and writes one uffdio_copy, which `copy` is, and reads the memory of
        // `pages`. It writes to another process's memory, if to any.
        let result = check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_COPY, &raw mut copy) });
        (copy.copied.max(0).cast_unsigned(), result)
    }

    /// Puts pages of zeros where none are.
    ///
    /// # Errors
    /// As the kernel says: `EEXIST` if there is one, `EAGAIN` if an event has to be read first.
    pub fn zero(&self, range: PageRange) -> io::Result<()> {
        let mut zero = ZeroPage {
            start: range.start(),
            len: range.bytes(),
            mode: 0,
            zeroed: 0,
        };
        // SAFETY: UFFDIO_ZEROPAGE reads and writes one uffdio_zeropage, which `zero` is. It writes to
        // another process's memory, if to any.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut zero) })
    }

    /// Lets go on who waits for pages that are there already.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wake(&self, range: PageRange) -> io::Result<()> {
        let mut wake = Range {
            start: range.start(),
            len: range.bytes(),
        };
        // SAFETY: UFFDIO_WAKE reads one uffdio_range, which `wake` is.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WAKE, &raw mut wake) })
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The result of a libc call that says "failed" with -1.
fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
