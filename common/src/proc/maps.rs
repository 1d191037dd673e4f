//! `/proc/PID/maps`: one mapping in each line.

use super::{decimal, hex, split_once};
use crate::PageRange;

/// Name of the mapping with the kernel's system call entry points for user space.
const VDSO: &[u8] = b"[vdso]";

/// One line of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping<'a> {
    /// First address. It need not be in user space: vsyscall lies in the kernel's half of the address space.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// Whether the process may write it.
    pub write: bool,
    /// Whether the process may execute it.
    pub execute: bool,
    /// Whether writes go to the mapped object (`MAP_SHARED`).
    pub shared: bool,
    /// Offset in the mapped object, bytes.
    pub offset: u64,
    /// Major number of the device of the mapped object.
    pub major: u64,
    /// Minor number of the device of the mapped object.
    pub minor: u64,
    /// Inode number of the mapped object; 0 for anonymous memory.
    pub inode: u64,
    /// Path of the mapped object or a name by the kernel, which is in brackets; empty for anonymous memory.
    /// The kernel writes a line feed in a path as `\012`.
    pub name: &'a [u8],
}

impl<'a> Mapping<'a> {
    /// Parses a line, with or without its line feed.
    #[must_use]
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let (bounds, rest) = split_once(line, b' ')?;
        let (permissions, rest) = split_once(rest, b' ')?;
        let (offset, rest) = split_once(rest, b' ')?;
        let (device, rest) = split_once(rest, b' ')?;
        let (inode, name) = split_once(rest, b' ').unwrap_or((rest, b""));
        let (start, end) = split_once(bounds, b'-')?;
        let (major, minor) = split_once(device, b':')?;
        let [_read, write, execute, sharing] = *permissions.first_chunk()?;
        Some(Self {
            start: hex(start)?,
            end: hex(end)?,
            write: write == b'w',
            execute: execute == b'x',
            shared: sharing == b's',
            offset: hex(offset)?,
            major: hex(major)?,
            minor: hex(minor)?,
            inode: decimal(inode)?,
            name: name.trim_ascii_start(),
        })
    }

    /// Returns the addresses of the mapping; `None` if they are not in user space.
    #[must_use]
    pub fn range(&self) -> Option<PageRange> {
        PageRange::from_bounds(self.start, self.end)
    }
}

/// Splits the content of the file into lines.
pub fn lines(content: &[u8]) -> impl Iterator<Item = &[u8]> {
    content
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
}

/// Returns the addresses of the vDSO. The path of a file may end with that name but cannot be equal to it.
#[must_use]
pub fn vdso(content: &[u8]) -> Option<PageRange> {
    let mut mappings = lines(content).filter_map(Mapping::parse);
    mappings.find(|mapping| mapping.name == VDSO)?.range()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_field_of_a_line_is_read() {
        let line = b"7f0012000-7f0014000 r-xs 00002000 fe:1f 77        /tmp/\xff a (deleted)\n";
        let expected = Mapping {
            start: 0x7_f001_2000,
            end: 0x7_f001_4000,
            write: false,
            execute: true,
            shared: true,
            offset: 0x2000,
            major: 0xfe,
            minor: 0x1f,
            inode: 77,
            name: b"/tmp/\xff a (deleted)",
        };
        assert_eq!(Mapping::parse(line), Some(expected));
        assert_eq!(Mapping::parse(line.trim_ascii_end()), Some(expected));
    }

    #[test]
    fn a_line_cut_short_is_not_a_mapping() {
        let line = b"1000-2000 rw-p 00000000 00:01 77";
        let whole = Mapping::parse(line).unwrap();
        assert_eq!((whole.inode, whole.name), (77, &b""[..]));
        for cut in 0..line.len() - 2 {
            assert_eq!(Mapping::parse(&line[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn vsyscall_is_not_in_user_space() {
        let line = b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]";
        let vsyscall = Mapping::parse(line).unwrap();
        assert_eq!(vsyscall.name, b"[vsyscall]");
        assert_eq!(vsyscall.range(), None);
    }

    #[test]
    fn a_file_cannot_pass_for_the_vdso() {
        let content = b"1000-2000 r-xp 00000000 08:01 7 /tmp/\xff[vdso]\n\
            3000-4000 r-xp 00000000 08:01 7 /tmp/a [vdso]\n\
            5000-7000 r-xp 00000000 00:00 0                 [vdso]\n";
        assert_eq!(vdso(content), PageRange::from_bounds(0x5000, 0x7000));
        assert_eq!(vdso(&content[..100]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_rejected(line in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Mapping::parse(&line);
            let _ = vdso(&line);
        }
    }
}
