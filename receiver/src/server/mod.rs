//! Accepting senders: any number, one after another and at once, none in another's way.

pub mod detect;
pub mod tls;

use crate::refusal::Failure;
use crate::restore::Restorer;
use crate::server::detect::{Dialect, FIRST_BYTES, detect};
use crate::server::tls::{Accepted, Secure};
use crate::session::admission::{Admission, Pending};
use crate::session::{Limits, Migration, criu, native};
use crate::storage::lease::Disconnect;
use crate::storage::store::Store;
use crate::with_causes;
use nix::sys::socket::{MsgFlags, recv};
use pageferry_common::wire::WireError;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, Interest, split};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

/// How the server works.
#[derive(Debug, Clone)]
pub struct Options {
    /// End after one migration. If its connection is lost, its sender may come again for so long.
    pub once: Option<Duration>,
    /// Most senders at once.
    pub max_senders: usize,
    /// Of each.
    pub limits: Limits,
    /// Each dump by CRIU has the one before of the same process as its parent.
    pub chain_dumps: bool,
    /// With this, everybody has to prove who he is, and everything is encrypted.
    pub secure: Option<Secure>,
    /// With this, processes are restored if their senders want it.
    pub restorer: Option<Restorer>,
}

/// Why the server ended.
#[derive(Debug)]
pub enum Ended {
    /// With `once`: how the migration went.
    Once(Migration, Result<(), Failure>),
    /// SIGINT.
    Interrupted,
    /// SIGTERM.
    Terminated,
}

/// Serves until a signal comes or, with `once`, one migration is over.
///
/// # Errors
/// Those of the runtime and of accepting.
pub async fn serve(listener: TcpListener, store: Store, options: Options) -> io::Result<Ended> {
    let store = Arc::new(store);
    if let Some(restorer) = &options.restorer {
        native::finish_all(&restorer.criu, &store).await;
    }
    let admission = Admission::new(options.max_senders);
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let (over, mut ended) = mpsc::unbounded_channel::<(Dialect, Over)>();
    // With `once`: a migration that has lost its connection.
    let mut lost: Option<Over> = None;
    let patience = options.once.unwrap_or_default();
    let mut waiting = Box::pin(sleep(patience));
    loop {
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: those who are here finish and free some.
                    tracing::error!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            Some((dialect, (migration, result))) = ended.recv() => {
                if options.once.is_none() {
                    continue;
                }
                // CRIU does not come again.
                let native = dialect == Dialect::Native;
                let broken = result.as_ref().is_err_and(Failure::is_broken_connection);
                if !(native && broken) || patience.is_zero() {
                    return Ok(Ended::Once(migration, result));
                }
                tracing::info!(event = "awaiting_reconnect", ?patience, "its sender may come again");
                lost = Some((migration, result));
                waiting.as_mut().reset(Instant::now() + patience);
                continue;
            }
            () = &mut waiting, if lost.is_some() => {
                let came = |lost: &mut (Migration, _)| store.is_leased(&lost.0.directory);
                match lost.take_if(|lost| !came(lost)) {
                    Some((migration, result)) => return Ok(Ended::Once(migration, result)),
                    None => waiting.as_mut().reset(Instant::now() + patience),
                }
                continue;
            }
            _ = interrupt.recv() => return Ok(Ended::Interrupted),
            _ = terminate.recv() => return Ok(Ended::Terminated),
        };
        let Some(pending) = admission.admit(options.limits.handshake) else {
            tracing::warn!(event = "connection_refused", %peer, "closed: too many have not said yet what they want");
            continue;
        };
        let (store, over, options) = (Arc::clone(&store), over.clone(), options.clone());
        tokio::spawn(async move {
            if let Some(outcome) = connection(stream, peer, pending, &store, &options).await {
                // The server is gone only if everything is over.
                let _ = over.send(outcome);
            }
        });
    }
}

/// How a connection's migration went.
type Over = (Migration, Result<(), Failure>);

/// Serves one connection. `None` if it was no migration.
async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    pending: Pending,
    store: &Arc<Store>,
    options: &Options,
) -> Option<(Dialect, Over)> {
    let limits = options.limits;
    let pending = match Disconnect::new(&stream) {
        Ok(cut) => pending.with(cut),
        Err(error) => {
            tracing::error!(event = "connection_refused", %peer, %error, "refused");
            return None;
        }
    };
    let first = first_bytes(&stream);
    let first = pending.in_time(async { first.await.map_err(WireError::Io) });
    let Ok(Some(first)) = first.await else {
        // Connected and gone, or not a word: a port scan, a health check.
        tracing::debug!(%peer, "said nothing");
        return None;
    };
    let _ = stream.set_nodelay(true);
    match (&options.secure, detect(first)) {
        (Some(secure), Dialect::Tls) => {
            let accepted = async { Ok::<_, WireError>(secure.accept(stream).await) };
            let Accepted {
                stream,
                first,
                name,
            } = match pending.in_time(accepted).await {
                Ok(Ok(accepted)) => accepted,
                Ok(Err(why)) => {
                    tracing::warn!(event = "connection_refused", %peer, why, "refused");
                    return None;
                }
                Err(_) => {
                    tracing::warn!(event = "connection_refused", %peer, "refused: it does not say who it is");
                    return None;
                }
            };
            let (read, write) = split(stream);
            let read = first.chain(read);
            let dialect = detect(first);
            match name {
                Ok(name) => tracing::info!(event = "connection_accepted", %peer, name, "let in"),
                Err(why) => {
                    tracing::warn!(event = "connection_refused", %peer, why, "refused");
                    if dialect == Dialect::Native {
                        native::refuse(read, write, limits, why).await;
                    }
                    return None;
                }
            }
            converse(dialect, read, write, peer, pending, store, options).await
        }
        (Some(_), dialect) => {
            tracing::warn!(event = "connection_refused", %peer, "refused: it does not encrypt, as this receiver wants it");
            if dialect == Dialect::Native {
                let (read, write) = stream.into_split();
                let what = "this receiver takes encrypted connections only: send --tls-ca ...";
                native::refuse(read, write, limits, what.to_owned()).await;
            }
            None
        }
        (None, Dialect::Tls) => {
            tracing::warn!(event = "connection_refused", %peer, "refused: it encrypts, and this receiver has no certificates (--tls-ca)");
            None
        }
        (None, dialect) => {
            let (read, write) = stream.into_split();
            converse(dialect, read, write, peer, pending, store, options).await
        }
    }
}

/// Takes what a peer sends that may. `None` if it was no migration.
async fn converse(
    dialect: Dialect,
    read: impl AsyncRead + Unpin,
    write: impl AsyncWrite + Unpin,
    peer: SocketAddr,
    pending: Pending,
    store: &Arc<Store>,
    options: &Options,
) -> Option<(Dialect, Over)> {
    let limits = options.limits;
    let mut migration = Migration::default();
    let result = match dialect {
        Dialect::Native => {
            let restorer = options.restorer.as_ref();
            let migration = &mut migration;
            native::receive(read, write, pending, store, limits, restorer, migration).await
        }
        Dialect::Criu => {
            tracing::info!(event = "dump_begun", %peer, "CRIU begins a dump");
            let chain = options.chain_dumps;
            let migration = &mut migration;
            criu::receive(read, write, pending, store, limits, chain, migration).await
        }
        Dialect::Tls | Dialect::Unknown => {
            tracing::warn!(event = "connection_refused", %peer, "refused: neither `send` nor CRIU");
            return None;
        }
    };
    let directory = migration.directory.display();
    match &result {
        Ok(()) => tracing::info!(
            event = "migration_done",
            %peer,
            %directory,
            migration.rounds,
            "migration complete"
        ),
        Err(Failure::Refusal(refusal)) if migration.directory.as_os_str().is_empty() => {
            let why = with_causes(refusal);
            tracing::warn!(event = "migration_refused", %peer, why, "migration refused");
        }
        Err(error) => {
            let why = with_causes(error);
            tracing::warn!(
                event = "connection_ended_early",
                %peer,
                %directory,
                migration.rounds,
                why,
                "migration ended early"
            );
        }
    }
    // A peer that broke the protocol before it was welcome began no migration.
    let began = !migration.directory.as_os_str().is_empty();
    began.then_some((dialect, (migration, result)))
}

/// The first bytes, left where they are; `None` if the peer goes without sending as many.
async fn first_bytes(stream: &TcpStream) -> io::Result<Option<[u8; FIRST_BYTES]>> {
    let mut first = [0; FIRST_BYTES];
    loop {
        let ready = stream.ready(Interest::READABLE).await?;
        let peeked = stream.try_io(Interest::READABLE, || {
            let got = recv(stream.as_raw_fd(), &mut first, MsgFlags::MSG_PEEK)?;
            if got < FIRST_BYTES && !ready.is_read_closed() {
                // Readable, but not enough yet: the next bytes, or the end, are news again.
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(got)
        });
        match peeked {
            Ok(FIRST_BYTES) => return Ok(Some(first)),
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}
