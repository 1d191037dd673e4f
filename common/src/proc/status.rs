//! `/proc/PID/status` and other files with one `Name: value` in each line.

use super::hex;
use std::str::FromStr;

/// Returns the value of the first field of this name, without the white space around it.
#[must_use]
pub fn field<'a>(content: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut lines = content.split(|&byte| byte == b'\n');
    let value = lines.find_map(|line| line.strip_prefix(name.as_bytes())?.strip_prefix(b":"))?;
    Some(value.trim_ascii())
}

/// Returns the value of a field that holds one decimal number.
#[must_use]
pub fn number<T: FromStr>(content: &[u8], name: &str) -> Option<T> {
    parse(field(content, name)?)
}

/// Returns the value of a field that holds a mask of 64 bits, such as `CapEff` and `SigIgn`.
#[must_use]
pub fn mask(content: &[u8], name: &str) -> Option<u64> {
    hex(field(content, name)?)
}

/// Returns the PIDs of a process in each of its nested PID namespaces, beginning with that of the reader of
/// `/proc`. It is read from `NStgid` and not `NSpid`, because the thread need not be the leader.
#[must_use]
pub fn nested_pids(content: &[u8]) -> Vec<u32> {
    let pids = field(content, "NStgid").unwrap_or_default();
    let pids = pids.split(u8::is_ascii_whitespace);
    pids.filter_map(parse).collect()
}

fn parse<T: FromStr>(value: &[u8]) -> Option<T> {
    str::from_utf8(value).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &[u8] = b"Name:\tk\xc3\nState:\tT (stopped)\nTracerPid:\t0\n\
        NStgid:\t70\t7\nSigIgn:\t0000000000010000\nCapEff:\t0000000000040141\n";

    #[test]
    fn fields_are_found_by_name() {
        assert_eq!(field(STATUS, "Name"), Some(&b"k\xc3"[..]));
        assert_eq!(field(STATUS, "State"), Some(&b"T (stopped)"[..]));
        assert_eq!(number(STATUS, "TracerPid"), Some(0));
        assert_eq!(mask(STATUS, "SigIgn"), Some(1 << 16));
        assert_eq!(mask(STATUS, "CapEff"), Some(0x40141));
        assert_eq!(nested_pids(STATUS), [70, 7]);
    }

    #[test]
    fn a_missing_field_has_no_value() {
        for missing in ["Stat", "tate", "SigCgt", ""] {
            assert_eq!(field(STATUS, missing), None, "{missing}");
        }
        assert_eq!(number::<i32>(STATUS, "Name"), None);
        assert_eq!(mask(STATUS, "State"), None);
        assert!(nested_pids(b"NSpid:\t1\n").is_empty());
    }
}
