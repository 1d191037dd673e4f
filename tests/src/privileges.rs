//! The programs under test as other users than root, and with few capabilities.

use crate::pair::{receive_command, send_command};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// A user without rights.
pub const NOBODY: u32 = 65534;

/// Another one.
pub const SOMEBODY: u32 = 1;

/// The programs where every user may run them.
#[derive(Debug)]
pub struct Public(TempDir);

impl Public {
    /// Copies them there.
    ///
    /// # Panics
    /// If they are not built.
    #[must_use]
    pub fn copy() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        open_to_all(dir.path());
        // By a program of its own: a child of another thread's would keep a file that we write busy.
        let mut copy = Command::new("cp");
        copy.args([send_command(), receive_command()].map(|it| it.get_program().to_owned()));
        let copied = copy.arg(dir.path()).status().expect("cp is there");
        assert!(copied.success(), "both are built");
        Self(dir)
    }

    /// Runs one of them as this user, with these capabilities (as `setpriv` calls them) and no other: none that
    /// it could get back, either.
    #[must_use]
    pub fn run(&self, name: &str, user: u32, capabilities: &[&str]) -> Command {
        let mut command = as_user(user, capabilities);
        command.arg(self.0.path().join(name));
        command
    }
}

/// A command that runs as this user, with these capabilities and no other, the program that is its next
/// argument.
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

/// Lets every user write to a directory.
///
/// # Panics
/// If it is not ours.
pub fn open_to_all(dir: &Path) {
    let all = fs::Permissions::from_mode(0o777);
    fs::set_permissions(dir, all).expect("it is ours");
}
