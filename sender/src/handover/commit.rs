//! The commit: decides at which end the target runs.
//!
//! Each state is a type, and each step consumes it, so that no step can be left out or repeated:
//!
//! | state | where the target can run | if the sender dies |
//! |---|---|---|
//! | [`Restored`] | here, once CRIU undoes the dump | it runs here |
//! | [`Recorded`] | here, once CRIU undoes the dump | it runs here; `send --resolve` removes the record |
//! | [`Held`] | nowhere, until the receiver decides | it stays frozen; `send --resolve` asks |
//! | [`Killing`] | at the receiver | it runs there; `send --resolve` kills the copy here |
//! | [`Releasing`] | here | `send --resolve` releases it |
//! | [`Released`] | here | it runs here; `send --resolve` removes the record |
//!
//! The names are those of the model that checks the protocol ([`decide`] is its `Committing` and `Asking`).

use super::dump::Dump;
use super::hold::Hierarchy;
use super::record::LockedRecord;
use super::{Handover, HandoverError, InDoubt, Record};
use crate::freeze::{check_signal_permission, process_list};
use crate::sink::{CommitError, Destination, Outcome, SinkError};
use pageferry_common::ReceiverId;
use pageferry_common::proc::process::ProcessId;
use pageferry_common::with_causes;
use std::time::Instant;

/// The receiver has restored the target and holds it back. CRIU waits for the permission to kill the target
/// here; until then it can undo everything.
pub(super) struct Restored {
    root: i32,
    dump: Dump,
}

/// The record of the hand-over is on disk, and this sender holds its lock.
pub(super) struct Recorded<'a> {
    record: LockedRecord,
    restored: Restored,
    hierarchy: &'a Hierarchy,
}

/// The target is frozen here, which outlasts CRIU and the sender, and has not run since its dump.
pub(super) struct Held<'a>(Recorded<'a>);

/// The target runs at the receiver, and is to be killed here.
pub(super) struct Killing<'a>(Recorded<'a>);

/// The target never runs at the receiver, and is to run here.
struct Releasing<'a>(Recorded<'a>);

/// The target runs here. Its record is still there.
struct Released(LockedRecord);

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

    /// Writes the record, with which `send --resolve` can end the hand-over if this sender cannot.
    pub(super) fn record(
        self,
        handover: &Handover,
        receiver: ReceiverId,
    ) -> Result<Recorded<'_>, HandoverError> {
        let mut tree = Vec::new();
        for process in process_list(self.root) {
            let pid = process.pid;
            tree.push(ProcessId::find(pid).ok_or(HandoverError::TargetGone(pid))?);
            check_signal_permission(pid).map_err(|_| HandoverError::MayNotKill(pid))?;
        }
        if tree.is_empty() {
            return Err(HandoverError::TargetGone(self.root));
        }
        let record = Record::new(&handover.to, receiver, handover.claim, tree);
        let record = record.map_err(HandoverError::Hold)?;
        Ok(Recorded {
            record: handover.records.create(record)?,
            restored: self,
            hierarchy: &handover.hierarchy,
        })
    }
}

impl<'a> Recorded<'a> {
    /// Freezes the target, so that it cannot run here even if CRIU undoes the dump.
    pub(super) fn hold(self, receiver: &mut dyn Destination) -> Result<Held<'a>, HandoverError> {
        let began = Instant::now();
        if let Err(why) = self.record.record.freeze(self.hierarchy) {
            return Err(self.roll_back(HandoverError::Hold(why)));
        }
        tracing::debug!(took = ?began.elapsed(), "the target is frozen in a cgroup");
        if !self.restored.dump.is_criu_alive() {
            // The kernel lets a process run when its tracer exits. Nothing was committed: the receiver
            // aborts.
            receiver.disconnect();
            return Err(self.roll_back(HandoverError::CriuExitedAfterDump));
        }
        Ok(Held(self))
    }

    /// Resumes the target here, and returns the error to report.
    fn roll_back(self, why: HandoverError) -> HandoverError {
        match Releasing(self).release() {
            Ok(released) => released.remove_record(why),
            Err(frozen) => {
                tracing::warn!(event = "not_released", %why, "the move failed, and the target is still frozen");
                frozen
            }
        }
    }
}

impl Releasing<'_> {
    /// Thaws the target, and lets CRIU undo its dump.
    fn release(self) -> Result<Released, HandoverError> {
        let Recorded {
            record,
            restored: Restored { root, dump },
            hierarchy,
        } = self.0;
        if let Err(source) = record.record.release(hierarchy) {
            return Err(HandoverError::NotReleased { root, source });
        }
        dump.abort();
        Ok(Released(record))
    }
}

impl Released {
    /// Removes the record, and returns the error to report.
    fn remove_record(self, why: HandoverError) -> HandoverError {
        match self.0.remove() {
            Ok(()) => why,
            Err(error) => error.into(),
        }
    }
}

impl<'a> Held<'a> {
    /// Asks the receiver to commit. If the receiver aborts instead, the target runs here again.
    pub(super) fn commit(
        self,
        receiver: &mut dyn Destination,
    ) -> Result<Killing<'a>, HandoverError> {
        let root = self.0.restored.root;
        match decide(receiver) {
            Decision::Committed => Ok(Killing(self.0)),
            Decision::Aborted(why) => Err(self.0.roll_back(why.into())),
            Decision::Unknown(source) => Err(InDoubt { root, source }.into()),
        }
    }
}

impl Killing<'_> {
    /// Kills the target here and removes the record.
    pub(super) fn kill_source(self) -> Result<(), HandoverError> {
        let Recorded {
            record,
            restored: Restored { root, dump },
            hierarchy,
        } = self.0;
        if let Err(why) = dump.finish() {
            tracing::warn!(
                event = "criu_did_not_kill", %why,
                "CRIU did not kill the copy here: killing it"
            );
        }
        match record.record.kill(hierarchy) {
            Ok(_) => {
                // The target runs at the receiver, whatever becomes of the record.
                if let Err(error) = record.remove() {
                    tracing::warn!(
                        event = "record_not_removed",
                        why = with_causes(&error),
                        "the record of a finished move is left behind"
                    );
                }
                Ok(())
            }
            Err(source) => Err(HandoverError::NotKilled { root, source }),
        }
    }
}

/// Asks the receiver to commit, and asks again on new connections if the answer is lost.
fn decide(receiver: &mut dyn Destination) -> Decision {
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
