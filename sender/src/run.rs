//! From the command line to an exit code: sets everything up, and says of every failure what to do
//! about it.

use crate::cli::Cli;
use crate::copy::stream::StreamError;
use crate::copy::{CollectError, Copier, ListError, SendError};
use crate::dirty::{self, NoTracker};
use crate::freeze::{FreezeError, Freezer, Then, TreeError, may_signal};
use crate::handover::{Handover, HandoverError, Record, RecordError};
use crate::migrate::{MigrateError, Parts, Plan, migrate};
use crate::progress::{LogWriter, Progress};
use crate::report::Report;
use crate::sink::{Connect, SinkError};
use crate::target::process::namespace_depth;
use nix::sys::signal::Signal;
use pageferry_common::criu::session::{BadOption, Criu, CriuError};
use pageferry_common::proc::capabilities::{self, lacking};
use pageferry_common::sys::rlimit::raise_descriptors;
use pageferry_common::tls::TlsError;
use pageferry_common::wire::WireError;
use pageferry_common::{BufferPool, Claim, MigrationId, Token};
use std::io::{self, IsTerminal, Read};
use std::net::ToSocketAddrs;
use std::path::Path;
use std::process::ExitCode;

/// What `send` exits with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed, for a reason without a code of its own.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// The target is not there (any more).
    TargetGone = 3,
    /// The receiver refused, and said why.
    Refused = 4,
    /// The kernel forbids it.
    NotPermitted = 5,
    /// The receiver does not say whether the process runs there; here it is stopped.
    InDoubt = 6,
    /// The user said stop.
    Interrupted = 130,
}

/// Runs `send`.
#[must_use]
pub fn run(cli: &Cli) -> ExitCode {
    start_log(cli.verbose);
    raise_descriptors();
    let done = match (cli.resolve, &cli.to, cli.pid) {
        (Some(root), _, _) => resolve(cli, root).map(|()| None),
        (None, Some(to), Some(pid)) => send(cli, to, pid).map(Some),
        (None, _, _) => unreachable!("clap requires both"),
    };
    let exit = match done {
        Ok(None) => Exit::Done,
        Ok(Some(report)) => {
            if cli.json {
                println!(
                    "{}",
                    serde_json::to_string(&report).expect("a report is plain data")
                );
            }
            Exit::Done
        }
        Err(failure) => {
            let error = anyhow::Error::new(failure);
            eprintln!("send: {error:#}");
            let failure = error.downcast_ref().expect("it was made of a Failure");
            let (exit, advice) = judge(failure);
            if !advice.is_empty() {
                eprintln!("send: {advice}");
            }
            exit
        }
    };
    ExitCode::from(exit as u8)
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0} is not this host, and memory would cross the network in the clear")]
    Plaintext(String),
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

/// Ends a move whose end was lost sight of: asks the receiver, and lets the copy here go on or go.
fn resolve(cli: &Cli, root: i32) -> Result<(), Failure> {
    let record = Record::read(root)?;
    let claim = record.claim().ok_or(Failure::BadRecord(root))?;
    may_signal(root).map_err(|why| MigrateError::from(FreezeError::from(why)))?;
    let tls = cli.tls.client()?;
    match crate::sink::resolve(record.to.clone(), claim, cli.timeout, tls) {
        Ok(true) => {
            record.signal(Signal::SIGKILL);
            record.await_end();
            eprintln!(
                "send: process {root} runs at {}; its copy here is gone",
                record.to
            );
        }
        Ok(false) => {
            record.let_go();
            eprintln!(
                "send: process {root} never ran at {}; it goes on here",
                record.to
            );
        }
        Err(source) => {
            return Err(MigrateError::from(HandoverError::InDoubt { root, source }).into());
        }
    }
    Record::remove(root)?;
    Ok(())
}

fn send(cli: &Cli, to: &str, pid: i32) -> Result<Report, Failure> {
    // Suspended from a terminal, it would leave a frozen target frozen.
    for signal in [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU] {
        crate::sys::signals::ignore(signal).map_err(Failure::Prepare)?;
    }
    let tls = cli.tls.client()?;
    if tls.is_none() {
        refuse_plaintext(cli, to)?;
    }
    let gone = |_| MigrateError::TargetGone(pid);
    let depth = namespace_depth(pid).map_err(gone)?;
    let root_pid = crate::target::process::pid_in_namespace(pid, depth).map_err(gone)?;
    let claim = Claim {
        id: MigrationId(random().map_err(Failure::Prepare)?),
        root_pid,
        token: Token(random().map_err(Failure::Prepare)?),
    };
    if cli.then != Then::Run || cli.migrate {
        // Found out in the end, all rounds would be in vain.
        may_signal(pid).map_err(|why| MigrateError::from(FreezeError::from(why)))?;
    }
    let lacking = lacking(&capabilities::TO_DUMP);
    if cli.migrate && !lacking.is_empty() {
        return Err(Failure::MayNotMove(lacking));
    }
    let handover = match cli.migrate {
        true => Some(Handover {
            criu: match Criu::find(cli.criu.as_deref())?.with_options(&cli.criu_args)? {
                criu if cli.tcp_established => criu.prefer_nftables(),
                criu => criu,
            },
            options: cli.criu_options(),
            state_dump: cli.state_dump,
            to: to.to_owned(),
            claim,
        }),
        false => None,
    };
    let mut tracker = dirty::probe(cli.tracker)?;
    let mut freezer = Freezer::start(Path::new("/proc/self/exe")).map_err(MigrateError::from)?;
    let mut tree = Copier::new(pid, cli.skip_unchanged).map_err(Failure::Prepare)?;
    let pool = BufferPool::new(usize::from(cli.buffers));
    let connect = Connect {
        to: to.to_owned(),
        claim,
        stall: cli.timeout,
        reconnect_for: cli.reconnect_for,
        max_frozen: cli.max_frozen,
        tls,
        compression: cli.compress,
        moves: cli.migrate,
    };
    let sink = cli.dialect.connect(connect, &pool);
    let mut sink = sink.map_err(MigrateError::from)?;
    if handover.is_some() && sink.destination().is_none() {
        return Err(MigrateError::from(SinkError::NoRestore).into());
    }
    let progress = Progress::start(sink.counters());
    let mut report = Report::new(pid, tracker.name());
    report.migration = claim.id.to_string();
    sink.directory().clone_into(&mut report.directory);
    let plan = Plan {
        root: pid,
        limits: cli.limits(),
        then: cli.then,
        handover,
    };
    let parts = Parts {
        freezer: &mut freezer,
        tracker: tracker.as_mut(),
        sink: sink.as_mut(),
        pool: &pool,
        progress: &progress,
    };
    migrate(&plan, &mut tree, parts, &mut report)?;
    Ok(report)
}

/// Memory is full of secrets: beyond loopback only if asked for by name.
fn refuse_plaintext(cli: &Cli, to: &str) -> Result<(), Failure> {
    if cli.insecure {
        return Ok(());
    }
    let resolve = |source| Failure::Resolve {
        to: to.to_owned(),
        source,
    };
    let mut addresses = to.to_socket_addrs().map_err(resolve)?;
    match addresses.all(|address| address.ip().is_loopback()) {
        true => Ok(()),
        false => Err(Failure::Plaintext(to.to_owned())),
    }
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn start_log(verbose: u8) {
    let level = match verbose {
        0 => tracing::Level::INFO,
        1 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(LogWriter::default)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
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
fn judge(failure: &Failure) -> (Exit, &'static str) {
    match failure {
        Failure::Plaintext(_) => (
            Exit::Usage,
            "give certificates (--tls-ca, --tls-cert, --tls-key; `receive certs` makes some), send \
             through a tunnel to a loopback port, or say --insecure",
        ),
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
        SinkError::Wire(_) | SinkError::Disagreement => (
            Exit::Failed,
            "the target runs; the receiver keeps the rounds it acknowledged",
        ),
        SinkError::Io(_) => (Exit::Failed, "the target runs"),
    }
}
