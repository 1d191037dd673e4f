//! Waiting for the next stop of one traced thread, with a deadline.

use crate::sys::ptrace::{self, Stop, Tid};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// How often the thread is looked at without a signal: in a program with other threads, SIGCHLD may be lost to
/// one of those.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Whether a wait ends when the sender is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnDeadSender {
    /// It fails with `BrokenPipe`.
    Fail,
    /// It goes on: the target is being restored.
    GoOn,
}

/// What tells of stops: the freezer's SIGCHLD, and the socket that the sender closes.
#[derive(Clone, Copy)]
pub(super) struct Stops<'a> {
    pub(super) signals: &'a SignalFd,
    pub(super) socket: BorrowedFd<'a>,
}

impl Stops<'_> {
    /// Waits until a traced thread that is about to stop has stopped or exited.
    ///
    /// # Errors
    /// `TimedOut` at the deadline, `BrokenPipe` if the sender is gone and that matters, and those of `waitpid`.
    pub(super) fn wait(
        self,
        tid: Tid,
        deadline: Instant,
        on_dead_sender: OnDeadSender,
    ) -> io::Result<Stop> {
        loop {
            if let Some(stop) = ptrace::poll(tid)? {
                return Ok(stop);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            if on_dead_sender == OnDeadSender::Fail {
                // poll always reports POLLHUP.
                fds.push(PollFd::new(self.socket, PollFlags::empty()));
            }
            // Rounded up, for a timeout of 0 ms would make the loop spin.
            let left = left.min(POLL_INTERVAL).as_millis() + 1;
            let ms = u16::try_from(left).unwrap_or(u16::MAX);
            match poll(&mut fds, PollTimeout::from(ms)) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let hung_up = |fd: &PollFd<'_>| {
                let events = fd.revents().unwrap_or(PollFlags::empty());
                events.contains(PollFlags::POLLHUP)
            };
            if fds.get(1).is_some_and(hung_up) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            while let Ok(Some(_)) = self.signals.read_signal() {}
        }
    }
}
