//! What the receiver holds of an image, as far as it is known: rounds may be lost on their way.

use pageferry_common::PageSet;

/// The pages of one image that the receiver holds. Only they can be in-parent entries.
#[derive(Debug, Default)]
pub struct Baseline {
    /// Those of the last round that it has acked, as they are there, but for those that were written and
    /// sent since, and did not arrive.
    acked: PageSet,
    /// The round on its way.
    sent: Option<InFlight>,
}

/// What a round says of an image.
#[derive(Debug, Default)]
struct InFlight {
    announced: PageSet,
    changed: PageSet,
}

impl Baseline {
    /// Pages of the last acked round that are still as they are there, or are known by the tracker not to be.
    #[must_use]
    pub fn pages(&self) -> &PageSet {
        &self.acked
    }

    /// A round was sent to its end: it says of `announced` what they are. That `changed` have changed since the
    /// one before, nothing will tell again: a tracker tells of a write once.
    pub fn sent(&mut self, announced: PageSet, changed: PageSet) {
        self.sent = Some(InFlight { announced, changed });
    }

    /// A round was not sent to its end.
    pub fn send_failed(&mut self, changed: &PageSet) {
        self.acked = self.acked.difference(changed);
    }

    /// The receiver has the round.
    pub fn acked(&mut self) {
        if let Some(InFlight { announced, .. }) = self.sent.take() {
            self.acked = announced;
        }
    }

    /// The receiver has not got the round, and never will.
    pub fn lost(&mut self) {
        if let Some(InFlight { announced, changed }) = self.sent.take() {
            // What was gone when it was sent may be something else when it is there again.
            self.acked = self.acked.intersection(&announced);
            self.send_failed(&changed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_common::PageRange;

    fn pages(numbers: &[u64]) -> PageSet {
        let page = |&number: &u64| PageRange::new(number << 12, 1).unwrap();
        numbers.iter().map(page).collect()
    }

    #[test]
    fn what_was_sent_is_held_once_it_is_acked() {
        let mut baseline = Baseline::default();
        baseline.sent(pages(&[1, 2, 3]), pages(&[1, 2, 3]));
        assert!(baseline.pages().is_empty());
        baseline.acked();
        assert_eq!(*baseline.pages(), pages(&[1, 2, 3]));
        // Another word of the same round changes nothing.
        baseline.acked();
        baseline.lost();
        assert_eq!(*baseline.pages(), pages(&[1, 2, 3]));
    }

    #[test]
    fn what_was_sent_and_lost_is_sent_again() {
        let mut baseline = Baseline::default();
        baseline.sent(pages(&[1, 2, 3]), pages(&[1, 2, 3]));
        baseline.acked();
        // 2 was written, 3 went, 4 came.
        baseline.sent(pages(&[1, 2, 4]), pages(&[2, 4]));
        baseline.lost();
        assert_eq!(*baseline.pages(), pages(&[1]));
        baseline.send_failed(&pages(&[1, 5]));
        assert!(baseline.pages().is_empty());
    }
}
