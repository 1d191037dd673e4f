//! The processes that hold the userfaultfds of a restored tree: a filler process, and keepers that replace
//! it.
//!
//! When the last descriptor of a userfaultfd is closed, the kernel unregisters the memory, and a thread that
//! touches a missing page reads zeros. So the processes share one table of descriptors: whatever CRIU or a
//! fork adds to it belongs to all of them at once, and stays open until the last of them has exited.
//! Meanwhile a thread that touches a missing page waits. All of them are in sessions of their own, so that no
//! signal to a session reaches more than one.
//!
//! Each member has a place, in which the number of a descriptor of it (a pidfd) stands. A keeper that sees
//! another member die starts one in its place. If several do so, the first that enters itself stays.

use super::journal::{Journal, Received, Source};
use super::{RETRY_DELAY, report};
use crate::sys::shared::{self, Words, held};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{FileStat, SFlag, fstat};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::sleep;
use std::time::Duration;

/// Shared word: whether the group is over.
const OVER: usize = 0;
/// Shared word: number of filler processes so far.
const FILLERS: usize = 1;
/// First of the shared words with the members' places.
const PLACES: usize = 2;

/// Number of members.
const MEMBERS: usize = 4;

/// The filler's place. The keepers have the others.
const FILLER: usize = 0;

/// Names of the processes. None contains that of the receiver, so that killing all processes of that name
/// does not kill these.
const FILLER_NAME: &str = "lazy-filler";
const KEEPER_NAME: &str = "lazy-keeper";

/// Longest time that a keeper sleeps before it looks at the places again, ms. It is woken by a death, except
/// of a member that entered its place in the meantime.
const LOOK_AGAIN_MS: u16 = 1000;

/// Longest wait for a started process to enter its place.
const ENTER_TIMEOUT: Duration = Duration::from_millis(100);
const ENTER_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// State of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    Open,
    Closed,
}

/// What can be read from.
pub(super) struct Ready {
    pub(super) criu: bool,
    pub(super) receiver: bool,
    /// One for each userfaultfd.
    pub(super) uffds: Vec<bool>,
}

/// What all members share. It is never dropped: that would close the descriptors of the others.
#[derive(Debug)]
pub(super) struct Group {
    words: &'static Words,
    pub(super) journal: Journal,
    /// Connection from CRIU.
    pub(super) criu: UnixStream,
    /// Connection to the receiver.
    pub(super) receiver: UnixStream,
    /// Round that has the pages.
    pub(super) round: PathBuf,
}

impl Group {
    /// Makes this process the only member of a new group, its filler.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn start(
        criu: UnixStream,
        receiver: UnixStream,
        round: PathBuf,
    ) -> io::Result<&'static Self> {
        let words = shared::words()?;
        shared::ignore_children();
        words[PLACES + FILLER].store(shared::own_pidfd()?.unsigned_abs().into(), SeqCst);
        set_name(FILLER_NAME);
        Ok(Box::leak(Box::new(Self {
            words,
            journal: Journal::new(words)?,
            criu,
            receiver,
            round,
        })))
    }

    /// Prepares this process to fill. Returns its number among the filler processes, from 1.
    pub(super) fn begin_filling(&'static self) -> u64 {
        shared::lock(self.words);
        for place in FILLER + 1..MEMBERS {
            while self.member(place).is_none() {
                self.replace(place, None);
            }
        }
        self.words[FILLERS].fetch_add(1, SeqCst) + 1
    }

    /// Lets all members exit.
    pub(super) fn end(&self) {
        self.words[OVER].store(1, SeqCst);
    }

    /// Returns whether the members exit.
    pub(super) fn is_over(&self) -> bool {
        self.words[OVER].load(SeqCst) != 0
    }

    /// Returns the pidfd of the member in this place; `None` if there has been no member yet.
    fn member(&self, place: usize) -> Option<RawFd> {
        let fd = self.words[PLACES + place].load(SeqCst);
        RawFd::try_from(fd).ok().filter(|&fd| fd > 0)
    }

    /// Replaces the keepers if all are dead. The filler calls it now and then: if one keeper lives, it
    /// replaces the others, with less memory than a copy of the filler would have.
    pub(super) fn check_keepers(&'static self) {
        let keepers = || FILLER + 1..MEMBERS;
        let members: Vec<_> = keepers().map(|place| self.member(place)).collect();
        if await_deaths(&members, PollTimeout::ZERO)
            .iter()
            .all(|&dead| dead)
        {
            keepers()
                .zip(members)
                .for_each(|(place, dead)| self.replace(place, dead));
        }
    }

    /// Keeps the descriptors, and replaces other members that die, until the group is over.
    fn keep(&'static self, own_place: usize) {
        while !self.is_over() {
            let others = (0..MEMBERS).filter(|&place| place != own_place);
            let members: Vec<_> = others.clone().map(|place| self.member(place)).collect();
            let dead = await_deaths(&members, LOOK_AGAIN_MS.into());
            for ((place, member), dead) in others.zip(members).zip(dead) {
                if dead && !self.is_over() {
                    self.replace(place, member);
                }
            }
        }
    }

    /// Starts a member in the place of one that is dead, and waits until that or another one has entered it.
    fn replace(&'static self, place: usize, dead: Option<RawFd>) {
        if let Err(error) = shared::spawn(|| self.enter(place, dead)) {
            report(&error);
            sleep(RETRY_DELAY);
        }
        let mut waited = Duration::ZERO;
        while self.member(place) == dead && waited < ENTER_TIMEOUT {
            sleep(ENTER_POLL_INTERVAL);
            waited += ENTER_POLL_INTERVAL;
        }
    }

    /// Enters a place if it is still that of the dead member, and then does what is done there. Returns the
    /// exit code.
    fn enter(&'static self, place: usize, dead: Option<RawFd>) -> i32 {
        let Ok(own) = shared::own_pidfd() else {
            return 1;
        };
        // The descriptor of the dead member stays open: while its number is not used again, no place can be
        // mistaken for what it was before.
        let [dead, new] = [dead.unwrap_or(0), own].map(|fd| u64::from(fd.unsigned_abs()));
        let word = &self.words[PLACES + place];
        if word.compare_exchange(dead, new, SeqCst, SeqCst).is_err() {
            shared::close(own);
            return 0;
        }
        set_session();
        if place == FILLER {
            set_name(FILLER_NAME);
            return super::fill(self);
        }
        set_name(KEEPER_NAME);
        self.keep(place);
        0
    }

    /// Closes the images that an earlier filler process had opened.
    ///
    /// # Errors
    /// Those of listing the descriptors.
    pub(super) fn close_images(&self) -> io::Result<()> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir("/proc/self/fd")? {
            let name = entry?.file_name();
            numbers.extend(name.to_str().and_then(|name| name.parse::<RawFd>().ok()));
        }
        for fd in numbers.into_iter().filter(|&fd| fd > libc::STDERR_FILENO) {
            // The journal is the only other regular file: all else are sockets, pidfds and userfaultfds.
            let is_file = |stat: FileStat| {
                SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG
            };
            if fstat(held(fd)).is_ok_and(is_file) && !self.journal.is_in(fd) {
                shared::close(fd);
            }
        }
        Ok(())
    }

    /// Waits until CRIU, the receiver or one of `uffds` can be read from. Returns `None` if that was interrupted
    /// by a signal.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn poll<'a>(
        &'a self,
        criu: Peer,
        receiver: Peer,
        uffds: impl Iterator<Item = BorrowedFd<'a>>,
        timeout: PollTimeout,
    ) -> io::Result<Option<Ready>> {
        // A closed connection is left out: it would be ready all the time.
        let peers = [(self.criu.as_fd(), criu), (self.receiver.as_fd(), receiver)];
        let open = peers.into_iter().filter(|it| it.1 == Peer::Open);
        let all = open.map(|it| it.0).chain(uffds);
        let mut fds: Vec<_> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Err(nix::Error::EINTR) => return Ok(None),
            other => other?,
        };
        let mut ready = fds.iter().map(|fd| fd.any() == Some(true));
        let mut is_ready = |peer| peer == Peer::Open && ready.next() == Some(true);
        let (criu, receiver) = (is_ready(criu), is_ready(receiver));
        Ok(Some(Ready {
            criu,
            receiver,
            uffds: ready.collect(),
        }))
    }

    /// Receives a message of CRIU's, if there is one: the userfaultfd of the process `awaited`, or another.
    ///
    /// # Errors
    /// Those of reading, and if CRIU has not sent the userfaultfd.
    pub(super) fn receive_from_criu(&self, awaited: Option<i32>) -> io::Result<Received> {
        let criu = self.criu.as_fd();
        match awaited {
            None => self
                .journal
                .receive(Source::Criu, |to| shared::read(criu, to, size_of::<i32>())),
            Some(pid) => self
                .journal
                .receive(Source::CriuFd(pid), |to| shared::receive_fd(criu, to)),
        }
    }

    /// Receives a message of the receiver's.
    ///
    /// # Errors
    /// Those of reading.
    pub(super) fn receive_from_receiver(&self) -> io::Result<Received> {
        let receiver = self.receiver.as_fd();
        let read = |to: &_| shared::read(receiver, to, super::RECEIVER_MESSAGE_BYTES);
        self.journal.receive(Source::Receiver, read)
    }
}

/// Waits until one of these members is dead. Returns which of them are.
fn await_deaths(members: &[Option<RawFd>], timeout: PollTimeout) -> Vec<bool> {
    let fds = members.iter().flatten();
    let mut fds: Vec<_> = fds
        .map(|&fd| PollFd::new(held(fd), PollFlags::POLLIN))
        .collect();
    // A wait that is interrupted finds no dead process.
    let _ = poll(&mut fds, timeout);
    let mut dead = fds.iter().map(|fd| fd.any() == Some(true));
    let of_members = members
        .iter()
        .map(|member| member.is_some() && dead.next() == Some(true));
    of_members.collect()
}

/// Gives this process a session of its own: a hang-up of the terminal must not end it.
pub(super) fn set_session() {
    // This fails in a session leader, which does not need it.
    let _ = nix::unistd::setsid();
}

/// Names this process, as lists of processes show it.
fn set_name(name: &str) {
    // It is only a name.
    let _ = fs::write("/proc/self/comm", name);
}
