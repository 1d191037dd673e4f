//! Options of a dump and a restore.

use super::messages::Opts;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Options that Pageferry sets itself, or that would change what CRIU does with the images or the processes.
const RESERVED_OPTIONS: [&str; 28] = [
    "action-script",
    "address",
    "auto-dedup",
    "check-only",
    "config",
    "daemon",
    "deprecated",
    "exec-cmd",
    "images-dir",
    "lazy-pages",
    "leave-running",
    "leave-stopped",
    "log-file",
    "no-default-config",
    "page-server",
    "pidfile",
    "port",
    "pre-dump-mode",
    "prev-images-dir",
    "ps-socket",
    "restore-detached",
    "restore-sibling",
    "status-fd",
    "stream",
    "tls",
    "track-mem",
    "tree",
    "work-dir",
];

/// An option that is not passed on to CRIU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadOption {
    /// One of the options that Pageferry sets itself.
    #[error("--{0} is reserved: Pageferry sets it")]
    Reserved(String),
    /// Not an option.
    #[error("{0:?} is not a CRIU option: give its long name and a plain value")]
    Malformed(String),
}

/// Options that a dump and its restore must share.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Keep established TCP connections.
    pub tcp_established: bool,
    /// The tree belongs to a terminal session that it does not lead.
    pub shell_job: bool,
    /// Disconnect Unix sockets whose peer is outside the tree.
    pub ext_unix_sk: bool,
    /// Dump and restore the cgroups of the tree too.
    pub manage_cgroups: bool,
}

impl Options {
    /// Returns the options as bits: 1, 2, 4, 8 in the order of the fields.
    #[must_use]
    pub fn bits(self) -> u32 {
        u32::from(self.tcp_established)
            | u32::from(self.shell_job) << 1
            | u32::from(self.ext_unix_sk) << 2
            | u32::from(self.manage_cgroups) << 3
    }

    /// Returns the options with these bits; `None` if there are unknown ones.
    #[must_use]
    pub fn from_bits(bits: u32) -> Option<Self> {
        (bits < 16).then_some(Self {
            tcp_established: bits & 1 != 0,
            shell_job: bits & 2 != 0,
            ext_unix_sk: bits & 4 != 0,
            manage_cgroups: bits & 8 != 0,
        })
    }

    /// Returns the options of a request about the directory `images`.
    pub(super) fn opts(self, images: BorrowedFd<'_>) -> Opts {
        Opts {
            // CRIU opens it through /proc/PID/fd of this process.
            images_dir_fd: images.as_raw_fd(),
            notify_scripts: Some(true),
            log_level: Some(1),
            // `Some(false)` would override the configuration file.
            tcp_established: self.tcp_established.then_some(true),
            shell_job: self.shell_job.then_some(true),
            ext_unix_sk: self.ext_unix_sk.then_some(true),
            manage_cgroups: self.manage_cgroups.then_some(true),
            ..Opts::default()
        }
    }
}

/// Returns the text of a configuration file with options that are written as on CRIU's command line.
pub(super) fn config_text(options: &[String]) -> Result<String, BadOption> {
    let is_plain = |text: &str| !text.contains(['"', '\\', '\n', '\0', '#']);
    let mut text = String::new();
    let mut takes_value = false;
    for option in options {
        let malformed = || BadOption::Malformed(option.clone());
        let (name, value) = match option.strip_prefix("--") {
            Some(option) => match option.split_once('=') {
                Some((name, value)) => (Some(name), Some(value)),
                None => (Some(option), None),
            },
            None if takes_value => (None, Some(option.as_str())),
            None => return Err(malformed()),
        };
        if let Some(name) = name {
            check_name(name, malformed)?;
            text += "\n";
            text += name;
        }
        takes_value = value.is_none();
        if let Some(value) = value {
            if !is_plain(value) {
                return Err(malformed());
            }
            text += &format!(" \"{value}\"");
        }
    }
    Ok(text + "\n")
}

fn check_name(name: &str, malformed: impl Fn() -> BadOption) -> Result<(), BadOption> {
    let is_valid = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name.is_empty() || !name.bytes().all(is_valid) {
        return Err(malformed());
    }
    // CRIU accepts a unique prefix of a name.
    match RESERVED_OPTIONS
        .iter()
        .any(|reserved| reserved.starts_with(name))
    {
        true => Err(BadOption::Reserved(name.to_owned())),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_round_trip_through_bits() {
        for bits in 0..16 {
            assert_eq!(Options::from_bits(bits).unwrap().bits(), bits);
        }
        assert_eq!(Options::from_bits(16), None);
    }

    #[test]
    fn passed_options_become_a_configuration_file() {
        let config = |options: &[&str]| {
            let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
            config_text(&options)
        };
        let text = config(&["--tcp-close", "--external", "mnt[/a b]:x", "--timeout=5"]);
        let expected = "\ntcp-close\nexternal \"mnt[/a b]:x\"\ntimeout \"5\"\n";
        assert_eq!(text.unwrap(), expected);
        for reserved in ["--leave-running", "--leave-r", "--images-dir=/tmp"] {
            let result = config(&[reserved]);
            assert!(matches!(result, Err(BadOption::Reserved(_))), "{reserved}");
        }
        for malformed in [
            &["-R"][..],
            &["word"],
            &["--"],
            &["--x", "b", "c"],
            &["--x=b", "c"],
            &["--x", "b\"\nleave-running"],
            &["--x\nleave-running"],
        ] {
            let result = config(malformed);
            assert!(matches!(result, Err(BadOption::Malformed(_))), "{result:?}");
        }
    }
}
