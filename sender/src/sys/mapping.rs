//! Memory mappings of this process.

use super::check;
use pageferry_common::{PAGE_SIZE, PageRange};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

/// Memory mapped by this process, at an address chosen by the kernel. Unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: usize,
    bytes: usize,
    access: Access,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    ReadWrite,
}

impl Mapping {
    /// Maps a private anonymous page.
    ///
    /// # Errors
    /// Errors of `mmap`: `ENOMEM`.
    pub fn private_page() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        Self::new(PAGE_SIZE as usize, Access::ReadWrite, flags, None)
    }

    /// Maps shared anonymous memory, without reserving swap space.
    ///
    /// # Errors
    /// Errors of `mmap`: `ENOMEM`.
    #[cfg(test)]
    pub fn shared(bytes: usize) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Self::new(bytes, Access::ReadWrite, flags, None)
    }

    /// Maps the first `bytes` bytes of a file for reading.
    ///
    /// # Errors
    /// Errors of `mmap`: `EINVAL` if `bytes` is 0.
    pub fn read_only(file: &File, bytes: usize) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        Self::new(bytes, Access::Read, flags, Some(file))
    }

    fn new(
        bytes: usize,
        access: Access,
        flags: libc::c_int,
        file: Option<&File>,
    ) -> io::Result<Self> {
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        let fd = file.map_or(-1, File::as_raw_fd);
        // SAFETY: without MAP_FIXED, the kernel places the mapping where nothing is mapped.
        match unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, fd, 0) } {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            start => Ok(Self {
                start: start as usize,
                bytes,
                access,
            }),
        }
    }

    /// Address of the first byte.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start as u64
    }

    /// Returns the pages of the mapping. The last page may reach beyond the length that was asked for.
    #[must_use]
    pub fn range(&self) -> PageRange {
        let pages = (self.bytes as u64).div_ceil(PAGE_SIZE);
        PageRange::new(self.start(), pages).expect("the kernel returns page-aligned addresses")
    }

    /// Writes a byte to the first page.
    ///
    /// # Panics
    /// If the mapping is read-only.
    pub fn touch(&mut self) {
        assert_eq!(self.access, Access::ReadWrite);
        // SAFETY: the address is mapped and writable until `self` is dropped, and no reference to it exists.
        unsafe { (self.start as *mut u8).write_volatile(1) };
    }

    /// Makes a guard region of the mapping (Linux 6.13): its content is lost, and an access is a fault.
    ///
    /// # Errors
    /// Errors of `madvise`: `EINVAL` if the kernel has no guard regions.
    pub fn make_guard(&self) -> io::Result<()> {
        const MADV_GUARD_INSTALL: libc::c_int = 102;
        // SAFETY: this call owns the mapping, and no reference to its memory exists.
        let made = unsafe {
            libc::madvise(
                self.start as *mut libc::c_void,
                self.bytes,
                MADV_GUARD_INSTALL,
            )
        };
        check(libc::c_long::from(made)).map(drop)
    }

    /// Moves this mapping onto another one of the same length, which it replaces.
    ///
    /// # Errors
    /// Errors of `mremap`: `ENOMEM`. `place` may be unmapped then.
    pub fn move_onto(self, place: Self) -> io::Result<Self> {
        assert_eq!(self.bytes, place.bytes);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (from, to) = (
            self.start as *mut libc::c_void,
            place.start as *mut libc::c_void,
        );
        // SAFETY: this call owns both mappings, of the lengths given, and no reference to their memory
        // exists.
        let result = unsafe { libc::mremap(from, self.bytes, place.bytes, flags, to) };
        if result == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            // The kernel may have unmapped it already, and another thread may have mapped memory there since.
            std::mem::forget(place);
            return Err(error);
        }
        let moved = Self {
            start: place.start,
            bytes: place.bytes,
            access: self.access,
        };
        // The kernel has unmapped the old place of `self`, and replaced `place`.
        std::mem::forget(self);
        std::mem::forget(place);
        Ok(moved)
    }

    /// Maps all pages of a range for reading, so that later reads do not fault. Missing pages of the file are
    /// allocated.
    ///
    /// # Errors
    /// Errors of `madvise`: `EFAULT` if the file has become shorter, `ENOMEM`; `EINVAL` if the range lies
    /// outside the mapping.
    pub fn populate(&self, range: PageRange) -> io::Result<()> {
        let own = self.range();
        if range.start() < own.start() || range.end() > own.end() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range lies within this mapping, and MADV_POPULATE_READ does not change its contents.
        check(libc::c_long::from(unsafe {
            libc::madvise(
                range.start() as *mut libc::c_void,
                range.bytes() as usize,
                libc::MADV_POPULATE_READ,
            )
        }))?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this call owns the mapping, and no reference to its memory exists.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.bytes) };
    }
}
