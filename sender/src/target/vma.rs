//! The mappings of a process, as `/proc/PID/maps` lists them, and which of their pages are sent.
//!
//! The rules are those of CRIU: pages that it would dump are sent (see docs/design/dirty-tracking.md).

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

/// Which pages of a mapping are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Private memory: the pages that are the process's own go into its image.
    Private {
        /// Whether the pages are hugetlb pages, which restore reads from the newest directory only.
        hugetlb: bool,
    },
    /// Every page goes into the image, whatever the page tables show: the vDSO, which restore must parse, and
    /// rings that the kernel itself writes.
    Whole,
    /// A mapping of a shared segment, which has an image of its own.
    Segment,
    /// No page is sent: the mapping belongs to an ordinary file or to the kernel.
    Foreign,
}

/// One mapping (VMA).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vma {
    /// Addresses of the mapping.
    pub range: PageRange,
    /// Which of its pages are sent.
    pub class: Class,
    /// Whether it is code of a file: its pages are those of the file, except for breakpoints of a debugger.
    pub file_code: bool,
    /// Whether it is executable. CRIU makes a process run a few instructions there while it dumps the
    /// process.
    pub executable: bool,
    /// Offset in the mapped object, in bytes.
    pub offset: u64,
    /// Device of the mapped object.
    pub device: Device,
    /// Inode number of the mapped object; for a segment, CRIU's `shmid`.
    pub inode: u64,
}

/// A part of a private mapping.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Addresses of the part.
    pub range: PageRange,
    /// Whether its pages may belong to a file. If they cannot, the kernel does not look up the owner of every
    /// page, which makes its walk several times faster.
    pub file: bool,
}

impl Vma {
    /// Whether the process's own pages in it go into its image.
    #[must_use]
    pub fn is_private(&self) -> bool {
        matches!(self.class, Class::Private { .. })
    }

    /// Whether a page may have changed although userfaultfd write-protection reports it as clean. A protected
    /// page of a private file mapping that is given back leaves a marker. A write to it faults twice: the
    /// first fault copies the page of the file and protects the copy like its predecessor, the second removes
    /// the protection. A thread that is stopped between the two leaves a page that looks clean.
    #[must_use]
    pub fn is_doubtful(&self) -> bool {
        self.class == Class::Private { hugetlb: false } && self.inode != 0
    }

    /// Returns the whole mapping as one part to scan.
    #[must_use]
    pub fn part(&self) -> Part {
        Part {
            range: self.range,
            file: self.inode != 0,
        }
    }
}

/// Device numbers of the kernel's private tmpfs and hugetlbfs mounts, which hold all shared memory that is
/// not an ordinary file. They are found by creating memfds.
#[derive(Debug, Clone)]
pub struct KernelMounts {
    shmem: Device,
    hugetlb: Vec<Device>,
}

impl KernelMounts {
    /// Determines the device numbers on the running kernel.
    ///
    /// # Errors
    /// Errors of the kernel, if it has no memfd.
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
            // The kernel rejects sizes that it does not support.
            device_of(MFdFlags::MFD_HUGETLB | size).ok()
        });
        Ok(Self {
            shmem: device_of(MFdFlags::MFD_CLOEXEC)?,
            hugetlb: hugetlb.collect(),
        })
    }

    /// Returns whether an object on this device is a shared segment rather than a file.
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
    /// Converts an `st_dev`.
    #[must_use]
    pub fn from_raw(device: u64) -> Self {
        Self {
            major: major(device),
            minor: minor(device),
        }
    }
}

/// Lists the mappings of a process in ascending order. `buffer` is scratch space; it is kept between calls to
/// avoid allocations while the target is frozen.
///
/// # Errors
/// Errors of opening and reading `/proc/TID/maps`; `InvalidData` names a line that is not a mapping.
pub fn list(tid: i32, mounts: &KernelMounts, buffer: &mut Vec<u8>) -> io::Result<Vec<Vma>> {
    buffer.clear();
    File::open(format!("/proc/{tid}/maps"))?.read_to_end(buffer)?;
    parse(buffer, mounts)
}

/// Parses the content of `/proc/PID/maps`.
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
    /// The vsyscall page, which lies in the kernel's half of the address space.
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
    fn every_kind_of_mapping_is_classified() {
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
    fn own_mappings_are_listed_in_ascending_order() {
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
        fn any_text_is_parsed_or_rejected(text in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&text, &mounts());
        }
    }
}
