//! A second host on this machine as far as CRIU is concerned: a PID namespace in which every PID is free.

use crate::criu::await_listener;
use crate::daemon::{kill_tree, until};
use crate::memory;
use crate::pair::{Receiver, receive_command};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Process 1 of the namespace: mounts `/proc` and `/run`, and reaps orphans.
const INIT: &str =
    "mount -t proc proc /proc && mount -t tmpfs run /run && while :; do sleep 1000 & wait $!; done";

/// A PID and mount namespace. Dropping it kills every process in it.
#[derive(Debug)]
pub struct Host {
    unshare: Child,
    init: i32,
}

impl Host {
    /// Starts the namespace.
    ///
    /// # Panics
    /// If it does not start; this requires root.
    #[must_use]
    pub fn start() -> Self {
        Self::start_in(Command::new("env"))
    }

    /// Does the same through a command whose next argument is the program to run.
    ///
    /// # Panics
    /// As [`Host::start`].
    #[must_use]
    pub fn start_in(mut unshare: Command) -> Self {
        unshare.args(["unshare", "--pid", "--fork", "--kill-child"]);
        unshare.args(["--mount", "bash", "-c", INIT]);
        let null = Stdio::null;
        let unshare = unshare.stdin(null()).stdout(null()).stderr(null()).spawn();
        let unshare = unshare.expect("unshare is there");
        let pid = unshare.id().cast_signed();
        // The init script has finished its mounts once it runs `sleep`.
        let init = until("the host starts", || match memory::tree(pid)[..] {
            [_, init, last] if name(last) == "sleep" => Ok(init),
            ref tree => Err(format!("{tree:?}")),
        });
        Self { unshare, init }
    }

    /// Gives the host the boot id in this file, so that its programs find that it was started again.
    ///
    /// # Panics
    /// If the file cannot be mounted over the kernel's.
    pub fn set_boot_id(&self, file: &Path) {
        let mut mount = self.enter();
        mount.args(["mount", "--bind"]).arg(file);
        let mounted = mount.arg("/proc/sys/kernel/random/boot_id").status();
        assert!(mounted.expect("mount is there").success());
    }

    /// Starts a receiver in the namespace.
    ///
    /// # Panics
    /// As [`Receiver::start`].
    #[must_use]
    pub fn receiver(&self, port: &str, dir: &Path, options: &[&str]) -> Receiver {
        let mut command = self.enter();
        command.arg(receive_command().get_program());
        Receiver::run(command, port, dir, options)
    }

    /// Waits until a program in the namespace listens on a port.
    ///
    /// # Panics
    /// If no program starts to listen.
    pub fn await_listener(&self, port: u16) {
        await_listener(&format!("/proc/{}/net/tcp", self.init), port);
    }

    /// Returns a command that runs its next argument in the namespace.
    #[must_use]
    pub fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string()]);
        command.args(["--pid", "--mount", "--net", "--"]);
        command
    }
}

fn name(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    name.unwrap_or_default().trim().to_owned()
}

impl Drop for Host {
    fn drop(&mut self) {
        kill_tree(self.unshare.id().cast_signed());
        let _ = self.unshare.wait();
    }
}
