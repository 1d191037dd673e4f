//! Runs the real CRIU: dumps, page servers and restores.

use crate::daemon::{kill_tree, until};
use crate::memory;
use crate::program::Program;
use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Reports a skipped test and the reason on standard error, and appends it to the file named by
/// `$PAGEFERRY_SKIPPED`, which `scripts/test` counts at the end of a run.
pub fn skip(what: &str, why: &str) {
    eprintln!("SKIPPED: {what}: {why}");
    if let Some(path) = std::env::var_os("PAGEFERRY_SKIPPED") {
        let file = fs::OpenOptions::new().append(true).create(true).open(path);
        let written = file.and_then(|mut file| writeln!(file, "{what}: {why}"));
        written.expect("the file of skipped tests can be written");
    }
}

/// An installed CRIU.
#[derive(Debug, Clone)]
pub struct Criu {
    path: PathBuf,
    version: (u32, u32),
}

/// Environment variable (as printed by `scripts/install-criu`) and default cache directory of each CRIU.
const PLACES: [(&str, &str); 2] = [
    ("PAGEFERRY_CRIU", "pageferry-criu"),
    ("PAGEFERRY_CRIU_NEXT", "pageferry-criu-next"),
];

impl Criu {
    /// Returns every installed CRIU, oldest first. Reports `test` as skipped for each missing one. An empty
    /// variable means that this CRIU is not available.
    #[must_use]
    pub fn all(test: &str) -> Vec<Self> {
        let found = PLACES.iter().filter_map(|(variable, default)| {
            let found = Self::at(&place(variable, default));
            if found.is_none() {
                skip(test, &format!("there is no CRIU at ${variable}"));
            }
            found
        });
        found.collect()
    }

    /// Returns the CRIU of Debian 13; reports `test` as skipped if it is missing.
    #[must_use]
    pub fn stable(test: &str) -> Option<Self> {
        let (variable, default) = PLACES[0];
        let found = Self::at(&place(variable, default));
        if found.is_none() {
            skip(test, &format!("there is no CRIU at ${variable}"));
        }
        found
    }

    fn at(path: &Path) -> Option<Self> {
        let output = Command::new(path).arg("--version").output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let version = text.lines().next()?.strip_prefix("Version: ")?;
        let mut numbers = version.split('.').map(|number| number.parse().ok());
        Some(Self {
            path: path.to_owned(),
            version: (numbers.next()??, numbers.next()??),
        })
    }

    /// Returns the major and minor version.
    #[must_use]
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Returns the path of the program.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the command `criu ACTION -D DIR`, with its log in DIR.
    #[must_use]
    pub fn command(&self, action: &str, dir: &Path) -> Command {
        let mut command = Command::new(&self.path);
        command.args([action, "-v1", "-o"]);
        command.arg(dir.join(format!("{action}.log")));
        command.arg("-D").arg(dir);
        command.stdin(Stdio::null());
        command
    }

    /// Runs `criu ACTION -D DIR OPTIONS`.
    ///
    /// # Errors
    /// Returns the last lines of CRIU's log if it fails.
    pub fn run(&self, action: &str, dir: &Path, options: &[&str]) -> Result<(), String> {
        let mut command = self.command(action, dir);
        // A restored process would inherit a pipe and keep it open.
        let status = command.args(options).stdout(Stdio::null()).status();
        let status = status.map_err(|error| format!("{command:?}: {error}"))?;
        let log = fs::read_to_string(dir.join(format!("{action}.log"))).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(15)..].join("\n");
        match status.success() {
            true => Ok(()),
            false => Err(format!("{command:?}: {status}\n{end}")),
        }
    }

    /// Dumps a tree; its memory goes to a page server.
    ///
    /// # Errors
    /// As [`Criu::run`].
    pub fn dump_to(
        &self,
        server: SocketAddr,
        pid: i32,
        state: &Path,
        options: &[&str],
    ) -> Result<(), String> {
        let (address, port) = (server.ip().to_string(), server.port().to_string());
        let pid = pid.to_string();
        let mut all = vec!["-t", &pid, "--page-server"];
        all.extend(["--address", &address, "--port", &port]);
        self.run("dump", state, &[&all, options].concat())
    }

    /// Restores the images in `dir`. The restored tree is not a child of this process.
    ///
    /// # Errors
    /// As [`Criu::run`].
    pub fn restore(&self, dir: &Path, root: i32, options: &[&str]) -> Result<Restored, String> {
        let restored = Restored(root);
        self.run("restore", dir, &[&["-d"], options].concat())?;
        Ok(restored)
    }

    /// Starts `criu page-server` for one dump into `dir`, and waits until it listens.
    ///
    /// # Panics
    /// If it does not start to listen.
    #[must_use]
    pub fn page_server(&self, dir: &Path, options: &[&str]) -> (Program, SocketAddr) {
        let address = free_address();
        let mut command = self.command("page-server", dir);
        command.args(["--address", "127.0.0.1", "--port"]);
        command.arg(address.port().to_string()).args(options);
        let server = Program::start(&mut command);
        await_listener("/proc/net/tcp", address.port());
        (server, address)
    }
}

fn place(variable: &str, default: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache");
    cache.unwrap_or_else(home).join(default).join("criu")
}

/// Returns a loopback address with a free port.
///
/// # Panics
/// If no port is free.
#[must_use]
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it is bound")
}

/// Waits until a program listens on a port, according to the socket table of a network namespace. A test
/// connection would use up the one dump that a page server accepts.
///
/// # Panics
/// If no program starts to listen.
pub fn await_listener(table: &str, port: u16) {
    until("a program listens", || match listens(table, port) {
        true => Ok(()),
        false => Err("not yet".to_owned()),
    });
}

fn listens(table: &str, port: u16) -> bool {
    const LISTENING: &str = "0A";
    let table = fs::read_to_string(table).unwrap_or_default();
    let local = format!(":{port:04X}");
    table.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|it| it.ends_with(&local)) && fields.nth(1) == Some(LISTENING)
    })
}

/// Copies CRIU's images, except those of memory, from `state` to `images`.
///
/// # Panics
/// If a file cannot be copied.
pub fn merge(state: &Path, images: &Path) {
    for entry in fs::read_dir(state).expect("it is there").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let memory = name.starts_with("pages-") || name.starts_with("pagemap-");
        if name.ends_with(".img") && !memory {
            fs::copy(entry.path(), images.join(&name)).expect("it can be copied");
        }
    }
}

/// Waits until every process of a dumped tree has been reaped: a restore needs their PIDs.
///
/// # Panics
/// If a process remains.
pub fn await_gone(tree: &[i32]) {
    let there = |pid: &&i32| Path::new("/proc").join(pid.to_string()).exists();
    until("the tree is gone", || match tree.iter().find(there) {
        Some(pid) => Err(format!("{pid} is there")),
        None => Ok(()),
    });
}

/// A restored tree. Dropping it kills the tree.
#[derive(Debug)]
pub struct Restored(i32);

impl Restored {
    /// Returns the process ID of the root.
    #[must_use]
    pub fn root(&self) -> i32 {
        self.0
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        let tree = memory::tree(self.0);
        kill_tree(self.0);
        let _ = memory::await_end(&tree);
    }
}
