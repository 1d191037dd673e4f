//! Who may say what when: one table that both ends obey.

use super::frame::FrameKind;

/// Where a connection stands. Both ends advance it with every frame sent *and* received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Connected; the sender speaks first.
    Fresh,
    /// Hello was said; the receiver answers.
    Greeting,
    /// Between rounds.
    Ready,
    /// In a round, no image open.
    Round,
    /// In a round, an image open.
    Image,
    /// The round was sent; the receiver makes it durable.
    Sealing,
    /// No more rounds; the receiver says goodbye.
    Finishing,
    /// CRIU restores; the receiver says how that went.
    Restoring,
    /// Restored, and not running.
    Restored,
    /// To be let run; the receiver says that it does.
    Committing,
    /// Asked about an earlier migration; the receiver answers.
    Resolving,
    /// The receiver compares files.
    Checking,
    /// Over.
    Closed,
}

/// A frame came at the wrong time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a {kind:?} frame has no place in phase {phase:?}")]
pub struct OutOfPhase {
    /// Where the connection stood.
    pub phase: Phase,
    /// The frame that came.
    pub kind: FrameKind,
}

impl Phase {
    /// The phase after a frame of `kind`.
    ///
    /// # Errors
    /// [`OutOfPhase`] if there is no such step.
    pub fn advance(self, kind: FrameKind) -> Result<Self, OutOfPhase> {
        use FrameKind as K;
        let next = match (self, kind) {
            (Self::Closed, _) => None,
            (_, K::Refuse | K::Abort) => Some(Self::Closed),

            (Self::Fresh, K::Hello) => Some(Self::Greeting),
            (Self::Greeting, K::Welcome) => Some(Self::Ready),
            (Self::Ready, K::RoundBegin) => Some(Self::Round),
            (Self::Round | Self::Image, K::ImageOpen) => Some(Self::Image),
            (Self::Image, K::Memfd | K::Chunk) => Some(Self::Image),
            (Self::Round | Self::Image, K::RoundEnd) => Some(Self::Sealing),
            (Self::Sealing, K::RoundAck) => Some(Self::Ready),
            (Self::Ready, K::Finish) => Some(Self::Finishing),
            (Self::Finishing, K::FinishAck) => Some(Self::Closed),

            (Self::Ready, K::File | K::State) => Some(Self::Ready),
            (Self::Ready, K::Check) => Some(Self::Checking),
            (Self::Checking, K::Lacks) => Some(Self::Checking),
            (Self::Checking, K::Checked) => Some(Self::Ready),
            (Self::Ready, K::Restore) => Some(Self::Restoring),
            (Self::Restoring, K::Restored) => Some(Self::Restored),
            (Self::Restored, K::Commit) => Some(Self::Committing),
            (Self::Committing, K::Running) => Some(Self::Ready),
            (Self::Fresh, K::Resolve) => Some(Self::Resolving),
            (Self::Resolving, K::Outcome) => Some(Self::Closed),

            (Self::Fresh, K::Working) => None,
            (
                Self::Greeting
                | Self::Ready
                | Self::Round
                | Self::Image
                | Self::Sealing
                | Self::Finishing
                | Self::Checking
                | Self::Restoring
                | Self::Restored
                | Self::Committing
                | Self::Resolving,
                K::Working,
            ) => Some(self),

            (
                _,
                K::Hello
                | K::Welcome
                | K::RoundBegin
                | K::ImageOpen
                | K::Chunk
                | K::RoundEnd
                | K::RoundAck
                | K::Finish
                | K::FinishAck
                | K::State
                | K::Restore
                | K::Restored
                | K::Commit
                | K::Running
                | K::Resolve
                | K::Outcome
                | K::Memfd
                | K::File
                | K::Check
                | K::Lacks
                | K::Checked,
            ) => None,
        };
        next.ok_or(OutOfPhase { phase: self, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use FrameKind as K;
    use proptest::prelude::*;

    #[test]
    fn a_whole_migration_is_in_phase() {
        let frames = [
            K::Hello,
            K::Welcome,
            K::File,
            K::Check,
            K::Lacks,
            K::Checked,
            K::RoundBegin,
            K::ImageOpen,
            K::Chunk,
            K::Working,
            K::Chunk,
            K::ImageOpen,
            K::Memfd,
            K::RoundEnd,
            K::Working,
            K::RoundAck,
            K::RoundBegin,
            K::RoundEnd,
            K::RoundAck,
            K::State,
            K::State,
            K::Restore,
            K::Working,
            K::Restored,
            K::Commit,
            K::Running,
            K::Finish,
            K::FinishAck,
        ];
        let end = frames.iter().try_fold(Phase::Fresh, |p, &k| p.advance(k));
        assert_eq!(end, Ok(Phase::Closed));
    }

    proptest! {
        /// Whatever comes: no chunk without an image, no image without a round, no round before
        /// the welcome, and nothing after the end.
        #[test]
        fn no_order_of_frames_breaks_the_structure(order in prop::collection::vec(0..FrameKind::ALL.len(), 0..60)) {
            let mut phase = Phase::Fresh;
            let (mut welcomed, mut in_round, mut image, mut over) = (false, false, false, false);
            let (mut restoring, mut restored, mut committed) = (false, false, false);
            for kind in order.into_iter().map(|i| FrameKind::ALL[i]) {
                let Ok(next) = phase.advance(kind) else { continue };
                prop_assert!(!over);
                match kind {
                    K::Welcome => welcomed = true,
                    K::RoundBegin => { prop_assert!(welcomed && !in_round); in_round = true; image = false; }
                    K::ImageOpen => { prop_assert!(in_round); image = true; }
                    K::Memfd | K::Chunk => prop_assert!(in_round && image),
                    K::RoundEnd => { prop_assert!(in_round); }
                    K::RoundAck => { prop_assert!(in_round); in_round = false; }
                    K::Refuse | K::Abort | K::FinishAck | K::Outcome => over = true,
                    K::Restore => { prop_assert!(welcomed && !in_round); restoring = true; }
                    K::Restored => { prop_assert!(restoring); restored = true; }
                    K::Commit => { prop_assert!(restored); committed = true; }
                    K::Running => {
                        prop_assert!(committed);
                        (restoring, restored, committed) = (false, false, false);
                    }
                    K::State => prop_assert!(welcomed && !in_round),
                    K::File | K::Check => prop_assert!(welcomed && !in_round),
                    K::Lacks | K::Checked | K::Hello | K::Finish | K::Working | K::Resolve => {}
                }
                phase = next;
            }
        }
    }
}
