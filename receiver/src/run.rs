//! From the command line to an exit code, and of every failure what to do about it.

use crate::cli::{Cli, Command, Serve};
use crate::dialect::{Limits, Migration};
use crate::image::flatten::flatten;
use crate::image::verify::verify;
use crate::server::{self, Ended, Options};
use crate::store::{Store, StoreError};
use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;

/// What `receive` exits with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed: the migration, the check.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// The port or the directory cannot be used.
    Unusable = 4,
}

/// Runs `receive`.
#[must_use]
pub fn run(cli: &Cli) -> ExitCode {
    start_log(cli.serve.verbose);
    let exit = match &cli.command {
        Some(Command::Flatten { dir, out }) => run_flatten(dir, out),
        Some(Command::Verify { dir }) => run_verify(dir),
        None => return run_serve(&cli.serve),
    };
    ExitCode::from(exit as u8)
}

fn run_flatten(dir: &Path, out: &Path) -> Exit {
    match flatten(dir, out, |image| tracing::info!(%image, "merging")) {
        Ok(done) => {
            println!(
                "{}: {} images with {} pages, merged from {} rounds",
                out.display(),
                done.images,
                done.pages,
                done.levels
            );
            Exit::Done
        }
        Err(error) => complain(error, ""),
    }
}

fn run_verify(dir: &Path) -> Exit {
    match verify(dir) {
        Ok(verified) if verified.problems.is_empty() => {
            println!(
                "{}: {} rounds, {} images, {} pages in the newest: all right",
                dir.display(),
                verified.levels,
                verified.images,
                verified.pages
            );
            Exit::Done
        }
        Ok(verified) => {
            for problem in &verified.problems {
                eprintln!("receive: {problem}");
            }
            Exit::Failed
        }
        Err(error) => complain(error, ""),
    }
}

fn run_serve(serve: &Serve) -> ExitCode {
    let (Some(listen), Some(dir)) = (serve.listen, &serve.dir) else {
        unreachable!("clap requires both without a subcommand");
    };
    if !listen.ip().is_loopback() && !serve.insecure {
        let advice = "memory is full of secrets and would come in the clear: listen on loopback \
                      and use a tunnel, or say --insecure";
        let what = anyhow::anyhow!("{listen} can be reached from other hosts");
        complain(what, advice);
        return ExitCode::from(Exit::Usage as u8);
    }
    match serve_until_end(serve, listen, dir) {
        Ok(Ended::Once(migration, result)) => {
            if serve.json {
                report(&migration, result.as_ref().err().map(ToString::to_string));
            }
            ExitCode::from(match result {
                Ok(()) => Exit::Done as u8,
                Err(_) => Exit::Failed as u8,
            })
        }
        // As a shell would say it.
        Ok(Ended::Signal(number)) => ExitCode::from(128 + number as u8),
        Err(exit) => ExitCode::from(exit as u8),
    }
}

fn serve_until_end(serve: &Serve, listen: SocketAddr, dir: &Path) -> Result<Ended, Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| complain(error, ""))?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(listen)
            .await
            .map_err(|error| {
                let advice = match error.kind() {
                    io::ErrorKind::AddrInUse => "another program listens there: take another port",
                    io::ErrorKind::PermissionDenied => "ports below 1024 are for root",
                    _ => "",
                };
                complain(
                    anyhow::Error::new(error).context(format!("cannot listen on {listen}")),
                    advice,
                );
                Exit::Unusable
            })?;
        let store = Store::open(dir).map_err(|error| {
            let advice = match &error {
                StoreError::InUse { .. } => "give each receiver a directory of its own",
                StoreError::File(_) => "--dir takes a directory that this user may write to",
            };
            complain(error, advice);
            Exit::Unusable
        })?;
        let at = listener.local_addr().map_err(|error| complain(error, ""))?;
        eprintln!("listening on {at}");
        let options = Options {
            once: serve.once,
            max_senders: usize::from(serve.max_senders),
            limits: Limits {
                stall: serve.timeout,
                buffers: usize::from(serve.buffers),
            },
            chain_dumps: serve.chain_dumps,
        };
        server::serve(listener, store, options)
            .await
            .map_err(|error| complain(error, ""))
    })
}

fn report(migration: &Migration, error: Option<String>) {
    let mut report = serde_json::to_value(migration).expect("a migration is plain data");
    report["error"] = error.into();
    println!("{report}");
}

fn complain(error: impl Into<anyhow::Error>, advice: &str) -> Exit {
    eprintln!("receive: {:#}", error.into());
    if !advice.is_empty() {
        eprintln!("receive: {advice}");
    }
    Exit::Failed
}

fn start_log(verbose: u8) {
    let level = match verbose {
        0 => tracing::Level::INFO,
        1 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
}
