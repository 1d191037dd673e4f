//! The network is just another image writer: what a round is written to.

mod compress;
mod criu;
mod link;
mod native;

pub use compress::{Compression, FAST};
pub use criu::CriuSink;
pub use native::{Connect, NativeSink, resolve};

use crate::progress::Counters;
use bytes::Bytes;
use pageferry_common::criu::session::Options;
use pageferry_common::needed_files::NeededFile;
use pageferry_common::tls;
use pageferry_common::wire::{Entry, RefuseCode, RoundKind, Totals, WireError};
use pageferry_common::{BufferPool, ImageId, MemfdName, StateName};
use std::io;
use std::sync::Arc;

/// What a receiver speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Dialect {
    /// Our own protocol, of `receive`.
    Native,
    /// CRIU's, of `criu page-server`.
    Criu,
}

impl Dialect {
    /// Connects to a receiver. Buffers for compressed pages come out of `pool`.
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

/// What a committed round cost and held.
#[derive(Debug, Clone, Copy, Default)]
pub struct Receipt {
    /// What both ends counted.
    pub totals: Totals,
    /// Bytes that crossed the link for it, framing and all.
    pub bytes_wire: u64,
}

/// Why a sink cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// Nobody listens there, or the name is unknown.
    #[error("cannot connect to {to}")]
    Connect {
        /// Where to, as given.
        to: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The connection or the peer.
    #[error(transparent)]
    Wire(WireError),
    /// One side's certificate is not to the other's liking.
    #[error("no encrypted connection: {0}")]
    Tls(String),
    /// The receiver counted something else than we did.
    #[error("the receiver acknowledged something else than was sent")]
    Disagreement,
    /// It speaks CRIU's protocol, which has no words for what went wrong.
    #[error("the page server {0}")]
    PageServer(String),
    /// It keeps memory, and no more.
    #[error("the receiver does not restore processes")]
    NoRestore,
    /// An image of CRIU's cannot be read.
    #[error("cannot read what CRIU has written")]
    State(#[source] io::Error),
    /// The user said stop.
    #[error("interrupted")]
    Interrupted,
    /// The network thread could not do its work.
    #[error("the network thread failed")]
    Io(#[source] io::Error),
}

impl SinkError {
    /// Whether the connection is lost, and nothing else is wrong.
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

    /// Whether it may be otherwise if one connects again.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Wire(WireError::Refused { code, .. }) => matches!(
                code,
                RefuseCode::Silent | RefuseCode::Limit | RefuseCode::Busy | RefuseCode::Storage
            ),
            Self::Wire(_) | Self::Connect { .. } | Self::Tls(_) => true,
            Self::Disagreement
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
            WireError::Io(io) => match tls::explain(io) {
                Some(why) => Self::Tls(why),
                None => Self::Wire(error),
            },
            _ => Self::Wire(error),
        }
    }
}

/// Why a receiver did not say that the process runs there.
#[derive(Debug)]
pub enum Lost {
    /// It said that it does not, and never will.
    Refused(SinkError),
    /// It said nothing.
    InDoubt(SinkError),
}

/// Where a process goes on: after the last round `state` for each image of CRIU's, `restore`,
/// `commit`.
pub trait Destination {
    /// Asks whether these files are there, before the first round. Returns what is wrong, all of it.
    ///
    /// # Errors
    /// [`SinkError`].
    fn check_files(&mut self, files: Vec<NeededFile>) -> Result<Vec<String>, SinkError>;

    /// Sends one of CRIU's images.
    ///
    /// # Errors
    /// [`SinkError`].
    fn state(&mut self, name: &StateName, image: &mut dyn io::Read) -> Result<(), SinkError>;

    /// Has the process restored, and returns when it could run.
    ///
    /// # Errors
    /// [`SinkError`]; nothing is left of it then.
    fn restore(&mut self, options: Options) -> Result<(), SinkError>;

    /// Lets the copy run, and returns when it does.
    ///
    /// # Errors
    /// [`Lost`].
    fn commit(&mut self) -> Result<(), Lost>;

    /// After [`Lost::InDoubt`]: connects anew, as often as it takes in the time allowed, and asks
    /// whether the copy runs. If it does not, it never will.
    ///
    /// # Errors
    /// [`SinkError`]; then it is still in doubt.
    fn ask_again(&mut self) -> Result<bool, SinkError>;
}

/// Takes the rounds of one migration, in order: `prepare`, `begin`, then for each image `open` and
/// any number of `put`, then `commit`; at the end `finish`.
pub trait PageSink {
    /// Gets ready for a round while the tree still runs.
    ///
    /// # Errors
    /// [`SinkError`]; the sink is of no use afterwards. So for all that follows.
    fn prepare(&mut self) -> Result<(), SinkError> {
        Ok(())
    }

    /// While the tree is frozen, a receiver is not waited for as long as otherwise.
    fn frozen(&mut self, _is: bool) {}

    /// After a failure that [`SinkError::is_broken_connection`]: connects anew, and finds out what arrived. If
    /// a round was on its way, returns its receipt if the receiver has it after all; else it has not, and never
    /// will.
    ///
    /// # Errors
    /// [`SinkError`]; `broken` itself if that is all there is to say.
    fn reconnect(&mut self, broken: SinkError) -> Result<Option<Receipt>, SinkError> {
        Err(broken)
    }

    /// A round begins. `uptime_us` is the source host's uptime when its tree was frozen, µs.
    ///
    /// # Errors
    /// [`SinkError`].
    fn begin(&mut self, round: u32, kind: RoundKind, uptime_us: u64) -> Result<(), SinkError>;

    /// What is put from now on belongs to this image.
    ///
    /// # Errors
    /// [`SinkError`].
    fn open(&mut self, image: ImageId) -> Result<(), SinkError>;

    /// The image is of a segment that a memfd of this name could be. For who restores it.
    ///
    /// # Errors
    /// [`SinkError`].
    fn memfd(&mut self, _name: &MemfdName) -> Result<(), SinkError> {
        Ok(())
    }

    /// Entries, ascending through all calls of an image, and the pages of those that have data.
    ///
    /// # Errors
    /// [`SinkError`].
    fn put(&mut self, entries: Vec<Entry>, pages: Bytes) -> Result<(), SinkError>;

    /// Ends the round; returns when it is durable.
    ///
    /// # Errors
    /// [`SinkError`]; the receiver then keeps the rounds before this one.
    fn commit(&mut self) -> Result<Receipt, SinkError>;

    /// No more rounds.
    ///
    /// # Errors
    /// [`SinkError`].
    fn finish(&mut self) -> Result<(), SinkError>;

    /// Whether the sink still is of use: that the user said stop shows here, too.
    ///
    /// # Errors
    /// [`SinkError`].
    fn check(&mut self) -> Result<(), SinkError> {
        Ok(())
    }

    /// Whether the receiver can store pages of the round before again (`EntryKind::Copy`).
    fn copies(&self) -> bool {
        true
    }

    /// The receiver as a place where the process can go on; `None` if it restores none.
    fn destination(&mut self) -> Option<&mut dyn Destination> {
        None
    }

    /// Where the receiver puts the rounds; empty if it does not say.
    fn directory(&self) -> &str;

    /// What it counts; for a progress display.
    fn counters(&self) -> Arc<Counters>;
}
