//! Network thread of the native protocol: connecting with retries, commands out, replies in.

use crate::progress::Counters;
use crate::sink::SinkError;
use crate::sink::compress::{Compression, LinkRate, Payload};
use crate::sink::link::{Connect, Duplex, Link, dial};
use pageferry_common::wire::{
    self, FrameReader, FrameWriter, Incoming, Message, Phase, SharedPhase, StallLimit, WireError,
};
use pageferry_common::{PAGE_SIZE, with_causes};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf, split};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// Interval at which `Working` is sent while there is nothing else to send.
const WORKING_INTERVAL: Duration = Duration::from_secs(1);

/// How long to wait, after a write failed, for the receiver to send the reason.
const REFUSAL_LINGER: Duration = Duration::from_secs(2);

/// Pause before the first attempt to reconnect; it doubles up to [`RETRY_DELAY_MAX`].
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);

/// Maximum pause between two attempts to reconnect.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(2);

/// Time limit for one attempt to reconnect.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Command for the network thread.
pub(super) enum Outgoing {
    Message(Message),
    Chunk { meta: Vec<u8>, payload: Payload },
}

/// Parameters of one connection, and what it shares with the sink.
pub(super) struct Conversation {
    pub(super) connect: Connect,
    /// Maximum time without progress.
    pub(super) patience: StallLimit,
    /// How long to retry connecting; zero for a single attempt.
    pub(super) retry_for: Duration,
    pub(super) counters: Arc<Counters>,
    pub(super) rate: Arc<LinkRate>,
}

/// Established connection, after the exchange of greetings.
struct Connection {
    reader: FrameReader<ReadHalf<Box<dyn Duplex>>>,
    writer: FrameWriter<WriteHalf<Box<dyn Duplex>>>,
    phase: SharedPhase,
    /// Duplicate of the socket, for [`LinkRate::watch`]. Closed with the connection, so that the receiver
    /// sees it close.
    _socket: Arc<OwnedFd>,
}

impl Conversation {
    /// Starts the network thread, which connects first.
    pub(super) fn start(self) -> Result<Link<Outgoing, Message>, SinkError> {
        Link::start(|commands_rx, replies_tx| self.run(commands_rx, replies_tx))
    }

    async fn run(
        self,
        commands_rx: mpsc::Receiver<Outgoing>,
        replies_tx: mpsc::UnboundedSender<Message>,
    ) -> Result<(), SinkError> {
        let Connection {
            mut reader,
            mut writer,
            phase,
            _socket,
        } = self.connect(&replies_tx).await?;
        let receiving = recv_replies(&mut reader, replies_tx);
        tokio::pin!(receiving);
        let error = tokio::select! {
            sent = self.send_commands(&mut writer, commands_rx, &phase) => match sent {
                Ok(()) => return Ok(()),
                // If the receiver refused, its reason says more than the failed write.
                Err(write_error) => match timeout(REFUSAL_LINGER, &mut receiving).await {
                    Ok(Err(refused @ WireError::Refused { .. })) => refused,
                    _ => write_error,
                },
            },
            received = &mut receiving => match received {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
        };
        if let WireError::Stalled(stall) = error {
            tracing::warn!(
                event = "no_progress",
                ?stall,
                "no progress on the connection"
            );
        }
        Err(error.into())
    }

    /// Connects and exchanges greetings, retrying for `retry_for`.
    async fn connect(
        &self,
        replies_tx: &mpsc::UnboundedSender<Message>,
    ) -> Result<Connection, SinkError> {
        let began = Instant::now();
        let mut delay = RETRY_DELAY_MIN;
        let attempt = match self.retry_for.is_zero() {
            true => self.connect.stall,
            false => self.connect.stall.min(ATTEMPT_TIMEOUT),
        };
        loop {
            match self.connect_once(attempt, replies_tx).await {
                Ok(connection) => return Ok(connection),
                Err(error) if !error.is_transient() || began.elapsed() + delay > self.retry_for => {
                    return Err(error);
                }
                Err(error) => tracing::debug!(why = with_causes(&error), "not connected yet"),
            }
            sleep(delay).await;
            delay = RETRY_DELAY_MAX.min(delay * 2);
        }
    }

    /// Connects within `attempt`, and passes the receiver's greeting to the sink.
    async fn connect_once(
        &self,
        attempt: Duration,
        replies_tx: &mpsc::UnboundedSender<Message>,
    ) -> Result<Connection, SinkError> {
        let Connect { to, stall, tls, .. } = &self.connect;
        let stream = dial(to, attempt, *stall, tls.as_ref()).await?;
        let socket = stream.socket().try_clone_to_owned();
        let socket = Arc::new(socket.map_err(SinkError::Io)?);
        self.rate.watch(&socket);
        let (read, write) = split(stream);
        let phase = SharedPhase::default();
        // In these phases the receiver sends nothing before the end of the round; that it makes progress is
        // seen by writes that succeed.
        let mut reader = FrameReader::new(read, phase.clone(), self.patience.clone())
            .untimed_in(&[Phase::Ready, Phase::Round, Phase::Image]);
        let mut writer = FrameWriter::new(write, phase.clone(), self.patience.clone());
        writer.send(&self.hello()).await?;
        loop {
            match reader.recv().await? {
                Incoming::Message(Message::Working) => {}
                Incoming::Message(welcome @ Message::Welcome { .. }) => {
                    // Fails only if the sink was dropped, which ends the conversation anyway.
                    let _ = replies_tx.send(welcome);
                    return Ok(Connection {
                        reader,
                        writer,
                        phase,
                        _socket: socket,
                    });
                }
                Incoming::Message(_) | Incoming::Chunk { .. } => {
                    return Err(SinkError::UnexpectedReply);
                }
            }
        }
    }

    fn hello(&self) -> Message {
        let mut features = 0;
        if self.connect.needs_restore {
            features |= wire::FEATURE_RESTORE;
        }
        if self.connect.compression != Compression::None {
            features |= wire::FEATURE_ZSTD;
        }
        Message::Hello {
            version: wire::VERSION,
            page_size: PAGE_SIZE as u32,
            features,
            claim: self.connect.claim,
        }
    }

    /// Sends commands until the sink is dropped, and `Working` while there are none.
    async fn send_commands(
        &self,
        writer: &mut FrameWriter<impl AsyncWrite + Unpin>,
        mut commands_rx: mpsc::Receiver<Outgoing>,
        phase: &SharedPhase,
    ) -> Result<(), WireError> {
        let bytes_sent = &self.counters.bytes;
        // Bytes of earlier connections.
        let bytes_before = bytes_sent.load(Ordering::Relaxed);
        loop {
            match timeout(WORKING_INTERVAL, commands_rx.recv()).await {
                Ok(Some(Outgoing::Message(message))) => writer.send(&message).await?,
                Ok(Some(Outgoing::Chunk { meta, payload })) => {
                    let Payload { compressed, data } = payload;
                    let (len, unsent, began) = (data.len(), self.rate.unsent(), Instant::now());
                    writer.send_chunk(&meta, compressed, data).await?;
                    self.rate.record_write(len, began.elapsed(), unsent);
                }
                Ok(None) => {
                    if phase.get() != Phase::Closed {
                        let reason = "the sender ended the migration".to_owned();
                        writer.send(&Message::Abort { reason }).await?;
                    }
                    return Ok(());
                }
                Err(_) if allows_working(phase.get()) => writer.send(&Message::Working).await?,
                Err(_) => {}
            }
            bytes_sent.store(bytes_before + writer.bytes(), Ordering::Relaxed);
        }
    }
}

/// Returns whether `Working` may be sent in this phase.
fn allows_working(phase: Phase) -> bool {
    match phase {
        Phase::Fresh | Phase::Greeting | Phase::Closed => false,
        Phase::Ready
        | Phase::Round
        | Phase::Image
        | Phase::Sealing
        | Phase::Finishing
        | Phase::Checking
        | Phase::Restoring
        | Phase::Restored
        | Phase::Committing
        | Phase::Resolving => true,
    }
}

/// Passes the receiver's replies to the sink, until the receiver acknowledges the end of the migration.
async fn recv_replies(
    reader: &mut FrameReader<impl AsyncRead + Unpin>,
    replies_tx: mpsc::UnboundedSender<Message>,
) -> Result<(), WireError> {
    loop {
        match reader.recv().await? {
            Incoming::Message(Message::Working) => {}
            Incoming::Message(
                message @ (Message::FileProblem { .. }
                | Message::Checked
                | Message::RoundAck { .. }
                | Message::Restored
                | Message::Running
                | Message::FinishAck),
            ) => {
                let is_last = message == Message::FinishAck;
                // The channel is closed when the sink is dropped: the migration is over.
                if replies_tx.send(message).is_err() || is_last {
                    return Ok(());
                }
            }
            Incoming::Message(_) | Incoming::Chunk { .. } => {
                // The phase table does not distinguish directions. Only a sender sends these messages.
                return Err(WireError::Closed);
            }
        }
    }
}
