//! Tracing of a single thread with ptrace, and waiting for its stops.
//!
//! Signals are plain numbers, not an enum, for real-time signals must be delivered unchanged.

use super::check;
use std::io;

/// Thread ID, in the PID namespace of this process.
pub type Tid = i32;

/// Why a traced thread stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Stopped by `PTRACE_INTERRUPT`, between two instructions.
    Event,
    /// Stopped by a stop signal (group stop): the thread stays stopped when it is detached.
    Group,
    /// Stopped at the entry or the exit of a system call.
    Syscall,
    /// Stopped before the delivery of this signal.
    Signal(i32),
    /// The thread has exited.
    Gone,
}

const NULL: *mut libc::c_void = std::ptr::null_mut();

/// Attaches to a thread without stopping it. `PTRACE_O_EXITKILL` is not set, so that the kernel detaches the
/// thread, and it runs, if the tracer dies.
///
/// # Errors
/// `ESRCH` if the thread has exited, `EPERM` if it has a tracer already, is exiting, or may not be traced.
pub fn seize(tid: Tid) -> io::Result<()> {
    let options = libc::PTRACE_O_TRACESYSGOOD;
    // SAFETY: PTRACE_SEIZE takes no pointers; the options are passed by value.
    check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, tid, NULL, options as *mut libc::c_void) })
        .map(drop)
}

/// Whether the seccomp filters of a traced thread apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seccomp {
    /// They do.
    Applies,
    /// They do not.
    Suspended,
}

/// Suspends the seccomp filters of a stopped thread, or applies them again. They also apply again when it is
/// detached.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` or if the tracer itself has a seccomp filter.
pub fn set_seccomp(tid: Tid, seccomp: Seccomp) -> io::Result<()> {
    let options = libc::PTRACE_O_TRACESYSGOOD
        | match seccomp {
            Seccomp::Applies => 0,
            Seccomp::Suspended => libc::PTRACE_O_SUSPEND_SECCOMP,
        };
    // SAFETY: PTRACE_SETOPTIONS takes no pointers; the options are passed by value.
    check(unsafe {
        libc::ptrace(
            libc::PTRACE_SETOPTIONS,
            tid,
            NULL,
            options as *mut libc::c_void,
        )
    })
    .map(drop)
}

/// Asks a seized thread to stop. [`poll`] reports the stop.
///
/// # Errors
/// `ESRCH` if it has exited.
pub fn interrupt(tid: Tid) -> io::Result<()> {
    // SAFETY: PTRACE_INTERRUPT takes no pointers.
    check(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, tid, NULL, NULL) }).map(drop)
}

/// Resumes a stopped thread, and delivers `signal`, or none if that is 0.
///
/// # Errors
/// `ESRCH` if it has exited or is not stopped.
pub fn resume(tid: Tid, signal: i32) -> io::Result<()> {
    resume_with(libc::PTRACE_CONT, tid, signal)
}

/// Resumes a stopped thread until its next entry to or exit from a system call.
///
/// # Errors
/// `ESRCH` if it has exited or is not stopped.
pub fn resume_to_syscall(tid: Tid) -> io::Result<()> {
    resume_with(libc::PTRACE_SYSCALL, tid, 0)
}

/// Detaches from a stopped thread, which resumes, or stays in its group stop.
///
/// # Errors
/// `ESRCH` if it has exited or is not stopped.
pub fn detach(tid: Tid) -> io::Result<()> {
    resume_with(libc::PTRACE_DETACH, tid, 0)
}

/// Makes a ptrace request that resumes a stopped thread.
fn resume_with(request: libc::c_uint, tid: Tid, signal: i32) -> io::Result<()> {
    let signal = signal as usize as *mut libc::c_void;
    // SAFETY: these requests take no pointers; the signal number is passed by value.
    check(unsafe { libc::ptrace(request, tid, NULL, signal) }).map(drop)
}

/// Returns the registers of a stopped thread.
///
/// # Errors
/// `ESRCH` if it has exited or is not stopped.
pub fn registers(tid: Tid) -> io::Result<libc::user_regs_struct> {
    let mut regs = std::mem::MaybeUninit::<libc::user_regs_struct>::uninit();
    // SAFETY: PTRACE_GETREGS writes one user_regs_struct to `regs`, which is valid for writes. It is
    // initialised when the call succeeds.
    unsafe {
        check(libc::ptrace(
            libc::PTRACE_GETREGS,
            tid,
            NULL,
            regs.as_mut_ptr(),
        ))?;
        Ok(regs.assume_init())
    }
}

/// Replaces the registers of a stopped thread.
///
/// # Errors
/// `ESRCH` if it has exited or is not stopped.
pub fn set_registers(tid: Tid, regs: &libc::user_regs_struct) -> io::Result<()> {
    let regs: *const libc::user_regs_struct = regs;
    // SAFETY: PTRACE_SETREGS reads one user_regs_struct, which the reference keeps alive.
    check(unsafe { libc::ptrace(libc::PTRACE_SETREGS, tid, NULL, regs) }).map(drop)
}

/// Returns the blocked signals of a stopped thread: bit n-1 stands for signal n.
///
/// # Errors
/// `ESRCH` if it has exited or is not stopped.
pub fn signal_mask(tid: Tid) -> io::Result<u64> {
    let mut mask = 0u64;
    // SAFETY: the kernel writes eight bytes, the size given, to a live u64.
    check(unsafe {
        libc::ptrace(
            libc::PTRACE_GETSIGMASK,
            tid,
            size_of::<u64>() as *mut libc::c_void,
            &raw mut mask,
        )
    })?;
    Ok(mask)
}

/// Replaces the blocked signals of a stopped thread.
///
/// # Errors
/// `ESRCH` if it has exited or is not stopped.
pub fn set_signal_mask(tid: Tid, mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads eight bytes, the size given, from a live u64.
    check(unsafe {
        libc::ptrace(
            libc::PTRACE_SETSIGMASK,
            tid,
            size_of::<u64>() as *mut libc::c_void,
            &raw const mask,
        )
    })
    .map(drop)
}

/// Returns whether a stopped thread uses syscall user dispatch, which turns its system calls into signals
/// (Wine does). An injected system call might be turned into a signal, too.
///
/// # Errors
/// `ESRCH` if it has exited or is not stopped.
pub fn dispatches_system_calls(tid: Tid) -> io::Result<bool> {
    const GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
    // mode, selector, offset, length
    let mut configuration = [0u64; 4];
    // SAFETY: the kernel writes at most the size given, to a live array of that size.
    let result = check(unsafe {
        libc::ptrace(
            GET_SYSCALL_USER_DISPATCH_CONFIG,
            tid,
            size_of_val(&configuration) as *mut libc::c_void,
            configuration.as_mut_ptr(),
        )
    });
    match result {
        Ok(_) => Ok(configuration[0] != 0),
        // A kernel before 6.4 does not have this request.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Sends a signal to one thread.
///
/// # Errors
/// `ESRCH` if it has exited.
pub fn signal_thread(pid: i32, tid: Tid, signal: i32) -> io::Result<()> {
    // SAFETY: tgkill takes no pointers.
    check(unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) }).map(drop)
}

/// Returns the address of the `struct rseq` of a stopped thread, if it has registered one for restartable
/// sequences.
///
/// # Errors
/// `ESRCH` if it has exited or is not stopped.
pub fn rseq_area(tid: Tid) -> io::Result<Option<u64>> {
    const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        pointer: u64,
        size: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    let mut configuration = Configuration::default();
    // SAFETY: the kernel writes at most the size given, to a live struct of that size.
    let result = check(unsafe {
        libc::ptrace(
            PTRACE_GET_RSEQ_CONFIGURATION,
            tid,
            size_of::<Configuration>() as *mut libc::c_void,
            &raw mut configuration,
        )
    });
    match result {
        Ok(_) => Ok(Some(configuration.pointer).filter(|&pointer| pointer != 0)),
        // The kernel was built without restartable sequences.
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns the next stop of a traced thread, without blocking; `None` if the thread runs.
///
/// # Errors
/// Errors of `waitpid`, except `ECHILD`, which means [`Stop::Gone`].
pub fn poll(tid: Tid) -> io::Result<Option<Stop>> {
    let mut status = 0;
    // SAFETY: waitpid writes one int, to a live int.
    let result = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
    match check(libc::c_long::from(result)) {
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(decode(status))),
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(Some(Stop::Gone)),
        Err(error) => Err(error),
    }
}

/// Converts the status from `waitpid`.
fn decode(status: i32) -> Stop {
    if !libc::WIFSTOPPED(status) {
        return Stop::Gone;
    }
    let signal = libc::WSTOPSIG(status);
    if status >> 16 == libc::PTRACE_EVENT_STOP {
        match signal {
            libc::SIGTRAP => Stop::Event,
            _ => Stop::Group,
        }
    } else if signal == libc::SIGTRAP | 0x80 {
        Stop::Syscall
    } else {
        Stop::Signal(signal)
    }
}
