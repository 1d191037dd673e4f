//! CRIU's images of state: the messages and fields that are used. An image is one or two magic words,
//! followed by records: a length in 32 bits and that many bytes of protobuf.

use prost::Message;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// Maximum length of an image that is read, bytes. That of a process with a million mappings is shorter.
const IMAGE_MAX: u64 = 64 << 20;

/// Beginning of the name of an image of a thread.
const CORE: &str = "core-";

/// Image of a thread (`core-TID.img`).
#[derive(Clone, PartialEq, Message)]
pub struct Core {
    /// Architecture.
    #[prost(int32, required, tag = "1")]
    machine: i32,
    /// Registers on x86-64; none in a process that has exited and was not waited for.
    #[prost(message, optional, tag = "2")]
    x86: Option<ThreadInfo>,
    /// State of the process; only in the image of its leader.
    #[prost(message, optional, tag = "3")]
    process: Option<ProcessCore>,
}

#[derive(Clone, PartialEq, Message)]
struct ThreadInfo {
    #[prost(message, optional, tag = "2")]
    registers: Option<Registers>,
}

#[derive(Clone, PartialEq, Message)]
struct Registers {
    #[prost(uint64, required, tag = "20")]
    sp: u64,
}

#[derive(Clone, PartialEq, Message)]
struct ProcessCore {
    #[prost(message, repeated, tag = "15")]
    handlers: Vec<SignalHandler>,
}

#[derive(Clone, PartialEq, Message)]
struct SignalHandler {
    #[prost(uint64, required, tag = "2")]
    flags: u64,
}

/// Where the stack of a thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stack {
    /// The stack pointer.
    At(u64),
    /// The thread has exited, and has none.
    Exited,
    /// The image does not contain it, or is of another architecture than x86-64.
    Unknown,
}

impl Core {
    const X86_64: i32 = 1;

    /// Returns where the stack of the thread is.
    #[must_use]
    pub fn stack(&self) -> Stack {
        match (self.machine, &self.x86) {
            (Self::X86_64, None) => Stack::Exited,
            (Self::X86_64, Some(thread)) => match &thread.registers {
                Some(registers) => Stack::At(registers.sp),
                None => Stack::Unknown,
            },
            (_, _) => Stack::Unknown,
        }
    }
}

/// Image of the memory of a process (`mm-PID.img`).
#[derive(Clone, PartialEq, Message)]
pub struct Mm {
    /// Mappings.
    #[prost(message, repeated, tag = "14")]
    pub vmas: Vec<Vma>,
}

/// A mapping.
#[derive(Clone, PartialEq, Message)]
pub struct Vma {
    /// First address.
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    /// One past the last address.
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    /// Flags of `mmap(2)`.
    #[prost(uint32, required, tag = "6")]
    pub flags: u32,
    /// Flags of CRIU.
    #[prost(uint32, required, tag = "7")]
    pub status: u32,
}

impl Vma {
    /// Flag of a private mapping.
    pub const MAP_PRIVATE: u32 = 0x02;
    /// Flag of anonymous memory.
    pub const MAP_ANONYMOUS: u32 = 0x20;
    /// Flag of locked memory.
    pub const MAP_LOCKED: u32 = 0x2000;
    /// Flag of hugetlb pages.
    pub const MAP_HUGETLB: u32 = 0x4_0000;
    /// CRIU's flag of the vDSO.
    const VDSO: u32 = 1 << 3;
    /// CRIU's flag of the data of the vDSO.
    const VVAR: u32 = 1 << 12;

    /// Returns whether CRIU registers the mapping with the userfaultfd of a lazy restore.
    #[must_use]
    pub fn is_lazy(&self) -> bool {
        let required = Self::MAP_PRIVATE | Self::MAP_ANONYMOUS;
        let flags = self.flags & (required | Self::MAP_LOCKED | Self::MAP_HUGETLB);
        flags == required && self.status & (Self::VDSO | Self::VVAR) == 0
    }
}

/// A memfd, in the image of all memfds (`memfd.img`).
#[derive(Clone, PartialEq, Message)]
pub struct MemfdInode {
    /// Name given to `memfd_create(2)`.
    #[prost(string, required, tag = "1")]
    pub name: String,
    /// Size, bytes.
    #[prost(uint64, required, tag = "4")]
    pub size: u64,
    /// Id of the segment with its pages.
    #[prost(uint32, required, tag = "5")]
    pub shmid: u32,
    /// Seals (`F_ADD_SEALS`).
    #[prost(uint32, required, tag = "6")]
    pub seals: u32,
    /// Page size flags, if it consists of hugetlb pages.
    #[prost(uint32, optional, tag = "8")]
    pub hugetlb_flag: Option<u32>,
}

/// The image that describes a directory of images (`inventory.img`), with the fields that a pre-dump needs.
#[derive(Clone, PartialEq, Message)]
pub struct Inventory {
    #[prost(uint32, required, tag = "1")]
    image_version: u32,
    #[prost(uint64, optional, tag = "8")]
    dump_uptime: Option<u64>,
    #[prost(uint32, optional, tag = "9")]
    pre_dump_mode: Option<u32>,
}

impl Inventory {
    const IMAGE_VERSION: u32 = 2;
    const PRE_DUMP_READ: u32 = 2;

    /// Returns the inventory of a pre-dump. `uptime_us` is the uptime of the host of the sender when the tree
    /// was frozen, µs.
    #[must_use]
    pub fn of_pre_dump(uptime_us: u64) -> Self {
        Self {
            image_version: Self::IMAGE_VERSION,
            dump_uptime: Some(uptime_us),
            pre_dump_mode: Some(Self::PRE_DUMP_READ),
        }
    }
}

/// Returns all records of an image; none if the image does not exist.
///
/// # Errors
/// Those of reading it; `InvalidData` or `UnexpectedEof` if it is malformed.
pub fn records<M: Message + Default>(path: &Path) -> io::Result<Vec<M>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    let len = file.take(IMAGE_MAX + 1).read_to_end(&mut bytes)?;
    match len as u64 > IMAGE_MAX {
        true => Err(io::Error::other("it is too long")),
        false => parse(&bytes),
    }
}

fn parse<M: Message + Default>(bytes: &[u8]) -> io::Result<Vec<M>> {
    let truncated = || io::Error::from(io::ErrorKind::UnexpectedEof);
    // Two magic words.
    let mut rest = bytes.get(8..).ok_or_else(truncated)?;
    let mut records = Vec::new();
    while let Some((len, after)) = rest.split_first_chunk() {
        let len = u32::from_le_bytes(*len) as usize;
        let (record, later) = after.split_at_checked(len).ok_or_else(truncated)?;
        records.push(M::decode(record).map_err(io::Error::other)?);
        rest = later;
    }
    match rest.is_empty() {
        true => Ok(records),
        false => Err(truncated()),
    }
}

/// Returns whether every process in a directory of images must wait for its children: none has set
/// `SA_NOCLDWAIT`, which no file in `/proc` shows.
///
/// # Errors
/// As [`records`].
pub fn children_are_waited_for(dir: &Path) -> io::Result<bool> {
    const SA_NOCLDWAIT: u64 = 2;
    let waits = |process: &ProcessCore| {
        let mut handlers = process.handlers.iter();
        handlers.all(|handler| handler.flags & SA_NOCLDWAIT == 0)
    };
    Ok(processes(dir)?.iter().all(waits))
}

/// Returns each process in a directory of images.
fn processes(dir: &Path) -> io::Result<Vec<ProcessCore>> {
    let mut processes = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.starts_with(CORE) {
            continue;
        }
        let cores = records::<Core>(&dir.join(&name))?.into_iter();
        processes.extend(cores.filter_map(|core| core.process));
    }
    Ok(processes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, PartialEq, Message)]
    struct Number {
        #[prost(uint32, required, tag = "1")]
        number: u32,
    }

    #[test]
    fn records_follow_each_other() {
        let image = b"magicTWO\x02\0\0\0\x08\x05\x02\0\0\0\x08\x07";
        let numbers: Vec<Number> = parse(image).unwrap();
        assert_eq!(numbers.iter().map(|n| n.number).collect::<Vec<_>>(), [5, 7]);
        for cut in [0, 7, 9, 13, 15, image.len() - 1] {
            assert!(parse::<Number>(&image[..cut]).is_err(), "{cut}");
        }
        assert_eq!(parse::<Number>(&image[..8]).unwrap(), []);
    }

    #[test]
    fn signal_handlers_of_every_process_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, flags: &[u64]| {
            let handlers = flags.iter().map(|&flags| SignalHandler { flags }).collect();
            let core = Core {
                process: Some(ProcessCore { handlers }),
                ..Core::default()
            };
            let core = core.encode_to_vec();
            let mut image = b"magicTWO".to_vec();
            image.extend((core.len() as u32).to_le_bytes());
            image.extend(core);
            fs::write(dir.path().join(name), image).unwrap();
        };
        put("core-1.img", &[0, 4]);
        put("mm-1.img", &[2]);
        assert!(children_are_waited_for(dir.path()).unwrap());
        put("core-2.img", &[0x1000_0002, 0]);
        assert!(!children_are_waited_for(dir.path()).unwrap());
        put("core-2.img", &[]);
        assert!(children_are_waited_for(dir.path()).unwrap());
        fs::write(dir.path().join("core-3.img"), "short").unwrap();
        assert!(children_are_waited_for(dir.path()).is_err());
    }

    #[test]
    fn a_stack_is_where_the_registers_point() {
        let core = |machine, x86| Core {
            machine,
            x86,
            process: None,
        };
        let thread = |registers| Some(ThreadInfo { registers });
        let registers = Some(Registers { sp: 0x7000 });
        let cases = [
            (core(1, thread(registers)), Stack::At(0x7000)),
            (core(1, thread(None)), Stack::Unknown),
            (core(1, None), Stack::Exited),
            (core(2, None), Stack::Unknown),
        ];
        for (core, stack) in cases {
            assert_eq!(core.stack(), stack);
        }
    }
}
