//! BPF iterators (`man 2 bpf`, `BPF_TRACE_ITER`): programs that the kernel runs for each item of a list.

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

/// License of the program. The kernel requires a GPL-compatible one to call its helpers.
const LICENSE: &CStr = c"Dual MIT/GPL";

/// BPF program that runs for each mapping of a process, verified by the kernel.
#[derive(Debug)]
pub struct MappingsProgram(OwnedFd);

impl MappingsProgram {
    /// Loads a program. `iterator` is the ID of the kernel's function `bpf_iter_task_vma` in the kernel's
    /// type information.
    ///
    /// # Errors
    /// `EPERM` without `CAP_BPF` and `CAP_PERFMON`, `EINVAL` or `EACCES` if the kernel rejects the program.
    pub fn load(instructions: &[u64], iterator: u32) -> io::Result<Self> {
        // `union bpf_attr` for this command, in words of 32 bits, up to the last member that is set.
        let mut attributes = [0u32; 28];
        attributes[0] = BPF_PROG_TYPE_TRACING;
        attributes[1] = instructions.len() as u32;
        set_pointer(&mut attributes, 2, instructions.as_ptr().addr());
        set_pointer(&mut attributes, 4, LICENSE.as_ptr().addr());
        attributes[17] = BPF_TRACE_ITER;
        attributes[27] = iterator;
        bpf(BPF_PROG_LOAD, &attributes).map(Self)
    }

    /// Runs the program for the mappings of the process of thread `tid`. Its output can be read from the
    /// returned file.
    ///
    /// # Errors
    /// `ESRCH` if the thread does not exist.
    pub fn run(&self, tid: i32) -> io::Result<File> {
        // `union bpf_iter_link_info` for tasks: TID, PID, pidfd, padding.
        let link_info = [tid as u32, 0, 0, 0];
        let mut attributes = [0u32; 7];
        attributes[0] = self.0.as_raw_fd() as u32;
        attributes[2] = BPF_TRACE_ITER;
        set_pointer(&mut attributes, 4, link_info.as_ptr().addr());
        attributes[6] = size_of_val(&link_info) as u32;
        let link = bpf(BPF_LINK_CREATE, &attributes)?;
        let iterator = bpf(BPF_ITER_CREATE, &[link.as_raw_fd() as u32, 0])?;
        Ok(iterator.into())
    }
}

/// Stores an address as two words of 32 bits, the lower first.
fn set_pointer(attributes: &mut [u32], at: usize, address: usize) {
    attributes[at] = address as u32;
    attributes[at + 1] = (address as u64 >> 32) as u32;
}

/// Calls `bpf` with a command that returns a descriptor.
fn bpf(command: libc::c_int, attributes: &[u32]) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads the attributes, whose size is given, and the buffers that they point to, whose
    // sizes are in the attributes or which end with NUL. The callers keep those buffers alive. The kernel
    // writes nothing.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_ptr(),
            size_of_val(attributes),
        )
    })?;
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
