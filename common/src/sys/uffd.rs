//! userfaultfd (`man 2 userfaultfd`): the calls that both programs need. The sender tracks writes to the
//! memory of a running process; the receiver fills the memory of a restored process.

use crate::PageRange;
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Flags for the `userfaultfd` system call: close on exec, and do not handle faults of kernel code, so that
/// no privilege is needed.
pub const CREATE_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | UFFD_USER_MODE_ONLY;

/// Allows write-protection of shared memory and huge pages.
pub const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Allows write-protection of pages that are not populated.
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// The kernel resolves write faults itself, and only records them.
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// Registers a mapping for write-protection.
pub const REGISTER_MODE_WP: u64 = 2;

const UFFD_USER_MODE_ONLY: u64 = 1;
const UFFD_API: u64 = 0xAA;

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;

/// `struct uffdio_api`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

/// Creates a userfaultfd for the memory of this process. [`Userfaultfd::handshake`] makes it usable.
///
/// # Errors
/// `ENOSYS` from a kernel without userfaultfd, `EPERM` if it is forbidden.
pub fn create() -> io::Result<OwnedFd> {
    // SAFETY: userfaultfd takes flags only, and no pointers.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, CREATE_FLAGS) })?;
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A userfaultfd after its handshake with the kernel. It may belong to another process. Closing it
/// unregisters all memory.
#[derive(Debug)]
pub struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// Enables features on a new userfaultfd.
    ///
    /// # Errors
    /// `EINVAL` if the kernel lacks one of the features.
    pub fn handshake(fd: OwnedFd, features: u64) -> io::Result<Self> {
        let mut api = UffdioApi {
            api: UFFD_API,
            features,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API reads and writes one uffdio_api, which has the layout of UffdioApi.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        Ok(Self(fd))
    }

    /// Wraps a userfaultfd whose creator has done the handshake.
    #[must_use]
    pub fn after_handshake(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Registers a mapping in this mode. Registering it again has no effect, and is cheap.
    ///
    /// # Errors
    /// `ESRCH` if the memory no longer exists (exit or exec), `EINVAL` or `EPERM` if this mapping cannot be
    /// registered, `EBUSY` if it is registered with another userfaultfd, `ENOENT` if it was unmapped.
    pub fn register(&self, range: PageRange, mode: u64) -> io::Result<()> {
        let mut register = UffdioRegister {
            start: range.start(),
            len: range.bytes(),
            mode,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes one uffdio_register, which has the layout of
        // UffdioRegister. Registration changes when pages fault, but not what they contain.
        Errno::result(unsafe {
            libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut register)
        })?;
        Ok(())
    }

    /// Wakes the threads that wait for a page of this range.
    ///
    /// # Errors
    /// `EINVAL` if the range is not registered.
    pub fn wake(&self, range: PageRange) -> io::Result<()> {
        let mut wake = UffdioRange {
            start: range.start(),
            len: range.bytes(),
        };
        // SAFETY: UFFDIO_WAKE reads one uffdio_range, which has the layout of UffdioRange.
        Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WAKE, &raw mut wake) })?;
        Ok(())
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
