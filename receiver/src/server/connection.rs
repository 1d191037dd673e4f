//! One connection: its protocol, its authentication, and the conversation that follows.

use super::detect::{Dialect, FIRST_BYTES, detect};
use super::tls::{Authenticated, Secure};
use crate::refusal::Failure;
use crate::session::admission::Pending;
use crate::session::{ServerContext, SessionEnd, criu, native};
use crate::storage::lease::Disconnect;
use crate::with_causes;
use nix::sys::socket::{MsgFlags, recv};
use pageferry_common::wire::WireError;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, Interest, split};
use tokio::net::TcpStream;

/// A connection that was accepted, before anything was read from it.
pub(super) struct Connection {
    pub peer: SocketAddr,
    pub pending: Pending,
    pub context: Arc<ServerContext>,
}

impl Connection {
    /// Serves the connection until it ends. Returns `None` if no migration began.
    pub(super) async fn serve(
        mut self,
        stream: TcpStream,
        secure: Option<&Secure>,
    ) -> Option<(Dialect, SessionEnd)> {
        let peer = self.peer;
        match Disconnect::new(&stream) {
            Ok(disconnect) => self.pending = self.pending.with_disconnect(disconnect),
            Err(error) => {
                tracing::error!(event = "connection_refused", %peer, %error, "connection refused");
                return None;
            }
        }
        let first = async { first_bytes(&stream).await.map_err(WireError::Io) };
        let Ok(Some(first)) = self.pending.within_deadline(first).await else {
            // Too short, or silent: a port scan, a health check.
            tracing::debug!(event = "connection_silent", %peer, "connection closed without a message");
            return None;
        };
        // Without it, messages are delayed, and nothing else is wrong.
        let _ = stream.set_nodelay(true);
        match (secure, detect(first)) {
            (Some(secure), Dialect::Tls) => self.authenticate(stream, secure).await,
            (Some(_), dialect) => {
                tracing::warn!(
                    event = "connection_refused",
                    %peer,
                    "connection refused: it does not encrypt, and this receiver requires TLS"
                );
                let (read, write) = stream.into_split();
                let reason = "this receiver takes encrypted connections only: send --tls-ca ...";
                self.refuse(dialect, read, write, reason.to_owned()).await;
                None
            }
            (None, Dialect::Tls) => {
                tracing::warn!(
                    event = "connection_refused",
                    %peer,
                    "connection refused: it uses TLS, and this receiver has no certificates (--tls-ca)"
                );
                None
            }
            (None, dialect) => {
                let (read, write) = stream.into_split();
                self.converse(dialect, read, write).await
            }
        }
    }

    /// Authenticates the peer, and converses with it.
    async fn authenticate(
        self,
        stream: TcpStream,
        secure: &Secure,
    ) -> Option<(Dialect, SessionEnd)> {
        let peer = self.peer;
        let accepting = async { Ok::<_, WireError>(secure.accept(stream).await) };
        let why = match self.pending.within_deadline(accepting).await {
            Ok(Ok(authenticated)) => return self.check_name(authenticated).await,
            Ok(Err(why)) => why,
            Err(_) => "it did not authenticate in time (--handshake-timeout)".to_owned(),
        };
        tracing::warn!(event = "connection_refused", %peer, why, "connection refused");
        None
    }

    async fn check_name(self, authenticated: Authenticated) -> Option<(Dialect, SessionEnd)> {
        let Authenticated {
            stream,
            first,
            name,
        } = authenticated;
        let peer = self.peer;
        let (read, write) = split(stream);
        let read = first.chain(read);
        match name {
            Ok(name) => {
                tracing::info!(event = "connection_accepted", %peer, name, "connection accepted");
                self.converse(detect(first), read, write).await
            }
            Err(why) => {
                tracing::warn!(event = "connection_refused", %peer, why, "connection refused");
                self.refuse(detect(first), read, write, why).await;
                None
            }
        }
    }

    /// Sends the reason to a native sender. CRIU's protocol has no message for it.
    async fn refuse(
        self,
        dialect: Dialect,
        read: impl AsyncRead + Unpin,
        write: impl AsyncWrite + Unpin,
        reason: String,
    ) {
        match dialect {
            Dialect::Native => native::refuse(read, write, &self.context.limits, reason).await,
            Dialect::Criu | Dialect::Tls | Dialect::Unknown => {}
        }
    }

    async fn converse(
        self,
        dialect: Dialect,
        read: impl AsyncRead + Unpin,
        write: impl AsyncWrite + Unpin,
    ) -> Option<(Dialect, SessionEnd)> {
        let Self {
            peer,
            pending,
            context,
        } = self;
        let end = match dialect {
            Dialect::Native => native::receive(read, write, pending, &context).await,
            Dialect::Criu => {
                tracing::info!(event = "dump_begun", %peer, "dump by CRIU begun");
                criu::receive(read, write, pending, &context).await
            }
            Dialect::Tls | Dialect::Unknown => {
                tracing::warn!(
                    event = "connection_refused",
                    %peer,
                    "connection refused: neither `send` nor CRIU"
                );
                return None;
            }
        };
        log_end(peer, &end);
        // A peer that was not accepted began no migration.
        end.migration.has_begun().then_some((dialect, end))
    }
}

fn log_end(peer: SocketAddr, end: &SessionEnd) {
    let SessionEnd { migration, result } = end;
    let (directory, rounds) = (migration.directory.display(), migration.rounds);
    match result {
        Ok(()) => {
            tracing::info!(event = "migration_done", %peer, %directory, rounds, "migration complete");
        }
        Err(Failure::Refusal(refusal)) if !migration.has_begun() => {
            let why = with_causes(refusal);
            tracing::warn!(event = "migration_refused", %peer, why, "migration refused");
        }
        Err(error) => {
            let why = with_causes(error);
            tracing::warn!(
                event = "connection_ended_early",
                %peer,
                %directory,
                rounds,
                why,
                "migration ended early"
            );
        }
    }
}

/// Returns the first bytes without consuming them; `None` if the peer closes the connection before.
async fn first_bytes(stream: &TcpStream) -> io::Result<Option<[u8; FIRST_BYTES]>> {
    let mut first = [0; FIRST_BYTES];
    loop {
        let ready = stream.ready(Interest::READABLE).await?;
        let peeked = stream.try_io(Interest::READABLE, || {
            let len = recv(stream.as_raw_fd(), &mut first, MsgFlags::MSG_PEEK)?;
            if len < FIRST_BYTES && !ready.is_read_closed() {
                // Clears the readiness, so that only more bytes or the end of the stream set it again.
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(len)
        });
        match peeked {
            Ok(FIRST_BYTES) => return Ok(Some(first)),
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}
