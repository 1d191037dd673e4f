//! `send --resolve`: ends a hand-over whose outcome the sender did not learn.

use super::hold::{Hierarchy, HoldError};
use super::record::LockedRecord;
use super::{InDoubt, Record, RecordError, Records};
use crate::freeze::{TreeError, check_signal_permission};
use crate::sink::{Outcome, SinkError};
use rustls::ClientConfig;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// What the operator decides if the receiver cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The copy here runs.
    TakeBack,
    /// The copy here is killed.
    GiveUp,
}

/// How a hand-over was resolved.
#[derive(Debug)]
pub struct Resolved {
    /// Address of the receiver.
    pub to: String,
    /// Name of the root's program.
    pub command: String,
    /// What was found and done.
    pub result: Found,
}

/// What [`resolve`] found, and did about it.
#[derive(Debug)]
pub enum Found {
    /// No recorded process is left here. The receiver was not asked.
    NothingLeft,
    /// The target runs at the receiver; this number of processes was killed here.
    Moved(usize),
    /// The receiver will never run the target; it runs here.
    Kept,
    /// The receiver did not answer, and the operator let the target run here.
    TakenBack(SinkError),
    /// The receiver did not answer, and the operator had this number of processes killed here.
    GivenUp(SinkError, usize),
}

/// Why a hand-over could not be resolved. The copy here stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The record cannot be read, does not exist, or is handled by another program.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The record names no migration.
    #[error("the record of process {0} is damaged")]
    Damaged(i32),
    /// The sender may not signal the target.
    #[error(transparent)]
    MayNotSignal(#[from] TreeError),
    /// The receiver could not be asked.
    #[error(transparent)]
    InDoubt(#[from] InDoubt),
    /// The receiver decided otherwise than the operator.
    #[error("{to} answers that the target {answer} there")]
    Decided {
        /// Address of the receiver.
        to: String,
        /// Its answer.
        answer: &'static str,
    },
    /// The tree could not be thawed.
    #[error("cannot release the target")]
    Release(#[from] HoldError),
    /// The tree could not be killed.
    #[error("cannot kill the copy here")]
    Kill(#[source] io::Error),
}

/// Asks the receiver whether it runs the target with this root, for at most `patience`; then releases or
/// kills the copy here and removes the record. If the receiver does not decide, `verdict` does.
///
/// # Errors
/// [`ResolveError`].
pub fn resolve(
    root: i32,
    verdict: Option<Verdict>,
    patience: Duration,
    tls: Option<Arc<ClientConfig>>,
) -> Result<Resolved, ResolveError> {
    let locked = Records::default().open(root)?;
    let (to, command) = (locked.record.to.clone(), locked.record.command.clone());
    let result = match locked.record.is_stale() {
        true => {
            locked.record.clean_up();
            Found::NothingLeft
        }
        false => settle(&locked, verdict, patience, tls)?,
    };
    locked.remove()?;
    Ok(Resolved {
        to,
        command,
        result,
    })
}

/// Asks, and acts on the answer.
fn settle(
    locked: &LockedRecord,
    verdict: Option<Verdict>,
    patience: Duration,
    tls: Option<Arc<ClientConfig>>,
) -> Result<Found, ResolveError> {
    let record = &locked.record;
    let hierarchy = Hierarchy::open()?;
    for process in record.alive() {
        check_signal_permission(process.pid)?;
    }
    let decided = |answer| ResolveError::Decided {
        to: record.to.clone(),
        answer,
    };
    let kill = || record.kill(&hierarchy).map_err(ResolveError::Kill);
    Ok(match (ask(record, patience, tls)?, verdict) {
        (Ok(Outcome::Running), Some(Verdict::TakeBack)) => return Err(decided("runs")),
        (Ok(Outcome::Aborted), Some(Verdict::GiveUp)) => return Err(decided("does not run")),
        (Ok(Outcome::Running), None | Some(Verdict::GiveUp)) => Found::Moved(kill()?),
        (Ok(Outcome::Aborted), None | Some(Verdict::TakeBack)) => {
            record.release(&hierarchy)?;
            Found::Kept
        }
        (Err(why), Some(Verdict::TakeBack)) => {
            record.release(&hierarchy)?;
            Found::TakenBack(why)
        }
        (Err(why), Some(Verdict::GiveUp)) => Found::GivenUp(why, kill()?),
        (Err(source), None) => {
            let root = record.root.pid;
            return Err(InDoubt { root, source }.into());
        }
    })
}

/// Asks the receiver that the record names for the outcome.
fn ask(
    record: &Record,
    patience: Duration,
    tls: Option<Arc<ClientConfig>>,
) -> Result<Result<Outcome, SinkError>, ResolveError> {
    let (Some(claim), Some(receiver)) = (record.claim(), record.receiver()) else {
        return Err(ResolveError::Damaged(record.root.pid));
    };
    Ok(crate::sink::resolve(
        record.to.clone(),
        receiver,
        claim,
        patience,
        tls,
    ))
}
