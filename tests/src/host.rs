//! A second host on this machine, as far as CRIU is concerned: a PID namespace of its own, in which
//! every number is free.

use crate::criu::await_listener;
use crate::daemon::{kill_tree, until};
use crate::memory;
use crate::pair::{Receiver, receive_command};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// What runs as its process 1: it mounts its `/proc`, and reaps whatever is left to it.
const INIT: &str =
    "mount -t proc proc /proc && mount -t tmpfs run /run && while :; do sleep 1000 & wait $!; done";

/// The namespace. Dropped, everything in it is killed.
#[derive(Debug)]
pub struct Host {
    unshare: Child,
    init: i32,
}

impl Host {
    /// Starts it.
    ///
    /// # Panics
    /// If it does not come up; it takes root.
    #[must_use]
    pub fn start() -> Self {
        Self::start_in(Command::new("env"))
    }

    /// The same, started through a command whose next argument is a program to become.
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
        // It is up when it has come to sleep.
        let init = until("the host comes up", || match memory::tree(pid)[..] {
            [_, init, last] if name(last) == "sleep" => Ok(init),
            ref tree => Err(format!("{tree:?}")),
        });
        Self { unshare, init }
    }

    /// A receiver that runs there.
    ///
    /// # Panics
    /// As [`Receiver::start`].
    #[must_use]
    pub fn receiver(&self, port: &str, dir: &Path, options: &[&str]) -> Receiver {
        let mut command = self.enter();
        command.arg(receive_command().get_program());
        Receiver::run(command, port, dir, options)
    }

    /// Waits until somebody listens there on a port.
    ///
    /// # Panics
    /// If nobody comes to.
    pub fn await_listener(&self, port: u16) {
        await_listener(&format!("/proc/{}/net/tcp", self.init), port);
    }

    /// A command that runs there the program that is its next argument.
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
