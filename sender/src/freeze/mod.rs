//! Stopping a process tree, and letting it go again whatever happens.
//!
//! The tracer is a process of its own, the *freezer*: this program started once more with a hidden
//! argument. Whatever kills the sender, at any instant, closes the socket between the two, and the
//! freezer gives every thread its registers back and lets the tree run. Were the sender itself the
//! tracer, a SIGKILL between "registers changed" and "registers restored" would crash the target.
//! If the freezer dies, the kernel detaches its tracees, and they run.

pub mod freezer;
mod inject;
mod procs;

pub use procs::{TreeError, are_held, children, may_signal, process_list, threads};

use pageferry_common::sys::fdpass;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The hidden first argument that makes `send` a freezer.
pub const FREEZER_ARG: &str = "__freezer";

/// Longest message between sender and freezer, bytes.
const MESSAGE_MAX: usize = 4096;

/// What happens to the tree when it is let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Then {
    /// It runs on.
    Run,
    /// It stays stopped by the SIGSTOP that [`Frozen::settle`] gave it; SIGCONT lets it go on.
    Stop,
    /// It is killed (SIGKILL).
    Kill,
}

/// One process of a frozen tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenProcess {
    /// Its PID, as this program's PID namespace counts.
    pub pid: i32,
    /// A live thread of it: its leader may have exited before the rest.
    pub tid: i32,
}

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// Stop the whole tree under this PID.
    Freeze { root: i32 },
    /// Put the (stopped) tree under SIGSTOP, so that it stays stopped when it is let go.
    Settle,
    /// Make a userfaultfd in this (stopped) process and hand it over.
    Userfaultfd { pid: i32 },
    /// Let everything go.
    Thaw { then: Then },
}

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    /// One process of the tree; more follow.
    Process(FrozenProcess),
    /// That was all; the tree is stopped.
    Frozen,
    /// The tree is under SIGSTOP.
    Settled,
    /// The descriptor is attached.
    Userfaultfd,
    /// There is none to be had, and why.
    NoUserfaultfd(String),
    /// The tree was let go, after this many nanoseconds.
    Thawed { stopped_ns: u64 },
    /// The tree could not be stopped; it runs.
    Failed(TreeError),
}

/// Why a tree could not be frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// About the tree; it runs.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// About the freezer process. The kernel lets the tree run.
    #[error("the freezer process failed")]
    Freezer(#[source] io::Error),
}

/// The sender's handle on the freezer process.
#[derive(Debug)]
pub struct Freezer {
    /// `None` only while being dropped.
    socket: Option<OwnedFd>,
    child: Child,
}

impl Freezer {
    /// Starts the freezer process: `program` is `send`, wherever it is.
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

    /// Stops every thread of every process of the tree under `root`. It stays stopped until the
    /// guard is thawed or dropped, or this program dies.
    ///
    /// # Errors
    /// [`FreezeError`]; the tree runs then.
    pub fn freeze(&mut self, root: i32) -> Result<Frozen<'_>, FreezeError> {
        self.say(&Request::Freeze { root })?;
        let mut processes = Vec::new();
        loop {
            match self.hear()?.0 {
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

    fn say(&self, request: &Request) -> Result<(), FreezeError> {
        let bytes = serde_json::to_vec(request).expect("requests have string keys only");
        fdpass::send(self.socket(), &bytes, None).map_err(FreezeError::Freezer)
    }

    fn hear(&self) -> Result<(Reply, Option<OwnedFd>), FreezeError> {
        let mut buffer = [0; MESSAGE_MAX];
        let mut hear = || {
            let (len, fd) = fdpass::receive(self.socket(), &mut buffer)?
                .ok_or_else(|| io::Error::other("it died"))?;
            Ok((serde_json::from_slice(&buffer[..len])?, fd))
        };
        hear().map_err(FreezeError::Freezer)
    }

    fn socket(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket
            .as_ref()
            .expect("the socket is only taken while being dropped")
            .as_fd()
    }
}

fn unexpected(reply: &Reply) -> FreezeError {
    FreezeError::Freezer(io::Error::other(format!("it said {reply:?}")))
}

impl Drop for Freezer {
    fn drop(&mut self) {
        drop(self.socket.take());
        // It ends by itself when the socket closes; reaping it is all there is left to do.
        let _ = self.child.wait();
    }
}

/// Proof that the tree is stopped, and the one way to let it go.
#[derive(Debug)]
#[must_use = "dropping it lets the tree run"]
pub struct Frozen<'a> {
    freezer: &'a mut Freezer,
    processes: Vec<FrozenProcess>,
    thawed: bool,
}

impl Frozen<'_> {
    /// The processes of the tree, the root first. A zombie has no memory and is not among them,
    /// nor is a child between vfork and exec, which has none of its own.
    #[must_use]
    pub fn processes(&self) -> &[FrozenProcess] {
        &self.processes
    }

    /// Puts the tree under SIGSTOP, for [`Then::Stop`]. To be called before its memory is read: the
    /// signals that are pending in it are delivered on the way, which writes to its stacks.
    ///
    /// # Errors
    /// [`FreezeError`]; the tree runs then.
    pub fn settle(&mut self) -> Result<(), FreezeError> {
        self.freezer.say(&Request::Settle)?;
        match self.freezer.hear()?.0 {
            Reply::Settled => Ok(()),
            Reply::Failed(why) => Err(why.into()),
            other => Err(unexpected(&other)),
        }
    }

    /// A userfaultfd over the memory of `pid`, made by the process itself, which keeps nothing.
    ///
    /// # Errors
    /// The inner result tells why this process cannot have one; the outer is the freezer's.
    pub fn userfaultfd(&mut self, pid: i32) -> Result<Result<OwnedFd, String>, FreezeError> {
        self.freezer.say(&Request::Userfaultfd { pid })?;
        match self.freezer.hear()? {
            (Reply::Userfaultfd, Some(fd)) => Ok(Ok(fd)),
            (Reply::NoUserfaultfd(why), None) => Ok(Err(why)),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Lets the tree go. Returns how long it was stopped.
    ///
    /// # Errors
    /// [`FreezeError::Freezer`]; the kernel lets the tree run then.
    pub fn thaw(mut self, then: Then) -> Result<Duration, FreezeError> {
        self.let_go(then)
    }

    fn let_go(&mut self, then: Then) -> Result<Duration, FreezeError> {
        self.thawed = true;
        self.freezer.say(&Request::Thaw { then })?;
        match self.freezer.hear()?.0 {
            Reply::Thawed { stopped_ns } => Ok(Duration::from_nanos(stopped_ns)),
            other => Err(unexpected(&other)),
        }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if !self.thawed {
            // On an error's way out. If even this fails the freezer is dead and the tree runs.
            let _ = self.let_go(Then::Run);
        }
    }
}
