//! From the command line to an exit code, and of every failure what to do about it.

use crate::cli::{Cli, Command, RestoreHow, Serve, ServePages};
use crate::quota::Bounds;
use crate::restore::Restorer;
use crate::server::tls::Secure;
use crate::server::{self, Ended, ExitPolicy, Options};
use crate::session::page_client::{ServeError, Served};
use crate::session::{DumpParents, Limits, Migration, ServerContext};
use crate::storage::store::{Store, StoreError};
use crate::tools::certs;
use crate::tools::flatten::{Pages, flatten};
use crate::tools::verify::verify;
use crate::with_causes;
use pageferry_common::cli::{Exit, Plaintext, start_log};
use pageferry_common::criu::session::Criu;
use pageferry_common::proc::capabilities::{self, lacking};
use pageferry_common::sys::rlimit::raise_descriptors;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use time::OffsetDateTime;

/// Runs `receive`.
#[must_use]
pub fn run(cli: &Cli) -> ExitCode {
    start_log(cli.serve.verbose, io::stderr);
    raise_descriptors();
    let exit = match &cli.command {
        Some(Command::Flatten { dir, out, skeleton }) => run_flatten(dir, out, *skeleton),
        Some(Command::ServePages(options)) => run_serve_pages(options),
        Some(Command::Certs { dir, host, days }) => run_certs(dir, host, *days),
        Some(Command::Verify { dir }) => run_verify(dir),
        None => run_serve(&cli.serve),
    };
    exit.into()
}

fn run_flatten(dir: &Path, out: &Path, skeleton: bool) -> Exit {
    let pages = match skeleton {
        true => Pages::NotLazy,
        false => Pages::All,
    };
    match flatten(dir, out, pages, |image| tracing::info!(%image, "merging")) {
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

fn run_certs(dir: &Path, hosts: &[String], days: u16) -> Exit {
    let now = OffsetDateTime::now_utc();
    match certs::make(dir, hosts, now..now + time::Duration::days(days.into())) {
        Ok(()) => {
            let dir = dir.display();
            println!(
                "{dir}: keep ca.key away from both hosts\n\
                 here:   receive --tls-ca {dir}/ca.pem --tls-cert {dir}/receive.pem \
                 --tls-key {dir}/receive.key ...\n\
                 there:  send --tls-ca ca.pem --tls-cert send.pem --tls-key send.key ..."
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

/// Gives the pages of finished images to whoever connects, each client on a thread of its own.
fn run_serve_pages(options: &ServePages) -> Exit {
    if let Err(exit) = check_plaintext(options.listen, options.insecure) {
        return exit;
    }
    let served = match Served::load(&options.dir) {
        Ok(served) => served,
        Err(error) => {
            complain(error, "it takes a directory that `receive` has completed");
            return Exit::Unusable;
        }
    };
    let listener = match std::net::TcpListener::bind(options.listen) {
        Ok(listener) => listener,
        Err(error) => return cannot_listen(options.listen, error),
    };
    match listener.local_addr() {
        Ok(at) => log_listening(at),
        Err(error) => return complain(error, ""),
    }
    tracing::info!(processes = served.processes(), "serving pages");
    std::thread::scope(|scope| {
        for stream in listener.incoming() {
            let served = &served;
            match stream {
                // One client at a time then: the one that gets everything is the last.
                Ok(stream) if options.once => {
                    if serve_client(served, &stream, options.timeout) {
                        return Exit::Done;
                    }
                }
                Ok(stream) => {
                    scope.spawn(move || serve_client(served, &stream, options.timeout));
                }
                Err(error) => tracing::error!(%error, "cannot accept a connection"),
            }
        }
        Exit::Failed
    })
}

/// Serves one client; whether it said that it has everything.
fn serve_client(served: &Served, stream: &TcpStream, stall: Duration) -> bool {
    let peer = stream.peer_addr().ok();
    let prepared = stream
        .set_nodelay(true)
        // It may be silent for as long as nobody needs pages, but must take what it wants.
        .and_then(|()| stream.set_write_timeout(Some(stall)));
    match prepared
        .map_err(ServeError::Io)
        .and_then(|()| served.serve(stream, stream))
    {
        Ok((pages, complete)) => {
            tracing::info!(
                event = "page_client_done",
                ?peer,
                pages,
                complete,
                "the client is gone"
            );
            complete
        }
        Err(error) => {
            tracing::warn!(
                event = "page_client_failed",
                ?peer,
                why = with_causes(&error),
                "a client is given up"
            );
            false
        }
    }
}

fn check_plaintext(listen: SocketAddr, insecure: bool) -> Result<(), Exit> {
    let checked = Plaintext::from_flag(insecure).check(listen, [listen.ip()]);
    checked.map_err(|forbidden| {
        complain(forbidden, Plaintext::ADVICE);
        Exit::Usage
    })
}

fn cannot_listen(listen: SocketAddr, error: io::Error) -> Exit {
    let advice = match error.kind() {
        io::ErrorKind::AddrInUse => "another program listens there: take another port",
        io::ErrorKind::PermissionDenied => "ports below 1024 are for root",
        _ => "",
    };
    let what = anyhow::Error::new(error).context(format!("cannot listen on {listen}"));
    complain(what, advice);
    Exit::Unusable
}

fn run_serve(serve: &Serve) -> Exit {
    let (Some(listen), Some(dir)) = (serve.listen, &serve.dir) else {
        unreachable!("clap requires both without a subcommand");
    };
    let secure = match Secure::new(&serve.tls, &serve.allow) {
        Ok(secure) => secure,
        Err(error) => {
            let advice = "`receive certs DIR --host NAME` makes certificates for both ends";
            complain(error, advice);
            return Exit::Usage;
        }
    };
    if secure.is_none()
        && let Err(exit) = check_plaintext(listen, serve.insecure)
    {
        return exit;
    }
    match serve_until_end(serve, secure, listen, dir) {
        Ok(Ended::Once(migration, result)) => {
            if serve.json {
                report(&migration, result.as_ref().err().map(ToString::to_string));
            }
            match result {
                Ok(()) => Exit::Done,
                Err(_) => Exit::Failed,
            }
        }
        Ok(Ended::Interrupted) => Exit::Interrupted,
        Ok(Ended::Terminated) => Exit::Terminated,
        Err(exit) => exit,
    }
}

fn serve_until_end(
    serve: &Serve,
    secure: Option<Secure>,
    listen: SocketAddr,
    dir: &Path,
) -> Result<Ended, Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| complain(error, ""))?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(listen)
            .await
            .map_err(|error| cannot_listen(listen, error))?;
        let store = Store::open(dir).map_err(|error| {
            let advice = match &error {
                StoreError::InUse { .. } => "give each receiver a directory of its own",
                StoreError::File(_) => "--dir takes a directory that this user may write to",
            };
            complain(error, advice);
            Exit::Unusable
        })?;
        let at = listener.local_addr().map_err(|error| complain(error, ""))?;
        log_listening(at);
        let restorer = match serve.restore {
            Some(how) => Some(restorer(how, serve)?),
            None => None,
        };
        let context = ServerContext {
            store,
            limits: limits(serve),
            restorer,
            dump_parents: match serve.chain_dumps {
                true => DumpParents::Newest,
                false => DumpParents::None,
            },
        };
        let options = Options {
            exit: match serve.once {
                true => ExitPolicy::AfterOne {
                    reconnect_for: serve.reconnect_for,
                },
                false => ExitPolicy::Signal,
            },
            max_senders: usize::from(serve.max_senders),
            secure,
        };
        server::serve(listener, context, options)
            .await
            .map_err(|error| complain(error, ""))
    })
}

fn limits(serve: &Serve) -> Limits {
    Limits {
        stall: serve.timeout,
        handshake: serve.handshake_timeout,
        buffers: usize::from(serve.buffers),
        bounds: Bounds {
            rounds: serve.max_rounds,
            bytes: serve.max_bytes,
            images: serve.max_images as usize,
            keep_free: serve.keep_free,
        },
    }
}

fn restorer(how: RestoreHow, serve: &Serve) -> Result<Restorer, Exit> {
    let criu = Criu::find(serve.criu.as_deref()).map_err(|error| {
        let advice = "--restore takes CRIU 4.1 or later: scripts/install-criu installs one";
        complain(error, advice);
        Exit::Unusable
    })?;
    let criu = criu.with_options(&serve.criu_args).map_err(|error| {
        complain(error, "what follows -- is for CRIU");
        Exit::Usage
    })?;
    let lacking = lacking(&capabilities::TO_RESTORE);
    if !lacking.is_empty() {
        let without = lacking.join(", ");
        tracing::warn!(without, "CRIU will hardly be able to restore");
    }
    let can = how != RestoreHow::Eager && criu.has_lazy_pages();
    if how == RestoreHow::Lazy && !can {
        let what = "CRIU or this kernel has no lazy restore";
        complain(anyhow::anyhow!(what), "say --restore=eager");
        return Err(Exit::Unusable);
    }
    Ok(Restorer {
        criu,
        lazy: can,
        timeout: serve.restore_timeout,
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

/// Logs the address that connections are accepted on, which is the only place where a port chosen by the
/// kernel (`--listen 0`) appears.
fn log_listening(address: SocketAddr) {
    tracing::info!(event = "listening", "listening on {address}");
}
