//! Declarations that all preloaded libraries share. The libraries are built separately (`build.rs`) and
//! without the standard library, because they must work with the libc of any CRIU.

use core::ffi::{c_int, c_long, c_void};

pub const AF_UNIX: c_int = 1;
pub const SOCK_SEQPACKET: c_int = 5;
pub const O_CLOEXEC: c_int = 0o2_000_000;

/// Numbers of the system calls that all libraries make.
#[cfg(target_arch = "x86_64")]
pub mod number {
    pub const LSEEK: core::ffi::c_long = 8;
    pub const OPENAT: core::ffi::c_long = 257;
}
#[cfg(target_arch = "aarch64")]
pub mod number {
    pub const LSEEK: core::ffi::c_long = 62;
    pub const OPENAT: core::ffi::c_long = 56;
}

/// `struct sockaddr_un`.
#[repr(C)]
pub struct Address {
    family: u16,
    path: [u8; 108],
}

impl Address {
    /// Returns the address of a NUL-terminated path; `None` if the path is too long.
    pub fn new(path: &[u8]) -> Option<Self> {
        let mut address = Self {
            family: AF_UNIX as u16,
            path: [0; 108],
        };
        address.path.get_mut(..path.len())?.copy_from_slice(path);
        Some(address)
    }
}

unsafe extern "C" {
    fn abort() -> !;
    pub fn syscall(number: c_long, ...) -> c_long;
    pub fn __errno_location() -> *mut c_int;
    pub fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    pub fn connect(fd: c_int, address: *const Address, len: u32) -> c_int;
    pub fn close(fd: c_int) -> c_int;
    #[allow(dead_code)]
    pub fn recv(fd: c_int, buffer: *mut c_void, len: usize, flags: c_int) -> isize;
}

/// Referenced by the compiled core library, and never called, because panics abort.
#[unsafe(no_mangle)]
pub extern "C" fn rust_eh_personality() {}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: `abort` has no preconditions.
    unsafe { abort() }
}
