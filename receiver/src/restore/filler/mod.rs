//! Filling the memory of processes that CRIU has restored without it, while they run.
//!
//! CRIU connects to our socket and hands over a userfaultfd for each process. Pages that somebody waits
//! for come first, then those that were written last, then all others. When everything is in its place,
//! the descriptors are closed, and nothing depends on us any more. Until then everything does: so this
//! runs as a process of its own, in a session of its own, which outlives `receive`.

use crate::file_error::{FileError, failed};
use crate::image::index::{Catalog, Pages};
use crate::restore::lazy::{Awaited, awaited};
use crate::sys::uffd::{Event, Uffd};
use crate::with_causes;
use missing::Missing;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pageferry_common::sys::fdpass;
use pageferry_common::{PAGE_SIZE, PageRange};
use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

pub(crate) mod handle;
mod missing;

/// The hidden first argument that makes `receive` fill memory: from a round, for what is restored from a
/// directory.
pub const ARG: &str = "__fill";

/// Where CRIU connects to, in the directory that it restores from.
const SOCKET: &str = "lazy-pages.socket";

/// What CRIU says when all processes are restored.
const FINISHED: i32 = 0x5253_5446;

/// Pages filled in one go, 256 KiB: as long as it takes somebody who needs another page has to wait.
const CHUNK: u64 = 64;

/// Pages that somebody gets who waits for the first of them.
const AHEAD: u64 = 8;

/// How long to wait before reading what cannot be read, or filling what there is no memory for, again.
const AGAIN: Duration = Duration::from_millis(200);

/// Why memory is not filled.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The images.
    #[error(transparent)]
    File(#[from] FileError),
    /// CRIU, or the kernel.
    #[error("cannot fill memory")]
    Io(#[from] io::Error),
    /// The images are not of a kind that can be restored ahead of memory.
    #[error("the images do not tell where the stacks are")]
    NoStacks,
}

/// Fills the memory of what CRIU restores from the directory `restored`, from the images in `round`.
/// Writes a line to standard output when CRIU may connect. Takes the [`Catalog`] of the round from standard
/// input, and begins to fill when one more byte comes from there; what is waited for is filled before.
///
/// # Errors
/// [`FillError`]: if CRIU has begun to restore by then, what it restores is of no use.
pub fn run(round: &Path, restored: &Path) -> Result<(), FillError> {
    // A terminal's hang-up is not for us. It fails for who leads a session already.
    let _ = nix::unistd::setsid();
    // Whatever else is killed for want of memory. It takes a privilege.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let dir = File::open(restored).map_err(failed("open", restored))?;
    // The path of a socket must be short.
    let socket = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    let listener = UnixListener::bind(socket)?;
    writeln!(io::stdout(), "listening")?;
    io::stdout().flush()?;
    let catalog = Catalog::read(&mut io::stdin().lock())?;
    let mut filler = Filler {
        images: awaited(round, catalog)?.ok_or(FillError::NoStacks)?,
        spaces: Vec::new(),
        turn: 0,
        buffer: vec![0; (CHUNK * PAGE_SIZE) as usize],
    };
    let (criu, _) = listener.accept()?;
    filler.fill(&criu)
}

struct Filler {
    images: BTreeMap<i32, Awaited>,
    spaces: Vec<Space>,
    /// Which of them is filled next.
    turn: usize,
    buffer: Vec<u8>,
}

/// What one process has of memory, or will have.
struct Space {
    uffd: Uffd,
    pages: Rc<Pages>,
    missing: Missing,
    /// What is to be filled next; what is missing may not be in it.
    queue: VecDeque<PageRange>,
    /// What is to be filled then.
    later: Box<dyn Iterator<Item = PageRange>>,
    /// Pages that are waited for.
    faults: Vec<u64>,
    /// The process is no more.
    gone: bool,
}

/// Who speaks to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Speaks,
    Silent,
}

impl Filler {
    fn fill(&mut self, criu: &UnixStream) -> Result<(), FillError> {
        let stdin = io::stdin();
        let (mut may_fill, mut finished) = (false, false);
        let (mut restoring, mut receiver) = (Peer::Speaks, Peer::Speaks);
        loop {
            let busy = may_fill && self.spaces.iter().any(|space| !space.missing.is_empty())
                || self.spaces.iter().any(|space| !space.faults.is_empty());
            let timeout = match busy {
                true => PollTimeout::ZERO,
                false => PollTimeout::NONE,
            };
            let mut fds = vec![
                PollFd::new(criu.as_fd(), events(restoring)),
                PollFd::new(stdin.as_fd(), events(receiver)),
            ];
            let uffds = self.spaces.iter().map(|space| space.uffd.as_fd());
            fds.extend(uffds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            match poll(&mut fds, timeout) {
                Err(nix::Error::EINTR) => continue,
                other => other.map_err(io::Error::from)?,
            };
            let ready: Vec<_> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
            let mut children = Vec::new();
            for (space, _) in self.spaces.iter_mut().zip(&ready[2..]).filter(|it| *it.1) {
                children.extend(space.take_events()?);
            }
            self.spaces.extend(children);
            if restoring == Peer::Speaks && ready[0] {
                match self.hear(criu)? {
                    Heard::Process => {}
                    Heard::Finished => (may_fill, finished) = (true, true),
                    Heard::End => restoring = Peer::Silent,
                }
            }
            if receiver == Peer::Speaks && ready[1] {
                match stdin.lock().read(&mut [0])? {
                    0 => receiver = Peer::Silent,
                    _ => may_fill = true,
                }
            }
            for space in &mut self.spaces {
                space.answer_faults(&mut self.buffer)?;
            }
            if may_fill && !self.spaces.is_empty() {
                self.turn = (self.turn + 1) % self.spaces.len();
                self.spaces[self.turn].fill_some(&mut self.buffer)?;
            }
            self.spaces.retain(|space| !space.gone);
            let over = finished || restoring == Peer::Silent;
            if over && self.spaces.iter().all(Space::is_whole) {
                return Ok(());
            }
            if restoring == Peer::Silent && !may_fill {
                // It has given up, and takes away what it had restored.
                return Ok(());
            }
        }
    }

    /// What CRIU says: the number of a process, with its userfaultfd behind, or that it is done.
    fn hear(&mut self, mut criu: &UnixStream) -> Result<Heard, FillError> {
        let mut word = [0; 4];
        match criu.read(&mut word[..1])? {
            0 => return Ok(Heard::End),
            _ => criu.read_exact(&mut word[1..])?,
        }
        let pid = match i32::from_le_bytes(word) {
            FINISHED => return Ok(Heard::Finished),
            // One that had ended, and has no memory.
            ..=0 => return Ok(Heard::Process),
            pid => pid,
        };
        let received = fdpass::receive(criu.as_fd(), &mut [0])?;
        let fd = received.and_then(|(_, fd)| fd);
        let fd = fd.ok_or_else(|| io::Error::other("CRIU sends no userfaultfd"))?;
        let Some(awaited) = self.images.get(&pid) else {
            let what = format!("CRIU restores process {pid}, which has no image");
            return Err(io::Error::other(what).into());
        };
        self.spaces.push(Space {
            uffd: Uffd::ready(fd),
            pages: Rc::clone(&awaited.pages),
            missing: Missing::new(&awaited.missing),
            queue: VecDeque::new(),
            later: Box::new(Rc::clone(&awaited.pages).by_age()),
            faults: Vec::new(),
            gone: false,
        });
        Ok(Heard::Process)
    }
}

fn events(peer: Peer) -> PollFlags {
    match peer {
        Peer::Speaks => PollFlags::POLLIN,
        Peer::Silent => PollFlags::empty(),
    }
}

enum Heard {
    Process,
    Finished,
    End,
}

impl Space {
    fn is_whole(&self) -> bool {
        self.gone || self.missing.is_empty()
    }

    /// Takes what has happened; children that it has got.
    fn take_events(&mut self) -> Result<Vec<Space>, FillError> {
        let mut children = Vec::new();
        for event in self.uffd.events()? {
            match event {
                Event::Fault(address) => self.faults.push(address),
                Event::Fork(uffd) => children.push(Space {
                    uffd,
                    pages: Rc::clone(&self.pages),
                    missing: self.missing.clone(),
                    queue: VecDeque::new(),
                    later: Box::new(std::iter::empty()),
                    faults: Vec::new(),
                    gone: false,
                }),
                Event::Remap { from, to, len } => {
                    let range = |start| PageRange::from_bounds(start, start.checked_add(len)?);
                    if let (Some(from), Some(to)) = (range(from), range(to)) {
                        self.missing.remap(from, to);
                    }
                }
                Event::Gone { start, end } => {
                    if let Some(range) = PageRange::from_bounds(start, end) {
                        self.missing.remove(range);
                    }
                }
            }
        }
        Ok(children)
    }

    /// Gives those who wait what they wait for.
    fn answer_faults(&mut self, buffer: &mut [u8]) -> Result<(), FillError> {
        for address in std::mem::take(&mut self.faults) {
            let page = PageRange::new(address, 1).map_err(io::Error::other)?;
            let ahead = PageRange::new(address, AHEAD).unwrap_or(page);
            match self.missing.first_in(ahead) {
                Some((found, image)) if found.start() == address => {
                    if self.put(found, image, buffer)? {
                        // Where somebody is, he will soon need more.
                        if let Ok(next) = PageRange::new(found.end(), CHUNK) {
                            self.queue.push_front(next);
                        }
                    } else {
                        self.faults.push(address);
                    }
                }
                // Nothing was ever there, or it was given back.
                _ => match self.uffd.zero(page) {
                    Ok(()) => {}
                    Err(error) => match error.raw_os_error() {
                        Some(libc::EEXIST) => self.uffd.wake(page)?,
                        Some(libc::EAGAIN) => self.faults.push(address),
                        Some(libc::ENOENT) => {}
                        Some(libc::ENOMEM) => {
                            self.faults.push(address);
                            std::thread::sleep(AGAIN);
                        }
                        Some(libc::ESRCH) => self.gone = true,
                        _ => return Err(error.into()),
                    },
                },
            }
        }
        Ok(())
    }

    /// Fills what is to be filled next.
    fn fill_some(&mut self, buffer: &mut [u8]) -> Result<(), FillError> {
        if self.is_whole() {
            return Ok(());
        }
        let next = self.queue.pop_front().or_else(|| self.later.next());
        let Some(range) = next else {
            // What has been moved, or is a child's.
            self.queue.extend(self.missing.iter());
            return Ok(());
        };
        let Some((found, image)) = self.missing.first_in(range) else {
            return Ok(());
        };
        let (now, _) = found.split_at(CHUNK);
        let now = now.expect("a range is not empty");
        let rest = match self.put(now, image, buffer)? {
            true => now.end(),
            false => range.start(),
        };
        if let Some(rest) = PageRange::from_bounds(rest, range.end()) {
            self.queue.push_front(rest);
        }
        Ok(())
    }

    /// Puts pages in their place, of which the first is at `image` in the images. Returns whether the
    /// first is done; if not, there are events to be taken first.
    fn put(&mut self, range: PageRange, image: u64, buffer: &mut [u8]) -> Result<bool, FillError> {
        let buffer = &mut buffer[..range.bytes() as usize];
        let len = match self.pages.read(image, buffer) {
            Ok(pages) => pages * PAGE_SIZE,
            // Better to have the process wait than to give it anything else.
            Err(error) => {
                complain(&error);
                std::thread::sleep(AGAIN);
                return Ok(false);
            }
        };
        let mut done = 0;
        let mut step = len;
        while done < len {
            let part = &buffer[done as usize..(done + step.min(len - done)) as usize];
            let (copied, result) = self.uffd.copy(range.start() + done, part);
            done += copied;
            match result.as_ref().map_err(io::Error::raw_os_error) {
                Ok(()) => {}
                // It is there: CRIU has put it there, or somebody was faster than his event.
                Err(Some(libc::EEXIST)) => {
                    let page = PageRange::new(range.start() + done, 1).map_err(io::Error::other)?;
                    self.uffd.wake(page)?;
                    done += PAGE_SIZE;
                }
                // Across two mappings, or where none is any more.
                Err(Some(libc::ENOENT)) if part.len() as u64 > PAGE_SIZE => step = PAGE_SIZE,
                Err(Some(libc::ENOENT)) => done += PAGE_SIZE,
                Err(Some(libc::EAGAIN)) => break,
                Err(Some(libc::ENOMEM)) => {
                    std::thread::sleep(AGAIN);
                    break;
                }
                Err(Some(libc::ESRCH | libc::ENOSPC)) => {
                    self.gone = true;
                    return Ok(true);
                }
                Err(_) => return Err(result.unwrap_err().into()),
            }
        }
        let filled = PageRange::from_bounds(range.start(), range.start() + done);
        filled
            .into_iter()
            .for_each(|range| self.missing.remove(range));
        Ok(filled.is_some())
    }
}

/// On standard error, if anybody still reads it.
fn complain(error: &dyn std::error::Error) {
    let _ = writeln!(io::stderr(), "receive: {}", with_causes(error));
}

/// Runs [`run`] as a process of its own does.
#[must_use]
pub fn main(round: &Path, restored: &Path) -> ExitCode {
    match run(round, restored) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}
