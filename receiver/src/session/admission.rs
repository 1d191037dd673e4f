//! The admission: who has not said yet what he wants waits in the hall, with little time and next to no memory;
//! who sends takes one of the places.

use crate::refusal::{Failure, Refusal};
use crate::storage::lease::Disconnect;
use pageferry_common::wire::{RefuseCode, WireError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

/// How many more may be in the hall than there are places: so that who comes when all are taken is told so.
pub const HALL_MORE: usize = 64;

/// Lets in so many and no more.
#[derive(Debug)]
pub struct Admission {
    hall: Arc<Semaphore>,
    places: Arc<Semaphore>,
}

/// A connection in the hall.
#[derive(Debug)]
pub struct Pending {
    places: Arc<Semaphore>,
    /// When it has to have said what it wants.
    until: Instant,
    handshake: Duration,
    cut: Disconnect,
    _hall: OwnedSemaphorePermit,
}

/// A place for a sender, until dropped.
#[derive(Debug)]
pub struct SenderSlot {
    _taken: OwnedSemaphorePermit,
}

impl Admission {
    /// With so many places.
    #[must_use]
    pub fn new(max_senders: usize) -> Self {
        Self {
            hall: Arc::new(Semaphore::new(max_senders + HALL_MORE)),
            places: Arc::new(Semaphore::new(max_senders)),
        }
    }

    /// Lets a connection into the hall, where it has so much time to say what it wants; `None` if that is
    /// full.
    #[must_use]
    pub fn admit(&self, handshake: Duration) -> Option<Pending> {
        let hall = Arc::clone(&self.hall).try_acquire_owned().ok()?;
        Some(Pending {
            places: Arc::clone(&self.places),
            until: Instant::now() + handshake,
            handshake,
            cut: Disconnect::default(),
            _hall: hall,
        })
    }
}

impl Pending {
    /// Its connection can be cut.
    #[must_use]
    pub fn with(self, cut: Disconnect) -> Self {
        Self { cut, ..self }
    }

    /// Cuts its connection.
    #[must_use]
    pub fn cut(&self) -> Disconnect {
        self.cut.clone()
    }

    /// Waits for what it says, no longer than it may be in the hall.
    ///
    /// # Errors
    /// What `said` returns; [`WireError::Stalled`].
    pub async fn in_time<T, E: Into<Failure>>(
        &self,
        said: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure> {
        match timeout_at(self.until, said).await {
            Ok(said) => said.map_err(Into::into),
            Err(_) => Err(WireError::Stalled(self.handshake).into()),
        }
    }

    /// Leaves the hall for a place.
    ///
    /// # Errors
    /// [`Refusal`] if there is none.
    pub fn promote(self) -> Result<SenderSlot, Refusal> {
        match self.places.try_acquire_owned() {
            Ok(taken) => Ok(SenderSlot { _taken: taken }),
            Err(_) => {
                let what = "as many senders are here as this receiver takes (--max-senders)";
                Err(Refusal::new(RefuseCode::Limit, what))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_hall_is_left_for_a_place_or_for_good() {
        let admission = Admission::new(1);
        let mut hall = Vec::new();
        while let Some(guest) = admission.admit(Duration::from_secs(60)) {
            hall.push(guest);
        }
        assert_eq!(hall.len(), 1 + HALL_MORE);
        let place = hall.pop().unwrap().promote().unwrap();
        let refused = hall.pop().unwrap().promote().unwrap_err();
        assert!(refused.reason.contains("--max-senders"));
        // Both have left the hall.
        hall.extend(admission.admit(Duration::from_secs(60)));
        hall.extend(admission.admit(Duration::from_secs(60)));
        assert_eq!(hall.len(), 1 + HALL_MORE);
        drop(place);
        hall.pop().unwrap().promote().unwrap();
    }

    #[tokio::test]
    async fn who_says_nothing_in_time_is_given_up() {
        let guest = Admission::new(1).admit(Duration::from_millis(10)).unwrap();
        let said = guest.in_time(async { Ok::<_, WireError>("hello") }).await;
        assert_eq!(said.unwrap(), "hello");
        let nothing = std::future::pending::<Result<(), WireError>>();
        let late = guest.in_time(nothing).await;
        assert!(matches!(late, Err(Failure::Wire(WireError::Stalled(_)))));
    }
}
