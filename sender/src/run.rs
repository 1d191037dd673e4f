//! From the command line to an exit code: sets up what was asked for, runs it, and reports.

use crate::advice::{self, Advice, Failure};
use crate::cli::Cli;
use crate::copy::{Copier, WrittenPages};
use crate::dirty;
use crate::freeze::{FreezeError, Freezer, Then, check_signal_permission, process_list};
use crate::handover::{
    Found, Handover, HandoverError, Pipes, Records, ResolveError, Resolved, hold, resolve,
};
use crate::migrate::{MigrateError, Parts, Plan, migrate};
use crate::progress::{LogWriter, Progress};
use crate::report::{Interrupted, Report};
use crate::sink::{Connect, PageSink, SinkError};
use crate::target::process::{namespace_depth, pid_in_namespace};
use nix::sys::signal::Signal;
use pageferry_common::cli::{Exit, Plaintext, start_log};
use pageferry_common::criu::Criu;
use pageferry_common::proc::capabilities::{self, lacking};
use pageferry_common::proc::process::ProcessId;
use pageferry_common::sys::rlimit::raise_descriptor_limit;
use pageferry_common::{BufferPool, Claim, MigrationId, Token, with_causes};
use rustls::ClientConfig;
use std::net::ToSocketAddrs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

/// Runs `send` and prints its result. Returns the exit code.
#[must_use]
pub fn run(cli: &Cli) -> ExitCode {
    start_log(cli.verbose, LogWriter::default);
    raise_descriptor_limit();
    let done = match (cli.resolve, &cli.to, cli.pid) {
        (Some(root), _, _) if cli.list => list_interrupted(cli, root),
        (Some(Some(root)), _, _) => resolve_migration(cli, root),
        (Some(None), _, _) => Err(Failure::ResolveWhat),
        (None, Some(to), Some(pid)) => send(cli, to, pid).map(|report| print_report(cli, &report)),
        (None, _, _) => unreachable!("clap requires both"),
    };
    let exit = match done {
        Ok(()) => Exit::Done,
        Err(failure) => {
            let Advice { exit, hint } = advice::of_failure(&failure);
            eprintln!("send: {:#}", anyhow::Error::new(failure));
            if !hint.is_empty() {
                eprintln!("send: {hint}");
            }
            exit
        }
    };
    exit.into()
}

fn print_report(cli: &Cli, report: &Report) {
    if cli.json {
        let json = serde_json::to_string(report).expect("a report is plain data");
        println!("{json}");
    }
}

/// Resolves an interrupted migration, and prints what was found and done.
fn resolve_migration(cli: &Cli, root: i32) -> Result<(), Failure> {
    let Resolved {
        to,
        command,
        result,
    } = resolve(root, cli.verdict(), cli.timeout, cli.tls.client()?)?;
    let process = format!("process {root} ({command})");
    let text = match result {
        Found::NothingLeft => {
            format!("nothing is left of {process} here; its record is removed ({to} was not asked)")
        }
        Found::Moved(killed) => {
            format!("{process} runs at {to}; its copy here is gone ({killed} processes killed)")
        }
        Found::Kept => format!("{process} does not run at {to}; it continues here"),
        Found::TakenBack(why) => format!(
            "{to} did not answer ({}): {process} continues here; it may have run there for a moment",
            with_causes(&why)
        ),
        Found::GivenUp(why, killed) => format!(
            "{to} did not answer ({}): {process} is gone here ({killed} processes killed)",
            with_causes(&why)
        ),
    };
    eprintln!("send: {text}");
    Ok(())
}

/// Prints the interrupted migrations of this host, or that of one process, on standard output.
fn list_interrupted(cli: &Cli, root: Option<i32>) -> Result<(), Failure> {
    let mut list = Records::default().list().map_err(ResolveError::from)?;
    list.retain(|listed| root.is_none_or(|root| listed.record.root.pid == root));
    if cli.json {
        let list: Vec<_> = list.iter().map(Interrupted::new).collect();
        let json = serde_json::to_string(&list).expect("a list is plain data");
        println!("{json}");
        return Ok(());
    }
    for listed in &list {
        println!("{}", Interrupted::new(listed));
    }
    if list.is_empty() {
        eprintln!("send: no migration is interrupted on this host");
    }
    Ok(())
}

/// Copies or moves the target.
fn send(cli: &Cli, to: &str, pid: i32) -> Result<Report, Failure> {
    ignore_suspension()?;
    let tls = cli.tls.client()?;
    if tls.is_none() {
        check_plaintext(cli, to)?;
    }
    let claim = new_claim(pid)?;
    check_permissions(cli, pid)?;
    if cli.migrate {
        check_in_doubt(pid)?;
    }
    let handover = handover(cli, to, pid, claim)?;
    let mut tracker = dirty::probe(cli.tracker)?;
    let mut freezer = Freezer::start(Path::new("/proc/self/exe")).map_err(MigrateError::from)?;
    let written_pages = match cli.skip_unchanged {
        true => WrittenPages::Compare,
        false => WrittenPages::Send,
    };
    let mut copier = Copier::new(pid, written_pages).map_err(Failure::Prepare)?;
    let pool = BufferPool::new(usize::from(cli.buffers));
    let mut sink = connect(cli, to, claim, tls, &pool).map_err(MigrateError::from)?;
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
        copier: &mut copier,
        tracker: tracker.as_mut(),
        sink: sink.as_mut(),
        pool: &pool,
        progress: &progress,
    };
    migrate(&plan, parts, &mut report)?;
    Ok(report)
}

/// Ignores the signals by which a terminal suspends programs: a suspended sender would leave a frozen target
/// frozen.
fn ignore_suspension() -> Result<(), Failure> {
    for signal in [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU] {
        crate::sys::signals::ignore(signal).map_err(Failure::Prepare)?;
    }
    Ok(())
}

/// Checks that memory does not cross a network in the clear unless the user permits it.
fn check_plaintext(cli: &Cli, to: &str) -> Result<(), Failure> {
    let policy = Plaintext::from_flag(cli.insecure);
    if policy == Plaintext::Anywhere {
        return Ok(());
    }
    let addresses = to.to_socket_addrs().map_err(|source| Failure::Address {
        to: to.to_owned(),
        source,
    })?;
    policy.check(to, addresses.map(|address| address.ip()))?;
    Ok(())
}

/// Returns a new identity for the migration of the tree under `pid`.
fn new_claim(pid: i32) -> Result<Claim, Failure> {
    let gone = |_| Failure::NoTarget(pid);
    let depth = namespace_depth(pid).map_err(gone)?;
    Ok(Claim {
        id: MigrationId(random()?),
        root_pid: pid_in_namespace(pid, depth).map_err(gone)?,
        token: Token(random()?),
    })
}

fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| Failure::Prepare(error.into()))?;
    Ok(bytes)
}

/// Checks before the first round what would fail in the last.
fn check_permissions(cli: &Cli, pid: i32) -> Result<(), Failure> {
    if cli.then != Then::Run || cli.migrate {
        check_signal_permission(pid).map_err(|why| MigrateError::from(FreezeError::from(why)))?;
    }
    let lacking = lacking(&capabilities::TO_DUMP);
    if cli.migrate && !lacking.is_empty() {
        return Err(Failure::Capabilities(lacking));
    }
    Ok(())
}

/// Checks that no earlier move of this tree, or of a part of it, is in doubt: the other copy may run.
fn check_in_doubt(pid: i32) -> Result<(), Failure> {
    let tree = process_list(pid).into_iter();
    let tree: Vec<_> = tree
        .filter_map(|process| ProcessId::find(process.pid))
        .collect();
    let checked = Records::default().check_in_doubt(&tree);
    checked.map_err(|why| MigrateError::from(HandoverError::from(why)).into())
}

/// Returns how to hand the target over; `None` without `--migrate`.
fn handover(cli: &Cli, to: &str, pid: i32, claim: Claim) -> Result<Option<Handover>, Failure> {
    if !cli.migrate {
        return Ok(None);
    }
    let mut criu = Criu::find(cli.criu.as_deref())?.with_options(&cli.criu_args)?;
    if cli.tcp_established {
        criu = criu.prefer_nftables();
    }
    let hierarchy = hold::probe(claim.id, pid).map_err(Failure::Hold)?;
    Ok(Some(Handover {
        criu,
        options: cli.criu_options(),
        pipes: match cli.break_pipes {
            true => Pipes::Break,
            false => Pipes::Refuse,
        },
        state_dump: cli.state_dump,
        to: to.to_owned(),
        claim,
        hierarchy,
        records: Records::default(),
    }))
}

/// Connects to the receiver, and checks that it can do what was asked for.
fn connect(
    cli: &Cli,
    to: &str,
    claim: Claim,
    tls: Option<Arc<ClientConfig>>,
    pool: &BufferPool,
) -> Result<Box<dyn PageSink>, SinkError> {
    let connect = Connect {
        to: to.to_owned(),
        claim,
        stall: cli.timeout,
        reconnect_for: cli.reconnect_for,
        max_frozen: cli.max_frozen,
        tls,
        compression: cli.compress,
        needs_restore: cli.migrate,
    };
    let mut sink = cli.dialect.connect(connect, pool)?;
    match cli.migrate && sink.destination().is_none() {
        true => Err(SinkError::NoRestore),
        false => Ok(sink),
    }
}
