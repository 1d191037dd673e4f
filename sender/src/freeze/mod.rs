//! Freezes a process tree, and thaws it even if the sender dies.
//!
//! The tracer is a separate process, the *freezer*: the `send` program started again with a hidden argument.
//! When the sender dies, at any instant, the socket between the two closes, and the freezer restores the
//! registers of every thread and thaws the tree. If the sender itself were the tracer, a SIGKILL between
//! "registers changed" and "registers restored" would crash the target. If the freezer dies, the kernel
//! detaches its tracees, and they run.

pub mod freezer;
mod inject;
mod paused;
pub mod procs;
mod stops;

pub use paused::check_not_paused;
pub use procs::{
    TreeError, are_trace_stopped, check_signal_permission, has_live_thread, process_list,
};

use crate::sys::signals;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pageferry_common::sys::{fdpass, pidfd};
use pageferry_common::{PAGE_SIZE, PageRange};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Hidden first argument of `send` that starts the freezer instead of the sender.
pub const FREEZER_ARG: &str = "__freezer";

/// Maximum length of a message between sender and freezer, in bytes.
const MESSAGE_MAX: usize = 4096;

/// Maximum time for the freezer to reply. Longer than its own deadlines, at which it undoes what it has done: it
/// is exceeded only if the kernel does not let it run.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

/// Maximum time for the freezer to exit. It restores the target first.
const EXIT_TIMEOUT: Duration = Duration::from_secs(8);

/// How often the sender checks for signals while it waits for the freezer.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What to do with the tree when it is thawed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Then {
    /// Let it run.
    Run,
    /// Leave it stopped by the SIGSTOP that [`Frozen::sigstop`] sent; SIGCONT resumes it.
    Stop,
    /// Kill it with SIGKILL.
    Kill,
}

/// One process of a frozen tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenProcess {
    /// PID, in the PID namespace of this program.
    pub pid: i32,
    /// TID of a live thread; not always the leader, which may have exited before the other threads.
    pub tid: i32,
}

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// Freeze the tree under this PID.
    Freeze { root: i32 },
    /// Send SIGSTOP to the frozen tree, so that it stays stopped when it is thawed.
    Sigstop,
    /// Create a userfaultfd in this frozen process, and send it to the sender.
    Userfaultfd { pid: i32 },
    /// Read memory of this frozen process to the attached file.
    Read { pid: i32, start: u64, pages: u64 },
    /// Thaw the tree.
    Thaw { then: Then },
}

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    /// One process of the frozen tree; more replies follow.
    Process(FrozenProcess),
    /// The tree is frozen, and all its processes have been listed.
    Frozen,
    /// The tree is stopped by SIGSTOP.
    Sigstopped,
    /// A userfaultfd was created; it is attached to this message.
    Userfaultfd,
    /// The process cannot have a userfaultfd, for this reason.
    NoUserfaultfd(String),
    /// Number of bytes read; 0 if the first page cannot be read.
    Read { bytes: usize },
    /// The tree was thawed, after it was frozen for this many nanoseconds.
    Thawed { stopped_ns: u64 },
    /// The tree could not be stopped; it runs.
    Failed(TreeError),
}

/// Why a tree could not be frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The tree cannot be stopped; it runs.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The freezer process failed; the kernel has detached the tree, which runs.
    #[error("the freezer process failed")]
    Freezer(#[source] io::Error),
    /// The sender received SIGINT or SIGTERM.
    #[error("interrupted")]
    Interrupted,
}

/// Handle of the freezer process.
#[derive(Debug)]
pub struct Freezer {
    /// `None` only while the handle is being dropped.
    socket: Option<OwnedFd>,
    child: Child,
}

impl Freezer {
    /// Starts the freezer process. `program` is the path of the `send` program.
    ///
    /// # Errors
    /// [`FreezeError::Freezer`].
    pub fn start(program: &Path) -> Result<Self, FreezeError> {
        let start = || {
            let (ours, theirs) = fdpass::pair()?;
            let child = Command::new(program)
                .arg(FREEZER_ARG)
                .stdin(Stdio::from(theirs))
                .stdout(Stdio::null())
                .spawn()?;
            Ok(Self {
                socket: Some(ours),
                child,
            })
        };
        start().map_err(FreezeError::Freezer)
    }

    /// Stops every thread of every process in the tree under `root`. The tree stays frozen until the guard is
    /// thawed or dropped, or the sender dies.
    ///
    /// # Errors
    /// [`FreezeError`]; the tree runs then.
    pub fn freeze(&mut self, root: i32) -> Result<Frozen<'_>, FreezeError> {
        check_not_paused(root)?;
        self.send(&Request::Freeze { root }, None)?;
        let mut processes = Vec::new();
        loop {
            match self.recv()?.0 {
                Reply::Process(process) => processes.push(process),
                Reply::Frozen => break,
                Reply::Failed(why) => return Err(why.into()),
                other => return Err(unexpected(&other)),
            }
        }
        Ok(Frozen {
            freezer: self,
            processes,
            thawed: false,
        })
    }

    fn send(&self, request: &Request, fd: Option<BorrowedFd<'_>>) -> Result<(), FreezeError> {
        let bytes = serde_json::to_vec(request).expect("requests have string keys only");
        fdpass::send(self.socket(), &bytes, fd).map_err(FreezeError::Freezer)
    }

    fn recv(&self) -> Result<(Reply, Option<OwnedFd>), FreezeError> {
        let deadline = Instant::now() + REPLY_TIMEOUT;
        while !is_readable(self.socket(), POLL_INTERVAL).map_err(FreezeError::Freezer)? {
            if signals::is_interrupted() {
                return Err(FreezeError::Interrupted);
            }
            if Instant::now() > deadline {
                return Err(FreezeError::Freezer(io::ErrorKind::TimedOut.into()));
            }
        }
        let mut buffer = [0; MESSAGE_MAX];
        let mut recv = || {
            let (len, fd) = fdpass::recv(self.socket(), &mut buffer)?
                .ok_or_else(|| io::Error::other("it exited"))?;
            Ok((serde_json::from_slice(&buffer[..len])?, fd))
        };
        recv().map_err(FreezeError::Freezer)
    }

    fn socket(&self) -> BorrowedFd<'_> {
        self.socket
            .as_ref()
            .expect("the socket is only taken while being dropped")
            .as_fd()
    }
}

fn unexpected(reply: &Reply) -> FreezeError {
    FreezeError::Freezer(io::Error::other(format!("unexpected reply {reply:?}")))
}

impl Drop for Freezer {
    fn drop(&mut self) {
        drop(self.socket.take());
        // The freezer exits when the socket closes. If it does not, the kernel does not let it run: it must not
        // outlive the sender.
        let pidfd = pidfd::open(self.child.id().cast_signed());
        if !pidfd.is_ok_and(|exit| is_readable(exit.as_fd(), EXIT_TIMEOUT).is_ok_and(|it| it)) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

/// Waits for at most `timeout` until a descriptor is readable. Returns whether it is.
fn is_readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(timeout).expect("it is short");
    match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
        Ok(ready) => Ok(ready > 0),
        Err(nix::Error::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Proof that the tree is frozen. Thawing it takes this guard.
#[derive(Debug)]
#[must_use = "dropping it thaws the tree"]
pub struct Frozen<'a> {
    freezer: &'a mut Freezer,
    processes: Vec<FrozenProcess>,
    thawed: bool,
}

impl Frozen<'_> {
    /// Returns the processes of the tree, the root first. Leaves out zombies, which have no memory, and
    /// children between vfork and exec, which borrow that of their parent.
    #[must_use]
    pub fn processes(&self) -> &[FrozenProcess] {
        &self.processes
    }

    /// Sends SIGSTOP to the tree, for [`Then::Stop`]. Must be called before its memory is read: the kernel
    /// delivers pending signals on the way into the stop, which writes to the stacks.
    ///
    /// # Errors
    /// [`FreezeError`]; the tree runs then.
    pub fn sigstop(&mut self) -> Result<(), FreezeError> {
        self.freezer.send(&Request::Sigstop, None)?;
        match self.freezer.recv()?.0 {
            Reply::Sigstopped => Ok(()),
            Reply::Failed(why) => Err(why.into()),
            other => Err(unexpected(&other)),
        }
    }

    /// Returns a userfaultfd for the memory of `pid`. The process creates it itself, and keeps no descriptor.
    ///
    /// # Errors
    /// The inner error is the reason why this process cannot have a userfaultfd; the outer error is a failure
    /// of the freezer.
    pub fn userfaultfd(&mut self, pid: i32) -> Result<Result<OwnedFd, String>, FreezeError> {
        self.freezer.send(&Request::Userfaultfd { pid }, None)?;
        match self.freezer.recv()? {
            (Reply::Userfaultfd, Some(fd)) => Ok(Ok(fd)),
            (Reply::NoUserfaultfd(why), None) => Ok(Err(why)),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Reads a prefix of `range` of the memory of `pid` in the freezer process, which may read more than this
    /// program: some kernels let only the tracer read memory that the process itself may not
    /// (`CONFIG_PROC_MEM_FORCE_PTRACE`). Returns the length of the prefix in bytes, 0 if no process can read
    /// the first page.
    ///
    /// # Errors
    /// [`FreezeError::Freezer`].
    pub fn read(
        &mut self,
        pid: i32,
        range: PageRange,
        buffer: &mut [u8],
    ) -> Result<usize, FreezeError> {
        let failed = FreezeError::Freezer;
        let file = memfd_create("pageferry-read", MFdFlags::MFD_CLOEXEC);
        let file = File::from(file.map_err(|error| failed(error.into()))?);
        let pages = range.pages().min(buffer.len() as u64 / PAGE_SIZE);
        let start = range.start();
        let request = Request::Read { pid, start, pages };
        self.freezer.send(&request, Some(file.as_fd()))?;
        match self.freezer.recv()?.0 {
            Reply::Read { bytes } if bytes as u64 <= pages * PAGE_SIZE => {
                let read = file.read_exact_at(&mut buffer[..bytes], 0);
                read.map_err(failed)?;
                Ok(bytes)
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Thaws the tree. Returns how long it was frozen.
    ///
    /// # Errors
    /// [`FreezeError::Freezer`]; the kernel has detached the tree then, and it runs.
    pub fn thaw(mut self, then: Then) -> Result<Duration, FreezeError> {
        self.release(then)
    }

    fn release(&mut self, then: Then) -> Result<Duration, FreezeError> {
        self.thawed = true;
        self.freezer.send(&Request::Thaw { then }, None)?;
        match self.freezer.recv()?.0 {
            Reply::Thawed { stopped_ns } => Ok(Duration::from_nanos(stopped_ns)),
            other => Err(unexpected(&other)),
        }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if !self.thawed {
            // If even this fails, the freezer is dead and the kernel has detached the tree.
            let _ = self.release(Then::Run);
        }
    }
}
