//! The mappings of a process, as `/proc/PID/maps` lists them, and what each means to a dump.
//!
//! The rules are CRIU's: what it would dump, we send (docs/design/dirty-tracking.md).

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{fstat, major, minor};
use pageferry_common::PageRange;
use pageferry_common::proc::maps::{self, Mapping};
use std::fs::File;
use std::io::{self, Read};

/// A device number as `/proc/PID/maps` prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Device {
    /// Major number.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
}

/// What a mapping's pages are to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Private memory: the pages that are the process's own go into its image.
    Private {
        /// Made of hugetlb pages, which restore reads from the newest directory only.
        hugetlb: bool,
    },
    /// Every page goes, whatever the page tables say: the vDSO, which restore must parse, and
    /// rings that the kernel itself writes.
    Whole,
    /// A window into a shared segment, which has an image of its own.
    Segment,
    /// Nothing to send: an ordinary file's, or the kernel's.
    Foreign,
}

/// One mapping (VMA).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vma {
    /// Where it lies.
    pub range: PageRange,
    /// What its pages are to us.
    pub class: Class,
    /// Code of a file: its pages are the file's but for a debugger's breakpoints.
    pub file_code: bool,
    /// May be executed. CRIU makes a process run a few instructions there while it dumps it.
    pub executable: bool,
    /// Offset in the mapped object, bytes.
    pub offset: u64,
    /// Device of the mapped object.
    pub device: Device,
    /// Inode number of the mapped object; of a segment, CRIU's `shmid`.
    pub inode: u64,
}

/// A part of a private mapping.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Where it lies.
    pub range: PageRange,
    /// Whether its pages may be a file's. If not, the kernel need not be asked, which makes its
    /// walk several times faster: it looks up every page's owner otherwise.
    pub file: bool,
}

impl Vma {
    /// Whether the process's own pages in it go into its image.
    #[must_use]
    pub fn is_private(&self) -> bool {
        matches!(self.class, Class::Private { .. })
    }

    /// Whether a page that userfaultfd write-protection calls clean may have changed all the same.
    /// A protected page of a private file mapping that is given back leaves a marker; a write to it
    /// faults twice, first for a copy of the file's page, protected like what was there before, then
    /// to unprotect it. A thread that is stopped between the two leaves a page that looks clean.
    #[must_use]
    pub fn is_doubtful(&self) -> bool {
        self.class == Class::Private { hugetlb: false } && self.inode != 0
    }

    /// All of it, to be scanned.
    #[must_use]
    pub fn part(&self) -> Part {
        Part {
            range: self.range,
            file: self.inode != 0,
        }
    }
}

/// Where the kernel keeps shared memory that is no ordinary file: its private tmpfs and hugetlbfs
/// mounts, known by the device numbers of memfds of our own.
#[derive(Debug, Clone)]
pub struct KernelMounts {
    shmem: Device,
    hugetlb: Vec<Device>,
}

impl KernelMounts {
    /// Asks the running kernel.
    ///
    /// # Errors
    /// The kernel's, if it has no memfd.
    pub fn probe() -> io::Result<Self> {
        let device_of = |flags| -> io::Result<Device> {
            let fd = memfd_create("pageferry-probe", flags)?;
            Ok(Device::from_raw(fstat(&fd)?.st_dev))
        };
        let sizes = [
            MFdFlags::MFD_HUGE_2MB,
            MFdFlags::MFD_HUGE_1GB,
            MFdFlags::MFD_HUGE_16MB,
            MFdFlags::MFD_HUGE_512MB,
        ];
        let hugetlb = sizes.into_iter().filter_map(|size| {
            // A size that this kernel does not have is refused.
            device_of(MFdFlags::MFD_HUGETLB | size).ok()
        });
        Ok(Self {
            shmem: device_of(MFdFlags::MFD_CLOEXEC)?,
            hugetlb: hugetlb.collect(),
        })
    }

    /// Whether an object on this device is a shared segment rather than a file.
    #[must_use]
    pub fn holds(&self, device: Device) -> bool {
        device == self.shmem || self.hugetlb.contains(&device)
    }

    fn classify(&self, shared: bool, device: Device, name: &[u8]) -> Class {
        match name {
            b"[vdso]" => return Class::Whole,
            b"[vvar]" | b"[vvar_vclock]" | b"[vsyscall]" | b"[uprobes]" => return Class::Foreign,
            _ if name.starts_with(b"/[aio]") => return Class::Whole,
            _ => {}
        }
        match shared {
            true if self.holds(device) => Class::Segment,
            true => Class::Foreign,
            false => Class::Private {
                hugetlb: self.hugetlb.contains(&device),
            },
        }
    }
}

impl Device {
    /// From a `st_dev`.
    #[must_use]
    pub fn from_raw(device: u64) -> Self {
        Self {
            major: major(device),
            minor: minor(device),
        }
    }
}

/// Lists the mappings of a process, ascending. `buffer` is scratch space, kept between calls so
/// that nothing need be allocated while a tree is frozen.
///
/// # Errors
/// Those of opening and reading `/proc/TID/maps`; `InvalidData` names a line that is not a mapping.
pub fn list(tid: i32, mounts: &KernelMounts, buffer: &mut Vec<u8>) -> io::Result<Vec<Vma>> {
    buffer.clear();
    File::open(format!("/proc/{tid}/maps"))?.read_to_end(buffer)?;
    parse(buffer, mounts)
}

/// Parses the text of `/proc/PID/maps`.
///
/// # Errors
/// `InvalidData` names the first line that is not a mapping.
pub fn parse(text: &[u8], mounts: &KernelMounts) -> io::Result<Vec<Vma>> {
    let mut vmas = Vec::new();
    for line in maps::lines(text) {
        match parse_line(line, mounts) {
            Some(Line::Vma(vma)) => vmas.push(vma),
            Some(Line::BeyondUserSpace) => {}
            None => {
                let what = format!("not a mapping: {:?}", String::from_utf8_lossy(line));
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
        }
    }
    Ok(vmas)
}

enum Line {
    Vma(Vma),
    /// vsyscall, which lies in the kernel's half.
    BeyondUserSpace,
}

fn parse_line(line: &[u8], mounts: &KernelMounts) -> Option<Line> {
    let mapping = Mapping::parse(line)?;
    if mapping.name == b"[vsyscall]" {
        return Some(Line::BeyondUserSpace);
    }
    let device = Device {
        major: mapping.major,
        minor: mapping.minor,
    };
    Some(Line::Vma(Vma {
        range: mapping.range()?,
        class: mounts.classify(mapping.shared, device, mapping.name),
        file_code: mapping.execute && !mapping.write && mapping.inode != 0,
        executable: mapping.execute,
        offset: mapping.offset,
        device,
        inode: mapping.inode,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mounts() -> KernelMounts {
        KernelMounts {
            shmem: Device { major: 0, minor: 1 },
            hugetlb: vec![Device {
                major: 0,
                minor: 15,
            }],
        }
    }

    #[test]
    fn every_kind_of_mapping_has_its_class() {
        let private = Class::Private { hugetlb: false };
        for (line, class) in [
            ("1000-2000 rw-p 00000000 00:00 0 ", private),
            (
                "1000-2000 ---p 00000000 00:00 0                [heap]",
                private,
            ),
            (
                "1000-2000 r-xp 00002000 fe:01 77  /bin/a b (deleted)",
                private,
            ),
            ("1000-2000 rw-s 00000000 fe:01 77   /var/x", Class::Foreign),
            (
                "1000-2000 rw-s 00000000 00:01 9 /dev/zero (deleted)",
                Class::Segment,
            ),
            (
                "1000-2000 rw-s 00000000 00:01 32 /SYSV00000000 (deleted)",
                Class::Segment,
            ),
            (
                "1000-2000 rw-p 00000000 00:01 9 /memfd:x (deleted)",
                private,
            ),
            (
                "200000-400000 rw-s 00000000 00:0f 5 /memfd:h (deleted)",
                Class::Segment,
            ),
            (
                "200000-400000 rw-p 00000000 00:0f 5 /anon_hugepage (deleted)",
                Class::Private { hugetlb: true },
            ),
            ("1000-2000 r--p 00000000 00:00 0 [vvar]", Class::Foreign),
            ("1000-2000 r-xp 00000000 00:00 0 [vdso]", Class::Whole),
            (
                "1000-2000 rw-s 00000000 00:10 8 /[aio] (deleted)",
                Class::Whole,
            ),
        ] {
            let vmas = parse(line.as_bytes(), &mounts()).unwrap();
            assert_eq!(vmas[0].class, class, "{line}");
        }
        let vsyscall = b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]\n";
        assert_eq!(parse(vsyscall, &mounts()).unwrap(), []);
    }

    #[test]
    fn this_process_has_a_stack_a_vdso_and_code() {
        let mounts = KernelMounts::probe().unwrap();
        let vmas = list(std::process::id() as i32, &mounts, &mut Vec::new()).unwrap();
        assert_eq!(vmas.iter().filter(|v| v.class == Class::Whole).count(), 1);
        assert!(vmas.iter().any(|v| v.file_code));
        assert!(
            vmas.windows(2)
                .all(|w| w[0].range.end() <= w[1].range.start())
        );
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_parsed(text in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&text, &mounts());
        }
    }
}
