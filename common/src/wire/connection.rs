//! Frames over a byte stream: the only module that reads or writes the socket.

use super::codec::MessageError;
use super::frame::{FrameError, FrameKind, HEADER_LEN, Header};
use super::message::{Chunk, Message, RefuseCode};
use super::phase::{OutOfPhase, Phase};
use bytes::{Buf, Bytes};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// Failure of a connection. The connection cannot be used afterwards.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The transport failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// The peer closed the connection between frames.
    #[error("the peer closed the connection")]
    Closed,
    /// No data was transferred for longer than the limit.
    #[error("no progress on the connection for {} seconds", .0.as_secs())]
    Stalled(Duration),
    /// The peer sent an invalid frame.
    #[error("the peer violated the protocol")]
    Frame(#[from] FrameError),
    /// The peer sent an invalid message.
    #[error("the peer violated the protocol")]
    Message(#[from] MessageError),
    /// A frame is not permitted in this phase.
    #[error("the peer violated the protocol")]
    Phase(#[from] OutOfPhase),
    /// The receiver refused.
    #[error("the receiver refused: {reason}")]
    Refused {
        /// Code of the reason.
        code: RefuseCode,
        /// Reason as text.
        reason: String,
    },
    /// The sender aborted.
    #[error("the sender aborted: {0}")]
    Aborted(String),
}

/// Phase of a connection, shared by its two directions.
#[derive(Debug, Clone)]
pub struct SharedPhase(Arc<Mutex<Phase>>);

impl Default for SharedPhase {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Phase::Fresh)))
    }
}

impl SharedPhase {
    /// Returns the current phase.
    #[must_use]
    pub fn get(&self) -> Phase {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn advance(&self, kind: FrameKind) -> Result<(), OutOfPhase> {
        let mut phase = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *phase = phase.advance(kind)?;
        Ok(())
    }
}

/// Maximum time without progress, shared by the two directions of a connection. It can be changed at any
/// time.
#[derive(Debug, Clone)]
pub struct StallLimit(Arc<AtomicU64>);

impl StallLimit {
    /// Returns the current limit.
    #[must_use]
    pub fn get(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }

    /// Changes the limit, including for operations in progress.
    pub fn set(&self, stall: Duration) {
        let millis = u64::try_from(stall.as_millis()).unwrap_or(u64::MAX);
        self.0.store(millis, Ordering::Relaxed);
    }
}

impl From<Duration> for StallLimit {
    fn from(stall: Duration) -> Self {
        let limit = Self(Arc::default());
        limit.set(stall);
        limit
    }
}

/// Interval at which an operation in progress checks the limit.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Sending direction of a connection.
#[derive(Debug)]
pub struct FrameWriter<W> {
    io: W,
    phase: SharedPhase,
    stall: StallLimit,
    seq: u64,
    bytes: u64,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Returns a writer of frames to `io`. A frame that takes longer than `stall` to be written is an error.
    pub fn new(io: W, phase: SharedPhase, stall: impl Into<StallLimit>) -> Self {
        Self {
            io,
            phase,
            stall: stall.into(),
            seq: 0,
            bytes: 0,
        }
    }

    /// Returns the number of bytes written, including headers.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Sends a message other than a chunk.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn send(&mut self, message: &Message) -> Result<(), WireError> {
        let meta = message.encode();
        self.send_frame(message.kind(), false, &meta, Bytes::new())
            .await
    }

    /// Sends a chunk: its encoded metadata and its pages, in one vectored write.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn send_chunk(
        &mut self,
        meta: &[u8],
        compressed: bool,
        data: Bytes,
    ) -> Result<(), WireError> {
        self.send_frame(FrameKind::Chunk, compressed, meta, data)
            .await
    }

    async fn send_frame(
        &mut self,
        kind: FrameKind,
        compressed: bool,
        meta: &[u8],
        data: Bytes,
    ) -> Result<(), WireError> {
        self.phase.advance(kind)?;
        let header = Header::encode(kind, compressed, self.seq, meta, data.len());
        self.seq += 1;
        self.bytes += (header.len() + meta.len() + data.len()) as u64;
        let mut frame = Buf::chain(&header[..], meta).chain(data);
        let write = async {
            self.io.write_all_buf(&mut frame).await?;
            self.io.flush().await
        };
        within_limit(&self.stall, write)
            .await?
            .map_err(WireError::Io)
    }
}

/// A received frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A message other than a chunk.
    Message(Message),
    /// A chunk. Its data must be received with [`FrameReader::recv_data`] before the next frame.
    Chunk {
        /// Decoded metadata.
        chunk: Chunk,
        /// Encoded metadata, for the digest of the round.
        meta: Bytes,
        /// Whether the data is compressed.
        compressed: bool,
        /// Length of the data on the wire, bytes; at most [`crate::CHUNK_SIZE`].
        data_len: usize,
    },
}

/// Receiving direction of a connection.
#[derive(Debug)]
pub struct FrameReader<R> {
    io: R,
    phase: SharedPhase,
    stall: StallLimit,
    /// Phases in which the peer may be silent.
    untimed_phases: &'static [Phase],
    seq: u64,
    bytes: u64,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Returns a reader of frames from `io`. A peer that is silent for longer than `stall` is an error.
    pub fn new(io: R, phase: SharedPhase, stall: impl Into<StallLimit>) -> Self {
        Self {
            io,
            phase,
            stall: stall.into(),
            untimed_phases: &[],
            seq: 0,
            bytes: 0,
        }
    }

    /// Disables the limit between frames in these phases.
    #[must_use]
    pub fn untimed_in(self, phases: &'static [Phase]) -> Self {
        Self {
            untimed_phases: phases,
            ..self
        }
    }

    /// Returns the number of bytes read, including headers.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the stream, to read what follows the last frame.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.io
    }

    /// Receives the next frame. Refusals and aborts of the peer are returned as errors.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn recv(&mut self) -> Result<Incoming, WireError> {
        let mut header = [0; HEADER_LEN];
        let first = self.read_first_bytes(&mut header).await?;
        if first == 0 {
            return Err(WireError::Closed);
        }
        self.read(&mut header[first..]).await?;
        let decoded = Header::decode(&header, self.seq)?;
        self.seq += 1;
        let mut meta = vec![0; decoded.meta_len];
        self.read(&mut meta).await?;
        decoded.verify(&header, &meta)?;
        self.phase.advance(decoded.kind)?;
        match Message::decode(decoded.kind, &meta)? {
            Message::Refuse { code, reason } => Err(WireError::Refused { code, reason }),
            Message::Abort { reason } => Err(WireError::Aborted(reason)),
            Message::Chunk(chunk) => {
                if !decoded.compressed && decoded.data_len != chunk.raw_len() {
                    return Err(MessageError::Bounds {
                        entries: chunk.entries.len(),
                        raw_len: decoded.data_len as u64,
                    }
                    .into());
                }
                Ok(Incoming::Chunk {
                    chunk,
                    meta: meta.into(),
                    compressed: decoded.compressed,
                    data_len: decoded.data_len,
                })
            }
            message => Ok(Incoming::Message(message)),
        }
    }

    /// Receives the data of the chunk that [`FrameReader::recv`] just returned.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn recv_data(&mut self, buffer: &mut [u8]) -> Result<(), WireError> {
        self.read(buffer).await
    }

    /// Reads the first bytes of a header; 0 if the peer closed the connection.
    async fn read_first_bytes(&mut self, buffer: &mut [u8]) -> Result<usize, WireError> {
        let mut silent_since = Instant::now();
        loop {
            let stall = self.stall.get();
            // A read that is cancelled has read nothing.
            match timeout(POLL_INTERVAL.min(stall), self.io.read(buffer)).await {
                Ok(got) => {
                    let got = got.map_err(WireError::Io)?;
                    self.bytes += got as u64;
                    return Ok(got);
                }
                Err(_) if self.untimed_phases.contains(&self.phase.get()) => {
                    silent_since = Instant::now();
                }
                Err(_) if silent_since.elapsed() < stall => {}
                Err(_) => return Err(WireError::Stalled(stall)),
            }
        }
    }

    /// Fills `buffer`. The deadline is for the whole buffer, so a peer that trickles bytes does not extend
    /// it.
    async fn read(&mut self, buffer: &mut [u8]) -> Result<(), WireError> {
        let got = within_limit(&self.stall, self.io.read_exact(buffer)).await?;
        self.bytes += got.map_err(WireError::Io)? as u64;
        Ok(())
    }
}

/// Awaits `work`, which must not take longer than the limit. The limit may change meanwhile.
async fn within_limit<T>(
    limit: &StallLimit,
    work: impl Future<Output = T>,
) -> Result<T, WireError> {
    let began = Instant::now();
    let mut work = pin!(work);
    loop {
        let stall = limit.get();
        match timeout(POLL_INTERVAL.min(stall), &mut work).await {
            Ok(done) => return Ok(done),
            Err(_) if began.elapsed() < stall => {}
            Err(_) => return Err(WireError::Stalled(stall)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ImageId;
    use crate::memory::addr::PageRange;
    use crate::wire::{Entry, EntryKind};

    const STALL: Duration = Duration::from_secs(5);

    fn hello() -> Message {
        Message::Hello {
            version: 1,
            page_size: 4096,
            features: 0,
            claim: crate::Claim {
                id: crate::MigrationId([7; 16]),
                root_pid: 1,
                token: crate::Token([8; 32]),
            },
        }
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(work)
    }

    #[test]
    fn frames_and_data_arrive() {
        run(async {
            let (a, b) = tokio::io::duplex(1 << 20);
            let phase = SharedPhase::default();
            let mut writer = FrameWriter::new(a, phase.clone(), STALL);
            let mut reader = FrameReader::new(b, SharedPhase::default(), STALL);
            let entry = Entry {
                range: PageRange::new(0x1000, 1).unwrap(),
                kind: EntryKind::Data,
            };
            let chunk = Chunk {
                entries: vec![entry],
                digest: 3,
            };
            let welcome = Message::Welcome {
                version: 1,
                features: 0,
                rounds: 0,
                receiver: crate::ReceiverId([5; 16]),
                directory: "d".into(),
            };
            let begin = Message::RoundBegin {
                round: 1,
                kind: crate::wire::RoundKind::Final,
                uptime_us: 5,
            };
            let open = Message::ImageOpen(ImageId::Process(9));
            for message in [&hello(), &welcome, &begin, &open] {
                writer.send(message).await.unwrap();
                assert_eq!(
                    reader.recv().await.unwrap(),
                    Incoming::Message(message.clone())
                );
            }
            let meta = Message::Chunk(chunk.clone()).encode();
            let page = Bytes::from(vec![5; 4096]);
            writer.send_chunk(&meta, false, page.clone()).await.unwrap();
            let Incoming::Chunk {
                chunk: got,
                data_len,
                ..
            } = reader.recv().await.unwrap()
            else {
                panic!("not a chunk");
            };
            let mut data = vec![0; data_len];
            reader.recv_data(&mut data).await.unwrap();
            assert_eq!((got, &data[..]), (chunk, &page[..]));
            assert_eq!(writer.bytes(), reader.bytes());
        });
    }

    #[test]
    fn a_closed_connection_and_a_stalled_one_differ() {
        run(async {
            let (a, b) = tokio::io::duplex(64);
            drop(a);
            let mut reader = FrameReader::new(b, SharedPhase::default(), STALL);
            assert!(matches!(reader.recv().await, Err(WireError::Closed)));

            let (_a, b) = tokio::io::duplex(64);
            let mut reader = FrameReader::new(b, SharedPhase::default(), Duration::from_millis(10));
            assert!(matches!(reader.recv().await, Err(WireError::Stalled(_))));
        });
    }

    #[test]
    fn the_peer_may_be_silent_in_untimed_phases() {
        run(async {
            let (a, b) = tokio::io::duplex(256);
            let stall = Duration::from_millis(10);
            let mut reader =
                FrameReader::new(b, SharedPhase::default(), stall).untimed_in(&[Phase::Fresh]);
            let mut writer = FrameWriter::new(a, SharedPhase::default(), STALL);
            let late = async {
                tokio::time::sleep(5 * stall).await;
                writer.send(&hello()).await.unwrap();
            };
            let (received, ()) = tokio::join!(reader.recv(), late);
            assert_eq!(received.unwrap(), Incoming::Message(hello()));
            // The limit applies in the next phase.
            assert!(matches!(reader.recv().await, Err(WireError::Stalled(_))));
        });
    }

    #[test]
    fn a_lowered_limit_ends_operations_in_progress() {
        run(async {
            let (_a, b) = tokio::io::duplex(256);
            let limit = StallLimit::from(STALL);
            let mut reader = FrameReader::new(b, SharedPhase::default(), limit.clone());
            let (received, ()) = tokio::join!(reader.recv(), async {
                tokio::task::yield_now().await;
                limit.set(Duration::from_millis(10));
            });
            let short = Duration::from_millis(10);
            assert!(matches!(received, Err(WireError::Stalled(stall)) if stall == short));
        });
    }

    #[test]
    fn a_frame_out_of_phase_is_not_sent() {
        run(async {
            let (a, _b) = tokio::io::duplex(64);
            let mut writer = FrameWriter::new(a, SharedPhase::default(), STALL);
            let sent = writer.send(&Message::Finish).await;
            assert!(matches!(sent, Err(WireError::Phase(_))));
            assert_eq!(writer.bytes(), 0);
        });
    }
}
