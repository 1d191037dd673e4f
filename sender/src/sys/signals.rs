//! Small calls about signals and identity.

use super::check;
use nix::sys::signal::{SigHandler, Signal, signal};
use std::io;

/// Ignores a signal from now on.
///
/// # Errors
/// `EINVAL` for a signal that cannot be ignored.
pub fn ignore(number: Signal) -> io::Result<()> {
    // SAFETY: SIG_IGN installs no code of ours, so none can run in a handler's context.
    unsafe { signal(number, SigHandler::SigIgn) }?;
    Ok(())
}

/// Lets a signal do by default what it does.
///
/// # Errors
/// `EINVAL` for a signal that has no other way.
pub fn reset(number: Signal) -> io::Result<()> {
    // SAFETY: SIG_DFL installs no code of ours, so none can run in a handler's context.
    unsafe { signal(number, SigHandler::SigDfl) }?;
    Ok(())
}

/// Whether two processes share one memory (a vfork child and its parent do).
#[must_use]
pub fn share_memory(a: i32, b: i32) -> bool {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: kcmp takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) };
    // Where the kernel has no kcmp the answer is "no".
    matches!(check(result), Ok(0))
}
