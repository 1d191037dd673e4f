//! Filler process: fills the memory of processes that CRIU has restored without it, while they run.
//!
//! CRIU connects to a socket of the filler process and hands over a userfaultfd for each restored process.
//! Pages that a process has faulted on are filled first, then those that were written last, then all others.
//! When all memory is filled, the descriptors are closed, and nothing depends on the filler process any more.
//! Until then the restored processes need it. So it is a process of its own, in a session of its own, and
//! outlives the receiver.

use crate::file_error::{FileError, failed};
use crate::image::catalog::Catalog;
use crate::restore::lazy::{PendingPages, pending_pages};
use crate::sys::uffd::Uffd;
use crate::with_causes;
use address_space::AddressSpace;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pageferry_common::PAGE_SIZE;
use pageferry_common::sys::fdpass;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

mod address_space;
pub(crate) mod handle;
mod missing;

/// Hidden first argument of `receive` that makes it a filler process. Two more follow: the round that has the
/// pages, and the directory that CRIU restores from.
pub const ARG: &str = "__fill";

/// Name of the socket that CRIU connects to, in the directory that it restores from.
const SOCKET: &str = "lazy-pages.socket";

/// CRIU's message that all processes are restored.
const FINISHED: i32 = 0x5253_5446;

/// Most pages filled at once, 256 KiB: a fault on another page waits that long.
const CHUNK: u64 = 64;

/// Delay before reading again what could not be read, or filling again what there was no memory for.
const RETRY_DELAY: Duration = Duration::from_millis(200);

/// Reason why memory cannot be filled.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The images cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// CRIU or the kernel failed.
    #[error("cannot fill memory")]
    Io(#[from] io::Error),
    /// The images are of a kind that cannot be restored lazily.
    #[error("cannot find the stacks in CRIU's images")]
    NoStacks,
}

/// Runs the filler process to its exit code.
#[must_use]
pub fn main(round: &Path, restored: &Path) -> ExitCode {
    match run(round, restored) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

/// Writes an error to standard error, if that is still open.
fn report(error: &dyn std::error::Error) {
    let _ = writeln!(io::stderr(), "receive: {}", with_causes(error));
}

/// Fills the memory of what CRIU restores from the directory `restored`, from the images in `round`.
///
/// Writes a line to standard output when CRIU can connect. Reads the [`Catalog`] of the round from standard
/// input. One more byte there lets it fill all pages; before, it fills only those that a process has faulted
/// on.
///
/// # Errors
/// [`FillError`]: what CRIU restores is then useless.
fn run(round: &Path, restored: &Path) -> Result<(), FillError> {
    // A hang-up of the terminal must not end it. This fails in a session leader, which does not need it.
    let _ = nix::unistd::setsid();
    // The last process to be killed when memory runs out. This needs a privilege.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let dir = File::open(restored).map_err(failed("open", restored))?;
    // By descriptor: the path of a socket has at most 107 bytes.
    let socket = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    let listener = UnixListener::bind(socket)?;
    writeln!(io::stdout(), "listening")?;
    io::stdout().flush()?;
    let catalog = Catalog::read(&mut io::stdin().lock())?;
    let images = pending_pages(round, catalog)?.ok_or(FillError::NoStacks)?;
    let (criu, _) = listener.accept()?;
    Filler::new(images, &criu).fill()
}

/// State of the filler process.
struct Filler<'a> {
    images: BTreeMap<i32, PendingPages>,
    criu: &'a UnixStream,
    /// State of the connection to CRIU.
    restoring: Peer,
    /// State of the pipe from the receiver.
    receiver: Peer,
    /// Whether pages may be filled that no process has faulted on.
    may_fill: bool,
    /// Whether CRIU has reported that all processes are restored.
    finished: bool,
    spaces: Vec<AddressSpace>,
    /// Index of the address space that was filled last.
    turn: usize,
    buffer: Vec<u8>,
}

/// State of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Open,
    Closed,
}

impl Peer {
    /// Events to poll for.
    fn events(self) -> PollFlags {
        match self {
            Self::Open => PollFlags::POLLIN,
            Self::Closed => PollFlags::empty(),
        }
    }
}

/// Descriptors that are ready.
struct Ready {
    criu: bool,
    stdin: bool,
    /// One for each address space.
    spaces: Vec<bool>,
}

impl<'a> Filler<'a> {
    fn new(images: BTreeMap<i32, PendingPages>, criu: &'a UnixStream) -> Self {
        Self {
            images,
            criu,
            restoring: Peer::Open,
            receiver: Peer::Open,
            may_fill: false,
            finished: false,
            spaces: Vec::new(),
            turn: 0,
            buffer: vec![0; (CHUNK * PAGE_SIZE) as usize],
        }
    }

    /// Fills until all memory is complete, or CRIU gives up.
    fn fill(&mut self) -> Result<(), FillError> {
        while !self.is_over() {
            let Some(ready) = self.poll()? else {
                continue;
            };
            self.take_events(&ready.spaces)?;
            if self.restoring == Peer::Open && ready.criu {
                self.read_from_criu()?;
            }
            if self.receiver == Peer::Open && ready.stdin {
                match io::stdin().lock().read(&mut [0])? {
                    0 => self.receiver = Peer::Closed,
                    _ => self.may_fill = true,
                }
            }
            for space in &mut self.spaces {
                space.resolve_faults(&mut self.buffer)?;
            }
            if self.may_fill && !self.spaces.is_empty() {
                self.turn = (self.turn + 1) % self.spaces.len();
                self.spaces[self.turn].fill_some(&mut self.buffer)?;
            }
            self.spaces.retain(|space| !space.is_gone());
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        let closed = self.restoring == Peer::Closed;
        let restored = self.finished || closed;
        // If CRIU closes before anything may be filled, it has given up, and undoes what it has restored.
        restored && self.spaces.iter().all(AddressSpace::is_complete) || closed && !self.may_fill
    }

    /// Waits until there is something to do. Returns `None` if that was interrupted by a signal.
    fn poll(&self) -> io::Result<Option<Ready>> {
        let has_work =
            |space: &AddressSpace| space.has_faults() || self.may_fill && !space.is_complete();
        let timeout = match self.spaces.iter().any(has_work) {
            true => PollTimeout::ZERO,
            false => PollTimeout::NONE,
        };
        let stdin = io::stdin();
        let mut fds = vec![
            PollFd::new(self.criu.as_fd(), self.restoring.events()),
            PollFd::new(stdin.as_fd(), self.receiver.events()),
        ];
        let uffds = self.spaces.iter().map(AsFd::as_fd);
        fds.extend(uffds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Err(nix::Error::EINTR) => return Ok(None),
            other => other?,
        };
        let is_ready = |fd: &PollFd<'_>| fd.any() == Some(true);
        Ok(Some(Ready {
            criu: is_ready(&fds[0]),
            stdin: is_ready(&fds[1]),
            spaces: fds[2..].iter().map(is_ready).collect(),
        }))
    }

    /// Takes the events of all address spaces that have some, and adds those of forked children.
    fn take_events(&mut self, ready: &[bool]) -> Result<(), FillError> {
        let mut children = Vec::new();
        for (space, _) in self.spaces.iter_mut().zip(ready).filter(|it| *it.1) {
            children.extend(space.take_events()?);
        }
        self.spaces.extend(children);
        Ok(())
    }

    /// Reads one message of CRIU's: the PID of a process, which its userfaultfd follows, or that all are
    /// restored.
    fn read_from_criu(&mut self) -> Result<(), FillError> {
        let mut criu = self.criu;
        let mut word = [0; 4];
        if criu.read(&mut word[..1])? == 0 {
            self.restoring = Peer::Closed;
            return Ok(());
        }
        criu.read_exact(&mut word[1..])?;
        let pid = match i32::from_le_bytes(word) {
            FINISHED => {
                (self.may_fill, self.finished) = (true, true);
                return Ok(());
            }
            // A process that had exited, and has no memory.
            ..=0 => return Ok(()),
            pid => pid,
        };
        let received = fdpass::recv(criu.as_fd(), &mut [0])?;
        let fd = received.and_then(|(_, fd)| fd);
        let fd = fd.ok_or_else(|| io::Error::other("CRIU sent no userfaultfd"))?;
        let Some(pending) = self.images.get(&pid) else {
            let what = format!("CRIU restores process {pid}, which has no image");
            return Err(io::Error::other(what).into());
        };
        self.spaces
            .push(AddressSpace::new(Uffd::after_handshake(fd), pending));
        Ok(())
    }
}
