//! Runs a system call in a stopped thread of the target, and restores the thread afterwards.
//!
//! Only registers are changed, never memory: the thread executes a `syscall` instruction that the process
//! already has, in its vDSO. The registers are restored while the thread is in the same kind of stop as
//! before, *inside the signal handling of the kernel*: only there does the kernel restart a system call that
//! the stop interrupted.

use crate::sys::ptrace::{self, Stop, Tid};
use pageferry_common::proc::maps;
use pageferry_common::sys::pidfd;
use pageferry_common::sys::uffd;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Creates a userfaultfd in process `pid` with its stopped thread `tid`, duplicates it into this process, and
/// closes it in the target. Every thread of the process must be stopped, so that none sees the descriptor.
///
/// # Errors
/// The reason why this process cannot have a userfaultfd; the process is unchanged then.
pub(super) fn userfaultfd(pid: i32, tid: Tid) -> io::Result<OwnedFd> {
    let pidfd = pidfd::open(pid)?;
    let mut thread = BorrowedThread::take(pid, tid)?;
    let created = thread
        .call(libc::SYS_userfaultfd, uffd::CREATE_FLAGS)
        .and_then(|fd| {
            let duplicate = pidfd::get_fd(pidfd.as_fd(), fd as i32);
            thread.call(libc::SYS_close, fd)?;
            duplicate
        });
    thread.give_back()?;
    created
}

/// A stopped thread whose registers and signal mask were saved. Restores them when dropped.
struct BorrowedThread {
    pid: i32,
    tid: Tid,
    registers: libc::user_regs_struct,
    mask: u64,
    /// Address of a `syscall` instruction.
    syscall: u64,
    /// Signals that arrived although all are blocked (some cannot be). They are sent again afterwards.
    postponed: Vec<i32>,
    is_restored: bool,
}

impl BorrowedThread {
    /// Saves the registers and the signal mask of a stopped thread, and blocks all signals.
    #[cfg(target_arch = "x86_64")]
    fn take(pid: i32, tid: Tid) -> io::Result<Self> {
        const USER_CS: u64 = 0x33;
        let mut registers = ptrace::registers(tid)?;
        if registers.cs != USER_CS {
            return Err(io::Error::other("it is a 32-bit program"));
        }
        let syscall = syscall_instruction(tid)?;
        if ptrace::dispatches_system_calls(tid)? {
            return Err(io::Error::other("it intercepts its own system calls"));
        }
        if let Some(abort) = interrupted_rseq(tid, registers.rip)? {
            registers.rip = abort;
        }
        let seccomp = super::procs::status_number(tid, "Seccomp");
        if seccomp.is_some_and(|mode| mode != 0) {
            ptrace::suspend_seccomp(tid).map_err(|error| {
                io::Error::other(format!("its seccomp filter cannot be suspended: {error}"))
            })?;
        }
        let mask = ptrace::signal_mask(tid)?;
        // No signal handler may run with the changed registers.
        ptrace::set_signal_mask(tid, u64::MAX)?;
        Ok(Self {
            pid,
            tid,
            registers,
            mask,
            syscall,
            postponed: Vec::new(),
            is_restored: false,
        })
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn take(_: i32, _: Tid) -> io::Result<Self> {
        Err(io::Error::other(
            "system calls in the target are implemented for x86-64 only",
        ))
    }

    /// Runs a system call with one argument. Returns its result, or its errno as an error.
    fn call(&mut self, number: libc::c_long, argument: u64) -> io::Result<u64> {
        let registers = libc::user_regs_struct {
            rax: number as u64,
            // Marks the thread as not in a system call, so that the kernel restarts none.
            orig_rax: u64::MAX,
            rdi: argument,
            rip: self.syscall,
            ..self.registers
        };
        ptrace::set_registers(self.tid, &registers)?;
        for _entry_then_exit in 0..2 {
            ptrace::resume_to_syscall(self.tid)?;
            while self.next_stop()? != Stop::Syscall {
                ptrace::resume_to_syscall(self.tid)?;
            }
        }
        let result = ptrace::registers(self.tid)?.rax as i64;
        match result {
            -4095..=-1 => Err(io::Error::from_raw_os_error(-result as i32)),
            _ => Ok(result as u64),
        }
    }

    fn give_back(mut self) -> io::Result<()> {
        self.restore()
    }

    /// Restores the registers and the signal mask.
    fn restore(&mut self) -> io::Result<()> {
        self.is_restored = true;
        // The thread is stopped at the exit of the injected system call, where the kernel restarts no
        // interrupted call. With an interrupt pending, it stops again before its next instruction, in signal
        // handling.
        ptrace::interrupt(self.tid)?;
        ptrace::resume(self.tid, 0)?;
        while !matches!(self.next_stop()?, Stop::Event | Stop::Group) {
            // Any other stop uses up the pending interrupt.
            ptrace::interrupt(self.tid)?;
            ptrace::resume(self.tid, 0)?;
        }
        ptrace::set_registers(self.tid, &self.registers)?;
        ptrace::set_signal_mask(self.tid, self.mask)?;
        for signal in self.postponed.drain(..) {
            ptrace::signal_thread(self.pid, self.tid, signal)?;
        }
        Ok(())
    }

    /// Waits for the next stop. Keeps the signal of a signal-delivery stop for later.
    fn next_stop(&mut self) -> io::Result<Stop> {
        match ptrace::wait(self.tid)? {
            Stop::Gone => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            Stop::Signal(signal) => {
                self.postponed.push(signal);
                Ok(Stop::Signal(signal))
            }
            stop => Ok(stop),
        }
    }
}

impl Drop for BorrowedThread {
    fn drop(&mut self) {
        if !self.is_restored {
            // Reached after an error. It fails only if the thread has exited, which leaves nothing to
            // restore.
            let _ = self.restore();
        }
    }
}

/// Returns the address of a `syscall` instruction in the vDSO of a process.
fn syscall_instruction(tid: Tid) -> io::Result<u64> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    const VDSO_MAX_BYTES: usize = 64 << 10;
    let not_found = || io::Error::other("it has no vDSO with a system call instruction");
    let maps = fs::read(format!("/proc/{tid}/maps"))?;
    let range = maps::vdso(&maps).ok_or_else(not_found)?;
    let mut code = vec![0; (range.bytes() as usize).min(VDSO_MAX_BYTES)];
    let remote = nix::sys::uio::RemoteIoVec {
        base: range.start() as usize,
        len: code.len(),
    };
    nix::sys::uio::process_vm_readv(
        nix::unistd::Pid::from_raw(tid),
        &mut [io::IoSliceMut::new(&mut code)],
        &[remote],
    )?;
    let at = code.windows(2).position(|pair| pair == SYSCALL);
    Ok(range.start() + at.ok_or_else(not_found)? as u64)
}

/// Returns the address of the abort handler, if the thread is inside a restartable sequence (rseq).
///
/// The kernel aborts an interrupted sequence when the thread returns to an address inside it. Here the thread
/// first returns to the injected system call, where the kernel clears the sequence. So the caller has to
/// resume the thread at the abort handler, as the kernel would have.
fn interrupted_rseq(tid: Tid, ip: u64) -> io::Result<Option<u64>> {
    /// Offset of the field `rseq_cs` in `struct rseq`.
    const CS_POINTER: u64 = 8;
    /// Size of `struct rseq_cs`: version and flags of 32 bits each; start, length and abort address of 64
    /// bits each.
    const CS_BYTES: usize = 32;
    let Some(area) = ptrace::rseq_area(tid)? else {
        return Ok(None);
    };
    let memory = fs::File::open(format!("/proc/{tid}/mem"))?;
    let read =
        |at: u64, buffer: &mut [u8]| std::os::unix::fs::FileExt::read_exact_at(&memory, buffer, at);
    let mut pointer = [0; 8];
    read(area + CS_POINTER, &mut pointer)?;
    let pointer = u64::from_le_bytes(pointer);
    if pointer == 0 {
        return Ok(None);
    }
    let mut cs = [0; CS_BYTES];
    read(pointer, &mut cs)?;
    let field = |at: usize| {
        u64::from_le_bytes(
            cs[at..at + 8]
                .try_into()
                .expect("the slice has eight bytes"),
        )
    };
    let (start, length, abort) = (field(8), field(16), field(24));
    Ok((ip.wrapping_sub(start) < length).then_some(abort))
}
