//! `/proc/uptime`.

use std::fs;
use std::io;

/// Reads the time since boot, µs.
///
/// # Errors
/// Those of reading the file; `InvalidData` if it does not begin with a number.
pub fn read() -> io::Result<u64> {
    parse(&fs::read("/proc/uptime")?).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Parses the content of the file; returns the time since boot, µs.
#[must_use]
pub fn parse(content: &[u8]) -> Option<u64> {
    let seconds = content.split(|&byte| byte == b' ').next()?;
    let seconds: f64 = str::from_utf8(seconds).ok()?.parse().ok()?;
    Some((seconds * 1e6) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_is_the_time_since_boot() {
        assert_eq!(parse(b"12.34 99.99\n"), Some(12_340_000));
        assert_eq!(parse(b""), None);
        assert!(read().unwrap() > 0);
    }
}
