//! The server: accepts any number of connections, one after another and at the same time.

mod connection;
pub mod detect;
pub mod tls;

use crate::refusal::Failure;
use crate::server::detect::Dialect;
use crate::server::tls::Secure;
use crate::session::admission::Admission;
use crate::session::{Migration, ServerContext, SessionEnd, native};
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

/// Pause after a connection could not be accepted.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// How the server works.
#[derive(Debug, Clone)]
pub struct Options {
    /// When the server exits.
    pub exit: ExitPolicy,
    /// Largest number of senders at a time.
    pub max_senders: usize,
    /// Requires TLS and authenticates peers; `None` for plaintext.
    pub secure: Option<Secure>,
}

/// When the server exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitPolicy {
    /// When it receives a signal.
    Signal,
    /// Also after one migration (`--once`).
    AfterOne {
        /// How long a sender that has lost its connection may take to connect again.
        reconnect_for: Duration,
    },
}

/// Why the server ended.
#[derive(Debug)]
pub enum Ended {
    /// One migration ended, as [`ExitPolicy::AfterOne`] wants it.
    Once(Migration, Result<(), Failure>),
    /// It received SIGINT.
    Interrupted,
    /// It received SIGTERM.
    Terminated,
}

/// Serves until a signal arrives or, with [`ExitPolicy::AfterOne`], one migration has ended.
///
/// # Errors
/// Those of the runtime and of accepting.
pub async fn serve(
    listener: TcpListener,
    context: ServerContext,
    options: Options,
) -> io::Result<Ended> {
    let context = Arc::new(context);
    native::finish_all(&context).await;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let (ended_tx, mut ended_rx) = mpsc::unbounded_channel();
    let mut exit = Exit::new(options.exit);
    let server = Server {
        admission: Admission::new(options.max_senders),
        context,
        secure: options.secure,
        ended_tx,
    };
    let ended = loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => server.spawn(stream, peer),
                Err(error) => {
                    // Too many descriptors, most likely: connections that end free some.
                    tracing::error!(event = "accept_failed", %error, "cannot accept a connection");
                    sleep(ACCEPT_RETRY_DELAY).await;
                }
            },
            Some((dialect, end)) = ended_rx.recv() => {
                if let Some(SessionEnd { migration, result }) = exit.after(dialect, end) {
                    break Ended::Once(migration, result);
                }
            }
            () = sleep_until(exit.deadline), if exit.lost.is_some() => {
                let is_leased = |home: &Path| server.context.store.is_leased(home);
                if let Some(SessionEnd { migration, result }) = exit.at_deadline(is_leased) {
                    break Ended::Once(migration, result);
                }
            }
            _ = interrupt.recv() => break Ended::Interrupted,
            _ = terminate.recv() => break Ended::Terminated,
        }
    };
    native::end_undecided(&server.context);
    Ok(ended)
}

/// What every connection is served with.
struct Server {
    admission: Admission,
    context: Arc<ServerContext>,
    secure: Option<Secure>,
    ended_tx: mpsc::UnboundedSender<(Dialect, SessionEnd)>,
}

impl Server {
    /// Serves a connection in a task of its own, unless there are too many pending ones.
    fn spawn(&self, stream: TcpStream, peer: SocketAddr) {
        let Some(pending) = self.admission.admit(self.context.limits.handshake) else {
            tracing::warn!(
                event = "connection_refused",
                %peer,
                "connection refused: too many pending connections"
            );
            return;
        };
        let connection = connection::Connection {
            peer,
            pending,
            context: Arc::clone(&self.context),
        };
        let (secure, ended_tx) = (self.secure.clone(), self.ended_tx.clone());
        tokio::spawn(async move {
            if let Some(end) = connection.serve(stream, secure.as_ref()).await {
                // The receiver is gone only if the server has ended.
                let _ = ended_tx.send(end);
            }
        });
    }
}

/// Decides when the server exits.
struct Exit {
    policy: ExitPolicy,
    /// A migration whose connection was lost and whose sender may connect again.
    lost: Option<SessionEnd>,
    /// When to give up waiting for that sender.
    deadline: Instant,
}

impl Exit {
    fn new(policy: ExitPolicy) -> Self {
        Self {
            policy,
            lost: None,
            deadline: Instant::now(),
        }
    }

    /// Takes the end of a migration; returns it if the server is to exit now.
    fn after(&mut self, dialect: Dialect, end: SessionEnd) -> Option<SessionEnd> {
        let ExitPolicy::AfterOne { reconnect_for } = self.policy else {
            return None;
        };
        let lost = end
            .result
            .as_ref()
            .is_err_and(Failure::is_broken_connection);
        // CRIU never connects again for the same dump.
        if dialect != Dialect::Native || !lost || reconnect_for.is_zero() {
            return Some(end);
        }
        tracing::info!(
            event = "awaiting_reconnect",
            ?reconnect_for,
            "waiting for the sender to reconnect"
        );
        self.lost = Some(end);
        self.deadline = Instant::now() + reconnect_for;
        None
    }

    /// Returns the lost migration unless its sender has connected again, which leases its directory.
    fn at_deadline(&mut self, is_leased: impl Fn(&Path) -> bool) -> Option<SessionEnd> {
        let lost = |end: &mut SessionEnd| !is_leased(&end.migration.directory);
        if let Some(end) = self.lost.take_if(lost) {
            return Some(end);
        }
        if let ExitPolicy::AfterOne { reconnect_for } = self.policy {
            self.deadline = Instant::now() + reconnect_for;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_common::wire::WireError;

    const RECONNECT_FOR: Duration = Duration::from_secs(60);

    fn ended(result: Result<(), Failure>) -> SessionEnd {
        let migration = Migration::default();
        SessionEnd { migration, result }
    }

    fn lost() -> SessionEnd {
        ended(Err(WireError::Closed.into()))
    }

    #[tokio::test]
    async fn server_exits_after_one_migration_only_if_asked() {
        let mut exit = Exit::new(ExitPolicy::Signal);
        assert!(exit.after(Dialect::Native, ended(Ok(()))).is_none());
        assert!(exit.after(Dialect::Native, lost()).is_none());
        let reconnect_for = RECONNECT_FOR;
        let mut exit = Exit::new(ExitPolicy::AfterOne { reconnect_for });
        assert!(exit.after(Dialect::Native, ended(Ok(()))).is_some());
        assert!(exit.lost.is_none());
    }

    #[tokio::test]
    async fn only_a_native_sender_may_reconnect_after_it_was_lost() {
        let reconnect_for = RECONNECT_FOR;
        let mut exit = Exit::new(ExitPolicy::AfterOne { reconnect_for });
        assert!(exit.after(Dialect::Criu, lost()).is_some());
        assert!(exit.after(Dialect::Native, lost()).is_none());
        assert!(exit.at_deadline(|_| true).is_none());
        assert!(exit.at_deadline(|_| false).is_some());
        assert!(exit.lost.is_none());
        let reconnect_for = Duration::ZERO;
        let mut exit = Exit::new(ExitPolicy::AfterOne { reconnect_for });
        assert!(exit.after(Dialect::Native, lost()).is_some());
    }
}
