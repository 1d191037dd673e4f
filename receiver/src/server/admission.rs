//! The door: who has not said yet what he wants waits in the hall, with little time and next to no memory;
//! who sends takes one of the places.

use crate::session::{Failure, Refusal};
use crate::storage::store::Cut;
use pageferry_common::wire::{RefuseCode, WireError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

/// How many more may be in the hall than there are places: so that who comes when all are taken is told so.
pub const HALL_MORE: usize = 64;

/// Lets in so many and no more.
#[derive(Debug)]
pub struct Door {
    hall: Arc<Semaphore>,
    places: Arc<Semaphore>,
}

/// A connection in the hall.
#[derive(Debug)]
pub struct Guest {
    places: Arc<Semaphore>,
    /// When it has to have said what it wants.
    until: Instant,
    handshake: Duration,
    cut: Cut,
    _hall: OwnedSemaphorePermit,
}

/// A place for a sender, until dropped.
#[derive(Debug)]
pub struct Place {
    _taken: OwnedSemaphorePermit,
}

impl Door {
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
    pub fn let_in(&self, handshake: Duration) -> Option<Guest> {
        let hall = Arc::clone(&self.hall).try_acquire_owned().ok()?;
        Some(Guest {
            places: Arc::clone(&self.places),
            until: Instant::now() + handshake,
            handshake,
            cut: Cut::default(),
            _hall: hall,
        })
    }
}

impl Guest {
    /// Its connection can be cut.
    #[must_use]
    pub fn with(self, cut: Cut) -> Self {
        Self { cut, ..self }
    }

    /// Cuts its connection.
    #[must_use]
    pub fn cut(&self) -> Cut {
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
    pub fn take_place(self) -> Result<Place, Refusal> {
        match self.places.try_acquire_owned() {
            Ok(taken) => Ok(Place { _taken: taken }),
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
        let door = Door::new(1);
        let mut hall = Vec::new();
        while let Some(guest) = door.let_in(Duration::from_secs(60)) {
            hall.push(guest);
        }
        assert_eq!(hall.len(), 1 + HALL_MORE);
        let place = hall.pop().unwrap().take_place().unwrap();
        let refused = hall.pop().unwrap().take_place().unwrap_err();
        assert!(refused.reason.contains("--max-senders"));
        // Both have left the hall.
        hall.extend(door.let_in(Duration::from_secs(60)));
        hall.extend(door.let_in(Duration::from_secs(60)));
        assert_eq!(hall.len(), 1 + HALL_MORE);
        drop(place);
        hall.pop().unwrap().take_place().unwrap();
    }

    #[tokio::test]
    async fn who_says_nothing_in_time_is_given_up() {
        let guest = Door::new(1).let_in(Duration::from_millis(10)).unwrap();
        let said = guest.in_time(async { Ok::<_, WireError>("hello") }).await;
        assert_eq!(said.unwrap(), "hello");
        let nothing = std::future::pending::<Result<(), WireError>>();
        let late = guest.in_time(nothing).await;
        assert!(matches!(late, Err(Failure::Wire(WireError::Stalled(_)))));
    }
}
