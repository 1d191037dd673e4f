//! The connection to a native sender: messages in both directions, and the refusal at the end.

use crate::refusal::{Failure, Refusal};
use crate::session::admission::SenderSlot;
use crate::storage::lease::{Disconnect, Lease};
use crate::storage::store::Store;
use crate::with_causes;
use pageferry_common::wire::{
    FrameReader, FrameWriter, Incoming, Message, RefuseCode, SharedPhase, WireError,
};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::time::{sleep, timeout};

/// How often `Working` is sent to a sender that waits.
pub(super) const WORKING_INTERVAL: Duration = Duration::from_secs(1);

/// How often a lease that another connection holds is tried again.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How long a refused sender may take to stop sending. Closing the connection earlier would reset it, and
/// the refusal could be lost in flight.
const REFUSAL_LINGER: Duration = Duration::from_secs(2);

/// Both directions of a connection.
pub(super) struct Connection<R, W> {
    pub reader: FrameReader<R>,
    writer: FrameWriter<W>,
    /// Held until the connection is closed, because a refusal that lingers takes memory, too.
    slot: Option<SenderSlot>,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Connection<R, W> {
    /// Returns a connection on which the sender is about to send its first message.
    pub(super) fn new(read: R, write: W, stall: Duration) -> Self {
        let phase = SharedPhase::default();
        Self {
            reader: FrameReader::new(read, phase.clone(), stall),
            writer: FrameWriter::new(write, phase, stall),
            slot: None,
        }
    }

    /// Keeps a sender's slot until the connection is closed.
    pub(super) fn hold(&mut self, slot: SenderSlot) {
        self.slot = Some(slot);
    }

    /// Receives the next message other than `Working`, between rounds.
    pub(super) async fn recv(&mut self) -> Result<Message, Failure> {
        loop {
            match self.reader.recv().await? {
                Incoming::Message(Message::Working) => {}
                Incoming::Message(message) => return Ok(message),
                Incoming::Chunk { .. } => {
                    let reason = "a chunk was sent outside an image";
                    return Err(Refusal::new(RefuseCode::Protocol, reason).into());
                }
            }
        }
    }

    /// Sends a message.
    pub(super) async fn send(&mut self, message: &Message) -> Result<(), WireError> {
        self.writer.send(message).await
    }

    /// Leases the migration in `home`. If another connection holds it, closes that one and waits until its
    /// conversation has ended.
    pub(super) async fn lease(
        &mut self,
        store: &Store,
        home: &Path,
        disconnect: &Disconnect,
    ) -> Result<Lease, Failure> {
        loop {
            if let Some(lease) = store.try_lease(home, disconnect) {
                return Ok(lease);
            }
            sleep(POLL_INTERVAL).await;
            self.send(&Message::Working).await?;
        }
    }

    /// Sends the reason why the conversation ends, unless the connection is lost, and waits until the
    /// sender has received it or [`REFUSAL_LINGER`] is over.
    pub(super) async fn send_refusal(&mut self, failure: &Failure) {
        let (code, reason) = match failure {
            Failure::Refusal(refusal) => (refusal.code, refusal.reason.clone()),
            Failure::Wire(
                error @ (WireError::Frame(_) | WireError::Message(_) | WireError::Phase(_)),
            ) => (RefuseCode::Protocol, with_causes(error)),
            Failure::Wire(error @ WireError::Stalled(_)) => (RefuseCode::Silent, error.to_string()),
            Failure::Wire(
                WireError::Io(_)
                | WireError::Closed
                | WireError::Refused { .. }
                | WireError::Aborted(_),
            ) => return,
        };
        let refuse = Message::Refuse { code, reason };
        if self.send(&refuse).await.is_err() {
            return;
        }
        let reader = self.reader.get_mut();
        let mut scrap = vec![0; 1 << 16];
        let drain = async { while matches!(reader.read(&mut scrap).await, Ok(1..)) {} };
        // The connection is closed even if the sender does not close its end.
        let _ = timeout(REFUSAL_LINGER, drain).await;
    }
}

/// Returns the refusal of a message that a receiver does not accept at this point.
pub(super) fn unexpected_message(message: &Message) -> Refusal {
    let reason = format!("unexpected {:?} message", message.kind());
    Refusal::new(RefuseCode::Protocol, reason)
}
