//! From the command line to an exit code: sets everything up, and says of every failure what to do
//! about it.

use crate::advice::{Failure, judge};
use crate::cli::Cli;
use crate::copy::{Copier, WrittenPages};
use crate::dirty;
use crate::freeze::{FreezeError, Freezer, Then, check_signal_permission};
use crate::handover::{Handover, HandoverError, Record};
use crate::migrate::{MigrateError, Parts, Plan, migrate};
use crate::progress::{LogWriter, Progress};
use crate::report::Report;
use crate::sink::{Connect, Outcome, SinkError};
use crate::target::process::namespace_depth;
use nix::sys::signal::Signal;
use pageferry_common::cli::{Exit, Plaintext, start_log};
use pageferry_common::criu::session::Criu;
use pageferry_common::proc::capabilities::{self, lacking};
use pageferry_common::sys::rlimit::raise_descriptors;
use pageferry_common::{BufferPool, Claim, MigrationId, Token};
use std::net::ToSocketAddrs;
use std::path::Path;
use std::process::ExitCode;

/// Runs `send`.
#[must_use]
pub fn run(cli: &Cli) -> ExitCode {
    start_log(cli.verbose, LogWriter::default);
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
    exit.into()
}

/// Ends a move whose end was lost sight of: asks the receiver, and lets the copy here go on or go.
fn resolve(cli: &Cli, root: i32) -> Result<(), Failure> {
    let record = Record::read(root)?;
    let claim = record.claim().ok_or(Failure::BadRecord(root))?;
    check_signal_permission(root).map_err(|why| MigrateError::from(FreezeError::from(why)))?;
    let tls = cli.tls.client()?;
    match crate::sink::resolve(record.to.clone(), claim, cli.timeout, tls) {
        Ok(Outcome::Running) => {
            record.signal(Signal::SIGKILL);
            record.await_end();
            eprintln!(
                "send: process {root} runs at {}; its copy here is gone",
                record.to
            );
        }
        Ok(Outcome::Aborted) => {
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
        check_plaintext(cli, to)?;
    }
    let gone = |_| MigrateError::TargetGone(pid);
    let depth = namespace_depth(pid).map_err(gone)?;
    let root_pid = crate::target::process::pid_in_namespace(pid, depth).map_err(gone)?;
    let claim = Claim {
        id: MigrationId(random()?),
        root_pid,
        token: Token(random()?),
    };
    if cli.then != Then::Run || cli.migrate {
        // Found out in the end, all rounds would be in vain.
        check_signal_permission(pid).map_err(|why| MigrateError::from(FreezeError::from(why)))?;
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
    let written_pages = match cli.skip_unchanged {
        true => WrittenPages::Compare,
        false => WrittenPages::Send,
    };
    let mut tree = Copier::new(pid, written_pages).map_err(Failure::Prepare)?;
    let pool = BufferPool::new(usize::from(cli.buffers));
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

/// Checks that memory does not cross a network in the clear unless the user permits it.
fn check_plaintext(cli: &Cli, to: &str) -> Result<(), Failure> {
    let policy = Plaintext::from_flag(cli.insecure);
    if policy == Plaintext::Anywhere {
        return Ok(());
    }
    let resolve = |source| Failure::Resolve {
        to: to.to_owned(),
        source,
    };
    let addresses = to.to_socket_addrs().map_err(resolve)?;
    policy.check(to, addresses.map(|address| address.ip()))?;
    Ok(())
}

fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| Failure::Prepare(error.into()))?;
    Ok(bytes)
}
