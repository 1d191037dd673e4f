//! The thread with the socket, and the two channels to it.

use super::SinkError;
use nix::sys::socket::{setsockopt, sockopt};
use pageferry_common::tls;
use pageferry_common::wire::WireError;
use rustls::ClientConfig;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// A conversation on a thread of its own: it is told `C`s, in order, and answers `R`s. Dropping the
/// link ends it.
pub(super) struct Link<C, R> {
    /// `None` once closed.
    commands: Option<mpsc::Sender<C>>,
    replies: mpsc::UnboundedReceiver<R>,
    thread: Option<JoinHandle<Result<(), SinkError>>>,
}

impl<C: Send + 'static, R: Send + 'static> Link<C, R> {
    /// Starts a conversation, which ends at the latest when the user says stop.
    pub(super) fn start<F>(
        converse: impl FnOnce(mpsc::Receiver<C>, mpsc::UnboundedSender<R>) -> F + Send + 'static,
    ) -> Result<Self, SinkError>
    where
        F: Future<Output = Result<(), SinkError>>,
    {
        // Two: one frame on its way, one ready. The pool's size is the limit that counts.
        let (commands, told) = mpsc::channel(2);
        let (reply, replies) = mpsc::unbounded_channel();
        let thread = std::thread::Builder::new()
            .name("network".into())
            .spawn(move || network(converse(told, reply)))
            .map_err(SinkError::Io)?;
        Ok(Self {
            commands: Some(commands),
            replies,
            thread: Some(thread),
        })
    }

    /// Tells it something; waits if it has not come to the last yet.
    pub(super) fn say(&mut self, command: C) -> Result<(), SinkError> {
        let sent = match &self.commands {
            Some(channel) => channel.blocking_send(command).is_ok(),
            None => false,
        };
        if sent {
            Ok(())
        } else {
            Err(self.why_it_ended())
        }
    }

    /// Waits for its next answer.
    pub(super) fn hear(&mut self) -> Result<R, SinkError> {
        match self.replies.blocking_recv() {
            Some(reply) => Ok(reply),
            None => Err(self.why_it_ended()),
        }
    }

    /// Whether it still converses.
    pub(super) fn check(&mut self) -> Result<(), SinkError> {
        match &self.thread {
            Some(thread) if !thread.is_finished() => Ok(()),
            _ => Err(self.why_it_ended()),
        }
    }

    /// The thread is over; its result says why.
    fn why_it_ended(&mut self) -> SinkError {
        self.commands = None;
        let result = self.thread.take().map(JoinHandle::join);
        match result {
            Some(Ok(Err(why))) => why,
            Some(Ok(Ok(()))) | None => SinkError::Wire(WireError::Closed),
            Some(Err(_)) => SinkError::Io(io::Error::other("it panicked")),
        }
    }
}

impl<C, R> Drop for Link<C, R> {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // It says goodbye, or why not, and ends; what it returns was of interest before.
            let _ = thread.join();
        }
    }
}

fn network(conversation: impl Future<Output = Result<(), SinkError>>) -> Result<(), SinkError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(SinkError::Io)?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(SinkError::Io)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(SinkError::Io)?;
        // It may stand in the middle of a frame then; a closed connection says enough.
        tokio::select! {
            result = conversation => result,
            _ = interrupt.recv() => Err(SinkError::Interrupted),
            _ = terminate.recv() => Err(SinkError::Interrupted),
        }
    })
}

/// Both directions of a connection, encrypted or not.
pub(super) trait Duplex: AsyncRead + AsyncWrite + AsRawFd + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + AsRawFd + Send + Unpin> Duplex for T {}

/// Connects to `HOST:PORT` within `attempt`. What is not acknowledged for as long as `stall` ends the
/// connection.
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
        Ok(Err(error)) => Err(SinkError::Tls(tls::words(&error))),
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
            // What is not acknowledged for so long never will be: a link that is cut silently.
            let unacknowledged = u32::try_from(stall.as_millis()).unwrap_or(u32::MAX);
            setsockopt(&stream, sockopt::TcpUserTimeout, &unacknowledged)?;
            Ok(stream)
        })
        .map_err(|source| SinkError::Connect {
            to: to.to_owned(),
            source,
        })
}
