//! userfaultfd in asynchronous write-protect mode: no fault is ever delivered to us, the kernel
//! only remembers which protected page was written.

use super::pagemap::{Query, Region, WRITTEN, scan};
use super::{check, map};
use pageferry_common::{PAGE_SIZE, PageRange};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Flags of the `userfaultfd` call made in the target: no kernel faults to handle (so no
/// privilege is needed), and gone on exec.
pub const CREATE_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | UFFD_USER_MODE_ONLY;

const UFFD_USER_MODE_ONLY: u64 = 1;
const UFFD_API: u64 = 0xAA;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 2;

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// A userfaultfd over some process's memory. Closing it takes every protection back.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Makes a userfaultfd of this process, for probing what the kernel can.
    ///
    /// # Errors
    /// The kernel's: `ENOSYS` without userfaultfd, `EPERM` where it is forbidden.
    pub fn for_this_process() -> io::Result<Self> {
        use std::os::fd::FromRawFd;
        // SAFETY: userfaultfd takes no pointers; the descriptor it returns is new and ours alone.
        let fd = unsafe {
            let fd = check(libc::syscall(libc::SYS_userfaultfd, CREATE_FLAGS))?;
            OwnedFd::from_raw_fd(fd as i32)
        };
        Self::handshake(fd)
    }

    /// Agrees with the kernel on asynchronous write-protection of every kind of memory.
    ///
    /// # Errors
    /// `EINVAL` from a kernel before 6.7; the target's memory being gone shows later.
    pub fn handshake(fd: OwnedFd) -> io::Result<Self> {
        let mut api = UffdioApi {
            api: UFFD_API,
            // UNPOPULATED only so that PAGEMAP_SCAN reports anonymous memory at all.
            features: FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_WP_HUGETLBFS_SHMEM,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API reads and writes one uffdio_api, which `api` is, field for field.
        check(libc::c_long::from(unsafe {
            libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api)
        }))?;
        Ok(Self(fd))
    }

    /// Registers a mapping for write-protect tracking. Again is cheap and does nothing.
    ///
    /// # Errors
    /// `ESRCH` if the memory is gone (exit or exec), `EINVAL`/`EPERM` if this mapping cannot be
    /// tracked, `EBUSY` if another userfaultfd has it, `ENOENT` if it was unmapped.
    pub fn register(&self, range: PageRange) -> io::Result<()> {
        let mut register = UffdioRegister {
            start: range.start(),
            len: range.bytes(),
            mode: REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes one uffdio_register, which `register` is. It
        // changes nothing in this process's memory that Rust could see.
        check(libc::c_long::from(unsafe {
            libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut register)
        }))
        .map(drop)
    }

    /// Whether a page that was protected still counts as that after the process has moved it (`mremap`), once
    /// its new place is registered: said of kernels before 6.13. Then it is not seen that what is there is
    /// another page than before. Tried out with a page of this process, which `self` must be of.
    ///
    /// # Errors
    /// The kernel's, if it has no asynchronous write-protection.
    pub fn mremap_keeps_protection(&self) -> io::Result<bool> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let len = PAGE_SIZE as usize;
        let page = || {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            map(
                len,
                protection,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                None,
            )
        };
        let (from, to) = (page()?, page()?);
        let range =
            |at: *mut libc::c_void| PageRange::new(at.addr() as u64, 1).map_err(io::Error::other);
        let mut room = [Region::default()];
        let mut scan_for_written = |at, protect| {
            let query = Query {
                any: WRITTEN,
                report: WRITTEN,
                protect,
                ..Query::default()
            };
            let mut written = false;
            scan(&pagemap, range(at)?, query, &mut room, |_| written = true)?;
            io::Result::Ok(written)
        };
        // SAFETY: the page is ours, and writable.
        unsafe { from.cast::<u8>().write_volatile(1) };
        self.register(range(from)?)?;
        scan_for_written(from, true)?;
        if scan_for_written(from, false)? {
            return Err(io::Error::other("a protected page counts as written"));
        }
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both are pages of ours that nothing refers to; the second makes room for the first.
        if unsafe { libc::mremap(from, len, len, flags, to) } == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.register(range(to)?)?;
        let written = scan_for_written(to, false)?;
        // SAFETY: the page is ours, and nothing refers to it.
        check(libc::c_long::from(unsafe { libc::munmap(to, len) }))?;
        Ok(!written)
    }
}
