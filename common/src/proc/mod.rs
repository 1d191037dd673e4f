//! Parsers of the files in `/proc`.
//!
//! Each parser is a pure function over bytes: the names of files, memfds and processes are arbitrary bytes,
//! not UTF-8, and the kernel truncates the name of a process after 15 bytes, even within a character. Opening
//! a file is a separate thin layer.

pub mod boot;
pub mod capabilities;
pub mod cgroup;
pub mod maps;
pub mod meminfo;
pub mod process;
pub mod stat;
pub mod status;
pub mod uptime;

use std::fs;
use std::io;
use std::path::Path;

/// Returns the content of a file as text, with each sequence that is not UTF-8 replaced.
///
/// # Errors
/// Those of reading the file.
pub fn read_lossy(path: impl AsRef<Path>) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

/// Parses an unsigned decimal number with nothing around it.
fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |value, &digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add((digit - b'0').into()),
        _ => None,
    })
}

/// Parses an unsigned hexadecimal number of at most 16 digits, without a prefix.
fn hex(digits: &[u8]) -> Option<u64> {
    if !(1..=16).contains(&digits.len()) {
        return None;
    }
    digits.iter().try_fold(0, |value, &digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            b'A'..=b'F' => digit - b'A' + 10,
            _ => return None,
        };
        Some(value << 4 | u64::from(digit))
    })
}

/// Splits `bytes` at the first `separator`, which is in neither part.
fn split_once(bytes: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|&byte| byte == separator)?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_digits_and_nothing_else() {
        assert_eq!(decimal(b"18446744073709551615"), Some(u64::MAX));
        assert_eq!(hex(b"00fF"), Some(255));
        for bad in ["", "+1", "-1", " 1", "1 ", "0x1", "18446744073709551616"] {
            assert_eq!(decimal(bad.as_bytes()), None, "{bad:?}");
        }
        assert_eq!(hex(b"10000000000000000"), None);
    }
}
