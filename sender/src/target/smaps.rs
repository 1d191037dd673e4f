//! Lists the flags of a process's mappings without walking its page tables.
//!
//! CRIU needs to know for each mapping whether it is locked, grows downwards, is excluded from core dumps and
//! so on. Only `/proc/PID/smaps` has these flags, and the kernel counts every page to produce it: 7 to 10 ms
//! per GiB, while the target is stopped. Instead, the kernel runs a small BPF program for each mapping, which
//! writes its bounds and its flags. The kernel's type information (BTF) has their offsets.

use crate::sys::bpf::MappingsProgram;
use pageferry_common::proc::maps::Mapping;
use std::fs;
use std::io::{self, Read, Write};

/// File with the kernel's type information.
const TYPES: &str = "/sys/kernel/btf/vmlinux";

/// Names of the flags in `smaps`, beginning with the lowest bit. These have the same numbers in all kernels
/// and on all architectures.
const NAMES: [&str; 32] = [
    "rd", "wr", "ex", "sh", "mr", "mw", "me", "ms", "gd", "um", "pf", "??", "uw", "lo", "io", "sr",
    "rr", "dc", "de", "lf", "ac", "nr", "ht", "sf", "ar", "wf", "dd", "sd", "mm", "hg", "nh", "mg",
];

/// Flag of mappings whose pages the kernel may drop. It has no name above, but a dump does not need it.
const DROPPABLE: u64 = 1 << 40;

/// Number of bytes that the program writes for each mapping.
const RECORD: usize = 24;

/// Lists the flags of mappings with a BPF program.
#[derive(Debug)]
pub struct VmFlags(MappingsProgram);

impl VmFlags {
    /// Loads the program.
    ///
    /// # Errors
    /// Errors of the kernel: `ENOENT` without type information, `EPERM` without `CAP_BPF` and `CAP_PERFMON`.
    pub fn probe() -> io::Result<Self> {
        let Some((program, iterator)) = program_for(&fs::read(TYPES)?) else {
            return Err(invalid("unexpected kernel types"));
        };
        MappingsProgram::load(&program, iterator).map(Self)
    }

    /// Returns the part of `/proc/PID/smaps` that CRIU reads: the line and the flags of each mapping.
    ///
    /// # Errors
    /// Errors of the kernel; `InvalidData` if a flag has no known name, or the mappings change meanwhile.
    pub fn smaps(&self, tid: i32) -> io::Result<Vec<u8>> {
        let mut mappings = self.list(tid)?.into_iter();
        let maps = fs::read(format!("/proc/{tid}/maps"))?;
        let mut text = Vec::with_capacity(4 * maps.len());
        for line in maps.split_inclusive(|&byte| byte == b'\n') {
            text.extend_from_slice(line);
            let listed = Mapping::parse(line).ok_or_else(|| invalid("not a mapping"))?;
            // This mapping lies in the kernel's half of the address space and is the same in every process.
            if listed.name == b"[vsyscall]" {
                text.extend_from_slice(b"VmFlags: ex \n");
                continue;
            }
            let (_, _, flags) = mappings
                .next()
                .filter(|&(start, end, _)| (start, end) == (listed.start, listed.end))
                .ok_or_else(|| invalid("the mappings changed"))?;
            if flags & !DROPPABLE > u64::from(u32::MAX) {
                return Err(invalid("a mapping has a flag without a name"));
            }
            text.extend_from_slice(b"VmFlags: ");
            for (bit, name) in NAMES.iter().enumerate() {
                if flags & 1 << bit != 0 {
                    write!(text, "{name} ").expect("writing to a vector cannot fail");
                }
            }
            text.push(b'\n');
        }
        match mappings.next() {
            None => Ok(text),
            Some(_) => Err(invalid("the mappings changed")),
        }
    }

    /// Returns the bounds and the flags of each mapping, in ascending order.
    fn list(&self, tid: i32) -> io::Result<Vec<(u64, u64, u64)>> {
        let mut run = self.0.run(tid)?;
        let mut mappings: Vec<(u64, u64, u64)> = Vec::new();
        // The size of the kernel's own buffer. It returns whole records only.
        let mut buffer = vec![0; 1 << 15];
        loop {
            let got = run.read(&mut buffer)?;
            for mapping in buffer[..got].chunks_exact(RECORD) {
                let word =
                    |at| u64::from_le_bytes(mapping[at..at + 8].try_into().expect("8 bytes"));
                let start = word(0);
                // After the end of a list that took several reads, the kernel begins again at some mapping.
                if mappings.last().is_some_and(|last| start <= last.0) {
                    return Ok(mappings);
                }
                mappings.push((start, word(8), word(16)));
            }
            if got == 0 {
                return Ok(mappings);
            }
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Returns the program for a kernel with these types, and the type number of the iterator to attach it to;
/// `None` if the types are not as expected.
#[must_use]
pub fn program_for(btf: &[u8]) -> Option<([u64; 16], u32)> {
    let types = Btf::parse(btf)?;
    let iterator = types.find(FUNC, "bpf_iter_task_vma")?;
    let vma = types.find(STRUCT, "vm_area_struct")?;
    let offset = |name| {
        let mut left = MEMBERS_MAX;
        i16::try_from(types.offset(vma, name, DEPTH_MAX, &mut left)?).ok()
    };
    let program = program(offset("vm_start")?, offset("vm_end")?, offset("vm_flags")?);
    Some((program, iterator))
}

/// Returns a program that writes [`RECORD`] bytes for each mapping: its bounds and its flags, which are at
/// these offsets in the kernel's structure.
fn program(start: i16, end: i16, flags: i16) -> [u64; 16] {
    const SEQ_WRITE: i32 = 127;
    let op = |code: u8, to: u8, from: u8, offset: i16, value: i32| {
        let registers = from << 4 | to;
        let [low, high] = offset.to_le_bytes();
        let head = u32::from_le_bytes([code, registers, low, high]);
        u64::from(head) | u64::from(value as u32) << 32
    };
    let load = |to, from, offset| op(0x79, to, from, offset, 0);
    let store = |offset, from| op(0x7b, 10, from, offset, 0);
    [
        // The argument points to the output file, the task, and the mapping, which is null at the end.
        load(2, 1, 16),
        op(0x15, 2, 0, 12, 0),
        load(1, 1, 0),
        load(1, 1, 0),
        load(3, 2, start),
        store(-24, 3),
        load(3, 2, end),
        store(-16, 3),
        load(3, 2, flags),
        store(-8, 3),
        op(0xbf, 2, 10, 0, 0),
        op(0x07, 2, 0, 0, -(RECORD as i32)),
        op(0xb7, 3, 0, 0, RECORD as i32),
        op(0x85, 0, 0, 0, SEQ_WRITE),
        op(0xb7, 0, 0, 0, 0),
        op(0x95, 0, 0, 0, 0),
    ]
}

const STRUCT: u32 = 4;
const UNION: u32 = 5;
const FUNC: u32 = 12;

/// Greatest depth of nested members without a name.
const DEPTH_MAX: u32 = 8;

/// Greatest number of members that are visited to find one: a damaged type may contain itself many times.
const MEMBERS_MAX: u32 = 10_000;

/// The kernel's description of its types (`Documentation/bpf/btf.rst`).
struct Btf<'a> {
    types: &'a [u8],
    names: &'a [u8],
    /// Offset of each type, beginning with number 1.
    starts: Vec<usize>,
}

impl<'a> Btf<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        const MAGIC: u32 = 0xeb9f;
        if word(bytes, 0)? & 0xffff != MAGIC {
            return None;
        }
        let header = word(bytes, 4)?;
        let section = |at| {
            let start = header.checked_add(word(bytes, at)?)? as usize;
            bytes.get(start..start.checked_add(word(bytes, at + 4)? as usize)?)
        };
        let (types, names) = (section(8)?, section(16)?);
        let mut starts = Vec::new();
        let mut at = 0;
        while at < types.len() {
            starts.push(at);
            let info = word(types, at + 4)?;
            let members = (info & 0xffff) as usize;
            at += 12
                + match info >> 24 & 0x1f {
                    // Pointers, forwards, typedefs, qualifiers, functions, floats, type tags.
                    2 | 7..=12 | 16 | 18 => 0,
                    // Integers, variables, declaration tags.
                    1 | 14 | 17 => 4,
                    // Arrays.
                    3 => 12,
                    // Enumerations and prototypes.
                    6 | 13 => 8 * members,
                    // Structures, unions, sections, enumerations of 64 bits.
                    STRUCT | UNION | 15 | 19 => 12 * members,
                    _ => return None,
                };
        }
        Some(Self {
            types,
            names,
            starts,
        })
    }

    fn is_named(&self, name_at: u32, name: &str) -> bool {
        let found = self.names.get(name_at as usize..).unwrap_or_default();
        found
            .strip_prefix(name.as_bytes())
            .is_some_and(|rest| rest.first() == Some(&0))
    }

    /// Returns the number of the type with this kind and name.
    fn find(&self, kind: u32, name: &str) -> Option<u32> {
        let found = self.starts.iter().position(|&at| {
            let is_kind = word(self.types, at + 4).is_some_and(|info| info >> 24 & 0x1f == kind);
            is_kind && word(self.types, at).is_some_and(|at| self.is_named(at, name))
        });
        u32::try_from(found? + 1).ok()
    }

    /// Returns the offset of a member of a structure or union in bytes, also if it is in a member without a
    /// name. Visits at most `left` members, and subtracts those that it visits.
    fn offset(&self, number: u32, name: &str, depth: u32, left: &mut u32) -> Option<u32> {
        let at = *self.starts.get(number.checked_sub(1)? as usize)?;
        let info = word(self.types, at + 4)?;
        if !matches!(info >> 24 & 0x1f, STRUCT | UNION) || depth == 0 {
            return None;
        }
        let mut members = (0..(info & 0xffff) as usize).map(|member| at + 12 + 12 * member);
        members.find_map(|member| {
            *left = left.checked_sub(1)?;
            let inside = match word(self.types, member)? {
                0 => self.offset(word(self.types, member + 4)?, name, depth - 1, left)?,
                found if self.is_named(found, name) => 0,
                _ => return None,
            };
            // The offset is in bits; in structures with bit fields, the upper byte is the length of the
            // field.
            Some(inside + (word(self.types, member + 8)? & 0xff_ffff) / 8)
        })
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().expect("4 bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns type information with a function, and a structure with these members: name, type, offset in
    /// bits.
    fn btf(members: &[[u32; 3]]) -> Vec<u8> {
        let names = b"\0bpf_iter_task_vma\0vm_area_struct\0vm_start\0vm_end\0vm_flags\0";
        let function = [1, FUNC << 24, 0];
        let structure = [19, STRUCT << 24 | members.len() as u32, 4096];
        let words = [&function[..], &structure, members.as_flattened()].concat();
        let types: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let header = [0x1_eb9f, 24, 0, types.len(), types.len(), names.len()];
        let header = header.iter().flat_map(|&word| (word as u32).to_le_bytes());
        header
            .chain(types.iter().copied())
            .chain(names.iter().copied())
            .collect()
    }

    #[test]
    fn members_are_found_at_their_offsets() {
        let good = btf(&[[34, 1, 64], [43, 1, 128], [50, 1, 256]]);
        assert_eq!(program_for(&good), Some((program(8, 16, 32), 1)));
        for cut in 0..good.len() - 1 {
            assert_eq!(program_for(&good[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn type_that_contains_itself_a_thousand_times_takes_no_time() {
        assert_eq!(program_for(&btf(&[[0, 2, 0]; 1000])), None);
    }
}
