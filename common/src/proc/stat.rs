//! `/proc/PID/stat` and `/proc/PID/task/TID/stat`.

use super::decimal;

/// The fields of a `stat` file, parsed when they are asked for.
#[derive(Debug, Clone, Copy)]
pub struct Stat<'a> {
    /// Everything behind the name: the state and the fields after it, separated by single spaces.
    fields: &'a [u8],
}

// Positions among the fields behind the name, counted from the state at 0 (`man 5 proc`).
const CHILD_MINOR_FAULTS: usize = 8;
const CHILD_MAJOR_FAULTS: usize = 10;
const START_TIME: usize = 19;

impl<'a> Stat<'a> {
    /// Finds the fields behind the name in the content of the file. The name may contain anything, even `")
    /// Z"`; no field behind it contains a parenthesis.
    #[must_use]
    pub fn parse(content: &'a [u8]) -> Option<Self> {
        let name_end = content.iter().rposition(|&byte| byte == b')')?;
        let fields = content[name_end + 1..].trim_ascii();
        (!fields.is_empty()).then_some(Self { fields })
    }

    /// Returns the state letter of the process or thread.
    #[must_use]
    pub fn state(self) -> char {
        // `parse` does not accept a file without fields.
        self.fields.first().copied().map_or('?', char::from)
    }

    /// Returns whether the process or thread has exited.
    #[must_use]
    pub fn has_exited(self) -> bool {
        matches!(self.state(), 'Z' | 'X')
    }

    /// Returns the start time of the process or thread, in clock ticks since boot.
    #[must_use]
    pub fn start_time(self) -> Option<u64> {
        self.field(START_TIME)
    }

    /// Returns the number of page faults, minor and major, of the children that the process has waited for.
    /// The sum wraps around.
    #[must_use]
    pub fn child_faults(self) -> Option<u64> {
        let minor = self.field(CHILD_MINOR_FAULTS)?;
        Some(minor.wrapping_add(self.field(CHILD_MAJOR_FAULTS)?))
    }

    fn field(self, at: usize) -> Option<u64> {
        decimal(self.fields.split(|&byte| byte == b' ').nth(at)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_forge_fields() {
        let numbers: Vec<String> = (1..50).map(|number| number.to_string()).collect();
        for name in ["sh", ") Z 7 7", "a b", "(", "\u{e9}"] {
            let content = format!("9 ({name}) T {}\n", numbers.join(" "));
            let stat = Stat::parse(content.as_bytes()).unwrap();
            assert_eq!(stat.state(), 'T');
            assert!(!stat.has_exited());
            assert_eq!(stat.start_time(), Some(19));
            assert_eq!(stat.child_faults(), Some(8 + 10));
        }
    }

    #[test]
    fn a_truncated_file_has_no_fields() {
        assert!(Stat::parse(b"").is_none());
        assert!(Stat::parse(b"9 (sh").is_none());
        assert!(Stat::parse(b"9 (sh) ").is_none());
        let short = Stat::parse(b"9 (sh) Z 1 2").unwrap();
        assert!(short.has_exited());
        assert_eq!(short.start_time(), None);
        assert_eq!(short.child_faults(), None);
    }
}
