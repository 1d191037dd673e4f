//! Connection to the receiver: the network thread with the socket, and the two channels to it.

use super::{Compression, SinkError};
use crate::sys::signals;
use nix::sys::socket::{setsockopt, sockopt};
use pageferry_common::wire::WireError;
use pageferry_common::{Claim, tls};
use rustls::ClientConfig;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Commands that may wait for the network thread: one is being sent, one is ready. Memory is bounded by the
/// size of the buffer pool.
const COMMANDS_MAX: usize = 2;

/// Where to connect, and with which identity and limits.
#[derive(Debug, Clone)]
pub struct Connect {
    /// Address of the receiver, as `HOST:PORT`.
    pub to: String,
    /// Identity of the migration.
    pub claim: Claim,
    /// Maximum time without progress: for a reply of the receiver, and for one frame to be sent.
    pub stall: Duration,
    /// How long to retry after the connection is lost; zero to fail at once.
    pub reconnect_for: Duration,
    /// Upper limit of [`Connect::stall`] while the target is frozen.
    pub max_frozen: Duration,
    /// TLS identity and trust; `None` to send in the clear.
    pub tls: Option<Arc<ClientConfig>>,
    /// Whether to compress pages.
    pub compression: Compression,
    /// Whether the receiver has to restore the process after the last round.
    pub needs_restore: bool,
}

/// Conversation with the receiver on a thread of its own, which takes commands `C` in order and returns
/// replies `R`. Dropping the link ends the conversation and waits for the thread.
pub(super) struct Link<C, R> {
    /// `None` once closed.
    commands_tx: Option<mpsc::Sender<C>>,
    replies_rx: mpsc::UnboundedReceiver<R>,
    thread: Option<JoinHandle<Result<(), SinkError>>>,
}

impl<C: Send + 'static, R: Send + 'static> Link<C, R> {
    /// Starts the network thread. It ends the conversation early when the sender receives SIGINT or SIGTERM.
    pub(super) fn start<F>(
        converse: impl FnOnce(mpsc::Receiver<C>, mpsc::UnboundedSender<R>) -> F + Send + 'static,
    ) -> Result<Self, SinkError>
    where
        F: Future<Output = Result<(), SinkError>>,
    {
        let (commands_tx, commands_rx) = mpsc::channel(COMMANDS_MAX);
        let (replies_tx, replies_rx) = mpsc::unbounded_channel();
        let thread = std::thread::Builder::new()
            .name("network".into())
            .spawn(move || run_network(converse(commands_rx, replies_tx)))
            .map_err(SinkError::Io)?;
        Ok(Self {
            commands_tx: Some(commands_tx),
            replies_rx,
            thread: Some(thread),
        })
    }

    /// Sends a command to the network thread. Blocks while [`COMMANDS_MAX`] commands wait.
    pub(super) fn send(&mut self, command: C) -> Result<(), SinkError> {
        let sent = match &self.commands_tx {
            Some(channel) => channel.blocking_send(command).is_ok(),
            None => false,
        };
        if sent {
            Ok(())
        } else {
            Err(self.join_failed_thread())
        }
    }

    /// Waits for the next reply.
    pub(super) fn recv(&mut self) -> Result<R, SinkError> {
        match self.replies_rx.blocking_recv() {
            Some(reply) => Ok(reply),
            None => Err(self.join_failed_thread()),
        }
    }

    /// Checks, without blocking, that the network thread still runs.
    pub(super) fn check(&mut self) -> Result<(), SinkError> {
        match &self.thread {
            Some(thread) if !thread.is_finished() => Ok(()),
            _ => Err(self.join_failed_thread()),
        }
    }

    /// Joins the network thread, which has ended or is about to, and returns the reason.
    fn join_failed_thread(&mut self) -> SinkError {
        self.commands_tx = None;
        let result = self.thread.take().map(JoinHandle::join);
        match result {
            Some(Ok(Err(error))) => error,
            Some(Ok(Ok(()))) | None => SinkError::Wire(WireError::Closed),
            Some(Err(_)) => SinkError::Io(io::Error::other("it panicked")),
        }
    }
}

impl<C, R> Link<C, R> {
    /// Ends the conversation and waits for the thread.
    pub(super) fn close(&mut self) {
        self.commands_tx = None;
        if let Some(thread) = self.thread.take() {
            // The conversation is not needed any more, so its error is not either.
            let _ = thread.join();
        }
    }
}

impl<C, R> Drop for Link<C, R> {
    fn drop(&mut self) {
        self.close();
    }
}

/// Runs the conversation on a current-thread runtime until it ends or a signal arrives.
fn run_network(conversation: impl Future<Output = Result<(), SinkError>>) -> Result<(), SinkError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(SinkError::Io)?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(SinkError::Io)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(SinkError::Io)?;
        // A frame may be half sent, so no abort message is sent; the receiver sees the connection close.
        tokio::select! {
            result = conversation => return result,
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        signals::interrupt();
        Err(SinkError::Interrupted)
    })
}

/// Both directions of a connection, encrypted or not.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {
    /// Returns the TCP socket.
    fn socket(&self) -> BorrowedFd<'_>;
}

impl Duplex for TcpStream {
    fn socket(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

impl Duplex for TlsStream<TcpStream> {
    fn socket(&self) -> BorrowedFd<'_> {
        self.get_ref().0.as_fd()
    }
}

/// Connects to `HOST:PORT` within `attempt`. The kernel closes the connection when sent data is not
/// acknowledged within `stall`.
pub(super) async fn dial(
    to: &str,
    attempt: Duration,
    stall: Duration,
    tls: Option<&Arc<ClientConfig>>,
) -> Result<Box<dyn Duplex>, SinkError> {
    let stream = dial_plain(to, attempt, stall).await?;
    let Some(config) = tls else {
        return Ok(Box::new(stream));
    };
    let name = tls::server_name(to).map_err(|error| SinkError::Tls(error.to_string()))?;
    let connected = timeout(
        attempt,
        TlsConnector::from(Arc::clone(config)).connect(name, stream),
    );
    match connected.await {
        Ok(Ok(stream)) => Ok(Box::new(stream)),
        Ok(Err(error)) => Err(SinkError::Tls(tls::describe(&error))),
        Err(_) => Err(WireError::Stalled(attempt).into()),
    }
}

async fn dial_plain(to: &str, attempt: Duration, stall: Duration) -> Result<TcpStream, SinkError> {
    let dialled = timeout(attempt, TcpStream::connect(to)).await;
    dialled
        .map_err(|_| io::ErrorKind::TimedOut.into())
        .flatten()
        .and_then(|stream| {
            stream.set_nodelay(true)?;
            // Detects a link that was cut without a reset.
            let unacknowledged_ms = u32::try_from(stall.as_millis()).unwrap_or(u32::MAX);
            setsockopt(&stream, sockopt::TcpUserTimeout, &unacknowledged_ms)?;
            Ok(stream)
        })
        .map_err(|source| SinkError::Connect {
            to: to.to_owned(),
            source,
        })
}
