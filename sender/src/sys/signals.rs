//! Signal dispositions, and comparison of processes.

use super::check;
use nix::sys::signal::{SigHandler, Signal, signal};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the sender has received SIGINT or SIGTERM.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Notes that the sender has received SIGINT or SIGTERM. The network thread, which receives them, ends its
/// conversation; other waits look here.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Returns whether the sender has received SIGINT or SIGTERM.
#[must_use]
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Sets the disposition of a signal to "ignore".
///
/// # Errors
/// `EINVAL` for a signal that cannot be ignored.
pub fn ignore(number: Signal) -> io::Result<()> {
    // SAFETY: SIG_IGN installs no handler, so no code has to be async-signal-safe.
    unsafe { signal(number, SigHandler::SigIgn) }?;
    Ok(())
}

/// Sets the disposition of a signal to its default.
///
/// # Errors
/// `EINVAL` for a signal whose disposition cannot be changed.
pub fn reset(number: Signal) -> io::Result<()> {
    // SAFETY: SIG_DFL installs no handler, so no code has to be async-signal-safe.
    unsafe { signal(number, SigHandler::SigDfl) }?;
    Ok(())
}

/// Returns whether two processes share their memory, as a vfork child and its parent do. Returns `false` if
/// the kernel has no `kcmp`.
#[must_use]
pub fn share_memory(a: i32, b: i32) -> bool {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: kcmp takes no pointers.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) };
    matches!(check(result), Ok(0))
}
