//! The real CRIU, driven over its RPC: `criu swrk`, one process for each dump or restore.
//!
//! Requests and answers are protobuf messages, each one packet of a socket pair (CRIU's
//! `images/rpc.proto`, as far as we need it). While it works CRIU tells of its stages, and waits at
//! each for our word to go on: a no makes it undo everything. If we die it reads no word, which is a
//! no.

use crate::proc::read_lossy;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use prost::Message;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

/// The oldest that will do.
pub const OLDEST: (i32, i32) = (4, 1);

/// How long CRIU may take to stop a tree, s. What has come to a stop stands still meanwhile.
const FREEZE_TIMEOUT: u32 = 3;

/// Longest message from CRIU, bytes.
const ANSWER_MAX: usize = 1 << 16;

/// A CRIU that will do.
#[derive(Debug, Clone)]
pub struct Criu {
    path: PathBuf,
    version: (i32, i32),
    /// How it locks connections; `None` for its default.
    network_lock: Option<i32>,
    /// Its configuration file with options that we do not know: a memfd.
    config: Option<Arc<File>>,
}

/// Options that would take the work out of our hands.
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

/// Why an option is not passed on to CRIU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadOption {
    /// It would take the work out of our hands.
    #[error("--{0} is not for you to choose: it is how Pageferry works with CRIU")]
    Ours(String),
    /// It is no option.
    #[error("{0:?} is no option of CRIU's by its long name, with a value of plain characters")]
    Unclear(String),
}

/// The text of a configuration file for CRIU with these options, as on its command line.
fn config_of(options: &[String]) -> Result<String, BadOption> {
    let plain = |text: &str| !text.contains(['"', '\\', '\n', '\0', '#']);
    let mut text = String::new();
    let mut takes_value = false;
    for option in options {
        let unclear = || BadOption::Unclear(option.clone());
        let (name, value) = match option.strip_prefix("--") {
            Some(option) => match option.split_once('=') {
                Some((name, value)) => (Some(name), Some(value)),
                None => (Some(option), None),
            },
            None if takes_value => (None, Some(option.as_str())),
            None => return Err(unclear()),
        };
        if let Some(name) = name {
            let fine =
                |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
            if name.is_empty() || !name.bytes().all(fine) {
                return Err(unclear());
            }
            // CRIU takes the beginning of a name for the whole.
            if RESERVED_OPTIONS.iter().any(|ours| ours.starts_with(name)) {
                return Err(BadOption::Ours(name.to_owned()));
            }
            text += "\n";
            text += name;
        }
        takes_value = value.is_none();
        if let Some(value) = value {
            if !plain(value) {
                return Err(unclear());
            }
            text += &format!(" \"{value}\"");
        }
    }
    Ok(text + "\n")
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// It does not start, or does not answer.
    #[error("cannot use {} as CRIU", path.display())]
    Unusable {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is too old.
    #[error(
        "{} is CRIU {}.{}, and it takes {}.{} or later", path.display(),
        version.0, version.1, OLDEST.0, OLDEST.1
    )]
    TooOld {
        /// The program.
        path: PathBuf,
        /// Its version.
        version: (i32, i32),
    },
}

impl Criu {
    /// Asks the program at `path`, or the `criu` in `PATH`, for its version.
    ///
    /// # Errors
    /// [`CriuError`].
    pub fn find(path: Option<&Path>) -> Result<Self, CriuError> {
        let path = path.unwrap_or(Path::new("criu")).to_owned();
        let ask = || {
            let mut work = CriuSession::start(&path, &[], None)?;
            work.ask(&Request::of(Kind::Version))?;
            let version = work.hear()?.version;
            version.ok_or_else(|| io::Error::other("it does not tell its version"))
        };
        match ask() {
            Ok(Version { major, minor }) if (major, minor) >= OLDEST => Ok(Self {
                path,
                version: (major, minor),
                network_lock: None,
                config: None,
            }),
            Ok(Version { major, minor }) => {
                let version = (major, minor);
                Err(CriuError::TooOld { path, version })
            }
            Err(source) => Err(CriuError::Unusable { path, source }),
        }
    }

    /// Whether it and the kernel can let a restored process run before its memory is there.
    #[must_use]
    pub fn has_lazy_pages(&self) -> bool {
        let ask = || {
            let mut work = CriuSession::start(&self.path, &[], None)?;
            let mut request = Request::of(Kind::FeatureCheck);
            request.features = Some(Features {
                lazy_pages: Some(true),
            });
            work.ask(&request)?;
            work.hear()
        };
        let features = ask().ok().and_then(|answer| answer.features);
        features.and_then(|features| features.lazy_pages) == Some(true)
    }

    /// Has it keep packets from the connections that it dumps with nftables, if it and the kernel can.
    /// Its default runs `iptables` twice for each, while nothing runs.
    #[must_use]
    pub fn prefer_nftables(mut self) -> Self {
        const NFTABLES: i32 = 2;
        let mut check = Command::new(&self.path);
        check.args(["check", "--feature", "network_lock_nftables"]);
        check.stdin(Stdio::null());
        let can = check.stdout(Stdio::null()).stderr(Stdio::null()).status();
        self.network_lock = can.is_ok_and(|status| status.success()).then_some(NFTABLES);
        self
    }

    /// Gives it more options, as on its command line.
    ///
    /// # Errors
    /// [`BadOption`].
    ///
    /// # Panics
    /// If the kernel has no memfd.
    pub fn with_options(mut self, options: &[String]) -> Result<Self, BadOption> {
        if options.is_empty() {
            return Ok(self);
        }
        let text = config_of(options)?;
        let memfd =
            memfd_create("criu.conf", MFdFlags::MFD_CLOEXEC).expect("the kernel has memfds");
        let file = File::from(memfd);
        file.write_all_at(text.as_bytes(), 0)
            .expect("there is memory for a few bytes");
        self.config = Some(Arc::new(file));
        Ok(self)
    }

    fn config_file(&self) -> Option<String> {
        let config = self.config.as_ref()?;
        let fd = config.as_raw_fd();
        Some(format!("/proc/{}/fd/{fd}", std::process::id()))
    }

    /// Its version, major and minor.
    #[must_use]
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Begins a dump of the tree under `pid`, its state into the directory `images` and its pages
    /// into the socket `pages`. `preload` is a library that CRIU is to load.
    ///
    /// # Errors
    /// The kernel's, or CRIU's death.
    pub fn dump(
        &self,
        pid: i32,
        images: BorrowedFd<'_>,
        pages: BorrowedFd<'_>,
        preload: Option<&Path>,
        options: &Options,
    ) -> io::Result<CriuSession> {
        let mut work = CriuSession::start(&self.path, &[pages], preload)?;
        let mut request = Request::of(Kind::Dump);
        request.opts = Some(Opts {
            pid: Some(pid),
            log_file: Some("dump.log".to_owned()),
            network_lock: self.network_lock,
            config_file: self.config_file(),
            timeout: Some(FREEZE_TIMEOUT),
            ps: Some(PageServer {
                fd: Some(pages.as_raw_fd()),
            }),
            ..options.opts(images)
        });
        work.ask(&request)?;
        Ok(work)
    }

    /// Starts one that waits for its task, [`Criu::restore`]. `preload` is a library that it is to load.
    ///
    /// # Errors
    /// The kernel's.
    pub fn start(&self, preload: Option<&Path>) -> io::Result<CriuSession> {
        CriuSession::start(&self.path, &[], preload)
    }

    /// Has one that [`Criu::start`] started begin a restore from the directory `images`. If `lazy`, somebody
    /// must listen on the socket `lazy-pages.socket` there.
    ///
    /// # Errors
    /// The kernel's, or CRIU's death.
    pub fn restore(
        &self,
        work: &mut CriuSession,
        images: BorrowedFd<'_>,
        options: &Options,
        lazy: bool,
    ) -> io::Result<()> {
        let mut request = Request::of(Kind::Restore);
        request.opts = Some(Opts {
            log_file: Some("restore.log".to_owned()),
            lazy_pages: Some(lazy),
            config_file: self.config_file(),
            ..options.opts(images)
        });
        work.ask(&request)
    }
}

/// What CRIU is to do about connections and terminals, alike at both ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Keep TCP connections.
    pub tcp_established: bool,
    /// The tree belongs to a terminal's session that it does not lead.
    pub shell_job: bool,
    /// Let go of Unix sockets that are connected to others.
    pub ext_unix_sk: bool,
    /// Dump and restore the tree's cgroups, too.
    pub manage_cgroups: bool,
}

impl Options {
    /// As bits: 1, 2, 4, 8 in the order of the fields.
    #[must_use]
    pub fn bits(self) -> u32 {
        u32::from(self.tcp_established)
            | u32::from(self.shell_job) << 1
            | u32::from(self.ext_unix_sk) << 2
            | u32::from(self.manage_cgroups) << 3
    }

    /// From bits; `None` if there are others.
    #[must_use]
    pub fn from_bits(bits: u32) -> Option<Self> {
        (bits < 16).then_some(Self {
            tcp_established: bits & 1 != 0,
            shell_job: bits & 2 != 0,
            ext_unix_sk: bits & 4 != 0,
            manage_cgroups: bits & 8 != 0,
        })
    }

    fn opts(self, images: BorrowedFd<'_>) -> Opts {
        Opts {
            // CRIU opens it as ours.
            images_dir_fd: images.as_raw_fd(),
            notify_scripts: Some(true),
            log_level: Some(1),
            // A no would overrule what the configuration file says.
            tcp_established: self.tcp_established.then_some(true),
            shell_job: self.shell_job.then_some(true),
            ext_unix_sk: self.ext_unix_sk.then_some(true),
            manage_cgroups: self.manage_cgroups.then_some(true),
            ..Opts::default()
        }
    }
}

/// A CRIU at work. Dropping it says no to whatever it asks next, and waits for its end.
#[derive(Debug)]
pub struct CriuSession {
    /// `None` only while being dropped.
    socket: Option<OwnedFd>,
    child: Child,
}

/// What CRIU tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It has come to this stage, and waits for [`CriuSession::answer`].
    Stage {
        /// Its name, as of CRIU's action scripts: `post-dump`, `post-restore`…
        name: String,
        /// The process it is about, if any: when restoring, the restored root.
        pid: Option<i32>,
    },
    /// It is done; after a restore, the restored root runs.
    Done,
    /// It failed, and has undone everything.
    Failed(String),
}

impl Event {
    /// Understands what it said.
    ///
    /// # Errors
    /// If that is no answer of CRIU's.
    pub fn parse(packet: &[u8]) -> io::Result<Self> {
        let answer = Answer::decode(packet).map_err(io::Error::other)?;
        Ok(match (answer.kind, answer.notify) {
            (kind, Some(Notify { script, pid })) if kind == Kind::Notify as i32 => Self::Stage {
                name: script.unwrap_or_default(),
                pid,
            },
            _ if answer.success => Self::Done,
            _ => Self::Failed(match (answer.message, answer.errno) {
                (Some(message), _) => message,
                (None, Some(errno)) => io::Error::from_raw_os_error(errno).to_string(),
                (None, None) => "it does not say why".to_owned(),
            }),
        })
    }
}

/// The answer to a notification of CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// CRIU goes on.
    Continue,
    /// CRIU undoes everything and fails.
    Abort,
}

impl CriuSession {
    fn start(
        path: &Path,
        inherited: &[BorrowedFd<'_>],
        preload: Option<&Path>,
    ) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let mut command = Command::new(path);
        // Its socket is its standard input. A Ctrl-C is for us alone: interrupted at any point,
        // CRIU could leave the tree with its code in it.
        command.args(["swrk", "0"]).stdin(Stdio::from(theirs));
        command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        if let Some(library) = preload {
            command.env("LD_PRELOAD", library);
        }
        for fd in inherited {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        let child = command.spawn();
        for fd in inherited {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        Ok(Self {
            socket: Some(ours),
            child: child?,
        })
    }

    /// CRIU's process ID.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// What to wait on for [`CriuSession::event`] not to block.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        let socket = self.socket.as_ref();
        socket
            .expect("it is only taken while being dropped")
            .as_fd()
    }

    /// Waits for what it tells next.
    ///
    /// # Errors
    /// If it has died.
    pub fn event(&mut self) -> io::Result<Event> {
        Event::parse(&self.packet()?)
    }

    /// Answers the notification that CRIU waits at.
    ///
    /// # Errors
    /// If CRIU has died.
    pub fn reply(&mut self, reply: Reply) -> io::Result<()> {
        let mut request = Request::of(Kind::Notify);
        request.notify_success = Some(reply == Reply::Continue);
        self.ask(&request)
    }

    /// The same, but whatever it asks, the answer is no.
    ///
    /// # Errors
    /// If it has died.
    pub fn event_or_refuse(&mut self) -> io::Result<Event> {
        let event = self.event()?;
        if let Event::Stage { .. } = event {
            self.reply(Reply::Abort)?;
        }
        Ok(event)
    }

    fn ask(&mut self, request: &Request) -> io::Result<()> {
        let bytes = request.encode_to_vec();
        send(self.fd().as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }

    fn hear(&mut self) -> io::Result<Answer> {
        Answer::decode(&self.packet()?[..]).map_err(io::Error::other)
    }

    fn packet(&mut self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; ANSWER_MAX];
        let len = loop {
            match recv(self.fd().as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(nix::Error::EINTR) => {}
                other => break other?,
            }
        };
        if len == 0 {
            return Err(io::Error::other("CRIU ended without a word"));
        }
        buffer.truncate(len);
        Ok(buffer)
    }
}

impl Drop for CriuSession {
    fn drop(&mut self) {
        drop(self.socket.take());
        // It undoes what it has done, and ends.
        let _ = self.child.wait();
    }
}

/// The last errors in one of CRIU's logs, which say more than its answers; empty if there are none.
#[must_use]
pub fn last_errors(log: &Path) -> String {
    let log = read_lossy(log).unwrap_or_default();
    let errors: Vec<_> = log.lines().filter(|line| line.contains("Error")).collect();
    errors[errors.len().saturating_sub(2)..].join("; ")
}

#[derive(Debug, Clone, Copy)]
#[repr(i32)]
enum Kind {
    Dump = 1,
    Restore = 2,
    Notify = 6,
    FeatureCheck = 9,
    Version = 10,
}

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(int32, required, tag = "1")]
    kind: i32,
    #[prost(message, optional, tag = "2")]
    opts: Option<Opts>,
    #[prost(bool, optional, tag = "3")]
    notify_success: Option<bool>,
    #[prost(message, optional, tag = "5")]
    features: Option<Features>,
}

impl Request {
    fn of(kind: Kind) -> Self {
        Self {
            kind: kind as i32,
            opts: None,
            notify_success: None,
            features: None,
        }
    }
}

#[derive(Clone, PartialEq, Message)]
struct Opts {
    #[prost(int32, required, tag = "1")]
    images_dir_fd: i32,
    #[prost(int32, optional, tag = "2")]
    pid: Option<i32>,
    #[prost(bool, optional, tag = "4")]
    ext_unix_sk: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    tcp_established: Option<bool>,
    #[prost(bool, optional, tag = "7")]
    shell_job: Option<bool>,
    #[prost(int32, optional, tag = "9")]
    log_level: Option<i32>,
    #[prost(string, optional, tag = "10")]
    log_file: Option<String>,
    #[prost(message, optional, tag = "11")]
    ps: Option<PageServer>,
    #[prost(bool, optional, tag = "12")]
    notify_scripts: Option<bool>,
    #[prost(bool, optional, tag = "24")]
    manage_cgroups: Option<bool>,
    #[prost(uint32, optional, tag = "45")]
    timeout: Option<u32>,
    #[prost(bool, optional, tag = "48")]
    lazy_pages: Option<bool>,
    #[prost(string, optional, tag = "51")]
    config_file: Option<String>,
    #[prost(int32, optional, tag = "64")]
    network_lock: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Features {
    #[prost(bool, optional, tag = "2")]
    lazy_pages: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
struct PageServer {
    #[prost(int32, optional, tag = "4")]
    fd: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Answer {
    #[prost(int32, required, tag = "1")]
    kind: i32,
    #[prost(bool, required, tag = "2")]
    success: bool,
    #[prost(message, optional, tag = "5")]
    notify: Option<Notify>,
    #[prost(int32, optional, tag = "7")]
    errno: Option<i32>,
    #[prost(message, optional, tag = "8")]
    features: Option<Features>,
    #[prost(string, optional, tag = "9")]
    message: Option<String>,
    #[prost(message, optional, tag = "10")]
    version: Option<Version>,
}

#[derive(Clone, PartialEq, Message)]
struct Notify {
    #[prost(string, optional, tag = "1")]
    script: Option<String>,
    #[prost(int32, optional, tag = "2")]
    pid: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Version {
    #[prost(int32, required, tag = "1")]
    major: i32,
    #[prost(int32, required, tag = "2")]
    minor: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_bits() {
        for bits in 0..16 {
            assert_eq!(Options::from_bits(bits).unwrap().bits(), bits);
        }
        assert_eq!(Options::from_bits(16), None);
    }

    #[test]
    fn options_become_a_configuration() {
        let config = |options: &[&str]| {
            let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
            config_of(&options)
        };
        let text = config(&["--tcp-close", "--external", "mnt[/a b]:x", "--timeout=5"]);
        let expected = "\ntcp-close\nexternal \"mnt[/a b]:x\"\ntimeout \"5\"\n";
        assert_eq!(text.unwrap(), expected);
        for ours in ["--leave-running", "--leave-r", "--images-dir=/tmp"] {
            assert!(matches!(config(&[ours]), Err(BadOption::Ours(_))), "{ours}");
        }
        for unclear in [
            &["-R"][..],
            &["word"],
            &["--"],
            &["--x", "b", "c"],
            &["--x=b", "c"],
            &["--x", "b\"\nleave-running"],
            &["--x\nleave-running"],
        ] {
            let unclear = config(unclear);
            assert!(matches!(unclear, Err(BadOption::Unclear(_))), "{unclear:?}");
        }
    }

    #[test]
    fn what_is_no_criu_is_named() {
        for (path, words) in [("/nonexistent", "/nonexistent"), ("/bin/true", "/bin/true")] {
            let error = Criu::find(Some(Path::new(path))).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }
}
