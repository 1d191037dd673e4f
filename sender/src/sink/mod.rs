//! Destinations for rounds: [`PageSink`], and its implementations for the native protocol and for CRIU's.

mod compress;
mod criu;
mod link;
mod native;

pub use compress::{Compression, DEFAULT_LEVEL};
pub use criu::CriuSink;
pub use link::Connect;
pub use native::{NativeSink, resolve};

use crate::progress::Counters;
use bytes::Bytes;
use pageferry_common::criu::Options;
use pageferry_common::needed_files::NeededFile;
use pageferry_common::tls;
use pageferry_common::wire::{Entry, RefuseCode, RoundKind, Totals, WireError};
use pageferry_common::{BufferPool, ImageId, MemfdName, ReceiverId, StateName};
use std::io;
use std::sync::Arc;

/// Protocol of the receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Dialect {
    /// Pageferry's own protocol, for `receive`.
    Native,
    /// CRIU's page-server protocol, for `criu page-server`.
    Criu,
}

impl Dialect {
    /// Connects to a receiver. Takes buffers for compressed pages from `pool`.
    ///
    /// # Errors
    /// [`SinkError`].
    pub fn connect(
        self,
        connect: Connect,
        pool: &BufferPool,
    ) -> Result<Box<dyn PageSink>, SinkError> {
        Ok(match self {
            Self::Native => Box::new(NativeSink::connect(connect, pool)?),
            Self::Criu => Box::new(CriuSink::connect(connect)?),
        })
    }
}

/// Contents and cost of a committed round.
#[derive(Debug, Clone, Copy, Default)]
pub struct Receipt {
    /// Counts that sender and receiver agree on.
    pub totals: Totals,
    /// Bytes on the wire for this round, framing included.
    pub bytes_wire: u64,
}

/// Why a sink failed.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The receiver's host name is unknown, or nothing listens at its address.
    #[error("cannot connect to {to}")]
    Connect {
        /// Address of the receiver, as given by the user.
        to: String,
        /// Error from the resolver or the kernel.
        source: io::Error,
    },
    /// The connection failed, or the peer violated the protocol or refused.
    #[error(transparent)]
    Wire(WireError),
    /// The TLS handshake failed.
    #[error("cannot establish a TLS connection: {0}")]
    Tls(String),
    /// The receiver sent a valid message that does not answer what was sent: a wrong type, wrong counts, or a
    /// wrong number of rounds.
    #[error("unexpected reply from the receiver")]
    UnexpectedReply,
    /// Another receiver answers at the address. It cannot know what became of the migration.
    #[error("another receiver answers there, or its directory was replaced")]
    AnotherReceiver,
    /// CRIU's page server failed; its protocol has no error messages.
    #[error("the page server {0}")]
    PageServer(String),
    /// The receiver stores memory but runs without `--restore`.
    #[error("the receiver does not restore processes")]
    NoRestore,
    /// An image written by CRIU cannot be read.
    #[error("cannot read an image written by CRIU")]
    State(#[source] io::Error),
    /// The sender received SIGINT or SIGTERM.
    #[error("interrupted")]
    Interrupted,
    /// The network thread could not start, or panicked.
    #[error("the network thread failed")]
    Io(#[source] io::Error),
}

impl SinkError {
    /// Returns whether the only problem is that the connection was lost.
    #[must_use]
    pub fn is_broken_connection(&self) -> bool {
        matches!(
            self,
            Self::Wire(
                WireError::Io(_)
                    | WireError::Closed
                    | WireError::Stalled(_)
                    | WireError::Refused {
                        code: RefuseCode::Silent,
                        ..
                    }
            )
        )
    }

    /// Returns whether another connection attempt may succeed.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Wire(WireError::Refused { code, .. }) => matches!(
                code,
                RefuseCode::Silent | RefuseCode::Limit | RefuseCode::Storage
            ),
            Self::Wire(_) | Self::Connect { .. } | Self::Tls(_) => true,
            Self::UnexpectedReply
            | Self::AnotherReceiver
            | Self::PageServer(_)
            | Self::NoRestore
            | Self::State(_)
            | Self::Interrupted
            | Self::Io(_) => false,
        }
    }
}

impl From<WireError> for SinkError {
    fn from(error: WireError) -> Self {
        match &error {
            WireError::Io(io) => match tls::describe_tls(io) {
                Some(why) => Self::Tls(why),
                None => Self::Wire(error),
            },
            _ => Self::Wire(error),
        }
    }
}

/// Why a commit was not confirmed.
#[derive(Debug)]
pub enum CommitError {
    /// The receiver refused: the process does not run there, and never will.
    Refused(SinkError),
    /// No answer arrived: the process may or may not run at the receiver.
    InDoubt(SinkError),
}

/// Outcome of a migration, as reported by the receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The process runs at the receiver.
    Running,
    /// The process does not run at the receiver, and never will.
    Aborted,
}

/// Whether the target runs while the sender waits for the receiver. Selects how long the sender waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetState {
    /// The target runs: waiting costs nothing but time.
    Running,
    /// The target is frozen: waiting adds to its downtime.
    Frozen,
}

/// A receiver that can restore the process. Called after the last round: `put_state` for each of CRIU's
/// images, `restore`, `commit`.
pub trait Destination {
    /// Asks, before the first round, whether the receiver's host has these files. Returns a description of
    /// each file that is missing or differs.
    ///
    /// # Errors
    /// [`SinkError`].
    fn check_files(&mut self, files: Vec<NeededFile>) -> Result<Vec<String>, SinkError>;

    /// Sends one of CRIU's images.
    ///
    /// # Errors
    /// [`SinkError`].
    fn put_state(&mut self, name: &StateName, image: &mut dyn io::Read) -> Result<(), SinkError>;

    /// Asks the receiver to restore the process, and returns when the copy is ready to run.
    ///
    /// # Errors
    /// [`SinkError`]; the receiver has removed the copy then.
    fn restore(&mut self, options: Options) -> Result<(), SinkError>;

    /// Asks the receiver to resume the copy, and returns when it runs.
    ///
    /// # Errors
    /// [`CommitError`].
    fn commit(&mut self) -> Result<(), CommitError>;

    /// Reconnects after [`CommitError::InDoubt`], and asks for the outcome. Retries until the stall timeout
    /// while the receiver cannot be reached.
    ///
    /// # Errors
    /// [`SinkError`]; the outcome is still in doubt then.
    fn query_outcome(&mut self) -> Result<Outcome, SinkError>;

    /// Id of the receiver.
    fn id(&self) -> ReceiverId;

    /// Closes the connection, so that the receiver gives up at once what it waits to commit.
    fn disconnect(&mut self);
}

/// Takes the rounds of one migration. Order of calls: for each round `prepare`, `begin`, then for each image
/// `open` and any number of `put`, then `commit`; after the last round `finish`.
pub trait PageSink {
    /// Prepares for a round while the target still runs.
    ///
    /// # Errors
    /// [`SinkError`]. Here and in all other methods, the sink is unusable after an error unless `reconnect`
    /// succeeds.
    fn prepare(&mut self) -> Result<(), SinkError> {
        Ok(())
    }

    /// Sets how long to wait for the receiver, by whether the target runs meanwhile. Takes effect at once,
    /// also for a wait that has begun.
    fn set_target_state(&mut self, _state: TargetState) {}

    /// Reconnects after a failure for which [`SinkError::is_broken_connection`] is true, and asks the
    /// receiver which rounds it has. If a round was in flight, returns its receipt if the receiver has the
    /// whole round; otherwise returns `None`, and the receiver has discarded it.
    ///
    /// # Errors
    /// [`SinkError`]; `broken` itself if the sink does not reconnect.
    fn reconnect(&mut self, broken: SinkError) -> Result<Option<Receipt>, SinkError> {
        Err(broken)
    }

    /// Begins a round. `uptime_us` is the uptime of the sender's host when the target was frozen, in µs.
    ///
    /// # Errors
    /// [`SinkError`].
    fn begin(&mut self, round: u32, kind: RoundKind, uptime_us: u64) -> Result<(), SinkError>;

    /// Begins an image: all later `put` belong to it.
    ///
    /// # Errors
    /// [`SinkError`].
    fn open(&mut self, image: ImageId) -> Result<(), SinkError>;

    /// Names the memfd that the open image, a shared segment, can be restored as. Sent only to a receiver
    /// that restores processes.
    ///
    /// # Errors
    /// [`SinkError`].
    fn memfd_name(&mut self, _name: &MemfdName) -> Result<(), SinkError> {
        Ok(())
    }

    /// Sends entries, in ascending order across all calls for one image, and the pages of the data entries.
    ///
    /// # Errors
    /// [`SinkError`].
    fn put(&mut self, entries: Vec<Entry>, pages: Bytes) -> Result<(), SinkError>;

    /// Ends the round, and returns when it is durable at the receiver.
    ///
    /// # Errors
    /// [`SinkError`]; the receiver keeps the earlier rounds.
    fn commit(&mut self) -> Result<Receipt, SinkError>;

    /// Ends the migration after the last round.
    ///
    /// # Errors
    /// [`SinkError`].
    fn finish(&mut self) -> Result<(), SinkError>;

    /// Checks, without blocking, that the connection is up and the user has not interrupted the sender.
    ///
    /// # Errors
    /// [`SinkError`].
    fn check(&mut self) -> Result<(), SinkError> {
        Ok(())
    }

    /// Returns whether the receiver supports [`EntryKind::Copy`](pageferry_common::wire::EntryKind::Copy):
    /// storing a page of the previous round again.
    fn supports_copy(&self) -> bool {
        true
    }

    /// Returns the receiver as a destination for the process; `None` if it does not restore processes.
    fn destination(&mut self) -> Option<&mut dyn Destination> {
        None
    }

    /// Returns the receiver's directory for this migration; empty if the receiver did not report it.
    fn directory(&self) -> &str;

    /// Returns the counters behind the progress display.
    fn counters(&self) -> Arc<Counters>;
}
