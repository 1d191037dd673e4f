//! The exit code and the hint of each error: what a user or a script can do about it.

use crate::copy::stream::StreamError;
use crate::copy::{CollectError, ListError, SendError};
use crate::dirty::{NoTracker, TrackError};
use crate::freeze::{FreezeError, TreeError};
use crate::handover::hold::HoldError;
use crate::handover::{HandoverError, RecordError, ResolveError};
use crate::migrate::MigrateError;
use crate::sink::SinkError;
use pageferry_common::cli::{Exit, Plaintext, PlaintextForbidden};
use pageferry_common::criu::{BadOption, CriuError};
use pageferry_common::tls::TlsError;
use pageferry_common::wire::WireError;
use std::io;

/// Why `send` failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The target does not exist.
    #[error("there is no process {0}")]
    NoTarget(i32),
    /// The receiver is on another host, and the connection would not be encrypted.
    #[error(transparent)]
    Plaintext(#[from] PlaintextForbidden),
    /// The name of the receiver's host cannot be resolved.
    #[error("cannot resolve {to}")]
    Address { to: String, source: io::Error },
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The kernel lacks the dirty tracker.
    #[error(transparent)]
    Tracker(#[from] NoTracker),
    /// CRIU cannot be used.
    #[error(transparent)]
    Criu(#[from] CriuError),
    /// An option for CRIU is invalid or reserved.
    #[error("invalid option for CRIU")]
    CriuOption(#[from] BadOption),
    /// The sender lacks capabilities that CRIU needs.
    #[error("cannot move a process without {}", .0.join(", "))]
    Capabilities(Vec<&'static str>),
    /// Signals, random numbers or memory could not be set up.
    #[error("cannot set up the sender")]
    Prepare(#[source] io::Error),
    /// The migration failed.
    #[error(transparent)]
    Migrate(#[from] MigrateError),
    /// The target could not be frozen in a cgroup.
    #[error("cannot move a process that cannot be frozen in a cgroup")]
    Hold(#[source] HoldError),
    /// `--resolve` lacks a PID.
    #[error("--resolve needs a PID, or --list")]
    ResolveWhat,
    /// An interrupted hand-over could not be resolved.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
}

/// Exit code and hint for an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Advice {
    /// Exit code for scripts.
    pub exit: Exit,
    /// Hint for the user.
    pub hint: &'static str,
}

const TARGET_RUNS: &str = "the target runs";

const CRIU_KILLED_TARGET: &str =
    "CRIU kills a target that it has dumped: check whether it still runs";

const IS_PID_RIGHT: &str = "check the PID";

const MAY_NOT_TRACE: &str = "run it as root or as the target's user; processes of other users, and processes \
    that are not dumpable, need CAP_SYS_PTRACE";

const MAY_NOT_READ: &str = "run it as root or as the target's user; /proc of other users' processes, and of \
    processes that are not dumpable, needs CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH";

const MAY_NOT_OPEN: &str = "run it as root: shared memory needs CAP_CHECKPOINT_RESTORE, and that of other \
    users CAP_DAC_READ_SEARCH";

const MAY_NOT_SIGNAL: &str = "run it as root or as the target's user; stopping or killing other users' \
    processes needs CAP_KILL";

const DESCRIPTORS: &str = "the target runs; allow more descriptors (ulimit -n, LimitNOFILE=)";

const CERTIFICATES: &str = "`receive certs DIR --host NAME` creates certificates for both ends: here \
    --tls-ca ca.pem --tls-cert send.pem --tls-key send.key";

const NEEDS_CGROUP: &str = "the target runs; a move needs Linux 5.2 with cgroup v2, and permission to make cgroups \
    in it";

const NOT_SENT: &str = "nothing was done: another copy of the target may run";

const DO_NOT_RESUME: &str = "do not resume the copy here before that";

const RECEIVER_LOG: &str = "the target runs; the receiver's log has details";

fn advice(exit: Exit, hint: &'static str) -> Advice {
    Advice { exit, hint }
}

/// Returns the exit code and the hint for a failure of `send`.
pub(crate) fn of_failure(failure: &Failure) -> Advice {
    match failure {
        Failure::NoTarget(_) => advice(Exit::TargetGone, IS_PID_RIGHT),
        Failure::Plaintext(_) => advice(Exit::Usage, Plaintext::ADVICE),
        Failure::Address { .. } => advice(Exit::Failed, "--to takes HOST:PORT"),
        Failure::Tls(_) => advice(Exit::Usage, CERTIFICATES),
        Failure::Tracker(_) => advice(
            Exit::Failed,
            "--tracker auto uses what this kernel supports; --tracker hash works everywhere",
        ),
        Failure::Criu(_) => advice(
            Exit::Failed,
            "--migrate needs CRIU 4.1 or later: scripts/install-criu installs it, --criu takes its path",
        ),
        Failure::CriuOption(_) => advice(Exit::Usage, "arguments after -- are options for CRIU"),
        Failure::Capabilities(_) => advice(Exit::NotPermitted, "CRIU needs root and CAP_SYS_ADMIN"),
        Failure::Hold(error) => of_hold(error),
        Failure::ResolveWhat => advice(
            Exit::Usage,
            "send --resolve --list lists what can be resolved",
        ),
        Failure::Prepare(_) => advice(Exit::Failed, ""),
        Failure::Migrate(error) => of_migration(error),
        Failure::Resolve(error) => of_resolve(error),
    }
}

fn of_migration(error: &MigrateError) -> Advice {
    match error {
        MigrateError::TargetGone(_) => advice(Exit::TargetGone, ""),
        MigrateError::Freeze(error) => of_freeze(error),
        MigrateError::Collect(error) => of_collect(error),
        MigrateError::Send(error) => of_send(error),
        MigrateError::Sink(error) => of_sink(error),
        MigrateError::Handover(error) => of_handover(error),
        MigrateError::HandoversLost(_) => advice(Exit::Failed, RECEIVER_LOG),
        MigrateError::Guards(_) => advice(
            Exit::Failed,
            "the target runs; use CRIU 4.2 or later here and at the receiver (`--criu PATH`)",
        ),
        MigrateError::NoGuards(error) => of_io(error, MAY_NOT_READ),
        MigrateError::Uptime(_) => advice(Exit::Failed, TARGET_RUNS),
    }
}

fn of_handover(error: &HandoverError) -> Advice {
    match error {
        HandoverError::Files { .. } => advice(
            Exit::Refused,
            "the target runs; install the same builds of these files on the receiver's host",
        ),
        HandoverError::Pipes(_) => advice(
            Exit::Failed,
            "nothing was sent; move those processes with it (start from their parent), or accept broken pipes \
             with --break-pipes",
        ),
        HandoverError::TargetGone(_) => advice(Exit::TargetGone, ""),
        HandoverError::Collect(error) => of_collect(error),
        HandoverError::Send(error) => of_send(error),
        HandoverError::Sink(error) => of_sink(error),
        HandoverError::MayNotKill(_) => advice(Exit::NotPermitted, MAY_NOT_SIGNAL),
        HandoverError::InDoubt(_) => advice(Exit::InDoubt, DO_NOT_RESUME),
        HandoverError::Record(RecordError::InDoubt { .. }) => advice(Exit::InDoubt, NOT_SENT),
        HandoverError::NotReleased { .. } | HandoverError::NotKilled { .. } => {
            advice(Exit::InDoubt, "")
        }
        HandoverError::Hold(error) => of_hold(error),
        HandoverError::Tree(error) => of_tree(error),
        HandoverError::CriuFinishedEarly => advice(Exit::Failed, CRIU_KILLED_TARGET),
        HandoverError::CannotFreeze(_)
        | HandoverError::CriuFailed(_)
        | HandoverError::CriuExited(_)
        | HandoverError::CriuExitedAfterDump
        | HandoverError::NoPageServer
        | HandoverError::PageServer(_)
        | HandoverError::Cancelled
        | HandoverError::FollowerThread(_)
        | HandoverError::Io(_)
        | HandoverError::Record(_) => advice(Exit::Failed, TARGET_RUNS),
    }
}

fn of_hold(error: &HoldError) -> Advice {
    match error.source.kind() {
        io::ErrorKind::PermissionDenied => advice(Exit::NotPermitted, NEEDS_CGROUP),
        _ => advice(Exit::Failed, NEEDS_CGROUP),
    }
}

fn of_resolve(error: &ResolveError) -> Advice {
    match error {
        ResolveError::Record(RecordError::Missing(_)) => advice(
            Exit::Failed,
            "there is nothing to resolve; send --resolve --list lists what there is",
        ),
        ResolveError::Record(RecordError::Busy { .. }) => {
            advice(Exit::Failed, "wait until that program exits")
        }
        ResolveError::Record(_) | ResolveError::Damaged(_) => advice(Exit::Failed, ""),
        ResolveError::MayNotSignal(error) => of_tree(error),
        ResolveError::InDoubt(_) => advice(Exit::InDoubt, DO_NOT_RESUME),
        ResolveError::Decided { .. } => {
            advice(Exit::Failed, "run it without --take-back and --give-up")
        }
        ResolveError::Release(_) | ResolveError::Kill(_) => {
            advice(Exit::Failed, "the record is kept: resolve it again")
        }
    }
}

fn of_freeze(error: &FreezeError) -> Advice {
    match error {
        FreezeError::Freezer(_) => advice(Exit::Failed, TARGET_RUNS),
        FreezeError::Interrupted => advice(Exit::Interrupted, TARGET_RUNS),
        FreezeError::Tree(error) => of_tree(error),
    }
}

fn of_tree(error: &TreeError) -> Advice {
    match error {
        TreeError::NoProcess(_) => advice(Exit::TargetGone, IS_PID_RIGHT),
        TreeError::Traced { .. } => advice(
            Exit::Failed,
            "a process can have one tracer at a time: detach the other first",
        ),
        TreeError::Paused { .. } => advice(
            Exit::Failed,
            "resume it first (docker unpause, podman unpause, or write 0 to its cgroup.freeze)",
        ),
        TreeError::NotPermitted(_) => advice(Exit::NotPermitted, MAY_NOT_TRACE),
        TreeError::MayNotSignal(_) => advice(Exit::NotPermitted, MAY_NOT_SIGNAL),
        TreeError::OwnTree(_) => advice(
            Exit::Usage,
            "start it from outside the tree (another terminal, setsid, systemd-run)",
        ),
        TreeError::Stuck { .. } => advice(Exit::Failed, "the target runs; try again later"),
        TreeError::Io { .. } => advice(Exit::Failed, TARGET_RUNS),
    }
}

fn of_collect(error: &CollectError) -> Advice {
    match error {
        CollectError::List(ListError::Proc { source, .. })
        | CollectError::Track(TrackError::Io { source, .. }) => of_io(source, MAY_NOT_READ),
        CollectError::List(ListError::Segment { source, .. }) => of_io(source, MAY_NOT_OPEN),
        CollectError::Track(TrackError::Freeze(error)) => of_freeze(error),
    }
}

fn of_send(error: &SendError) -> Advice {
    match error {
        SendError::Ambiguous(_) => advice(Exit::Failed, TARGET_RUNS),
        SendError::Stream(StreamError::Source(error)) => of_io(error, MAY_NOT_READ),
        SendError::Stream(StreamError::Sink(error)) => of_sink(error),
    }
}

/// Returns the advice for an error of the kernel; `forbidden` is the hint if the kernel forbids it.
fn of_io(error: &io::Error, forbidden: &'static str) -> Advice {
    match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::PermissionDenied, _) => advice(Exit::NotPermitted, forbidden),
        (_, Some(libc::EMFILE | libc::ENFILE)) => advice(Exit::Failed, DESCRIPTORS),
        _ => advice(Exit::Failed, TARGET_RUNS),
    }
}

fn of_sink(error: &SinkError) -> Advice {
    match error {
        SinkError::Connect { .. } => advice(
            Exit::Failed,
            "is `receive --listen PORT --dir DIR` running there, and the port right?",
        ),
        SinkError::Wire(WireError::Refused { .. }) => advice(Exit::Refused, RECEIVER_LOG),
        SinkError::AnotherReceiver => {
            advice(Exit::Refused, "the receiver that began must be asked")
        }
        SinkError::Tls(_) => advice(Exit::Refused, CERTIFICATES),
        SinkError::PageServer(_) => advice(
            Exit::Failed,
            "the target runs; start `criu page-server` once for each round, from the second on with \
             --prev-images-dir",
        ),
        SinkError::NoRestore => advice(Exit::Refused, "start it with `receive --restore`"),
        SinkError::Interrupted => advice(Exit::Interrupted, TARGET_RUNS),
        SinkError::Wire(_) | SinkError::UnexpectedReply => advice(
            Exit::Failed,
            "the target runs; the receiver keeps the rounds that it has acknowledged",
        ),
        SinkError::State(_) | SinkError::Io(_) => advice(Exit::Failed, TARGET_RUNS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::InDoubt;
    use crate::handover::Records;
    use pageferry_common::criu::page_server::UnknownCommand;
    use pageferry_common::wire::RefuseCode;
    use std::net::IpAddr;

    /// Exit code of an error, and a word in its hint.
    type Expected = (Exit, &'static str);

    fn assert_advised(cases: Vec<(Failure, Expected)>) {
        for (failure, (exit, word)) in cases {
            let advice = of_failure(&failure);
            assert_eq!(advice.exit, exit, "{failure:?}");
            assert!(advice.hint.contains(word), "{failure:?}: {}", advice.hint);
        }
    }

    fn os(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    fn proc(errno: i32) -> CollectError {
        let (pid, source) = (7, os(errno));
        CollectError::List(ListError::Proc { pid, source })
    }

    fn segment(errno: i32) -> CollectError {
        let (pid, inode, source) = (7, 8, os(errno));
        CollectError::List(ListError::Segment { pid, inode, source })
    }

    fn tracking(errno: i32) -> CollectError {
        let (pid, source) = (7, os(errno));
        CollectError::Track(TrackError::Io { pid, source })
    }

    fn reading(errno: i32) -> SendError {
        SendError::Stream(StreamError::Source(os(errno)))
    }

    fn refused() -> SinkError {
        SinkError::Wire(WireError::Refused {
            code: RefuseCode::Limit,
            reason: "too much".to_owned(),
        })
    }

    fn in_doubt() -> InDoubt {
        InDoubt {
            root: 7,
            source: SinkError::Wire(WireError::Closed),
        }
    }

    fn busy() -> RecordError {
        RecordError::Busy {
            root: 7,
            holder: "8".to_owned(),
        }
    }

    fn cannot_hold() -> HoldError {
        HoldError {
            action: "make",
            cgroup: "/x".to_owned(),
            source: os(libc::EROFS),
        }
    }

    fn no_record() -> RecordError {
        Records::default().open(i32::MAX).unwrap_err()
    }

    #[test]
    fn failures_of_the_setup_have_exit_codes() {
        let plaintext = Plaintext::LoopbackOnly
            .check("x", [IpAddr::from([192, 0, 2, 1])])
            .unwrap_err();
        let unusable = CriuError::Unusable {
            path: "/bin/true".into(),
            source: os(libc::ENOENT),
        };
        assert_advised(vec![
            (Failure::NoTarget(7), (Exit::TargetGone, "PID")),
            (Failure::Plaintext(plaintext), (Exit::Usage, "--insecure")),
            (
                Failure::Address {
                    to: "x".to_owned(),
                    source: os(libc::ENOENT),
                },
                (Exit::Failed, "HOST:PORT"),
            ),
            (
                Failure::Tls(rustls::Error::DecryptError.into()),
                (Exit::Usage, "receive certs"),
            ),
            (Failure::Criu(unusable), (Exit::Failed, "CRIU 4.1 or later")),
            (
                Failure::CriuOption(BadOption::Malformed("x".to_owned())),
                (Exit::Usage, "--"),
            ),
            (
                Failure::Capabilities(vec!["CAP_SYS_ADMIN"]),
                (Exit::NotPermitted, "root"),
            ),
            (Failure::Hold(cannot_hold()), (Exit::Failed, "cgroup v2")),
            (Failure::ResolveWhat, (Exit::Usage, "--list")),
            (Failure::Prepare(os(libc::ENOMEM)), (Exit::Failed, "")),
        ]);
    }

    #[test]
    fn failures_of_the_freeze_have_exit_codes() {
        let traced = TreeError::Traced {
            pid: 7,
            tracer: 8,
            name: "strace".to_owned(),
        };
        let io = TreeError::Io {
            pid: 7,
            error: "x".to_owned(),
        };
        for (error, expected) in [
            (TreeError::NoProcess(7), (Exit::TargetGone, "PID")),
            (traced, (Exit::Failed, "detach")),
            (
                TreeError::NotPermitted(7),
                (Exit::NotPermitted, "CAP_SYS_PTRACE"),
            ),
            (TreeError::MayNotSignal(7), (Exit::NotPermitted, "CAP_KILL")),
            (TreeError::OwnTree(7), (Exit::Usage, "outside")),
            (
                TreeError::Stuck { pid: 7, tid: 8 },
                (Exit::Failed, "try again"),
            ),
            (io, (Exit::Failed, TARGET_RUNS)),
        ] {
            let tracked = CollectError::Track(TrackError::Freeze(error.clone().into()));
            assert_advised(vec![
                (MigrateError::Freeze(error.clone().into()).into(), expected),
                (MigrateError::Collect(tracked).into(), expected),
                (ResolveError::MayNotSignal(error).into(), expected),
            ]);
        }
        let died = MigrateError::Freeze(FreezeError::Freezer(os(libc::EPIPE)));
        assert_advised(vec![(died.into(), (Exit::Failed, TARGET_RUNS))]);
    }

    /// Errors that a plain run and a hand-over share have the same exit code and hint in both.
    #[test]
    fn plain_run_and_hand_over_agree() {
        let in_both = |plain: MigrateError, moving: HandoverError, expected: Expected| {
            assert_advised(vec![
                (plain.into(), expected),
                (MigrateError::Handover(moving).into(), expected),
            ]);
        };
        in_both(
            MigrateError::TargetGone(7),
            HandoverError::TargetGone(7),
            (Exit::TargetGone, ""),
        );
        for forbidden in [libc::EPERM, libc::EACCES] {
            for (error, hint) in [
                (proc as fn(i32) -> CollectError, "CAP_DAC_READ_SEARCH"),
                (segment, "CAP_CHECKPOINT_RESTORE"),
                (tracking, "CAP_SYS_PTRACE"),
            ] {
                in_both(
                    error(forbidden).into(),
                    error(forbidden).into(),
                    (Exit::NotPermitted, hint),
                );
            }
            in_both(
                reading(forbidden).into(),
                reading(forbidden).into(),
                (Exit::NotPermitted, "CAP_SYS_PTRACE"),
            );
        }
        for (errno, hint) in [
            (libc::EMFILE, "ulimit"),
            (libc::ENFILE, "ulimit"),
            (libc::EIO, TARGET_RUNS),
        ] {
            let expected = (Exit::Failed, hint);
            in_both(proc(errno).into(), proc(errno).into(), expected);
            in_both(reading(errno).into(), reading(errno).into(), expected);
        }
        let ambiguous = || SendError::Ambiguous(8);
        let expected = (Exit::Failed, TARGET_RUNS);
        in_both(ambiguous().into(), ambiguous().into(), expected);
        for (sink, expected) in sink_errors() {
            in_both(sink().into(), sink().into(), expected);
            let sent = || SendError::Stream(StreamError::Sink(sink()));
            in_both(sent().into(), sent().into(), expected);
        }
    }

    fn sink_errors() -> Vec<(fn() -> SinkError, Expected)> {
        vec![
            (
                || SinkError::Connect {
                    to: "x".to_owned(),
                    source: os(libc::ECONNREFUSED),
                },
                (Exit::Failed, "receive --listen"),
            ),
            (refused, (Exit::Refused, TARGET_RUNS)),
            (
                || SinkError::Wire(WireError::Closed),
                (Exit::Failed, "keeps the rounds"),
            ),
            (
                || SinkError::UnexpectedReply,
                (Exit::Failed, "keeps the rounds"),
            ),
            (
                || SinkError::AnotherReceiver,
                (Exit::Refused, "receiver that began"),
            ),
            (
                || SinkError::Tls("x".to_owned()),
                (Exit::Refused, "receive certs"),
            ),
            (
                || SinkError::PageServer("x".to_owned()),
                (Exit::Failed, "--prev-images-dir"),
            ),
            (
                || SinkError::NoRestore,
                (Exit::Refused, "receive --restore"),
            ),
            (
                || SinkError::State(os(libc::EIO)),
                (Exit::Failed, TARGET_RUNS),
            ),
            (|| SinkError::Interrupted, (Exit::Interrupted, TARGET_RUNS)),
            (|| SinkError::Io(os(libc::EIO)), (Exit::Failed, TARGET_RUNS)),
        ]
    }

    #[test]
    fn failures_of_a_hand_over_have_exit_codes() {
        let text = || "x".to_owned();
        let files = HandoverError::Files {
            root: 7,
            lacks: vec![text()],
        };
        for (error, expected) in [
            (files, (Exit::Refused, "install the same builds")),
            (
                HandoverError::MayNotKill(7),
                (Exit::NotPermitted, "CAP_KILL"),
            ),
            (in_doubt().into(), (Exit::InDoubt, "do not resume")),
            (
                HandoverError::CannotFreeze(text()),
                (Exit::Failed, TARGET_RUNS),
            ),
            (
                HandoverError::CriuFailed(text()),
                (Exit::Failed, TARGET_RUNS),
            ),
            (
                HandoverError::CriuExitedAfterDump,
                (Exit::Failed, TARGET_RUNS),
            ),
            (HandoverError::Hold(cannot_hold()), (Exit::Failed, "cgroup")),
            (
                HandoverError::NotReleased {
                    root: 7,
                    source: cannot_hold(),
                },
                (Exit::InDoubt, ""),
            ),
            (
                HandoverError::NotKilled {
                    root: 7,
                    source: os(libc::EPERM),
                },
                (Exit::InDoubt, ""),
            ),
            (
                RecordError::InDoubt {
                    root: 7,
                    to: text(),
                }
                .into(),
                (Exit::InDoubt, "nothing was done"),
            ),
            (busy().into(), (Exit::Failed, TARGET_RUNS)),
            (
                HandoverError::CriuExited(os(libc::EPIPE)),
                (Exit::Failed, TARGET_RUNS),
            ),
            (
                HandoverError::CriuFinishedEarly,
                (Exit::Failed, CRIU_KILLED_TARGET),
            ),
            (HandoverError::NoPageServer, (Exit::Failed, TARGET_RUNS)),
            (UnknownCommand(0).into(), (Exit::Failed, TARGET_RUNS)),
            (HandoverError::Cancelled, (Exit::Failed, TARGET_RUNS)),
            (
                HandoverError::FollowerThread(os(libc::EAGAIN)),
                (Exit::Failed, TARGET_RUNS),
            ),
            (os(libc::ENOSPC).into(), (Exit::Failed, TARGET_RUNS)),
            (no_record().into(), (Exit::Failed, TARGET_RUNS)),
        ] {
            assert_advised(vec![(MigrateError::Handover(error).into(), expected)]);
        }
        assert_advised(vec![
            (
                MigrateError::Guards(7).into(),
                (Exit::Failed, "CRIU 4.2 or later"),
            ),
            (
                MigrateError::HandoversLost(5).into(),
                (Exit::Failed, TARGET_RUNS),
            ),
        ]);
    }

    #[test]
    fn failures_to_resolve_have_exit_codes() {
        assert_advised(vec![
            (
                ResolveError::from(no_record()).into(),
                (Exit::Failed, "nothing to resolve"),
            ),
            (ResolveError::Damaged(7).into(), (Exit::Failed, "")),
            (
                ResolveError::from(busy()).into(),
                (Exit::Failed, "wait until"),
            ),
            (
                ResolveError::Decided {
                    to: "x".to_owned(),
                    answer: "runs",
                }
                .into(),
                (Exit::Failed, "--take-back"),
            ),
            (
                ResolveError::from(cannot_hold()).into(),
                (Exit::Failed, "record is kept"),
            ),
            (
                ResolveError::Kill(os(libc::EPERM)).into(),
                (Exit::Failed, "record is kept"),
            ),
            (
                ResolveError::from(in_doubt()).into(),
                (Exit::InDoubt, "do not resume"),
            ),
        ]);
    }
}
