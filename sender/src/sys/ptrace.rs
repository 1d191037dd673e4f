//! ptrace on one thread, and waiting for its stops.
//!
//! Signals are plain numbers here, not an enum: real-time signals must pass through unharmed.

use super::check;
use std::io;

/// A thread id, as this process's PID namespace counts.
pub type Tid = i32;

/// What a wait found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Stopped for us, between two instructions.
    Event,
    /// The same, but by a stop signal: it stays stopped when we let it go.
    Group,
    /// Entering or leaving a system call.
    Syscall,
    /// About to receive this signal.
    Signal(i32),
    /// The thread is no more.
    Gone,
}

const NULL: *mut libc::c_void = std::ptr::null_mut();

/// Begins to trace a thread without stopping it. Never with `PTRACE_O_EXITKILL`: if the tracer
/// dies, the kernel lets the thread run on.
///
/// # Errors
/// `ESRCH` if the thread is gone, `EPERM` if it is traced already, exiting, or not ours to trace.
pub fn seize(tid: Tid) -> io::Result<()> {
    let options = libc::PTRACE_O_TRACESYSGOOD;
    // SAFETY: PTRACE_SEIZE takes no pointers; options go by value.
    check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, tid, NULL, options as *mut libc::c_void) })
        .map(drop)
}

/// Sets the seccomp suspension of a stopped, seized thread.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` or if the tracer itself is under seccomp.
pub fn suspend_seccomp(tid: Tid) -> io::Result<()> {
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_SUSPEND_SECCOMP;
    // SAFETY: PTRACE_SETOPTIONS takes no pointers; options go by value.
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

/// Asks a seized thread to stop; [`wait`] tells when it has.
///
/// # Errors
/// `ESRCH` if it is gone.
pub fn interrupt(tid: Tid) -> io::Result<()> {
    // SAFETY: PTRACE_INTERRUPT takes no pointers.
    check(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, tid, NULL, NULL) }).map(drop)
}

/// Lets a stopped thread run on, delivering `signal` (0: none).
///
/// # Errors
/// `ESRCH` if it is gone or not stopped.
pub fn resume(tid: Tid, signal: i32) -> io::Result<()> {
    step(libc::PTRACE_CONT, tid, signal)
}

/// Lets a stopped thread run up to its next entry into or exit from a system call.
///
/// # Errors
/// `ESRCH` if it is gone or not stopped.
pub fn resume_to_syscall(tid: Tid) -> io::Result<()> {
    step(libc::PTRACE_SYSCALL, tid, 0)
}

/// Ends tracing of a stopped thread, which runs on (or stays in its group stop).
///
/// # Errors
/// `ESRCH` if it is gone or not stopped.
pub fn detach(tid: Tid) -> io::Result<()> {
    step(libc::PTRACE_DETACH, tid, 0)
}

fn step(request: libc::c_uint, tid: Tid, signal: i32) -> io::Result<()> {
    let signal = signal as usize as *mut libc::c_void;
    // SAFETY: these requests take a signal number by value and no pointers.
    check(unsafe { libc::ptrace(request, tid, NULL, signal) }).map(drop)
}

/// The registers of a stopped thread.
///
/// # Errors
/// `ESRCH` if it is gone or not stopped.
pub fn registers(tid: Tid) -> io::Result<libc::user_regs_struct> {
    let mut regs = std::mem::MaybeUninit::<libc::user_regs_struct>::uninit();
    // SAFETY: PTRACE_GETREGS writes exactly one user_regs_struct to the address given, which is
    // valid for it; it is read only after success.
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
/// `ESRCH` if it is gone or not stopped.
pub fn set_registers(tid: Tid, regs: &libc::user_regs_struct) -> io::Result<()> {
    let regs: *const libc::user_regs_struct = regs;
    // SAFETY: PTRACE_SETREGS only reads one user_regs_struct, which the reference keeps valid.
    check(unsafe { libc::ptrace(libc::PTRACE_SETREGS, tid, NULL, regs) }).map(drop)
}

/// The blocked signals of a stopped thread: bit n-1 stands for signal n.
///
/// # Errors
/// `ESRCH` if it is gone or not stopped.
pub fn signal_mask(tid: Tid) -> io::Result<u64> {
    let mut mask = 0u64;
    // SAFETY: the kernel writes the eight bytes whose size is given, into a live u64.
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
/// `ESRCH` if it is gone or not stopped.
pub fn set_signal_mask(tid: Tid, mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads the eight bytes whose size is given, from a live u64.
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

/// Whether a stopped thread has system calls turned into signals (syscall user dispatch, as Wine
/// does): one made on its behalf might be caught, too.
///
/// # Errors
/// `ESRCH` if it is gone or not stopped.
pub fn dispatches_system_calls(tid: Tid) -> io::Result<bool> {
    const GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
    // mode, selector, offset, length
    let mut configuration = [0u64; 4];
    // SAFETY: the kernel writes at most the size given to live memory of that size.
    let got = check(unsafe {
        libc::ptrace(
            GET_SYSCALL_USER_DISPATCH_CONFIG,
            tid,
            size_of_val(&configuration) as *mut libc::c_void,
            configuration.as_mut_ptr(),
        )
    });
    match got {
        Ok(_) => Ok(configuration[0] != 0),
        // A kernel that cannot tell; before 6.4 none could.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Sends a signal to one thread.
///
/// # Errors
/// `ESRCH` if it is gone.
pub fn signal_thread(pid: i32, tid: Tid, signal: i32) -> io::Result<()> {
    // SAFETY: tgkill takes no pointers.
    check(unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) }).map(drop)
}

/// Where a stopped thread registered its restartable sequences (`struct rseq`), if it did.
///
/// # Errors
/// `ESRCH` if it is gone or not stopped.
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
    // SAFETY: the kernel writes at most the size given to a live struct of that size.
    let got = check(unsafe {
        libc::ptrace(
            PTRACE_GET_RSEQ_CONFIGURATION,
            tid,
            size_of::<Configuration>() as *mut libc::c_void,
            &raw mut configuration,
        )
    });
    match got {
        Ok(_) => Ok(Some(configuration.pointer).filter(|&pointer| pointer != 0)),
        // A kernel without restartable sequences.
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Looks, without waiting, whether a traced thread has stopped or ended.
///
/// # Errors
/// The kernel's, but for `ECHILD`, which means [`Stop::Gone`].
pub fn poll(tid: Tid) -> io::Result<Option<Stop>> {
    let mut status = 0;
    // SAFETY: waitpid writes one int to a live int.
    let got = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
    match check(libc::c_long::from(got)) {
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(decode(status))),
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(Some(Stop::Gone)),
        Err(error) => Err(error),
    }
}

/// Waits until a traced thread has stopped or ended. For short and certain waits only.
///
/// # Errors
/// As [`poll`].
pub fn wait(tid: Tid) -> io::Result<Stop> {
    loop {
        let mut status = 0;
        // SAFETY: waitpid writes one int to a live int.
        let got = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) };
        match check(libc::c_long::from(got)) {
            Ok(_) => return Ok(decode(status)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(Stop::Gone),
            Err(error) => return Err(error),
        }
    }
}

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
