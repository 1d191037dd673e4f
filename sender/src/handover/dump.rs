//! CRIU's dump under way: follows CRIU's sockets.

use super::HandoverError;
use super::discard::Endpoint;
use crate::freeze::FrozenProcess;
use crate::target::smaps::VmFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pageferry_common::criu::session::{CriuSession, Event, Reply};
use pageferry_common::sys::fdpass;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often it is looked whether a dump is still wanted.
pub(super) const CHECK: Duration = Duration::from_millis(100);

/// A dump under way.
pub(super) struct Dump {
    /// Dropped before `work`, which waits for a CRIU that may be waiting for us to read.
    pub(super) endpoint: Endpoint,
    /// Where the library in CRIU tells that the tree has stopped; `None` after it has.
    pub(super) stopped: Option<OwnedFd>,
    /// Tells of mappings what CRIU would read of `smaps`.
    pub(super) flags: Option<VmFlags>,
    pub(super) work: CriuSession,
    /// CRIU opens it by our number.
    pub(super) _dir: File,
}

#[derive(Debug)]
pub(super) enum Next {
    Criu(Event),
    /// The tree has stopped. CRIU waits until this is dropped.
    Stopped(OwnedFd),
    PagesEnd {
        /// When CRIU said so.
        at: Instant,
    },
}

impl Dump {
    /// Waits for what CRIU does next, on any of its sockets, as long as `wanted`: a dump for a receiver that
    /// is gone, or that nobody wants any more, need not be awaited.
    pub(super) fn next(
        &mut self,
        wanted: &mut dyn FnMut() -> Result<(), HandoverError>,
    ) -> Result<Next, HandoverError> {
        loop {
            wanted()?;
            let (told, sent, stopped) = {
                let mut fds = vec![PollFd::new(self.work.fd(), PollFlags::POLLIN)];
                let mut add = |fd| {
                    fds.push(PollFd::new(fd, PollFlags::POLLIN));
                    fds.len() - 1
                };
                let stream = (!self.endpoint.ended).then(|| add(self.endpoint.stream.as_fd()));
                let stopped = self.stopped.as_ref().map(|listener| add(listener.as_fd()));
                let timeout = PollTimeout::try_from(CHECK).expect("it is short");
                match poll(&mut fds, timeout) {
                    Err(nix::Error::EINTR) => continue,
                    other => other.map_err(io::Error::from)?,
                };
                let ready = |at: Option<usize>| at.is_some_and(|at| fds[at].any() == Some(true));
                (ready(Some(0)), ready(stream), ready(stopped))
            };
            if sent && let Some(step) = self.endpoint.step()? {
                return Ok(step);
            }
            if stopped && let Some(listener) = self.stopped.take() {
                return Ok(Next::Stopped(fdpass::accept(listener.as_fd())?));
            }
            if told {
                return Ok(Next::Criu(self.work.event()?));
            }
        }
    }

    /// Leaves what CRIU wants of each process's `smaps` where the library in it looks for that. Without it CRIU
    /// reads the kernel's.
    pub(super) fn leave_smaps(
        &self,
        processes: &[FrozenProcess],
        images: &Path,
    ) -> Result<(), HandoverError> {
        let Some(flags) = &self.flags else {
            return Ok(());
        };
        for process in processes {
            match flags.smaps(process.tid) {
                Ok(smaps) => fs::write(images.join(format!("smaps-{}", process.pid)), smaps)?,
                Err(why) => tracing::debug!(process.pid, %why, "its flags are not to be had"),
            }
        }
        Ok(())
    }

    /// Lets CRIU go on until its end, or that of its pages.
    pub(super) fn until_end(&mut self, unwanted: &AtomicBool) -> Result<Next, HandoverError> {
        let mut wanted = || match unwanted.load(Ordering::Relaxed) {
            true => Err(HandoverError::Dump("nobody wants it any more".to_owned())),
            false => Ok(()),
        };
        loop {
            match self.next(&mut wanted)? {
                Next::Criu(Event::Stage { .. }) => self.work.reply(Reply::Continue)?,
                end => return Ok(end),
            }
        }
    }
}
