//! Journal of what the filler process has received: the state of one that dies is the state of the next one
//! that reads the journal.
//!
//! The kernel keeps no event that was read: a process continues once its fork or `munmap` was read, and what
//! a filler process knew of it dies with it. So the kernel writes every message straight to shared memory,
//! the inbox, and a message there counts as received from that moment on. It is appended to the journal
//! before anything else is done with it. What was filled is appended afterwards: filling it again has no
//! effect while it is there.

use super::{RETRY_DELAY, report};
use crate::sys::shared::{Message, Words, received_fd};
use crate::sys::uffd::Event;
use nix::sys::memfd::{MFdFlags, memfd_create};
use pageferry_common::proc::process::ProcessId;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::sleep;

/// Shared word with the length of the journal, in entries, and which of its files it is in.
const POSITION: usize = 8;
/// The inbox: the length of the journal for which it was prepared, its source, and its message.
const INBOX_POSITION: usize = 9;
const INBOX_SOURCE: usize = 10;
const INBOX_MESSAGE: usize = 11;
const INBOX_END: usize = 15;

/// Bit of the position: the journal is in the second file.
const SECOND_FILE: u64 = 1 << 63;

/// Words of an entry.
const ENTRY_WORDS: usize = 5;
const ENTRY_BYTES: usize = ENTRY_WORDS * size_of::<u64>();

/// First word of the message from the receiver that lets all pages be filled. The PID and the start time of
/// the restored root follow.
pub(super) const START: u64 = 1;

/// First word of the message from the receiver that ends all of it, and what is left of the restored
/// processes.
pub(super) const CANCEL: u64 = 2;

/// CRIU's message that all processes are restored.
const FINISHED: i32 = 0x5253_5446;

/// Where a message came from, and what it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// CRIU: the PID of a process in its namespace, or that all are restored.
    Criu,
    /// CRIU: the userfaultfd of the process with this PID.
    CriuFd(i32),
    /// The receiver.
    Receiver,
    /// An event of this userfaultfd.
    Event(RawFd),
    /// Not received: this userfaultfd is about to be closed, for its process has exited.
    Closed(RawFd),
    /// Not received, but left of earlier entries: this userfaultfd misses the pages that follow. The message
    /// is the PID of the image.
    Space(RawFd),
    /// Not received: these pages were filled. The message is their start and end.
    Filled(RawFd),
    /// Missing pages of this userfaultfd. The message is the start, the end, and the start in the images.
    Piece(RawFd),
}

impl Source {
    fn encode(self) -> u64 {
        let (kind, number) = match self {
            Self::Criu => (1, 0),
            Self::CriuFd(pid) => (2, pid),
            Self::Receiver => (3, 0),
            Self::Event(fd) => (4, fd),
            Self::Closed(fd) => (5, fd),
            Self::Space(fd) => (6, fd),
            Self::Piece(fd) => (7, fd),
            Self::Filled(fd) => (8, fd),
        };
        kind << 32 | u64::from(number.cast_unsigned())
    }

    fn decode(word: u64) -> Option<Self> {
        let number = (word as u32).cast_signed();
        match word >> 32 {
            1 => Some(Self::Criu),
            2 => Some(Self::CriuFd(number)),
            3 => Some(Self::Receiver),
            4 => Some(Self::Event(number)),
            5 => Some(Self::Closed(number)),
            6 => Some(Self::Space(number)),
            7 => Some(Self::Piece(number)),
            8 => Some(Self::Filled(number)),
            _ => None,
        }
    }
}

/// Entry of the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) source: Source,
    pub(super) message: [u64; 4],
}

/// What CRIU reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CriuReport {
    /// The userfaultfd of the process with this PID follows.
    Process(i32),
    /// The process had exited, and has no memory.
    Exited,
    /// All processes are restored.
    Finished,
}

impl Entry {
    /// Returns what CRIU reports, if the source is [`Source::Criu`].
    pub(super) fn criu_report(&self) -> CriuReport {
        match (self.message[0] as u32).cast_signed() {
            FINISHED => CriuReport::Finished,
            ..=0 => CriuReport::Exited,
            pid => CriuReport::Process(pid),
        }
    }

    /// Returns an entry of CRIU's with this report.
    pub(super) fn from_criu(report: CriuReport) -> Self {
        let word = match report {
            CriuReport::Process(pid) => pid,
            CriuReport::Exited => -1,
            CriuReport::Finished => FINISHED,
        };
        Self {
            source: Source::Criu,
            message: [u64::from(word.cast_unsigned()), 0, 0, 0],
        }
    }

    /// Returns whether the kernel has written the message, which was zero before.
    fn has_arrived(&self) -> bool {
        match self.source {
            Source::CriuFd(_) => received_fd(self.message).is_some(),
            _ => self.message[0] != 0,
        }
    }

    /// Returns whether the next filler process would not learn of it again: a thread that waits for a page is
    /// woken, and faults again.
    fn is_lasting(&self) -> bool {
        let is_fault = || matches!(Event::parse(self.message), Ok(Event::Fault(_)));
        !(matches!(self.source, Source::Event(_)) && is_fault())
    }

    fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        let [a, b, c, d] = self.message;
        let words = [self.source.encode(), a, b, c, d].map(u64::to_ne_bytes);
        let mut bytes = [0; ENTRY_BYTES];
        bytes.copy_from_slice(words.as_flattened());
        bytes
    }

    fn parse(bytes: &[u8; ENTRY_BYTES]) -> io::Result<Self> {
        let word = |number: usize| {
            let word = bytes[number * 8..][..8].try_into();
            u64::from_ne_bytes(word.expect("eight bytes"))
        };
        let source = Source::decode(word(0));
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, "the journal is damaged");
        Ok(Self {
            source: source.ok_or_else(invalid)?,
            message: [word(1), word(2), word(3), word(4)],
        })
    }
}

/// Result of reading from a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    Message(Entry),
    /// There is none yet.
    Nothing,
    /// The peer has closed its end.
    End,
}

/// What a copy depends on.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Holdings {
    /// All open userfaultfds.
    pub(super) uffds: Vec<RawFd>,
    /// PID that CRIU has sent, and whose userfaultfd follows.
    pub(super) awaited: Option<i32>,
    /// Root of the restored tree.
    pub(super) root: Option<ProcessId>,
}

/// The journal, in memory that survives the filler process.
#[derive(Debug)]
pub(super) struct Journal {
    words: &'static Words,
    /// Files in memory. One has the journal; the other is used when it is rewritten.
    files: [File; 2],
}

impl Journal {
    /// Creates an empty journal in these words, which are zero.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn new(words: &'static Words) -> io::Result<Self> {
        let file = || memfd_create("pageferry-journal", MFdFlags::MFD_CLOEXEC).map(File::from);
        Ok(Self {
            words,
            files: [file()?, file()?],
        })
    }

    fn file(&self, position: u64) -> &File {
        &self.files[usize::from(position & SECOND_FILE != 0)]
    }

    fn inbox(&self) -> &Message {
        let words = &self.words[INBOX_MESSAGE..INBOX_END];
        words.try_into().expect("four words")
    }

    /// Returns whether this descriptor is of one of its files.
    pub(super) fn is_in(&self, fd: RawFd) -> bool {
        self.files.iter().any(|file| file.as_raw_fd() == fd)
    }

    /// Returns the number of entries.
    pub(super) fn len(&self) -> u64 {
        self.words[POSITION].load(SeqCst) & !SECOND_FILE
    }

    /// Receives a message: `read` has the kernel write it to the memory that it is given, and returns the
    /// number of bytes. When this returns a message, it is in the journal, unless it would come again.
    ///
    /// # Errors
    /// Those of `read`; `InvalidData` if it has written no message.
    pub(super) fn receive(
        &self,
        source: Source,
        read: impl FnOnce(&Message) -> io::Result<usize>,
    ) -> io::Result<Received> {
        let [position, from] = [INBOX_POSITION, INBOX_SOURCE].map(|number| &self.words[number]);
        // In this order, so that whatever is in the inbox if this process dies is one whole message or none.
        from.store(0, SeqCst);
        self.inbox().iter().for_each(|word| word.store(0, SeqCst));
        position.store(self.words[POSITION].load(SeqCst), SeqCst);
        from.store(source.encode(), SeqCst);
        match read(self.inbox()) {
            Ok(0) => return Ok(Received::End),
            Ok(_) => {}
            Err(error) => {
                return match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Received::Nothing),
                    // The peer has died before it read all that it was sent.
                    io::ErrorKind::ConnectionReset => Ok(Received::End),
                    _ => Err(error),
                };
            }
        }
        let message = self.inbox().each_ref().map(|word| word.load(SeqCst));
        let entry = Entry { source, message };
        if !entry.has_arrived() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if entry.is_lasting() {
            self.append(entry);
        }
        Ok(Received::Message(entry))
    }

    /// Appends an entry. Waits while there is no memory for it: what was received must not be lost.
    pub(super) fn append(&self, entry: Entry) {
        let position = self.words[POSITION].load(SeqCst);
        let at = (position & !SECOND_FILE) * ENTRY_BYTES as u64;
        while let Err(error) = self.file(position).write_all_at(&entry.to_bytes(), at) {
            report(&error);
            sleep(RETRY_DELAY);
        }
        self.words[POSITION].store(position + 1, SeqCst);
    }

    /// Replaces all entries by others that say the same, also of the last message that was received.
    ///
    /// # Errors
    /// Those of the journal's file; the entries are as before then.
    pub(super) fn replace(&self, entries: impl Iterator<Item = Entry>) -> io::Result<()> {
        let next = !self.words[POSITION].load(SeqCst) & SECOND_FILE;
        let mut bytes = Vec::new();
        entries.for_each(|entry| bytes.extend(entry.to_bytes()));
        // What is in the inbox is among the entries. It must not be mistaken for a later message.
        self.words[INBOX_SOURCE].store(0, SeqCst);
        let file = self.file(next);
        file.set_len(0)?;
        file.write_all_at(&bytes, 0)?;
        let len = (bytes.len() / ENTRY_BYTES) as u64;
        self.words[POSITION].store(next | len, SeqCst);
        Ok(())
    }

    /// Returns all entries, with the one that a dead filler process had received and not appended.
    ///
    /// # Errors
    /// Those of the journal's file.
    pub(super) fn recover(&self) -> io::Result<Vec<Entry>> {
        let position = self.words[POSITION].load(SeqCst);
        let source = Source::decode(self.words[INBOX_SOURCE].load(SeqCst));
        if let Some(source) = source
            && self.words[INBOX_POSITION].load(SeqCst) == position
        {
            let message = self.inbox().each_ref().map(|word| word.load(SeqCst));
            let entry = Entry { source, message };
            if entry.has_arrived() && entry.is_lasting() {
                self.append(entry);
            }
        }
        let mut bytes = vec![0; self.len() as usize * ENTRY_BYTES];
        self.file(position).read_exact_at(&mut bytes, 0)?;
        let (entries, _) = bytes.as_chunks();
        entries.iter().map(Entry::parse).collect()
    }

    /// Returns what the copy depends on, according to the entries.
    ///
    /// # Errors
    /// Those of the journal's file.
    pub(super) fn holdings(&self) -> io::Result<Holdings> {
        let mut all = Holdings::default();
        for entry in self.recover()? {
            match entry.source {
                Source::Criu => {
                    if let CriuReport::Process(pid) = entry.criu_report() {
                        all.awaited = Some(pid);
                    }
                }
                Source::CriuFd(_) => {
                    all.awaited = None;
                    all.uffds.extend(received_fd(entry.message));
                }
                Source::Receiver => all.root = root(entry.message).or(all.root),
                Source::Event(_) => {
                    if let Ok(Event::Fork(fd)) = Event::parse(entry.message) {
                        all.uffds.push(fd);
                    }
                }
                Source::Closed(fd) => all.uffds.retain(|&open| open != fd),
                Source::Space(fd) => all.uffds.push(fd),
                Source::Piece(_) | Source::Filled(_) => {}
            }
        }
        Ok(all)
    }
}

/// Returns the root in a message of the receiver's, if it is still alive.
fn root([_, pid, start_time, _]: [u64; 4]) -> Option<ProcessId> {
    let root = ProcessId::find(i32::try_from(pid).ok()?)?;
    (root.start_time() == start_time).then_some(root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::shared;

    const FAULT: [u64; 4] = [0x12, 0, 0x5000, 0];
    const FORK: [u64; 4] = [0x13, 7, 0, 0];
    const UNMAP: [u64; 4] = [0x16, 0x1000, 0x3000, 0];

    fn journal() -> Journal {
        Journal::new(shared::words().unwrap()).unwrap()
    }

    fn event(message: [u64; 4]) -> Entry {
        Entry {
            source: Source::Event(5),
            message,
        }
    }

    /// Writes a message as the kernel does.
    fn put(to: &Message, message: [u64; 4]) {
        let words = to.iter().zip(message);
        words.for_each(|(word, value)| word.store(value, SeqCst));
    }

    fn receive(journal: &Journal, entry: Entry) {
        let received = journal.receive(entry.source, |to| {
            put(to, entry.message);
            Ok(32)
        });
        assert_eq!(received.unwrap(), Received::Message(entry));
    }

    /// The filler process dies when the kernel has written the message: nothing more is done.
    fn receive_and_die(journal: &Journal, entry: Entry) {
        let received = journal.receive(entry.source, |to| {
            put(to, entry.message);
            Err(io::Error::other("dead"))
        });
        received.unwrap_err();
    }

    #[test]
    fn message_is_kept_from_the_moment_that_the_kernel_wrote_it() {
        let journal = journal();
        receive(&journal, event(FORK));
        receive_and_die(&journal, event(UNMAP));
        for _ in 0..2 {
            assert_eq!(journal.recover().unwrap(), [event(FORK), event(UNMAP)]);
        }
        // The same again is another event.
        receive_and_die(&journal, event(UNMAP));
        assert_eq!(journal.recover().unwrap().len(), 3);
        // A reader that dies before there is a message.
        let died = journal.receive(Source::Event(5), |_| Err(io::Error::other("dead")));
        died.unwrap_err();
        assert_eq!(journal.recover().unwrap().len(), 3);
    }

    #[test]
    fn faults_are_not_kept() {
        let journal = journal();
        receive(&journal, event(FAULT));
        assert_eq!(journal.recover().unwrap(), []);
        receive_and_die(&journal, event(FAULT));
        assert_eq!(journal.recover().unwrap(), []);
        receive(&journal, event(UNMAP));
        assert_eq!(journal.recover().unwrap(), [event(UNMAP)]);
    }

    #[test]
    fn end_and_absence_of_messages_are_told_apart() {
        let journal = journal();
        let receive = |result| journal.receive(Source::Criu, |_| result);
        assert_eq!(receive(Ok(0)).unwrap(), Received::End);
        let error = io::ErrorKind::WouldBlock.into();
        assert_eq!(receive(Err(error)).unwrap(), Received::Nothing);
        let error = io::ErrorKind::ConnectionReset.into();
        assert_eq!(receive(Err(error)).unwrap(), Received::End);
        receive(Ok(4)).unwrap_err();
        assert_eq!(journal.recover().unwrap(), []);
    }

    #[test]
    fn rewritten_journal_has_the_new_entries_and_grows_on() {
        let journal = journal();
        let space = Entry {
            source: Source::Space(5),
            message: [9, 0, 0, 0],
        };
        let mut expected = vec![event(FORK); 3];
        expected.iter().for_each(|&entry| receive(&journal, entry));
        for _ in 0..3 {
            assert_eq!(journal.recover().unwrap(), expected);
            // It was read, and is in the entries that replace all others: it must not be added again.
            receive_and_die(&journal, event(UNMAP));
            assert_eq!(journal.recover().unwrap().last(), Some(&event(UNMAP)));
            journal.replace([space, event(UNMAP)].into_iter()).unwrap();
            assert_eq!(journal.recover().unwrap(), [space, event(UNMAP)]);
            receive(&journal, event(FORK));
            expected = vec![space, event(UNMAP), event(FORK)];
        }
    }

    #[test]
    fn entries_of_every_source_are_read_as_they_were_written() {
        for source in [
            Source::Criu,
            Source::CriuFd(12),
            Source::Receiver,
            Source::Event(3),
            Source::Closed(4),
            Source::Space(i32::MAX),
            Source::Piece(1),
            Source::Filled(2),
        ] {
            let message = [1, u64::MAX, 1 << 40, 4];
            let entry = Entry { source, message };
            assert_eq!(Entry::parse(&entry.to_bytes()).unwrap(), entry);
        }
        Entry::parse(&[0; ENTRY_BYTES]).unwrap_err();
    }

    #[test]
    fn holdings_are_the_open_userfaultfds_and_the_root() {
        let journal = journal();
        let own = ProcessId::find(std::process::id().cast_signed()).unwrap();
        let pid = u64::from(own.pid.cast_unsigned());
        let entry = |source, message| Entry { source, message };
        for entry in [
            Entry::from_criu(CriuReport::Process(3)),
            entry(Source::CriuFd(3), [0, 0, 5, 0]),
            Entry::from_criu(CriuReport::Exited),
            entry(Source::Receiver, [START, pid, own.start_time(), 0]),
            event(FORK),
            event(UNMAP),
            entry(Source::Closed(5), [0; 4]),
            entry(Source::Space(6), [3, 0, 0, 0]),
            Entry::from_criu(CriuReport::Finished),
            Entry::from_criu(CriuReport::Process(4)),
        ] {
            journal.append(entry);
        }
        let expected = Holdings {
            uffds: vec![7, 6],
            awaited: Some(4),
            root: Some(own),
        };
        assert_eq!(journal.holdings().unwrap(), expected);
        // Another process has the PID of the root.
        let other = entry(Source::Receiver, [START, pid, own.start_time() + 1, 0]);
        journal.replace([other].into_iter()).unwrap();
        assert_eq!(journal.holdings().unwrap(), Holdings::default());
    }
}
