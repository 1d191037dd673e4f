//! CRIU's RPC over `criu swrk`: one CRIU process for each dump or restore.
//!
//! Requests and responses are protobuf messages, each one packet of a socket pair. While it works, CRIU
//! notifies its caller of each stage and waits for a reply. A negative reply makes it undo everything. So does
//! the death of the caller during a dump, because CRIU then cannot read a reply.
//!
//! A restore outlives its caller instead ([`Criu::restore`]): CRIU keeps waiting. At its last stage it would take
//! the end of the connection for a permission to resume the tree, and at the one before for an order to undo it;
//! neither is decided by a death.

use super::messages::{Features, Kind, Notify, Opts, PageServerInfo, Request, Response, Version};
use super::options::{BadOption, Options, config_text};
use crate::sys::{fdpass, pidfd};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, shutdown, socketpair,
};
use prost::Message;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// Oldest supported version, major and minor.
const OLDEST: (i32, i32) = (4, 1);

/// Oldest version that dumps and restores guard regions, major and minor.
const KEEPS_GUARDS: (i32, i32) = (4, 2);

/// Longest time that CRIU may take to freeze a tree, s. Threads that it has stopped already stay stopped
/// meanwhile.
const FREEZE_TIMEOUT: u32 = 3;

/// Maximum length of a response, bytes.
const RESPONSE_MAX: usize = 1 << 16;

/// `cr_network_lock_method` that uses nftables.
const NETWORK_LOCK_NFTABLES: i32 = 2;

/// A CRIU program that is supported.
#[derive(Debug, Clone)]
pub struct Criu {
    path: PathBuf,
    /// Its version, major and minor.
    version: (i32, i32),
    /// How it locks TCP connections; `None` for its default.
    network_lock: Option<i32>,
    /// Memfd with its configuration file: the options that are passed through.
    config: Option<Arc<File>>,
}

/// CRIU cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// It does not start, or does not respond.
    #[error("cannot use {} as CRIU", path.display())]
    Unusable {
        /// Path of the program.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// It is too old.
    #[error(
        "{} is CRIU {}.{}, but {}.{} or later is required", path.display(),
        version.0, version.1, OLDEST.0, OLDEST.1
    )]
    TooOld {
        /// Path of the program.
        path: PathBuf,
        /// Its version, major and minor.
        version: (i32, i32),
    },
}

impl Criu {
    /// Checks the version of the program at `path`, or of the `criu` in `PATH`.
    ///
    /// # Errors
    /// [`CriuError`].
    pub fn find(path: Option<&Path>) -> Result<Self, CriuError> {
        let path = path.unwrap_or(Path::new("criu")).to_owned();
        let query = || {
            let mut session = CriuSession::start(&path, &[], None)?;
            session.send(&Request::new(Kind::Version))?;
            let version = session.recv()?.version;
            version.ok_or_else(|| io::Error::other("its response has no version"))
        };
        match query() {
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

    /// Returns whether CRIU dumps and restores guard regions (`MADV_GUARD_INSTALL`).
    #[must_use]
    pub fn keeps_guards(&self) -> bool {
        self.version >= KEEPS_GUARDS
    }

    /// Returns whether CRIU and the kernel support a lazy restore.
    #[must_use]
    pub fn has_lazy_pages(&self) -> bool {
        let query = || {
            let mut session = CriuSession::start(&self.path, &[], None)?;
            let mut request = Request::new(Kind::FeatureCheck);
            request.features = Some(Features {
                lazy_pages: Some(true),
            });
            session.send(&request)?;
            session.recv()
        };
        let features = query().ok().and_then(|response| response.features);
        features.and_then(|features| features.lazy_pages) == Some(true)
    }

    /// Makes CRIU lock the TCP connections that it dumps with nftables, if CRIU and the kernel can. By
    /// default it runs `iptables` twice for each connection while the tree is frozen.
    #[must_use]
    pub fn prefer_nftables(mut self) -> Self {
        let mut check = Command::new(&self.path);
        check.args(["check", "--feature", "network_lock_nftables"]);
        check.stdin(Stdio::null());
        let status = check.stdout(Stdio::null()).stderr(Stdio::null()).status();
        let supported = status.is_ok_and(|status| status.success());
        self.network_lock = supported.then_some(NETWORK_LOCK_NFTABLES);
        self
    }

    /// Adds options, written as on CRIU's command line.
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
        let text = config_text(options)?;
        let memfd =
            memfd_create("criu.conf", MFdFlags::MFD_CLOEXEC).expect("the kernel has memfds");
        let file = File::from(memfd);
        file.write_all_at(text.as_bytes(), 0)
            .expect("a memfd takes a few bytes");
        self.config = Some(Arc::new(file));
        Ok(self)
    }

    fn config_file(&self) -> Option<String> {
        let config = self.config.as_ref()?;
        let fd = config.as_raw_fd();
        Some(format!("/proc/{}/fd/{fd}", std::process::id()))
    }

    /// Begins a dump of the tree under `pid`: its state into the directory `images`, its pages into the
    /// socket `pages`. `preload` is a library for CRIU to load.
    ///
    /// # Errors
    /// Those of starting CRIU and of sending the request.
    pub fn dump(
        &self,
        pid: i32,
        images: BorrowedFd<'_>,
        pages: BorrowedFd<'_>,
        preload: Option<&Path>,
        options: &Options,
    ) -> io::Result<CriuSession> {
        let mut session = CriuSession::start(&self.path, &[pages], preload)?;
        let mut request = Request::new(Kind::Dump);
        request.opts = Some(Opts {
            pid: Some(pid),
            log_file: Some("dump.log".to_owned()),
            network_lock: self.network_lock,
            config_file: self.config_file(),
            timeout: Some(FREEZE_TIMEOUT),
            page_server: Some(PageServerInfo {
                fd: Some(pages.as_raw_fd()),
            }),
            ..options.opts(images)
        });
        session.send(&request)?;
        Ok(session)
    }

    /// Starts a CRIU process that waits for a request ([`Criu::restore`]). `preload` is a library for it to
    /// load. It exits if this program exits before it sends the request.
    ///
    /// # Errors
    /// Those of starting it.
    pub fn start(&self, preload: Option<&Path>) -> io::Result<CriuSession> {
        let (ours, theirs) = fdpass::pair()?;
        let mut session = CriuSession::start(&self.path, &[theirs.as_fd()], preload)?;
        session.mailbox = Some(ours);
        Ok(session)
    }

    /// Begins a restore from the directory `images` in a CRIU process started by [`Criu::start`]. For a lazy
    /// restore, a process must listen on the socket `lazy-pages.socket` in that directory.
    ///
    /// From here on, the death of this program neither undoes nor completes the restore: CRIU goes on up to
    /// the next stage, and waits there until it is killed.
    ///
    /// # Errors
    /// Those of sending the request.
    pub fn restore(
        &self,
        session: &mut CriuSession,
        images: BorrowedFd<'_>,
        options: &Options,
        lazy: bool,
    ) -> io::Result<()> {
        let mut request = Request::new(Kind::Restore);
        request.opts = Some(Opts {
            log_file: Some("restore.log".to_owned()),
            lazy_pages: Some(lazy),
            config_file: self.config_file(),
            ..options.opts(images)
        });
        session.outlive_this_program()?;
        session.send(&request)
    }
}

/// A running CRIU process. Dropping the session closes its connection, which aborts what CRIU is doing, and
/// waits until CRIU has exited.
#[derive(Debug)]
pub struct CriuSession {
    socket: OwnedFd,
    child: Child,
    pidfd: OwnedFd,
    /// Our end of a socket pair whose other end CRIU has inherited and never reads.
    mailbox: Option<OwnedFd>,
}

/// Message from CRIU during a dump or restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// CRIU has reached a stage, and waits for [`CriuSession::reply`].
    Stage {
        /// Name of the stage, as in CRIU's action scripts: `post-dump`, `post-restore`, ...
        name: String,
        /// PID of the process that it concerns, if any; in a restore, the restored root.
        pid: Option<i32>,
    },
    /// The dump or restore is complete; after a restore, the restored root runs.
    Done,
    /// The dump or restore failed, and CRIU has undone it.
    Failed(String),
}

impl Event {
    /// Decodes a packet.
    ///
    /// # Errors
    /// If it is not a response.
    pub fn parse(packet: &[u8]) -> io::Result<Self> {
        let response = Response::decode(packet).map_err(io::Error::other)?;
        Ok(match (response.kind, response.notify) {
            (kind, Some(Notify { script, pid })) if kind == Kind::Notify as i32 => Self::Stage {
                name: script.unwrap_or_default(),
                pid,
            },
            _ if response.success => Self::Done,
            _ => Self::Failed(match (response.message, response.errno) {
                (Some(message), _) => message,
                (None, Some(errno)) => io::Error::from_raw_os_error(errno).to_string(),
                (None, None) => "no reason given".to_owned(),
            }),
        })
    }
}

/// Reply to a stage of CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// CRIU continues.
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
        command.args(["swrk", "0"]).stdin(Stdio::from(theirs));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        // A Ctrl-C must reach this program only: CRIU, interrupted at any point, could leave its code in the
        // tree.
        command.process_group(0);
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
        let child = child?;
        Ok(Self {
            socket: ours,
            pidfd: pidfd::open(child.id().cast_signed())?,
            child,
            mailbox: None,
        })
    }

    /// Makes the connection stay open when this program exits. A duplicate of our end is sent to CRIU, which
    /// never receives it: the kernel keeps it until CRIU exits.
    fn outlive_this_program(&self) -> io::Result<()> {
        match &self.mailbox {
            Some(mailbox) => fdpass::send(mailbox.as_fd(), &[0], Some(self.socket.as_fd())),
            None => Ok(()),
        }
    }

    /// Returns the PID of CRIU.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Returns a descriptor that is readable when [`CriuSession::event`] does not block.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Closes the connection: CRIU aborts what it is doing, and exits.
    pub fn close(&self) {
        // Also for the duplicate that outlives this program. It fails if CRIU has exited.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }

    /// Kills CRIU.
    pub fn kill(&mut self) {
        // It may have exited.
        let _ = self.child.kill();
    }

    /// Waits for at most `timeout` until CRIU has exited. Returns whether it has.
    #[must_use]
    pub fn has_exited(&self, timeout: Duration) -> bool {
        is_readable(self.pidfd.as_fd(), timeout)
    }

    /// Waits for at most `timeout` until [`CriuSession::event`] does not block. Returns whether that is so.
    #[must_use]
    pub fn has_event(&self, timeout: Duration) -> bool {
        is_readable(self.fd(), timeout)
    }

    /// Waits until CRIU has exited, without ending what it is doing.
    pub fn detach(mut self) {
        // An error means that it has exited.
        let _ = self.child.wait();
    }

    /// Waits for the next event.
    ///
    /// # Errors
    /// If CRIU has exited.
    pub fn event(&mut self) -> io::Result<Event> {
        Event::parse(&self.recv_packet()?)
    }

    /// Replies to the stage at which CRIU waits.
    ///
    /// # Errors
    /// If CRIU has exited.
    pub fn reply(&mut self, reply: Reply) -> io::Result<()> {
        let mut request = Request::new(Kind::Notify);
        request.notify_success = Some(reply == Reply::Continue);
        self.send(&request)
    }

    /// Waits for the next event, and aborts if it is a stage.
    ///
    /// # Errors
    /// If CRIU has exited.
    pub fn event_or_abort(&mut self) -> io::Result<Event> {
        let event = self.event()?;
        if let Event::Stage { .. } = event {
            self.reply(Reply::Abort)?;
        }
        Ok(event)
    }

    fn send(&mut self, request: &Request) -> io::Result<()> {
        let bytes = request.encode_to_vec();
        send(self.fd().as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }

    fn recv(&mut self) -> io::Result<Response> {
        Response::decode(&self.recv_packet()?[..]).map_err(io::Error::other)
    }

    /// Waits for a packet, or for CRIU's exit: processes that it has restored may keep its socket open.
    fn wait_for_packet(&self) -> io::Result<()> {
        let mut fds = [
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN),
        ];
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::Error::EINTR) => {}
                other => {
                    other?;
                    break;
                }
            }
        }
        match fds[0].any() {
            Some(true) => Ok(()),
            Some(false) | None => Err(io::Error::other("CRIU exited without a response")),
        }
    }

    fn recv_packet(&mut self) -> io::Result<Vec<u8>> {
        self.wait_for_packet()?;
        let mut buffer = vec![0; RESPONSE_MAX];
        let len = loop {
            match recv(self.fd().as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(nix::Error::EINTR) => {}
                other => break other?,
            }
        };
        if len == 0 {
            return Err(io::Error::other("CRIU exited without a response"));
        }
        buffer.truncate(len);
        Ok(buffer)
    }
}

impl Drop for CriuSession {
    fn drop(&mut self) {
        self.close();
        // CRIU undoes what it has done, and exits.
        let _ = self.child.wait();
    }
}

/// Waits for at most `timeout` until a descriptor is readable. Returns whether it is.
fn is_readable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unusable_program_is_named() {
        for path in ["/nonexistent", "/bin/true"] {
            let error = Criu::find(Some(Path::new(path))).unwrap_err();
            assert!(error.to_string().contains(path), "{error}");
        }
    }
}
