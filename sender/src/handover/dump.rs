//! A dump by CRIU that is under way.
//!
//! CRIU talks to the sender on three sockets: its RPC, the page-server connection, and, with
//! [`StateDump::Preload`], a socket on which the library in CRIU reports that the target has stopped.

use super::discard::{DiscardingPageServer, Pages};
use super::{Handover, HandoverError, StateDump};
use crate::freeze::{FrozenProcess, has_live_thread};
use crate::target::smaps::VmFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use pageferry_common::criu::preload;
use pageferry_common::criu::{CriuSession, Event, Reply, last_errors};
use pageferry_common::sys::fdpass;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often the sender checks whether the dump was cancelled.
pub(super) const CANCEL_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How long CRIU may take to notice that the target is gone. CRIU 4.1 waits for ever if a process dies while
/// CRIU's code runs in it.
const GONE_PATIENCE: Duration = Duration::from_secs(3);

/// When to say that CRIU takes long to undo a dump.
const LATE: Duration = Duration::from_secs(10);

/// Name of the socket on which the library in CRIU reports that the target has stopped
/// (`common/preload/dump.rs`), in the directory of images.
const STOPPED_SOCKET: &str = "stopped.socket";

/// Next event of the dump.
#[derive(Debug)]
pub(super) enum Next {
    /// CRIU reached a stage and waits for the reply, or finished, or failed.
    Criu(Event),
    /// The target has stopped. CRIU waits until this is dropped.
    TargetStopped(OwnedFd),
    /// CRIU has sent all pages, and its code has left the target. CRIU waits for the status of the pages.
    PagesComplete {
        /// When CRIU sent the last page-server message.
        at: Instant,
    },
}

/// Message that CRIU waits for before it does anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaited {
    Nothing,
    /// The reply to a stage.
    Reply,
    /// The status of the pages.
    PagesStatus,
}

/// A dump under way. If it is dropped, CRIU undoes it and the target runs again.
pub(super) struct Dump {
    root: i32,
    pages: DiscardingPageServer,
    /// Listens for the library in CRIU; `None` once the target has stopped.
    stopped: Option<OwnedFd>,
    /// Reads what CRIU needs of `smaps`; `None` if CRIU has to read the kernel's file.
    flags: Option<VmFlags>,
    session: CriuSession,
    awaited: Awaited,
    images: PathBuf,
    /// CRIU opens the directory by this descriptor.
    _dir: File,
}

impl Dump {
    /// Starts CRIU, which dumps the tree under `root` into the directory `images`.
    pub(super) fn start(
        handover: &Handover,
        root: i32,
        images: &Path,
    ) -> Result<Self, HandoverError> {
        let (mut library, mut stopped, mut flags) = (None, None, None);
        if handover.state_dump == StateDump::Preload {
            library = Some(preload::write(preload::DUMP, images)?);
            stopped = Some(fdpass::listen(&images.join(STOPPED_SOCKET))?);
            let probed = VmFlags::probe().inspect_err(|why| {
                tracing::info!(
                    event = "kernel_smaps_needed", %why,
                    "CRIU reads smaps from the kernel: the downtime grows with the memory of the target"
                );
            });
            flags = probed.ok();
        }
        let (ours, theirs) = UnixStream::pair()?;
        let dir = File::open(images)?;
        let session = handover.criu.dump(
            root,
            dir.as_fd(),
            theirs.as_fd(),
            library.as_deref(),
            &handover.options,
        )?;
        Ok(Self {
            root,
            pages: DiscardingPageServer::new(ours),
            stopped,
            flags,
            session,
            awaited: Awaited::Nothing,
            images: images.to_owned(),
            _dir: dir,
        })
    }

    /// Directory of the images.
    pub(super) fn images(&self) -> &Path {
        &self.images
    }

    /// The page server of the dump.
    pub(super) fn pages(&self) -> &DiscardingPageServer {
        &self.pages
    }

    /// Waits for the next event, on any of CRIU's sockets. Fails as soon as `check` does.
    pub(super) fn next(
        &mut self,
        check: &mut dyn FnMut() -> Result<(), HandoverError>,
    ) -> Result<Next, HandoverError> {
        let mut gone_since = None;
        loop {
            check()?;
            let ready = self.wait()?;
            if has_live_thread(self.root, self.root) {
                gone_since = None;
            } else if gone_since.get_or_insert_with(Instant::now).elapsed() > GONE_PATIENCE {
                return Err(HandoverError::TargetGone(self.root));
            }
            if ready.pages && self.pages.recv()? == Pages::Complete {
                self.awaited = Awaited::PagesStatus;
                let at = Instant::now();
                return Ok(Next::PagesComplete { at });
            }
            if ready.stopped
                && let Some(listener) = self.stopped.take()
            {
                let held = fdpass::accept(listener.as_fd())?;
                return Ok(Next::TargetStopped(held));
            }
            if ready.session {
                let event = self.session.event().map_err(HandoverError::CriuExited)?;
                if let Event::Stage { .. } = event {
                    self.awaited = Awaited::Reply;
                }
                return Ok(Next::Criu(event));
            }
        }
    }

    /// Polls CRIU's sockets, for at most [`CANCEL_POLL_INTERVAL`].
    fn wait(&self) -> Result<Ready, HandoverError> {
        let mut fds = vec![PollFd::new(self.session.fd(), PollFlags::POLLIN)];
        let mut add = |fd| {
            fds.push(PollFd::new(fd, PollFlags::POLLIN));
            fds.len() - 1
        };
        let pages = self.pages.fd().map(&mut add);
        let stopped = self.stopped.as_ref().map(|listener| add(listener.as_fd()));
        let timeout = PollTimeout::try_from(CANCEL_POLL_INTERVAL).expect("it is short");
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(nix::Error::EINTR) => return Ok(Ready::default()),
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let ready = |at: Option<usize>| at.is_some_and(|at| fds[at].any() == Some(true));
        Ok(Ready {
            session: ready(Some(0)),
            pages: ready(pages),
            stopped: ready(stopped),
        })
    }

    /// Lets CRIU dump until it has sent all pages, finishes or fails.
    pub(super) fn follow(&mut self, cancelled: &AtomicBool) -> Result<Next, HandoverError> {
        let mut check = || match cancelled.load(Ordering::Relaxed) {
            true => Err(HandoverError::Cancelled),
            false => Ok(()),
        };
        loop {
            match self.next(&mut check)? {
                Next::Criu(Event::Stage { .. }) => self.reply_continue()?,
                end => return Ok(end),
            }
        }
    }

    /// Writes a short `smaps` of each process to where the library in CRIU looks for it. CRIU reads the
    /// kernel's file of a process without one.
    pub(super) fn write_smaps_stub(
        &self,
        processes: &[FrozenProcess],
    ) -> Result<(), HandoverError> {
        let Some(flags) = &self.flags else {
            return Ok(());
        };
        for process in processes {
            match flags.smaps(process.tid) {
                Ok(smaps) => {
                    fs::write(self.images.join(format!("smaps-{}", process.pid)), smaps)?;
                }
                Err(why) => tracing::debug!(process.pid, %why, "cannot read the flags of mappings"),
            }
        }
        Ok(())
    }

    /// Lets CRIU go on from the stage at which it waits.
    pub(super) fn reply_continue(&mut self) -> Result<(), HandoverError> {
        self.awaited = Awaited::Nothing;
        let replied = self.session.reply(Reply::Continue);
        replied.map_err(HandoverError::CriuExited)
    }

    /// Confirms that all pages are safe, so that CRIU completes the dump.
    pub(super) fn confirm_pages(&mut self) -> io::Result<()> {
        self.awaited = Awaited::Nothing;
        self.pages.confirm()
    }

    /// Rejects the pages, so that CRIU undoes the dump and reports why it failed.
    pub(super) fn reject_pages(&mut self) -> io::Result<()> {
        self.awaited = Awaited::Nothing;
        self.pages.reject()
    }

    /// Makes CRIU undo the dump. Returns when CRIU has exited, and the target runs again.
    pub(super) fn abort(mut self) {
        let replied = match self.awaited {
            // Dropping the sockets is enough. Waiting for a reply could block: CRIU may be writing pages.
            Awaited::Nothing => return,
            Awaited::Reply => self.session.reply(Reply::Abort),
            Awaited::PagesStatus => self.pages.reject(),
        };
        let undone = replied.and_then(|()| {
            loop {
                self.await_event();
                let Event::Stage { .. } = self.session.event_or_abort()? else {
                    return Ok(());
                };
            }
        });
        if let Err(why) = undone {
            // The kernel ends the traces of a CRIU that has exited.
            tracing::debug!(%why, "CRIU exited before it reported that the dump is undone");
        }
    }

    /// Waits until CRIU has reported something, or has exited.
    fn await_event(&mut self) {
        self.await_criu(|session| {
            session.has_event(CANCEL_POLL_INTERVAL) || session.has_exited(Duration::ZERO)
        });
    }

    /// Waits for CRIU until `done`. If the target is gone, CRIU may wait for it for ever: it is killed, for it
    /// has nothing to undo.
    fn await_criu(&mut self, done: impl Fn(&CriuSession) -> bool) {
        let began = Instant::now();
        let mut is_late = false;
        while !done(&self.session) {
            if !has_live_thread(self.root, self.root) && began.elapsed() > GONE_PATIENCE {
                self.session.kill();
            }
            if !is_late && began.elapsed() > LATE {
                is_late = true;
                tracing::warn!(
                    event = "criu_late",
                    "CRIU has not undone its dump yet: waiting for it (is the target paused?)"
                );
            }
        }
    }

    /// Returns whether CRIU still exists: it then has kept the target stopped since the dump.
    pub(super) fn is_criu_alive(&self) -> bool {
        let criu = Pid::from_raw(self.session.pid());
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(criu), flags) == Ok(WaitStatus::StillAlive)
    }

    /// Lets CRIU kill the target, which ends the dump. Fails if CRIU does not report success.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.session.reply(Reply::Continue)?;
        self.await_event();
        match self.session.event()? {
            Event::Done => Ok(()),
            other => Err(io::Error::other(format!("CRIU reported {other:?}"))),
        }
    }

    /// Returns the error for a dump that CRIU reports as failed, with the last errors in CRIU's log.
    pub(super) fn failure(&self, reason: &str) -> HandoverError {
        let errors = last_errors(&self.images.join("dump.log"));
        if errors.contains("Unseizable") {
            return HandoverError::CannotFreeze(errors);
        }
        HandoverError::CriuFailed(match errors.is_empty() {
            true => reason.to_owned(),
            false => format!("{reason}: {errors}"),
        })
    }
}

impl Drop for Dump {
    fn drop(&mut self) {
        self.pages.close();
        self.session.close();
        self.await_criu(|session| session.has_exited(CANCEL_POLL_INTERVAL));
    }
}

/// Which of CRIU's sockets have something to read.
#[derive(Debug, Clone, Copy, Default)]
struct Ready {
    session: bool,
    pages: bool,
    stopped: bool,
}
