//! From the command line to an exit code, with advice for every error that a user can do something about.

use crate::cli::{Cli, Command, RestoreHow, Serve, ServePages};
use crate::quota::Bounds;
use crate::restore::{Restorer, filler};
use crate::server::tls::Secure;
use crate::server::{self, Ended, ExitPolicy, Options};
use crate::session::page_client::{ClientEnd, ServeError, Served};
use crate::session::{DumpParents, Limits, Migration, ServerContext};
use crate::storage::store::{Store, StoreError};
use crate::tools::certs;
use crate::tools::flatten::{Pages, flatten};
use crate::tools::verify::verify;
use crate::with_causes;
use pageferry_common::cli::{Exit, Plaintext, start_log};
use pageferry_common::criu::Criu;
use pageferry_common::proc::capabilities::{self, lacking};
use pageferry_common::sys::rlimit::raise_descriptor_limit;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;
use time::OffsetDateTime;

/// Runs `receive`.
#[must_use]
pub fn run(cli: &Cli) -> ExitCode {
    start_log(cli.serve.verbose, io::stderr);
    raise_descriptor_limit();
    let done = match &cli.command {
        Some(Command::Flatten { dir, out, skeleton }) => run_flatten(dir, out, *skeleton),
        Some(Command::ServePages(options)) => run_serve_pages(options),
        Some(Command::Certs { dir, host, days }) => run_certs(dir, host, *days),
        Some(Command::Verify { dir }) => run_verify(dir),
        None => run_serve(&cli.serve),
    };
    done.unwrap_or_else(|fault| fault.print()).into()
}

/// An error that ends the program.
struct Fault {
    exit: Exit,
    error: anyhow::Error,
    /// What the user can do about it; may be empty.
    advice: &'static str,
}

impl Fault {
    fn new(exit: Exit, error: impl Into<anyhow::Error>, advice: &'static str) -> Self {
        let error = error.into();
        Self {
            exit,
            error,
            advice,
        }
    }

    fn print(&self) -> Exit {
        eprintln!("receive: {:#}", self.error);
        if !self.advice.is_empty() {
            eprintln!("receive: {}", self.advice);
        }
        self.exit
    }
}

/// Returns the fault of an error without advice.
fn failed(error: impl Into<anyhow::Error>) -> Fault {
    Fault::new(Exit::Failed, error, "")
}

fn run_flatten(dir: &Path, out: &Path, skeleton: bool) -> Result<Exit, Fault> {
    let pages = match skeleton {
        true => Pages::NotLazy,
        false => Pages::All,
    };
    let progress = |image| tracing::info!(event = "image_merging", %image, "merging image");
    let done = flatten(dir, out, pages, progress).map_err(failed)?;
    println!(
        "{}: {} images with {} pages, merged from {} rounds",
        out.display(),
        done.images,
        done.pages,
        done.levels
    );
    Ok(Exit::Done)
}

fn run_certs(dir: &Path, hosts: &[String], days: u16) -> Result<Exit, Fault> {
    let now = OffsetDateTime::now_utc();
    let validity = now..now + time::Duration::days(days.into());
    certs::make(dir, hosts, validity).map_err(failed)?;
    let dir = dir.display();
    println!(
        "{dir}: keep ca.key away from both hosts\n\
         receiver:  receive --tls-ca {dir}/ca.pem --tls-cert {dir}/receive.pem \
         --tls-key {dir}/receive.key ...\n\
         sender:    send --tls-ca ca.pem --tls-cert send.pem --tls-key send.key ..."
    );
    Ok(Exit::Done)
}

fn run_verify(dir: &Path) -> Result<Exit, Fault> {
    let verified = verify(dir).map_err(failed)?;
    if !verified.problems.is_empty() {
        for problem in &verified.problems {
            eprintln!("receive: {problem}");
        }
        return Ok(Exit::Failed);
    }
    println!(
        "{}: {} rounds, {} images, {} pages in the newest: no problems found",
        dir.display(),
        verified.levels,
        verified.images,
        verified.pages
    );
    Ok(Exit::Done)
}

/// Serves the pages of complete images, each client on a thread of its own.
fn run_serve_pages(options: &ServePages) -> Result<Exit, Fault> {
    check_plaintext(options.listen, options.insecure)?;
    let served = Served::load(&options.dir).map_err(|error| {
        let advice = "serve-pages needs a directory that `receive` has completed";
        Fault::new(Exit::Unusable, error, advice)
    })?;
    let listener = TcpListener::bind(options.listen);
    let listener = listener.map_err(|error| cannot_listen(options.listen, error))?;
    log_listening(listener.local_addr().map_err(failed)?);
    tracing::info!(
        event = "serving_pages",
        processes = served.processes(),
        "serving pages"
    );
    thread::scope(|scope| {
        for stream in listener.incoming() {
            let served = &served;
            match stream {
                // Clients are served one at a time, and the first that gets all pages is the last.
                Ok(stream) if options.once => {
                    let end = serve_client(served, &stream, options.timeout);
                    if end.is_some_and(|end| end.complete) {
                        return Ok(Exit::Done);
                    }
                }
                Ok(stream) => {
                    scope.spawn(move || serve_client(served, &stream, options.timeout));
                }
                Err(error) => {
                    tracing::error!(event = "accept_failed", %error, "cannot accept a connection");
                }
            }
        }
        Ok(Exit::Failed)
    })
}

/// Serves one client. Errors are logged.
fn serve_client(served: &Served, stream: &TcpStream, stall: Duration) -> Option<ClientEnd> {
    let peer = stream.peer_addr().ok();
    // A client may be silent as long as no pages are needed, but has to read those that it requested.
    let prepared = stream
        .set_nodelay(true)
        .and_then(|()| stream.set_write_timeout(Some(stall)))
        .map_err(ServeError::Io);
    match prepared.and_then(|()| served.serve(stream, stream)) {
        Ok(end) => {
            let ClientEnd { pages, complete } = end;
            tracing::info!(
                event = "page_client_done",
                ?peer,
                pages,
                complete,
                "client disconnected"
            );
            Some(end)
        }
        Err(error) => {
            let why = with_causes(&error);
            tracing::warn!(
                event = "page_client_failed",
                ?peer,
                why,
                "client disconnected after an error"
            );
            None
        }
    }
}

fn check_plaintext(listen: SocketAddr, insecure: bool) -> Result<(), Fault> {
    Plaintext::from_flag(insecure)
        .check(listen, [listen.ip()])
        .map_err(|forbidden| Fault::new(Exit::Usage, forbidden, Plaintext::ADVICE))
}

fn cannot_listen(listen: SocketAddr, error: io::Error) -> Fault {
    let advice = match error.kind() {
        io::ErrorKind::AddrInUse => "another program is listening there: choose another port",
        io::ErrorKind::PermissionDenied => "ports below 1024 need root or CAP_NET_BIND_SERVICE",
        _ => "",
    };
    let error = anyhow::Error::new(error).context(format!("cannot listen on {listen}"));
    Fault::new(Exit::Unusable, error, advice)
}

fn run_serve(serve: &Serve) -> Result<Exit, Fault> {
    let (Some(listen), Some(dir)) = (serve.listen, &serve.dir) else {
        unreachable!("clap requires both without a subcommand");
    };
    let secure = Secure::new(&serve.tls, &serve.allow).map_err(|error| {
        let advice = "`receive certs DIR --host NAME` creates certificates for both ends";
        Fault::new(Exit::Usage, error, advice)
    })?;
    if secure.is_none() {
        check_plaintext(listen, serve.insecure)?;
    }
    match serve_until_end(serve, secure, listen, dir)? {
        Ended::Once(migration, result) => {
            if serve.json {
                print_report(&migration, result.as_ref().err().map(ToString::to_string));
            }
            Ok(match result {
                Ok(()) => Exit::Done,
                Err(_) => Exit::Failed,
            })
        }
        Ended::Interrupted => Ok(Exit::Interrupted),
        Ended::Terminated => Ok(Exit::Terminated),
    }
}

fn serve_until_end(
    serve: &Serve,
    secure: Option<Secure>,
    listen: SocketAddr,
    dir: &Path,
) -> Result<Ended, Fault> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(listen).await;
        let listener = listener.map_err(|error| cannot_listen(listen, error))?;
        let store = Store::open(dir).map_err(|error| {
            let advice = match &error {
                StoreError::InUse { .. } => "give each receiver a directory of its own",
                StoreError::Copied(_) => {
                    "the original answers for its migrations: use that, or an empty directory; to keep \
                     this one without them, remove identity.json"
                }
                StoreError::File(_) => "--dir needs a directory that this user can write to",
            };
            Fault::new(Exit::Unusable, error, advice)
        })?;
        log_listening(listener.local_addr().map_err(failed)?);
        let context = ServerContext {
            store,
            limits: limits(serve),
            restorer: serve.restore.map(|how| restorer(how, serve)).transpose()?,
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
        let ended = server::serve(listener, context, options).await;
        ended.map_err(failed)
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

fn restorer(how: RestoreHow, serve: &Serve) -> Result<Restorer, Fault> {
    let criu = Criu::find(serve.criu.as_deref()).map_err(|error| {
        let advice = "--restore needs CRIU 4.1 or later: scripts/install-criu installs one";
        Fault::new(Exit::Unusable, error, advice)
    })?;
    let criu = criu
        .with_options(&serve.criu_args)
        .map_err(|error| Fault::new(Exit::Usage, error, "options after -- are passed to CRIU"))?;
    let missing = lacking(&capabilities::TO_RESTORE);
    if !missing.is_empty() {
        let missing = missing.join(", ");
        tracing::warn!(
            event = "capabilities_missing",
            missing,
            "CRIU is unlikely to be able to restore"
        );
    }
    let lazy = match how {
        RestoreHow::Eager => false,
        RestoreHow::Auto | RestoreHow::Lazy => criu.has_lazy_pages() && filler::is_supported(),
    };
    if how == RestoreHow::Lazy && !lazy {
        let error = anyhow::anyhow!("CRIU or this kernel does not support a lazy restore");
        return Err(Fault::new(Exit::Unusable, error, "use --restore=eager"));
    }
    Ok(Restorer {
        criu,
        lazy,
        timeout: serve.restore_timeout,
    })
}

fn print_report(migration: &Migration, error: Option<String>) {
    let mut report = serde_json::to_value(migration).expect("a migration is plain data");
    report["error"] = error.into();
    println!("{report}");
}

/// Logs the address that connections are accepted on, the only place where a port chosen by the kernel
/// (`--listen 0`) appears.
fn log_listening(address: SocketAddr) {
    tracing::info!(event = "listening", %address, "listening");
}
