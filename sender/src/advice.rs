//! The exit code and the hint of each error.

use crate::copy::stream::StreamError;
use crate::copy::{CollectError, ListError, SendError};
use crate::dirty::{self, NoTracker};
use crate::freeze::{FreezeError, TreeError};
use crate::handover::{HandoverError, RecordError};
use crate::migrate::MigrateError;
use crate::sink::SinkError;
use pageferry_common::cli::{Exit, Plaintext, PlaintextForbidden};
use pageferry_common::criu::session::{BadOption, CriuError};
use pageferry_common::tls::TlsError;
use pageferry_common::wire::WireError;
use std::io;

/// Why `send` failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Plaintext(#[from] PlaintextForbidden),
    #[error("cannot find {to}")]
    Resolve { to: String, source: io::Error },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Tracker(#[from] NoTracker),
    #[error(transparent)]
    Migrate(#[from] MigrateError),
    #[error(transparent)]
    Criu(#[from] CriuError),
    #[error("an option for CRIU")]
    Option(#[from] BadOption),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("the record of process {0} is damaged")]
    BadRecord(i32),
    #[error("cannot move a process without {}", .0.join(", "))]
    MayNotMove(Vec<&'static str>),
    #[error("cannot prepare")]
    Prepare(#[source] io::Error),
}

const MAY_NOT_TRACE: &str = "run it as root or as the target's user; for others' processes, and those that \
    are not dumpable, it takes CAP_SYS_PTRACE";

const MAY_NOT_READ: &str = "run it as root or as the target's user; what /proc tells of others' processes, and \
    of those that are not dumpable, takes CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH";

const MAY_NOT_OPEN: &str = "run it as root: shared memory takes CAP_CHECKPOINT_RESTORE, and others' \
    CAP_DAC_READ_SEARCH";

const MAY_NOT_SIGNAL: &str = "run it as root or as the target's user; to stop or end others' processes takes \
    CAP_KILL";

const DESCRIPTORS: &str = "the target runs; allow more descriptors (ulimit -n, LimitNOFILE=)";

const CERTIFICATES: &str = "`receive certs DIR --host NAME` makes certificates for both ends: here \
    --tls-ca ca.pem --tls-cert send.pem --tls-key send.key";

/// The exit code of a failure, and what to do about it.
pub(crate) fn judge(failure: &Failure) -> (Exit, &'static str) {
    match failure {
        Failure::Plaintext(_) => (Exit::Usage, Plaintext::ADVICE),
        Failure::Tls(_) => (Exit::Usage, CERTIFICATES),
        Failure::Resolve { .. } => (Exit::Failed, "--to takes HOST:PORT"),
        Failure::Tracker(_) => (
            Exit::Failed,
            "--tracker auto takes what this kernel has; --tracker hash works everywhere",
        ),
        Failure::Criu(_) => (
            Exit::Failed,
            "--migrate takes CRIU 4.1 or later: scripts/install-criu installs one, --criu names it",
        ),
        Failure::Option(_) => (Exit::Usage, "what follows -- is for CRIU"),
        Failure::Record(_) => (
            Exit::Failed,
            "without a record, no move of this process was lost sight of",
        ),
        Failure::MayNotMove(_) => (Exit::NotPermitted, "CRIU takes root and CAP_SYS_ADMIN"),
        Failure::BadRecord(_) => (Exit::Failed, ""),
        Failure::Prepare(_) => (Exit::Failed, ""),
        Failure::Migrate(error) => judge_migration(error),
    }
}

fn judge_migration(error: &MigrateError) -> (Exit, &'static str) {
    match error {
        MigrateError::TargetGone(_) => (Exit::TargetGone, "is the PID right?"),
        MigrateError::Uptime(_) => (Exit::Failed, ""),
        MigrateError::HandoversLost(_) => (
            Exit::Failed,
            "the target runs; the receiver's log says more",
        ),
        MigrateError::Handover(error) => judge_handover(error),
        MigrateError::Sink(error)
        | MigrateError::Send(SendError::Stream(StreamError::Sink(error))) => judge_sink(error),
        MigrateError::Freeze(error) => judge_freeze(error),
        MigrateError::Tree(error) => match error {
            CollectError::List(ListError::Proc { source, .. }) => judge_io(source, MAY_NOT_READ),
            CollectError::List(ListError::Segment { source, .. }) => judge_io(source, MAY_NOT_OPEN),
            CollectError::Track(dirty::TrackError::Io { source, .. }) => {
                judge_io(source, MAY_NOT_READ)
            }
            CollectError::Track(dirty::TrackError::Freeze(error)) => judge_freeze(error),
        },
        MigrateError::Send(SendError::Ambiguous(_)) => (Exit::Failed, ""),
        MigrateError::Send(SendError::Stream(StreamError::Source(error))) => {
            judge_io(error, MAY_NOT_READ)
        }
    }
}

fn judge_handover(error: &HandoverError) -> (Exit, &'static str) {
    match error {
        HandoverError::InDoubt { .. } => (Exit::InDoubt, "do not let it go on before that"),
        HandoverError::Sink(error)
        | HandoverError::Send(SendError::Stream(StreamError::Sink(error))) => judge_sink(error),
        HandoverError::Files { .. } => (
            Exit::Refused,
            "install them there, the same builds; the target runs",
        ),
        HandoverError::MayNotStop(_) => (Exit::NotPermitted, MAY_NOT_SIGNAL),
        HandoverError::Stop(_)
        | HandoverError::Dump(_)
        | HandoverError::Io(_)
        | HandoverError::Pages(_)
        | HandoverError::Send(_)
        | HandoverError::Tree(_)
        | HandoverError::Record(_) => (Exit::Failed, "the target runs"),
    }
}

fn judge_freeze(error: &FreezeError) -> (Exit, &'static str) {
    match error {
        FreezeError::Freezer(_) => (Exit::Failed, "the target runs"),
        FreezeError::Tree(error) => match error {
            TreeError::NoProcess(_) => (Exit::TargetGone, "is the PID right?"),
            TreeError::Traced { .. } => (
                Exit::Failed,
                "a process has one tracer at a time: detach the other first",
            ),
            TreeError::NotPermitted(_) => (Exit::NotPermitted, MAY_NOT_TRACE),
            TreeError::MayNotSignal(_) => (Exit::NotPermitted, MAY_NOT_SIGNAL),
            TreeError::OwnTree(_) => (
                Exit::Usage,
                "start it from outside the tree (another terminal, setsid, systemd-run)",
            ),
            TreeError::Stuck { .. } => (Exit::Failed, "the target runs; try again later"),
            TreeError::Io { .. } => (Exit::Failed, "the target runs"),
        },
    }
}

fn judge_io(error: &io::Error, may_not: &'static str) -> (Exit, &'static str) {
    match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::PermissionDenied, _) => (Exit::NotPermitted, may_not),
        (_, Some(libc::EMFILE | libc::ENFILE)) => (Exit::Failed, DESCRIPTORS),
        _ => (Exit::Failed, "the target runs"),
    }
}

fn judge_sink(error: &SinkError) -> (Exit, &'static str) {
    match error {
        SinkError::Connect { .. } => (
            Exit::Failed,
            "is `receive --listen PORT --dir DIR` running there, and the port right?",
        ),
        SinkError::Wire(WireError::Refused { .. }) => (
            Exit::Refused,
            "the target runs; the receiver's log says more",
        ),
        SinkError::Tls(_) => (Exit::Refused, CERTIFICATES),
        SinkError::PageServer(_) => (
            Exit::Failed,
            "the target runs; start `criu page-server` once for each round, from the second on with \
             --prev-images-dir",
        ),
        SinkError::NoRestore => (Exit::Refused, "start it with `receive --restore`"),
        SinkError::State(_) => (Exit::Failed, "the target runs"),
        SinkError::Interrupted => (Exit::Interrupted, "the target runs"),
        SinkError::Wire(_) | SinkError::UnexpectedReply => (
            Exit::Failed,
            "the target runs; the receiver keeps the rounds it acknowledged",
        ),
        SinkError::Io(_) => (Exit::Failed, "the target runs"),
    }
}
