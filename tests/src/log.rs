//! Reads events and fields from the log lines of `send` and `receive`.
//!
//! A line that tests or machines may match has a field `event` with a stable name; its message may change.

/// Returns the name of the event that a log line reports.
#[must_use]
pub fn event(line: &str) -> Option<&str> {
    field(line, "event")
}

/// Returns the value of a field (`name=value` or `name="value"`), without quotes and with escapes as they are.
#[must_use]
pub fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let start = line.match_indices(name).find_map(|(at, _)| {
        let starts_word = at == 0 || line[..at].ends_with(' ');
        let end = at + name.len();
        (starts_word && line[end..].starts_with('=')).then_some(end + 1)
    })?;
    let value = &line[start..];
    let Some(quoted) = value.strip_prefix('"') else {
        return value.split(' ').next();
    };
    let mut escaped = false;
    let end = quoted.find(|letter| {
        let closes = letter == '"' && !escaped;
        escaped = letter == '\\' && !escaped;
        closes
    })?;
    Some(&quoted[..end])
}

/// Returns the lines of a log that report this event.
pub fn lines<'a>(log: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    log.lines().filter(move |line| event(line) == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_and_fields_are_read_from_a_log_line() {
        let line =
            r#"2025-01-01T00:00:00Z  INFO round complete event="round_done" round=1 kind=full"#;
        assert_eq!(event(line), Some("round_done"));
        assert_eq!(field(line, "round"), Some("1"));
        assert_eq!(field(line, "kind"), Some("full"));
        assert_eq!(field(line, "ound"), None);
        assert_eq!(event("the event=none of this is a field"), Some("none"));
        assert_eq!(event("no event"), None);
    }

    #[test]
    fn a_quoted_value_may_contain_spaces_and_quotes() {
        let line = r#"WARN refused why="\"a\" is not b" peer=1.2.3.4:5"#;
        assert_eq!(field(line, "why"), Some(r#"\"a\" is not b"#));
        assert_eq!(field(line, "peer"), Some("1.2.3.4:5"));
    }

    #[test]
    fn lines_are_selected_by_event() {
        let log = "a event=\"x\" n=1\nb event=\"y\"\nc\nd event=\"x\" n=2\n";
        let values: Vec<_> = lines(log, "x")
            .filter_map(|line| field(line, "n"))
            .collect();
        assert_eq!(values, ["1", "2"]);
    }
}
