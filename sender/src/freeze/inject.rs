//! One system call in a stopped thread of the target, and not a trace left of it.
//!
//! Registers are borrowed, never memory: a `syscall` instruction that is already there (the
//! vDSO's) is run with other registers. They go back while the thread is in the same kind of stop
//! as before, *inside the kernel's signal handling*: only there does the kernel restart a system
//! call that our stop interrupted.

use crate::sys::ptrace::{self, Stop, Tid};
use crate::sys::{pidfd, uffd};
use pageferry_common::proc::maps;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Makes a userfaultfd in process `pid` by its stopped thread `tid`, takes it over, and closes it
/// there. Every thread of the process must be stopped, so that none sees the descriptor.
///
/// # Errors
/// Why this process cannot have one; it is as it was.
pub fn userfaultfd(pid: i32, tid: Tid) -> io::Result<OwnedFd> {
    let pidfd = pidfd::open(pid)?;
    let mut thread = Borrowed::take(pid, tid)?;
    let made = thread
        .call(libc::SYS_userfaultfd, uffd::CREATE_FLAGS)
        .and_then(|fd| {
            let ours = pidfd::get_fd(pidfd.as_fd(), fd as i32);
            thread.call(libc::SYS_close, fd)?;
            ours
        });
    thread.give_back()?;
    made
}

/// A thread whose registers and signal mask are kept to be given back.
struct Borrowed {
    pid: i32,
    tid: Tid,
    registers: libc::user_regs_struct,
    mask: u64,
    /// Address of a `syscall` instruction.
    syscall: u64,
    /// Signals that cannot be blocked came meanwhile: sent again when all is as before.
    postponed: Vec<i32>,
    returned: bool,
}

impl Borrowed {
    #[cfg(target_arch = "x86_64")]
    fn take(pid: i32, tid: Tid) -> io::Result<Self> {
        const USER_CS: u64 = 0x33;
        let mut registers = ptrace::registers(tid)?;
        if registers.cs != USER_CS {
            return Err(io::Error::other("it is a 32-bit program"));
        }
        let syscall = syscall_instruction(tid)?;
        if ptrace::dispatches_system_calls(tid)? {
            return Err(io::Error::other("it dispatches its system calls itself"));
        }
        if let Some(abort) = interrupted_rseq(tid, registers.rip)? {
            registers.rip = abort;
        }
        let seccomp = super::procs::status_number(tid, "Seccomp");
        if seccomp.is_some_and(|mode| mode != 0) {
            ptrace::suspend_seccomp(tid).map_err(|error| {
                io::Error::other(format!("it has a seccomp filter that stays on: {error}"))
            })?;
        }
        let mask = ptrace::signal_mask(tid)?;
        // A handler must not run on borrowed registers.
        ptrace::set_signal_mask(tid, u64::MAX)?;
        Ok(Self {
            pid,
            tid,
            registers,
            mask,
            syscall,
            postponed: Vec::new(),
            returned: false,
        })
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn take(_: i32, _: Tid) -> io::Result<Self> {
        Err(io::Error::other(
            "making system calls in the target is only built for x86-64",
        ))
    }

    /// Runs one system call with one argument; its result, or its errno as an error.
    fn call(&mut self, number: libc::c_long, argument: u64) -> io::Result<u64> {
        let registers = libc::user_regs_struct {
            rax: number as u64,
            // Not "in a system call": nothing for the kernel to restart.
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
        self.put_back()
    }

    fn put_back(&mut self) -> io::Result<()> {
        self.returned = true;
        // After a system call the thread stands at its exit, where nothing would be restarted.
        // An interrupt that is pending when it goes on stops it again before its next instruction.
        ptrace::interrupt(self.tid)?;
        ptrace::resume(self.tid, 0)?;
        while !matches!(self.next_stop()?, Stop::Event | Stop::Group) {
            // Any other stop has used up the interrupt.
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

    /// The next stop that is not a signal's; those are kept for later.
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

impl Drop for Borrowed {
    fn drop(&mut self) {
        if !self.returned {
            // On an error's way out; the thread may be gone, and then there is nothing to mend.
            let _ = self.put_back();
        }
    }
}

/// Where the process has a `syscall` instruction: in its vDSO, or behind it if the thread just
/// stands in a call.
fn syscall_instruction(tid: Tid) -> io::Result<u64> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    const VDSO_MAX: usize = 64 << 10;
    let none = || io::Error::other("it has no vDSO with a system call instruction");
    let maps = fs::read(format!("/proc/{tid}/maps"))?;
    let range = maps::vdso(&maps).ok_or_else(none)?;
    let mut code = vec![0; (range.bytes() as usize).min(VDSO_MAX)];
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
    Ok(range.start() + at.ok_or_else(none)? as u64)
}

/// If the thread stands in a restartable sequence: the address where it must go on.
///
/// The kernel aborts an interrupted sequence when the thread returns to user mode, by the place it
/// returns to. That place will be our system call first, where the kernel forgets the sequence;
/// so we send the thread to its abort handler ourselves, as the kernel would have.
fn interrupted_rseq(tid: Tid, ip: u64) -> io::Result<Option<u64>> {
    const CS_POINTER: u64 = 8; // offsetof(struct rseq, rseq_cs)
    const CS_LEN: usize = 32; // version, flags u32; start, length, abort u64
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
    let mut cs = [0; CS_LEN];
    read(pointer, &mut cs)?;
    let field = |at: usize| u64::from_le_bytes(cs[at..at + 8].try_into().expect("8 bytes"));
    let (start, length, abort) = (field(8), field(16), field(24));
    Ok((ip.wrapping_sub(start) < length).then_some(abort))
}
