//! The commit: decides at which end the target runs.
//!
//! Each state is a type, and each step consumes it, so that no step can be left out or repeated:
//!
//! | state | where the target can run | if the sender dies |
//! |---|---|---|
//! | [`Restored`] | here, once CRIU undoes the dump | it runs here |
//! | [`Stopped`] | nowhere, until the receiver decides | it stays stopped; `send --resolve` asks |
//! | [`Committed`] | at the receiver | it runs there; `send --resolve` kills the copy here |

use super::dump::Dump;
use super::{Handover, HandoverError, InDoubt, Record};
use crate::sink::{CommitError, Destination, Outcome, SinkError};
use nix::sys::signal::Signal;
use pageferry_common::criu::images::stopped;

/// The receiver has restored the target and holds it back. CRIU waits for the permission to kill the target
/// here; until then it can undo everything.
pub(super) struct Restored {
    root: i32,
    dump: Dump,
}

/// The target is stopped here by a SIGSTOP, which outlasts CRIU, and a record of the hand-over is on disk.
pub(super) struct Stopped {
    record: Record,
    restored: Restored,
}

/// The target runs at the receiver.
pub(super) struct Committed {
    record: Record,
    restored: Restored,
}

/// Decision of the receiver.
enum Decision {
    /// The target runs there.
    Committed,
    /// The target does not run there, and never will.
    Aborted(SinkError),
    /// The receiver could not be asked.
    Unknown(SinkError),
}

impl Restored {
    pub(super) fn new(root: i32, dump: Dump) -> Self {
        Self { root, dump }
    }

    /// Writes the record and stops the target, so that it cannot run here even if CRIU undoes the dump.
    pub(super) fn stop(self, handover: &Handover) -> Result<Stopped, HandoverError> {
        let job_stops = stopped(self.dump.images())?;
        let record = Record::new(&handover.to, handover.claim, self.root, &job_stops);
        record.write()?;
        let forbidden = record.signal(Signal::SIGSTOP);
        let stopped = Stopped {
            record,
            restored: self,
        };
        match forbidden {
            Some(pid) => Err(stopped.roll_back(HandoverError::MayNotStop(pid))),
            None => Ok(stopped),
        }
    }
}

impl Stopped {
    /// Asks the receiver to commit. If the receiver aborts instead, the target runs here again.
    pub(super) fn commit(self, receiver: &mut dyn Destination) -> Result<Committed, HandoverError> {
        let root = self.restored.root;
        match decision(receiver) {
            Decision::Committed => Ok(Committed {
                record: self.record,
                restored: self.restored,
            }),
            Decision::Aborted(why) => Err(self.roll_back(why.into())),
            Decision::Unknown(source) => Err(InDoubt { root, source }.into()),
        }
    }

    /// Resumes the target here, and returns the error to report.
    fn roll_back(self, why: HandoverError) -> HandoverError {
        self.record.release();
        let removed = Record::remove(self.restored.root);
        self.restored.dump.abort();
        match removed {
            Ok(()) => why,
            Err(error) => error.into(),
        }
    }
}

impl Committed {
    /// Kills the target here and removes the record.
    pub(super) fn kill_source(self) -> Result<(), HandoverError> {
        let Restored { root, dump } = self.restored;
        if let Err(why) = dump.finish() {
            tracing::warn!(
                event = "criu_did_not_kill", %why,
                "CRIU did not kill the copy here: killing it"
            );
        }
        self.record.signal(Signal::SIGKILL);
        self.record.await_exit();
        Ok(Record::remove(root)?)
    }
}

/// Asks the receiver to commit, and asks again on new connections if the answer is lost.
fn decision(receiver: &mut dyn Destination) -> Decision {
    let lost = match receiver.commit() {
        Ok(()) => return Decision::Committed,
        Err(CommitError::Refused(why)) => return Decision::Aborted(why),
        Err(CommitError::InDoubt(why)) => why,
    };
    tracing::warn!(
        event = "commit_answer_lost", why = %lost,
        "the receiver's answer to the commit is lost: asking again"
    );
    match receiver.query_outcome() {
        Ok(Outcome::Running) => Decision::Committed,
        Ok(Outcome::Aborted) => Decision::Aborted(lost),
        Err(why) => Decision::Unknown(why),
    }
}
