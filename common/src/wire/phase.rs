//! Which frame may follow which: one table that both ends obey.

use super::frame::FrameKind;

/// State of a connection. Both ends advance it with every frame sent *and* received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Connected. The sender begins.
    Fresh,
    /// Hello was sent. The receiver replies.
    Greeting,
    /// Between rounds.
    Ready,
    /// In a round, before its first image.
    Round,
    /// In an image of a round.
    Image,
    /// The round was sent. The receiver makes it durable.
    Sealing,
    /// No more rounds follow. The receiver acknowledges.
    Finishing,
    /// The receiver restores the process.
    Restoring,
    /// The process is restored, and does not run.
    Restored,
    /// The receiver resumes the process.
    Committing,
    /// The sender asked for the outcome of an earlier migration. The receiver replies.
    Resolving,
    /// The receiver compares files.
    Checking,
    /// The conversation is over.
    Closed,
}

/// A frame that the phase does not permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unexpected {kind:?} frame in phase {phase:?}")]
pub struct OutOfPhase {
    /// Phase of the connection.
    pub phase: Phase,
    /// Kind of the frame.
    pub kind: FrameKind,
}

impl Phase {
    /// Returns the phase after a frame of this kind.
    ///
    /// # Errors
    /// [`OutOfPhase`] if the frame is not permitted.
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
            (Self::Checking, K::FileProblem) => Some(Self::Checking),
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
                | K::FileProblem
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
    fn a_whole_migration_is_permitted() {
        let frames = [
            K::Hello,
            K::Welcome,
            K::File,
            K::Check,
            K::FileProblem,
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
        /// No chunk outside an image, no image outside a round, no round before Welcome, and no frame after
        /// the end.
        #[test]
        fn permitted_frames_are_well_nested(order in prop::collection::vec(0..FrameKind::ALL.len(), 0..60)) {
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
                    K::FileProblem | K::Checked | K::Hello | K::Finish | K::Working | K::Resolve => {}
                }
                phase = next;
            }
        }
    }
}
