//! userfaultfd in asynchronous write-protect mode: the kernel resolves write faults itself, and only records
//! which protected pages were written.

use super::mapping::Mapping;
use super::pagemap::{Query, Region, WRITTEN, scan};
use pageferry_common::PageRange;
use pageferry_common::sys::uffd::{self, Userfaultfd};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// Features that tracking needs. `PAGEMAP_SCAN` reports anonymous memory only if
/// [`uffd::FEATURE_WP_UNPOPULATED`] is enabled.
const FEATURES: u64 =
    uffd::FEATURE_WP_ASYNC | uffd::FEATURE_WP_UNPOPULATED | uffd::FEATURE_WP_HUGETLBFS_SHMEM;

/// Write-protection of the memory of a process. Closing it removes all protection.
#[derive(Debug)]
pub struct Uffd(Userfaultfd);

impl Uffd {
    /// Creates a userfaultfd for the memory of this process, to probe what the kernel supports.
    ///
    /// # Errors
    /// `ENOSYS` from a kernel without userfaultfd, `EPERM` if it is forbidden, `EINVAL` from a kernel before
    /// 6.7.
    pub fn for_this_process() -> io::Result<Self> {
        Self::handshake(uffd::create()?)
    }

    /// Enables asynchronous write-protection on a new userfaultfd.
    ///
    /// # Errors
    /// `EINVAL` from a kernel before 6.7.
    pub fn handshake(fd: OwnedFd) -> io::Result<Self> {
        Userfaultfd::handshake(fd, FEATURES).map(Self)
    }

    /// Registers a mapping for write-protection. Registering it again has no effect, and is cheap.
    ///
    /// # Errors
    /// As [`Userfaultfd::register`].
    pub fn register(&self, range: PageRange) -> io::Result<()> {
        self.0.register(range, uffd::REGISTER_MODE_WP)
    }

    /// Returns whether the protection of a page moves along when the process moves the page with `mremap` and
    /// the new place is registered. Kernels before 6.13 are said to do that; the new place then looks
    /// unchanged although it holds another page. Tries it out with a page of this process, whose memory
    /// `self` must be for.
    ///
    /// # Errors
    /// Errors of `mmap`, `mremap`, the registration, or `PAGEMAP_SCAN`.
    pub fn mremap_keeps_protection(&self) -> io::Result<bool> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let (mut page, place) = (Mapping::private_page()?, Mapping::private_page()?);
        let mut regions = [Region::default()];
        let written = Query {
            any: WRITTEN,
            report: WRITTEN,
            ..Query::default()
        };
        let written_then_protect = Query {
            protect: true,
            ..written
        };
        let mut matches = |range, query| {
            let mut found = false;
            scan(&pagemap, range, query, &mut regions, |_| found = true)?;
            io::Result::Ok(found)
        };
        page.touch();
        self.register(page.range())?;
        matches(page.range(), written_then_protect)?;
        if matches(page.range(), written)? {
            let what = "the kernel reports a protected page as written";
            return Err(io::Error::other(what));
        }
        let moved = page.move_onto(place)?;
        self.register(moved.range())?;
        Ok(!matches(moved.range(), written)?)
    }
}
