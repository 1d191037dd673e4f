//! The filler process at work: takes what CRIU, the receiver and the kernel report, and fills.

use super::address_space::AddressSpace;
use super::group::{Group, Peer, Ready};
use super::journal::{CANCEL, CriuReport, Entry, Received, Source};
use super::{CHUNK, FillError, Filled};
use crate::restore::lazy::PendingPages;
use crate::sys::shared::received_fd;
use crate::sys::uffd::Event;
use nix::poll::PollTimeout;
use pageferry_common::{PAGE_SIZE, PageRange};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::time::{Duration, Instant};

/// Most events of one process that are read at once.
const EVENTS_MAX: usize = 16;

/// Number of entries that the journal may grow by before it is rewritten, beside a multiple of what it had.
const JOURNAL_GROWTH: u64 = 1000;

/// Interval of checks whether the keepers are alive.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// State of the filler process.
pub(super) struct Filler {
    group: &'static Group,
    images: BTreeMap<i32, PendingPages>,
    /// State of the connection to CRIU.
    restoring: Peer,
    /// State of the connection to the receiver.
    receiver: Peer,
    /// The receiver's message that pages may be filled that no process has faulted on.
    start: Option<Entry>,
    /// Whether the receiver has cancelled it.
    is_cancelled: bool,
    /// PID that CRIU has sent, and whose userfaultfd follows.
    awaited: Option<i32>,
    /// Whether CRIU has reported that all processes are restored.
    finished: bool,
    spaces: Vec<AddressSpace>,
    /// Index of the address space that was filled last.
    turn: usize,
    buffer: Vec<u8>,
    /// Length of the journal at which it is rewritten, entries.
    rewrite_at: u64,
}

impl Filler {
    pub(super) fn new(group: &'static Group, images: BTreeMap<i32, PendingPages>) -> Self {
        Self {
            group,
            images,
            restoring: Peer::Open,
            receiver: Peer::Open,
            start: None,
            is_cancelled: false,
            awaited: None,
            finished: false,
            spaces: Vec::new(),
            turn: 0,
            buffer: vec![0; (CHUNK * PAGE_SIZE) as usize],
            rewrite_at: group.journal.len() + JOURNAL_GROWTH,
        }
    }

    /// Fills until all memory is complete, or CRIU gives up.
    pub(super) fn fill(&mut self) -> Result<Filled, FillError> {
        let mut checked = Instant::now();
        while !self.is_over() {
            if checked.elapsed() >= CHECK_INTERVAL {
                self.group.check_keepers();
                checked = Instant::now();
            }
            let Some(ready) = self.poll()? else {
                continue;
            };
            self.take_events(&ready.uffds)?;
            if ready.criu {
                match self.group.receive_from_criu(self.awaited)? {
                    Received::Message(entry) => self.apply(&entry)?,
                    Received::Nothing => {}
                    Received::End => self.restoring = Peer::Closed,
                }
            }
            if ready.receiver {
                match self.group.receive_from_receiver()? {
                    Received::Message(entry) => self.apply(&entry)?,
                    Received::Nothing => {}
                    Received::End => self.receiver = Peer::Closed,
                }
            }
            if self.is_cancelled {
                return Ok(Filled::Cancelled);
            }
            for space in &mut self.spaces {
                space.resolve_faults(&mut self.buffer)?;
            }
            if self.may_fill() && !self.spaces.is_empty() {
                self.turn = (self.turn + 1) % self.spaces.len();
                self.spaces[self.turn].fill_some(&mut self.buffer)?;
            }
            self.close_gone();
            self.rewrite_journal()?;
        }
        Ok(Filled::All)
    }

    /// Returns whether pages may be filled that no process has faulted on.
    fn may_fill(&self) -> bool {
        self.start.is_some() || self.finished
    }

    fn is_over(&self) -> bool {
        let closed = self.restoring == Peer::Closed;
        let restored = self.finished || closed;
        // If CRIU closes before anything may be filled, it has given up, and undoes what it has restored.
        restored && self.spaces.iter().all(AddressSpace::is_complete) || closed && !self.may_fill()
    }

    /// Makes all threads that wait for a page fault again: what an earlier filler process had read of their
    /// faults is lost.
    pub(super) fn wake_all(&self) {
        self.spaces.iter().for_each(|space| space.uffd().wake_all());
    }

    /// Waits until there is something to do. Returns `None` if that was interrupted by a signal.
    fn poll(&self) -> io::Result<Option<Ready>> {
        let has_work =
            |space: &AddressSpace| space.has_faults() || self.may_fill() && !space.is_complete();
        let timeout = match self.spaces.iter().any(has_work) {
            true => PollTimeout::ZERO,
            false => CHECK_INTERVAL.try_into().expect("it is short"),
        };
        let uffds = self.spaces.iter().map(AsFd::as_fd);
        self.group
            .poll(self.restoring, self.receiver, uffds, timeout)
    }

    /// Takes events of all address spaces that have some.
    fn take_events(&mut self, ready: &[bool]) -> Result<(), FillError> {
        for number in (0..ready.len()).filter(|&number| ready[number]) {
            for _ in 0..EVENTS_MAX {
                let uffd = self.spaces[number].uffd();
                let source = Source::Event(uffd.number());
                match self.group.journal.receive(source, |to| uffd.read(to))? {
                    Received::Message(entry) => self.apply(&entry)?,
                    Received::Nothing | Received::End => break,
                }
            }
        }
        Ok(())
    }

    /// Does what an entry of the journal says, whether it was received just now or by an earlier filler
    /// process.
    pub(super) fn apply(&mut self, entry: &Entry) -> Result<(), FillError> {
        let [one, two, three, _] = entry.message;
        let damaged = || io::Error::other("the journal is damaged");
        match entry.source {
            Source::Criu => match entry.criu_report() {
                CriuReport::Finished => self.finished = true,
                CriuReport::Exited => {}
                CriuReport::Process(pid) => self.awaited = Some(pid),
            },
            Source::CriuFd(pid) => {
                self.awaited = None;
                let missing = || io::Error::other("CRIU sent no userfaultfd");
                let fd = received_fd(entry.message).ok_or_else(missing)?;
                let space = AddressSpace::new(fd, &self.group.journal, pid, self.image(pid)?);
                self.spaces.push(space);
            }
            Source::Receiver if one == CANCEL => self.is_cancelled = true,
            Source::Receiver => self.start = Some(*entry),
            Source::Event(fd) => {
                let event = Event::parse(entry.message)?;
                let child = self.space(fd)?.apply(event);
                self.spaces.extend(child);
            }
            Source::Closed(fd) => self.spaces.retain(|space| space.uffd().number() != fd),
            Source::Space(fd) => {
                let pid = (one as u32).cast_signed();
                let space = AddressSpace::filled(fd, &self.group.journal, pid, self.image(pid)?);
                self.spaces.push(space);
            }
            Source::Piece(fd) => {
                let range = PageRange::from_bounds(one, two).ok_or_else(damaged)?;
                self.space(fd)?.add_missing(range, three);
            }
            Source::Filled(fd) => {
                let range = PageRange::from_bounds(one, two).ok_or_else(damaged)?;
                self.space(fd)?.remove_missing(range);
            }
        }
        Ok(())
    }

    fn image(&self, pid: i32) -> io::Result<&PendingPages> {
        let unknown = || format!("CRIU restores process {pid}, which has no image");
        let image = self.images.get(&pid);
        image.ok_or_else(|| io::Error::other(unknown()))
    }

    fn space(&mut self, fd: RawFd) -> io::Result<&mut AddressSpace> {
        let mut spaces = self.spaces.iter_mut();
        let space = spaces.find(|space| space.uffd().number() == fd);
        space.ok_or_else(|| io::Error::other("the journal is damaged"))
    }

    /// Closes the userfaultfds of processes that have exited. The journal has it first: the number of a
    /// closed descriptor is soon that of another.
    fn close_gone(&mut self) {
        for space in self.spaces.extract_if(.., |space| space.is_gone()) {
            let source = Source::Closed(space.uffd().number());
            let message = [0; 4];
            self.group.journal.append(Entry { source, message });
            space.into_uffd().close();
        }
    }

    /// Rewrites the journal if it has become long: a process may change its mappings for as long as it likes.
    fn rewrite_journal(&mut self) -> io::Result<()> {
        let journal = &self.group.journal;
        if journal.len() < self.rewrite_at {
            return Ok(());
        }
        let reports = [
            self.awaited.map(CriuReport::Process),
            self.finished.then_some(CriuReport::Finished),
        ];
        let reports = reports.into_iter().flatten().map(Entry::from_criu);
        let spaces = self.spaces.iter().flat_map(AddressSpace::entries);
        journal.replace(reports.chain(self.start).chain(spaces))?;
        self.rewrite_at = 2 * journal.len() + JOURNAL_GROWTH;
        Ok(())
    }
}
