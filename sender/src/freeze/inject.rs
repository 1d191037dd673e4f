//! Runs a system call in a stopped thread of the target, and restores the thread afterwards.
//!
//! Only registers are changed, never memory: the thread executes a `syscall` instruction that the process
//! already has, in its vDSO. The registers are restored while the thread is in the same kind of stop as
//! before, *inside the signal handling of the kernel*: only there does the kernel restart a system call that
//! the stop interrupted.
//!
//! The thread is not trusted to execute what it was given: a process outside the tree may share its memory, and
//! change its vDSO. At the entry of the call it is checked that it is the intended one, only then are seccomp
//! filters suspended, and at its exit they apply again. Every wait has a deadline, at which the thread is
//! interrupted and restored.

use super::stops::{OnDeadSender, Stops};
use crate::sys::ptrace::{self, Seccomp, Stop, Tid};
use pageferry_common::proc::maps;
use pageferry_common::sys::pidfd;
use pageferry_common::sys::uffd;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Maximum time for an injected system call. It does not block; only a thread that is kept from running, or
/// executes something else, takes longer.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum time for an interrupted thread to stop, so that it can be restored.
const RESTORE_TIMEOUT: Duration = Duration::from_secs(2);

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Creates a userfaultfd in process `pid` with its stopped thread `tid`, duplicates it into this process, and
/// closes it in the target. Every thread of the process must be stopped, so that none sees the descriptor.
///
/// # Errors
/// The reason why this process cannot have a userfaultfd; the process is unchanged then.
pub(super) fn userfaultfd(pid: i32, tid: Tid, stops: Stops<'_>) -> io::Result<OwnedFd> {
    let pidfd = pidfd::open(pid)?;
    let mut thread = BorrowedThread::take(pid, tid, stops)?;
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
struct BorrowedThread<'a> {
    pid: i32,
    tid: Tid,
    stops: Stops<'a>,
    at: At,
    has_filter: bool,
    registers: libc::user_regs_struct,
    mask: u64,
    /// Address of a `syscall` instruction.
    syscall: u64,
    /// Signals that arrived although all are blocked (some cannot be). They are sent again afterwards.
    postponed: Vec<i32>,
    is_restored: bool,
}

/// Where a borrowed thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Stopped.
    Stop,
    /// Stopped at the entry of a system call, which it makes when it is resumed.
    Entry,
    /// Resumed.
    Running,
}

impl<'a> BorrowedThread<'a> {
    /// Saves the registers and the signal mask of a stopped thread, and blocks all signals.
    #[cfg(target_arch = "x86_64")]
    fn take(pid: i32, tid: Tid, stops: Stops<'a>) -> io::Result<Self> {
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
        let has_filter = seccomp.is_some_and(|mode| mode != 0);
        if has_filter {
            // Tried here, where nothing has to be undone if it is not permitted.
            set_seccomp(tid, Seccomp::Suspended)?;
            set_seccomp(tid, Seccomp::Applies)?;
        }
        let mask = ptrace::signal_mask(tid)?;
        // No signal handler may run with the changed registers.
        ptrace::set_signal_mask(tid, u64::MAX)?;
        Ok(Self {
            pid,
            tid,
            stops,
            at: At::Stop,
            has_filter,
            registers,
            mask,
            syscall,
            postponed: Vec::new(),
            is_restored: false,
        })
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn take(_: i32, _: Tid, _: Stops<'a>) -> io::Result<Self> {
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
        let deadline = Instant::now() + CALL_TIMEOUT;
        self.run_to_syscall(deadline)?;
        self.at = At::Entry;
        let entered = ptrace::registers(self.tid)?;
        let intended = (number as u64, argument, self.syscall + SYSCALL.len() as u64);
        if (entered.orig_rax, entered.rdi, entered.rip) != intended {
            return Err(io::Error::other("its code was changed while it was frozen"));
        }
        self.set_seccomp(Seccomp::Suspended)?;
        self.run_to_syscall(deadline)?;
        self.set_seccomp(Seccomp::Applies)?;
        let result = ptrace::registers(self.tid)?.rax as i64;
        match result {
            -4095..=-1 => Err(io::Error::from_raw_os_error(-result as i32)),
            _ => Ok(result as u64),
        }
    }

    /// Resumes the thread up to its next entry to, or exit from, a system call.
    fn run_to_syscall(&mut self, deadline: Instant) -> io::Result<()> {
        loop {
            self.at = At::Running;
            ptrace::resume_to_syscall(self.tid)?;
            if self.next_stop(deadline, OnDeadSender::Fail)? == Stop::Syscall {
                return Ok(());
            }
        }
    }

    /// Suspends the seccomp filters of the thread, or applies them again.
    fn set_seccomp(&self, seccomp: Seccomp) -> io::Result<()> {
        match self.has_filter {
            true => set_seccomp(self.tid, seccomp),
            false => Ok(()),
        }
    }

    fn give_back(mut self) -> io::Result<()> {
        self.restore()
    }

    /// Restores the registers and the signal mask.
    fn restore(&mut self) -> io::Result<()> {
        self.is_restored = true;
        let deadline = Instant::now() + RESTORE_TIMEOUT;
        // The thread is stopped at the exit of the injected system call, where the kernel restarts no
        // interrupted call. With an interrupt pending, it stops again before its next instruction, in signal
        // handling. After an error it may be elsewhere, or run.
        loop {
            ptrace::interrupt(self.tid)?;
            match self.at {
                At::Running => {}
                At::Stop => ptrace::resume(self.tid, 0)?,
                At::Entry => {
                    self.skip_call()?;
                    ptrace::resume(self.tid, 0)?;
                }
            }
            self.at = At::Running;
            // Any other stop uses up the pending interrupt.
            if let Stop::Event | Stop::Group = self.next_stop(deadline, OnDeadSender::GoOn)? {
                break;
            }
        }
        self.set_seccomp(Seccomp::Applies)?;
        ptrace::set_registers(self.tid, &self.registers)?;
        ptrace::set_signal_mask(self.tid, self.mask)?;
        for signal in self.postponed.drain(..) {
            ptrace::signal_thread(self.pid, self.tid, signal)?;
        }
        Ok(())
    }

    /// Makes the thread, which is at the entry of a system call, make none. A filter could kill it for that.
    fn skip_call(&self) -> io::Result<()> {
        self.set_seccomp(Seccomp::Suspended)?;
        let registers = libc::user_regs_struct {
            orig_rax: u64::MAX,
            ..ptrace::registers(self.tid)?
        };
        ptrace::set_registers(self.tid, &registers)
    }

    /// Waits for the next stop. Keeps the signal of a signal-delivery stop for later.
    fn next_stop(&mut self, deadline: Instant, on_dead_sender: OnDeadSender) -> io::Result<Stop> {
        let stop = self.stops.wait(self.tid, deadline, on_dead_sender)?;
        self.at = At::Stop;
        match stop {
            Stop::Gone => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            Stop::Signal(signal) => {
                self.postponed.push(signal);
                Ok(Stop::Signal(signal))
            }
            stop => Ok(stop),
        }
    }
}

impl Drop for BorrowedThread<'_> {
    fn drop(&mut self) {
        if !self.is_restored {
            // Reached after an error. It fails only if the thread has exited, which leaves nothing to
            // restore.
            let _ = self.restore();
        }
    }
}

fn set_seccomp(tid: Tid, seccomp: Seccomp) -> io::Result<()> {
    ptrace::set_seccomp(tid, seccomp).map_err(|error| {
        io::Error::other(format!("its seccomp filter cannot be suspended: {error}"))
    })
}

/// Returns the address of a `syscall` instruction in the vDSO of a process.
fn syscall_instruction(tid: Tid) -> io::Result<u64> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{SigSet, Signal};
    use nix::sys::signalfd::{SfdFlags, SignalFd};
    use pageferry_common::proc::cgroup::v2_mount;
    use pageferry_common::sys::fdpass;
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command};

    /// A process in a cgroup of its own. Dropping it kills the process.
    struct Pausable {
        child: Child,
        cgroup: PathBuf,
    }

    impl Pausable {
        fn start() -> Option<Self> {
            let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
            let name = format!("pageferry-inject-{}", std::process::id());
            let cgroup = Path::new(v2_mount(&mounts)?).join(name);
            fs::create_dir(&cgroup).ok()?;
            let child = Command::new("sleep").arg("1000").spawn().unwrap();
            let member = child.id().to_string();
            fs::write(cgroup.join("cgroup.procs"), member).unwrap();
            Some(Self { child, cgroup })
        }

        fn set_paused(&self, value: &str) {
            fs::write(self.cgroup.join("cgroup.freeze"), value).unwrap();
        }
    }

    impl Drop for Pausable {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
            let _ = fs::remove_dir(&self.cgroup);
        }
    }

    /// It was paused after it was found not to be.
    #[test]
    fn call_in_a_paused_process_is_given_up_and_undone() {
        let Some(process) = Pausable::start() else {
            eprintln!("skipped: no cgroup can be made");
            return;
        };
        let tid = process.child.id().cast_signed();
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGCHLD);
        signals.thread_block().unwrap();
        let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK).unwrap();
        let (ours, _theirs) = fdpass::pair().unwrap();
        let stops = Stops {
            signals: &signals,
            socket: ours.as_fd(),
        };
        let soon = || Instant::now() + RESTORE_TIMEOUT;
        let stop = || {
            ptrace::seize(tid).unwrap();
            ptrace::interrupt(tid).unwrap();
            let stop = stops.wait(tid, soon(), OnDeadSender::Fail).unwrap();
            assert_eq!(stop, Stop::Event);
        };
        stop();
        let before = ptrace::registers(tid).unwrap();

        process.set_paused("1");
        let error = userfaultfd(tid, tid, stops).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        let after = ptrace::registers(tid).unwrap();
        assert_eq!((after.rip, after.rsp), (before.rip, before.rsp));

        ptrace::detach(tid).unwrap();
        process.set_paused("0");
        stop();
        drop(userfaultfd(tid, tid, stops).unwrap());
        ptrace::detach(tid).unwrap();
    }
}
