//! `/proc/meminfo`.

use super::{decimal, status};
use std::fs;
use std::io;

/// Memory of this host, as far as the kernel reports it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemInfo {
    /// All memory, bytes.
    pub total: Option<u64>,
    /// Memory that can be allocated without swapping, bytes.
    pub available: Option<u64>,
}

impl MemInfo {
    /// Reads and parses the file.
    ///
    /// # Errors
    /// Those of reading it.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&fs::read("/proc/meminfo")?))
    }

    /// Parses the content of the file.
    #[must_use]
    pub fn parse(content: &[u8]) -> Self {
        let bytes = |name| {
            let kib = status::field(content, name)?.strip_suffix(b" kB")?;
            decimal(kib)?.checked_mul(1024)
        };
        Self {
            total: bytes("MemTotal"),
            available: bytes("MemAvailable"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_converted_to_bytes() {
        let content = b"MemTotal:        4000 kB\nMemFree: 9 kB\nMemAvailable:    999 kB\n";
        let expected = MemInfo {
            total: Some(4000 << 10),
            available: Some(999 << 10),
        };
        assert_eq!(MemInfo::parse(content), expected);
        assert_eq!(MemInfo::parse(b"MemTotal: x\n"), MemInfo::default());
        assert!(MemInfo::read().unwrap().available.is_some());
    }
}
