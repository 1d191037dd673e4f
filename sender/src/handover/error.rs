//! Why a hand-over failed.

use super::RecordError;
use super::hold::HoldError;
use crate::copy::{CollectError, SendError};
use crate::freeze::TreeError;
use crate::sink::SinkError;
use crate::target::pipes::OutsidePipe;
use pageferry_common::criu::page_server::UnknownCommand;
use std::io;

/// Why a hand-over failed. Unless it is [`HandoverError::InDoubt`], the target runs again.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The receiver's host lacks files that the target needs, or has other versions of them.
    #[error("files that process {root} needs are missing or different on the receiver's host: {}", .lacks.join(", "))]
    Files {
        /// PID of the root.
        root: i32,
        /// One description for each file.
        lacks: Vec<String>,
    },
    /// Processes outside of the target use pipes of it, which would be broken.
    #[error("the target has pipes to processes that do not move with it: {}", list(.0))]
    Pipes(Vec<OutsidePipe>),
    /// The target cannot be stopped.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// CRIU could not stop a thread. It waits in vain for a thread whose stop was consumed by a signal.
    #[error("CRIU cannot freeze the target: {0}")]
    CannotFreeze(String),
    /// CRIU refused or failed to dump the target.
    #[error("CRIU cannot dump the target: {0}")]
    CriuFailed(String),
    /// CRIU exited during the dump, without a reply.
    #[error("CRIU exited during the dump")]
    CriuExited(#[source] io::Error),
    /// CRIU completed the dump, which kills the target, before the sender allowed it.
    #[error("CRIU completed the dump before the sender allowed it")]
    CriuFinishedEarly,
    /// CRIU never connected to the page server, so the last pages were not sent.
    #[error("CRIU dumped the target without using the page server")]
    NoPageServer,
    /// CRIU sent something else than a page-server message.
    #[error("cannot parse what CRIU sent to the page server")]
    PageServer(#[from] UnknownCommand),
    /// The sender cancelled the dump because the round beside it failed.
    #[error("the dump was cancelled")]
    Cancelled,
    /// The thread that follows CRIU could not be started.
    #[error("cannot start the thread that follows CRIU")]
    FollowerThread(#[source] io::Error),
    /// A process of the target exited while the target was frozen; no copy of it would be complete.
    #[error("process {0} exited")]
    TargetGone(i32),
    /// The mappings of the target could not be listed.
    #[error("cannot list the target's memory")]
    Collect(#[from] CollectError),
    /// The memory of the target could not be read or sent.
    #[error("cannot copy the target's memory")]
    Send(#[from] SendError),
    /// The receiver or the connection to it failed.
    #[error("cannot send to the receiver")]
    Sink(#[from] SinkError),
    /// Files or sockets of the hand-over failed.
    #[error("cannot communicate with CRIU or use its files")]
    Io(#[from] io::Error),
    /// CRIU exited after the dump, before the tree was held: the tree may have run since its state was
    /// dumped.
    #[error("CRIU exited after the dump, before the move was committed")]
    CriuExitedAfterDump,
    /// The tree could not be frozen in a cgroup.
    #[error("cannot hold the target")]
    Hold(#[source] HoldError),
    /// The tree could not be thawed after a move that failed.
    #[error(
        "the move failed and the target is still frozen here; to try again, run: send --resolve {root}"
    )]
    NotReleased {
        /// PID of the root.
        root: i32,
        /// Why it is frozen.
        source: HoldError,
    },
    /// The tree could not be killed after it was moved.
    #[error(
        "the target runs at the receiver, and its frozen copy here was not killed; run: send --resolve {root}"
    )]
    NotKilled {
        /// PID of the root.
        root: i32,
        /// Error from the kernel.
        source: io::Error,
    },
    /// The record of the hand-over could not be read or written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The sender may not kill a process, which could then run at both ends.
    #[error("not permitted to kill process {0}")]
    MayNotKill(i32),
    /// The receiver was asked to commit, and its answer is missing.
    #[error(transparent)]
    InDoubt(#[from] InDoubt),
}

fn list(pipes: &[OutsidePipe]) -> String {
    let all: Vec<_> = pipes.iter().map(ToString::to_string).collect();
    all.join("; ")
}

/// The sender cannot find out whether the receiver committed, so the local copy must stay frozen.
#[derive(Debug, thiserror::Error)]
#[error(
    "it is unknown whether process {root} runs at the receiver; the copy here stays frozen. \
     When the receiver can be reached again, run: send --resolve {root}"
)]
pub struct InDoubt {
    /// PID of the root.
    pub root: i32,
    /// Why the receiver could not be asked.
    pub source: SinkError,
}
