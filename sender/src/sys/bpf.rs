//! Programs that the kernel runs for each of the things it iterates over (`bpf(2)`, `BPF_TRACE_ITER`).

use super::check;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_ITER_CREATE: libc::c_int = 33;
const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_TRACE_ITER: u32 = 28;

/// What the kernel wants to hear of a program that calls its own helpers.
const LICENSE: &CStr = c"Dual MIT/GPL";

/// A program that the kernel has checked. It runs for each mapping of a process.
#[derive(Debug)]
pub struct MappingsProgram(OwnedFd);

impl MappingsProgram {
    /// Has the kernel check one. `iterator` is the number of the kernel's function `bpf_iter_task_vma` in its
    /// own type information.
    ///
    /// # Errors
    /// `EPERM` without `CAP_BPF` and `CAP_PERFMON`, `EINVAL` or `EACCES` if the kernel does not take it.
    pub fn load(instructions: &[u64], iterator: u32) -> io::Result<Self> {
        // The kernel's `union bpf_attr` for this command, up to the last member we set.
        let mut attributes = [0u32; 28];
        attributes[0] = BPF_PROG_TYPE_TRACING;
        attributes[1] = instructions.len() as u32;
        set_pointer(&mut attributes, 2, instructions.as_ptr().addr());
        set_pointer(&mut attributes, 4, LICENSE.as_ptr().addr());
        attributes[17] = BPF_TRACE_ITER;
        attributes[27] = iterator;
        bpf(BPF_PROG_LOAD, &attributes).map(Self)
    }

    /// Runs it for the mappings of the process of thread `tid`; what it writes is read from the file.
    ///
    /// # Errors
    /// `ESRCH` if there is no such thread.
    pub fn run(&self, tid: i32) -> io::Result<File> {
        // The kernel's `union bpf_iter_link_info`: of a task its thread, its process, or a pidfd.
        let which = [tid as u32, 0, 0, 0];
        let mut attributes = [0u32; 7];
        attributes[0] = self.0.as_raw_fd() as u32;
        attributes[2] = BPF_TRACE_ITER;
        set_pointer(&mut attributes, 4, which.as_ptr().addr());
        attributes[6] = size_of_val(&which) as u32;
        let link = bpf(BPF_LINK_CREATE, &attributes)?;
        let run = bpf(BPF_ITER_CREATE, &[link.as_raw_fd() as u32, 0])?;
        Ok(run.into())
    }
}

/// Pointers take two words, the lower first.
fn set_pointer(attributes: &mut [u32], at: usize, address: usize) {
    attributes[at] = address as u32;
    attributes[at + 1] = (address as u64 >> 32) as u32;
}

fn bpf(command: libc::c_int, attributes: &[u32]) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads as many bytes as it is told there are, and of what they point to as many as
    // they say; all of it lives until the call is over, and nothing is written.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_ptr(),
            size_of_val(attributes),
        )
    })?;
    // SAFETY: the kernel just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
