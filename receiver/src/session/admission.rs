//! Admission: a connection has a short deadline and almost no memory until it has identified itself; then it
//! takes one of `--max-senders` slots.

use crate::refusal::{Failure, Refusal};
use crate::storage::lease::Disconnect;
use pageferry_common::wire::{RefuseCode, WireError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

/// Number of pending connections that are allowed beyond the number of sender slots, so that a sender that
/// connects when all slots are taken still receives a refusal.
pub const EXTRA_PENDING: usize = 64;

/// Limits the numbers of pending connections and of senders.
#[derive(Debug)]
pub struct Admission {
    pending: Arc<Semaphore>,
    slots: Arc<Semaphore>,
}

/// A connection that has not identified itself yet.
#[derive(Debug)]
pub struct Pending {
    slots: Arc<Semaphore>,
    deadline: Instant,
    /// Time from the connection to the deadline.
    handshake: Duration,
    disconnect: Disconnect,
    _permit: OwnedSemaphorePermit,
}

/// The right to send a migration, until dropped.
#[derive(Debug)]
pub struct SenderSlot {
    _permit: OwnedSemaphorePermit,
}

impl Admission {
    /// Allows `max_senders` senders at a time.
    #[must_use]
    pub fn new(max_senders: usize) -> Self {
        Self {
            pending: Arc::new(Semaphore::new(max_senders + EXTRA_PENDING)),
            slots: Arc::new(Semaphore::new(max_senders)),
        }
    }

    /// Admits a connection that has until `handshake` from now to identify itself. Returns `None` if there
    /// are too many pending connections.
    #[must_use]
    pub fn admit(&self, handshake: Duration) -> Option<Pending> {
        let permit = Arc::clone(&self.pending).try_acquire_owned().ok()?;
        Some(Pending {
            slots: Arc::clone(&self.slots),
            deadline: Instant::now() + handshake,
            handshake,
            disconnect: Disconnect::default(),
            _permit: permit,
        })
    }
}

impl Pending {
    /// Adds the handle that closes the connection.
    #[must_use]
    pub fn with_disconnect(self, disconnect: Disconnect) -> Self {
        Self { disconnect, ..self }
    }

    /// Returns the handle that closes the connection.
    #[must_use]
    pub fn disconnect(&self) -> Disconnect {
        self.disconnect.clone()
    }

    /// Waits for `work`, but not beyond the deadline.
    ///
    /// # Errors
    /// The error of `work`; [`WireError::Stalled`] at the deadline.
    pub async fn within_deadline<T, E: Into<Failure>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure> {
        match timeout_at(self.deadline, work).await {
            Ok(result) => result.map_err(Into::into),
            Err(_) => Err(WireError::Stalled(self.handshake).into()),
        }
    }

    /// Makes the connection a sender's.
    ///
    /// # Errors
    /// [`Refusal`] if all slots are taken.
    pub fn promote(self) -> Result<SenderSlot, Refusal> {
        match self.slots.try_acquire_owned() {
            Ok(permit) => Ok(SenderSlot { _permit: permit }),
            Err(_) => {
                let reason = "this receiver has no free sender slot (--max-senders)";
                Err(Refusal::new(RefuseCode::Limit, reason))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn promoted_or_refused_connection_is_no_longer_pending() {
        let admission = Admission::new(1);
        let mut pending = Vec::new();
        while let Some(connection) = admission.admit(Duration::from_secs(60)) {
            pending.push(connection);
        }
        assert_eq!(pending.len(), 1 + EXTRA_PENDING);
        let slot = pending.pop().unwrap().promote().unwrap();
        let refused = pending.pop().unwrap().promote().unwrap_err();
        assert!(refused.reason.contains("--max-senders"));
        pending.extend(admission.admit(Duration::from_secs(60)));
        pending.extend(admission.admit(Duration::from_secs(60)));
        assert_eq!(pending.len(), 1 + EXTRA_PENDING);
        drop(slot);
        pending.pop().unwrap().promote().unwrap();
    }

    #[tokio::test]
    async fn silent_connection_fails_at_the_deadline() {
        let pending = Admission::new(1).admit(Duration::from_millis(10)).unwrap();
        let received = pending.within_deadline(async { Ok::<_, WireError>("hello") });
        assert_eq!(received.await.unwrap(), "hello");
        let silence = std::future::pending::<Result<(), WireError>>();
        let late = pending.within_deadline(silence).await;
        assert!(matches!(late, Err(Failure::Wire(WireError::Stalled(_)))));
    }
}
