//! Runs the programs under test as users other than root, and with few capabilities.

use crate::pair::{receive_command, send_command};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// The user `nobody`, without privileges.
pub const NOBODY: u32 = 65534;

/// The user `daemon`, without privileges.
pub const DAEMON: u32 = 1;

/// Copies of the programs that every user may execute.
#[derive(Debug)]
pub struct Public(TempDir);

impl Public {
    /// Copies the programs.
    ///
    /// # Panics
    /// If they are not built.
    #[must_use]
    pub fn copy() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        open_to_all(dir.path());
        // `cp` writes the copies: while this process writes one, a child forked by another thread would keep it busy.
        let mut copy = Command::new("cp");
        copy.args([send_command(), receive_command()].map(|it| it.get_program().to_owned()));
        let copied = copy.arg(dir.path()).status().expect("cp is there");
        assert!(copied.success(), "both are built");
        Self(dir)
    }

    /// Returns a command that runs one of the programs as this user, with exactly these capabilities (in the
    /// notation of `setpriv`) and no means to regain others.
    #[must_use]
    pub fn run(&self, name: &str, user: u32, capabilities: &[&str]) -> Command {
        let mut command = as_user(user, capabilities);
        command.arg(self.0.path().join(name));
        command
    }
}

/// Returns a command that runs its next argument as this user, with exactly these capabilities.
#[must_use]
pub fn as_user(user: u32, capabilities: &[&str]) -> Command {
    let only = capabilities
        .iter()
        .fold("-all".to_owned(), |list, capability| {
            format!("{list},+{capability}")
        });
    let mut command = Command::new("setpriv");
    command
        .arg(format!("--reuid={user}"))
        .arg(format!("--regid={user}"));
    command
        .arg("--clear-groups")
        .arg(format!("--inh-caps={only}"));
    command.arg(format!("--ambient-caps={only}"));
    command.arg(format!("--bounding-set={only}"));
    command
}

/// Makes a directory writable for every user.
///
/// # Panics
/// If this process does not own it.
pub fn open_to_all(dir: &Path) {
    let all = fs::Permissions::from_mode(0o777);
    fs::set_permissions(dir, all).expect("it is ours");
}
