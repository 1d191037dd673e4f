//! The network is just another image writer: what a round is written to.

mod native;

pub use native::{Compression, Connect, NativeSink};

use bytes::Bytes;
use pageferry_common::ImageId;
use pageferry_common::wire::{Entry, RoundKind, Totals, WireError};
use std::io;

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
    Wire(#[from] WireError),
    /// The receiver counted something else than we did.
    #[error("the receiver acknowledged something else than was sent")]
    Disagreement,
    /// The user said stop.
    #[error("interrupted")]
    Interrupted,
    /// The network thread could not do its work.
    #[error("the network thread failed")]
    Io(#[source] io::Error),
}

/// Takes the rounds of one migration, in order: `begin`, then for each image `open` and any number
/// of `put`, then `commit`; at the end `finish`.
pub trait PageSink {
    /// A round begins. `uptime_us` is the source host's uptime when its tree was frozen, µs.
    ///
    /// # Errors
    /// [`SinkError`]; the sink is of no use afterwards. So for all that follows.
    fn begin(&mut self, round: u32, kind: RoundKind, uptime_us: u64) -> Result<(), SinkError>;

    /// What is put from now on belongs to this image.
    ///
    /// # Errors
    /// [`SinkError`].
    fn open(&mut self, image: ImageId) -> Result<(), SinkError>;

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
}
