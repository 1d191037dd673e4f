//! Filler process: fills the memory of processes that CRIU has restored without it, while they run.
//!
//! CRIU connects to a socket of the filler process and hands over a userfaultfd for each restored process.
//! Pages that a process has faulted on are filled first, then those that were written last, then all others.
//! When all memory is filled, the descriptors are closed, and nothing depends on the filler process any more.
//! Until then the restored processes need it. So it is a process of its own, in a session of its own, and
//! outlives the receiver; and it is one of a [`group`] that holds the descriptors, so that another filler
//! process takes over if it dies, with what its [`journal`] has. If that is impossible, the restored
//! processes are killed, and the descriptors are held until they are gone.

use crate::file_error::{FileError, failed};
use crate::image::catalog::Catalog;
use crate::restore::copy::kill_copy;
use crate::restore::lazy::pending_pages;
use crate::sys::shared;
use crate::sys::uffd::Uffd;
use crate::with_causes;
use filling::Filler;
use group::{Group, Peer};
use journal::Received;
use pageferry_common::cli::start_log;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

mod address_space;
mod filling;
mod group;
pub(crate) mod handle;
mod journal;
mod missing;

/// Hidden first argument of `receive` that makes it a filler process. Two more follow: the round that has the
/// pages, and the directory that CRIU restores from.
pub const ARG: &str = "__fill";

/// Name of the socket that CRIU connects to, in the directory that it restores from.
const SOCKET: &str = "lazy-pages.socket";

/// Byte to the receiver: CRIU can connect.
const LISTENING: u8 = b'L';
/// Byte to the receiver: several processes hold what the restored processes depend on.
const READY: u8 = b'R';
/// Byte to the receiver: all memory is filled.
const DONE: u8 = b'D';

/// Length of a message from the receiver: three words.
const RECEIVER_MESSAGE_BYTES: usize = 24;

/// Most pages filled at once, 256 KiB: a fault on another page waits that long.
const CHUNK: u64 = 64;

/// Most filler processes that take over from one another. One that dies of what it does would do so for ever.
const MAX_FILLERS: u64 = 100;

/// Delay before reading again what could not be read, or filling again what there was no memory for.
const RETRY_DELAY: Duration = Duration::from_millis(200);

/// Interval of checks whether killed processes are gone, ms.
const GONE_POLL_MS: u16 = 50;

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
    /// Filler processes have died again and again.
    #[error("too many filler processes have died")]
    TooManyDeaths,
    /// The filler process panicked.
    #[error("the filler process panicked")]
    Panicked,
}

/// Returns whether this kernel can tell a process of the death of another (Linux 5.3).
#[must_use]
pub fn is_supported() -> bool {
    shared::own_pidfd().map(shared::close).is_ok()
}

/// Runs the filler process to its exit code.
#[must_use]
pub fn main(round: &Path, restored: &Path) -> ExitCode {
    start_log(0, || Lossy(io::stderr()));
    match listen(round, restored) {
        Ok(group) => ExitCode::from(fill(group) as u8),
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

/// Standard error, of which it does not matter whether it is still open.
struct Lossy(io::Stderr);

impl Write for Lossy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes an error to standard error, if that is still open.
fn report(error: &dyn std::error::Error) {
    let _ = writeln!(io::stderr(), "receive: {}", with_causes(error));
}

/// Waits for CRIU, which restores from the directory `restored`, to connect, and makes this process the
/// filler of a group.
///
/// Writes [`LISTENING`] to standard output, a socket that leads to the receiver, when CRIU can connect.
fn listen(round: &Path, restored: &Path) -> Result<&'static Group, FillError> {
    group::set_session();
    // The last processes to be killed when memory runs out. This needs a privilege.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let dir = File::open(restored).map_err(failed("open", restored))?;
    // By descriptor: the path of a socket has at most 107 bytes.
    let socket = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    let listener = UnixListener::bind(socket)?;
    let mut receiver = UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
    receiver.write_all(&[LISTENING])?;
    let (criu, _) = listener.accept()?;
    Ok(Group::start(criu, receiver, round.to_owned())?)
}

/// Fills all memory, from where an earlier filler process of the group has died, or kills what cannot be
/// filled. Returns the exit code.
fn fill(group: &'static Group) -> i32 {
    if group.is_over() {
        return 0;
    }
    let number = group.begin_filling();
    // The keepers run: from now on nothing is lost with this process. The receiver may be dead.
    let _ = (&group.receiver).write_all(&[READY]);
    let filled = catch_unwind(AssertUnwindSafe(|| try_fill(group, number)));
    let filled = filled.unwrap_or(Err(FillError::Panicked));
    let code = match filled {
        Ok(Filled::All) => {
            let _ = (&group.receiver).write_all(&[DONE]);
            0
        }
        Ok(Filled::Cancelled) => {
            end_copy(group);
            1
        }
        Err(error) => {
            tracing::error!(
                event = "filler_failed",
                error = with_causes(&error),
                "memory cannot be filled: killing the restored process"
            );
            end_copy(group);
            1
        }
    };
    group.end();
    // At once, and not when the last keeper exits: the kernel makes a process wait that changes its mappings.
    let holdings = group.journal.holdings().unwrap_or_default();
    holdings
        .uffds
        .into_iter()
        .for_each(|fd| Uffd::held(fd).close());
    code
}

/// How filling ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filled {
    /// All memory is filled, or CRIU has given up.
    All,
    /// The receiver has cancelled it.
    Cancelled,
}

/// Fills all memory. `number` counts the filler processes of the group, from 1.
fn try_fill(group: &'static Group, number: u64) -> Result<Filled, FillError> {
    if number > MAX_FILLERS {
        return Err(FillError::TooManyDeaths);
    }
    let catalog = match number {
        // From the receiver: reading it from the images takes longer.
        1 => Catalog::read(&mut io::stdin().lock())?,
        _ => {
            tracing::warn!(
                event = "filler_replaced",
                number,
                "the filler process died: another one takes over"
            );
            // The receiver may still be writing it.
            io::copy(&mut io::stdin().lock(), &mut io::sink())?;
            group.close_images()?;
            Catalog::load(&group.round)?
        }
    };
    let images = pending_pages(&group.round, catalog)?.ok_or(FillError::NoStacks)?;
    let mut filler = Filler::new(group, images);
    for entry in group.journal.recover()? {
        filler.apply(&entry)?;
    }
    if number > 1 {
        filler.wake_all();
    }
    filler.fill()
}

/// Kills the restored tree, and holds its userfaultfds until nothing is left that could read zeros. What is
/// not a descendant of its root any more waits when it touches a missing page.
fn end_copy(group: &Group) {
    let (mut criu, mut receiver) = (Peer::Open, Peer::Open);
    while let Err(error) = try_end_copy(group, &mut criu, &mut receiver) {
        report(&error);
        sleep(RETRY_DELAY);
    }
}

fn try_end_copy(group: &Group, criu: &mut Peer, receiver: &mut Peer) -> io::Result<()> {
    loop {
        let holdings = group.journal.holdings()?;
        if let Some(root) = holdings.root {
            kill_copy(root, &mut Vec::new());
        }
        let lives = |&fd: &RawFd| Uffd::held(fd).is_alive();
        if *criu == Peer::Closed && !holdings.uffds.iter().any(lives) {
            return Ok(());
        }
        // CRIU may still send userfaultfds, and the receiver the root.
        let Some(ready) = group.poll(*criu, *receiver, std::iter::empty(), GONE_POLL_MS.into())?
        else {
            continue;
        };
        if ready.criu && group.receive_from_criu(holdings.awaited)? == Received::End {
            *criu = Peer::Closed;
        }
        if ready.receiver && group.receive_from_receiver()? == Received::End {
            *receiver = Peer::Closed;
        }
    }
}
