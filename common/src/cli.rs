//! Behaviour of the command line that both programs share: durations, sizes, logging, the policy on
//! unencrypted connections, and exit codes.

use std::fmt;
use std::io::{self, IsTerminal};
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Duration;
use tracing_subscriber::fmt::MakeWriter;

/// Exit code of a program. Not every program uses every code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Success.
    Done = 0,
    /// Failure without a code of its own.
    Failed = 1,
    /// The command line is invalid or contradicts the environment.
    Usage = 2,
    /// The target does not exist, or exited during the migration.
    TargetGone = 3,
    /// The receiver refused the migration.
    Refused = 4,
    /// The kernel does not permit the operation.
    NotPermitted = 5,
    /// The receiver did not report whether the process runs there; the local copy is stopped.
    InDoubt = 6,
    /// The port or the directory cannot be used.
    Unusable = 7,
    /// Stopped by SIGINT.
    Interrupted = 130,
    /// Stopped by SIGTERM.
    Terminated = 143,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Parses a duration with units, such as `300ms`, `5s` or `1m 30s`. Zero may be written without a unit.
///
/// # Errors
/// A message for the user.
pub fn duration(text: &str) -> Result<Duration, String> {
    const EXAMPLES: &str = "a duration is written like 300ms, 5s or 2m";
    if let Ok(number) = text.parse::<u64>() {
        return match number {
            0 => Ok(Duration::ZERO),
            _ => Err(format!("the unit is missing, as in {number}s: {EXAMPLES}")),
        };
    }
    humantime::parse_duration(text).map_err(|_| EXAMPLES.to_owned())
}

/// Parses a [`duration`] that is longer than zero.
///
/// # Errors
/// A message for the user.
pub fn non_zero_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be longer than zero".to_owned()),
        duration => Ok(duration),
    }
}

/// Parses a size with an optional binary unit (K, M, G or T); returns bytes.
///
/// # Errors
/// A message for the user.
pub fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(char, u64); 4] = [
        ('K', 1 << 10),
        ('M', 1 << 20),
        ('G', 1 << 30),
        ('T', 1 << 40),
    ];
    let unit = UNITS
        .iter()
        .find_map(|&(letter, unit)| Some((text.strip_suffix(letter)?, unit)));
    let (number, unit) = unit.unwrap_or((text, 1));
    let number = number.parse::<u64>().ok();
    number
        .and_then(|number| number.checked_mul(unit))
        .ok_or_else(|| "a size is written like 4096, 256M or 2T".to_owned())
}

/// Starts logging to `writer`, which leads to standard error. `verbose` counts the `-v` options.
pub fn start_log<W>(verbose: u8, writer: W)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let level = match verbose {
        0 => tracing::Level::INFO,
        1 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(writer)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
}

/// Policy on connections without TLS. Memory contains secrets, so the default confines them to this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plaintext {
    /// Only on loopback addresses.
    LoopbackOnly,
    /// On any address (`--insecure`).
    Anywhere,
}

impl Plaintext {
    /// Advice for a user whose connection this policy forbids.
    pub const ADVICE: &str = "give certificates (--tls-ca, --tls-cert, --tls-key; `receive certs` \
        creates some), use a loopback address and a tunnel, or pass --insecure";

    /// Returns the policy that an `--insecure` flag selects.
    #[must_use]
    pub fn from_flag(insecure: bool) -> Self {
        match insecure {
            true => Self::Anywhere,
            false => Self::LoopbackOnly,
        }
    }

    /// Checks a connection without TLS to or from `peer`, which has these addresses.
    ///
    /// # Errors
    /// [`PlaintextForbidden`].
    pub fn check(
        self,
        peer: impl fmt::Display,
        addresses: impl IntoIterator<Item = IpAddr>,
    ) -> Result<(), PlaintextForbidden> {
        let mut addresses = addresses.into_iter();
        match self == Self::Anywhere || addresses.all(|address| address.is_loopback()) {
            true => Ok(()),
            false => Err(PlaintextForbidden(peer.to_string())),
        }
    }
}

/// A connection without TLS would leave this host.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a loopback address, and memory would cross the network in the clear")]
pub struct PlaintextForbidden(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, expected) in [
            ("0", Duration::ZERO),
            ("0s", Duration::ZERO),
            ("300ms", Duration::from_millis(300)),
            ("5s", Duration::from_secs(5)),
            ("1m 30s", Duration::from_secs(90)),
        ] {
            assert_eq!(duration(text), Ok(expected), "{text}");
        }
        for wrong in ["", "-1s", "soon", "5 parsecs", "0.5"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
        assert!(duration("5").unwrap_err().contains("5s"));
        assert_eq!(non_zero_duration("1ms"), Ok(Duration::from_millis(1)));
        assert!(non_zero_duration("0").is_err() && non_zero_duration("0ms").is_err());
    }

    #[test]
    fn sizes_have_binary_units() {
        for (text, expected) in [("0", 0), ("4096", 4096), ("3K", 3072), ("16T", 1 << 44)] {
            assert_eq!(size(text), Ok(expected));
        }
        for wrong in ["", "K", "-1", "1.5G", "1m", "1GB", "99999999T"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn plaintext_stays_on_this_host_by_default() {
        let [local, remote] =
            ["127.0.0.1", "192.0.2.1"].map(|text| text.parse::<IpAddr>().unwrap());
        let default = Plaintext::from_flag(false);
        assert_eq!(default.check("x", [local]), Ok(()));
        assert!(default.check("x", [local, remote]).is_err());
        assert_eq!(Plaintext::from_flag(true).check("x", [remote]), Ok(()));
    }
}
