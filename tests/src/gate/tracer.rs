//! The thread that traces a program: its threads, their system calls, and what these work on.

use super::{Action, Call, Edge, Observer, Seen};
use crate::memory;
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Longest part of a buffer that is looked at, bytes.
const BYTES_MAX: usize = 4096;

/// Message of a stop at the entry of a system call (`PTRACE_EVENTMSG_SYSCALL_ENTRY`).
const ENTRY: i64 = 1;

/// The thread that traces.
pub(super) struct Tracer {
    pid: i32,
    /// Traced threads.
    threads: HashSet<i32>,
    /// Threads that are stopped.
    stopped: Vec<Pid>,
    observer: Option<Observer>,
    /// Whether a socket is one of packets.
    packets: HashMap<PathBuf, bool>,
    memory: File,
}

impl Tracer {
    /// Traces all threads; `None` if there is none.
    pub(super) fn seize(pid: i32, observer: Option<Observer>) -> Option<Self> {
        let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
        let mut tracer = Self {
            pid,
            threads: HashSet::new(),
            stopped: Vec::new(),
            observer,
            packets: HashMap::new(),
            memory,
        };
        // New threads of traced threads are traced from the beginning.
        let mut traced = 0;
        loop {
            match tracer.seize_threads() {
                0 => return (traced > 0).then_some(tracer),
                new => traced += new,
            }
        }
    }

    fn seize_threads(&mut self) -> usize {
        let mut new = 0;
        let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE;
        for tid in memory::threads(self.pid) {
            let thread = Pid::from_raw(tid);
            if self.threads.insert(tid) && ptrace::seize(thread, options).is_ok() {
                ptrace::interrupt(thread).expect("it is traced");
                new += 1;
            }
        }
        new
    }

    /// Runs the program until it has done these calls; it stops at the last. Returns whether it got there.
    pub(super) fn run_to(&mut self, calls: &[Call]) -> bool {
        let mut calls = calls.iter();
        let Some(mut wanted) = calls.next() else {
            return false;
        };
        loop {
            let Some(thread) = self.next_call() else {
                return false;
            };
            let found = match self.seen(thread) {
                Some((mut seen, observer)) => {
                    if let Some(observer) = observer {
                        observer(&seen);
                    }
                    seen.is(wanted)
                }
                None => false,
            };
            if found {
                match calls.next() {
                    Some(next) => wanted = next,
                    None => {
                        self.stopped.push(thread);
                        return true;
                    }
                }
            }
            resume(thread, None);
        }
    }

    pub(super) fn resume(&mut self) {
        for thread in self.stopped.drain(..) {
            resume(thread, None);
        }
    }

    /// Waits until a thread enters or leaves a system call; `None` if the program has ended.
    fn next_call(&self) -> Option<Pid> {
        let any = WaitPidFlag::WEXITED | WaitPidFlag::WSTOPPED | WaitPidFlag::__WALL;
        // Not the children of other threads of the test.
        let own = any | WaitPidFlag::__WNOTHREAD;
        loop {
            match waitid(Id::All, own | WaitPidFlag::WNOWAIT) {
                Ok(WaitStatus::PtraceSyscall(thread)) => {
                    let _ = waitid(Id::Pid(thread), own);
                    return Some(thread);
                }
                Ok(WaitStatus::PtraceEvent(thread, signal, event)) => {
                    let _ = waitid(Id::Pid(thread), own);
                    // A signal on its way to the program is passed on.
                    resume(thread, (event == 0).then_some(signal));
                }
                Ok(WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, _, _)) => {
                    // The status of the program is for its parent.
                    if thread.as_raw() == self.pid {
                        return None;
                    }
                    let _ = waitid(Id::Pid(thread), own);
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return None,
            }
        }
    }

    fn seen(&mut self, thread: Pid) -> Option<(Seen<'_>, Option<&mut Observer>)> {
        // These fail if the thread was killed.
        let edge = match ptrace::getevent(thread).ok()? {
            ENTRY => Edge::Entry,
            _ => Edge::Exit,
        };
        let Registers {
            number,
            arguments,
            result,
        } = registers(thread)?;
        let (action, place) = decode(number)?;
        if edge == Edge::Exit && result < 0 {
            return None;
        }
        let path = match place {
            Place::None => PathBuf::new(),
            Place::Descriptor => {
                let fd = arguments[0].cast_signed() as i32;
                fs::read_link(format!("/proc/{}/fd/{fd}", self.pid)).unwrap_or_default()
            }
            Place::Name(at) => {
                let bytes = self.read(arguments[at], BYTES_MAX);
                let end = bytes.iter().position(|&byte| byte == 0);
                String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())])
                    .into_owned()
                    .into()
            }
        };
        let length = match (action, edge) {
            (Action::Send | Action::Write, _) => arguments[2],
            (Action::Receive | Action::Read, Edge::Exit) => result.cast_unsigned(),
            _ => 0,
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let bytes = match length {
            0 => Vec::new(),
            _ => self.read(arguments[1], length.min(BYTES_MAX)),
        };
        let seen = Seen {
            action,
            edge,
            path,
            pid: self.pid,
            bytes,
            packets: &mut self.packets,
        };
        Some((seen, self.observer.as_mut()))
    }

    /// Reads the program's memory, up to the end of what is mapped there.
    fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let mut done = 0;
        while done < length {
            // The rest of a page: one that follows may not be mapped.
            let at = address + done as u64;
            let part = (memory::PAGE - at as usize % memory::PAGE).min(length - done);
            match self.memory.read_at(&mut bytes[done..done + part], at) {
                Ok(0) | Err(_) => break,
                Ok(read) => done += read,
            }
        }
        bytes.truncate(done);
        bytes
    }
}

fn resume(thread: Pid, signal: Option<Signal>) {
    // This fails if the thread was killed.
    let _ = ptrace::syscall(thread, signal);
}

/// A system call in the registers of a thread.
struct Registers {
    number: u64,
    arguments: [u64; 4],
    result: i64,
}

#[cfg(target_arch = "x86_64")]
fn registers(thread: Pid) -> Option<Registers> {
    let regs = ptrace::getregs(thread).ok()?;
    Some(Registers {
        number: regs.orig_rax,
        arguments: [regs.rdi, regs.rsi, regs.rdx, regs.r10],
        result: regs.rax.cast_signed(),
    })
}

#[cfg(target_arch = "aarch64")]
fn registers(thread: Pid) -> Option<Registers> {
    // The result replaces the first argument: a descriptor is unknown at the exit.
    let regs = ptrace::getregs(thread).ok()?.regs;
    Some(Registers {
        number: regs[8],
        arguments: [regs[0], regs[1], regs[2], regs[3]],
        result: regs[0].cast_signed(),
    })
}

/// Where a call names what it works on.
enum Place {
    None,
    /// In its first argument, a descriptor.
    Descriptor,
    /// In this argument, the address of a path.
    Name(usize),
}

fn decode(number: u64) -> Option<(Action, Place)> {
    use nix::libc;
    Some(match number.cast_signed() {
        libc::SYS_sendto => (Action::Send, Place::Descriptor),
        libc::SYS_recvfrom => (Action::Receive, Place::Descriptor),
        libc::SYS_write | libc::SYS_pwrite64 => (Action::Write, Place::Descriptor),
        libc::SYS_read | libc::SYS_pread64 => (Action::Read, Place::Descriptor),
        libc::SYS_fsync | libc::SYS_fdatasync => (Action::Sync, Place::Descriptor),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_rename => (Action::Rename, Place::Name(1)),
        libc::SYS_renameat | libc::SYS_renameat2 => (Action::Rename, Place::Name(3)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_unlink => (Action::Unlink, Place::Name(0)),
        libc::SYS_unlinkat => (Action::Unlink, Place::Name(1)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open => (Action::Open, Place::Name(0)),
        libc::SYS_openat => (Action::Open, Place::Name(1)),
        libc::SYS_waitid | libc::SYS_wait4 => (Action::Wait, Place::None),
        libc::SYS_pidfd_send_signal => (Action::Signal, Place::None),
        _ => return None,
    })
}
