//! Frames over a byte stream: the only place that reads or writes the socket.

use super::frame::{FrameError, FrameKind, HEADER_LEN, Header};
use super::message::{Chunk, Message, MessageError, RefuseCode};
use super::phase::{OutOfPhase, Phase};
use bytes::{Buf, Bytes};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// What can go wrong on a connection.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The transport failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// The peer closed the connection between frames.
    #[error("the peer closed the connection")]
    Closed,
    /// Nothing moved for longer than allowed.
    #[error("no progress on the connection for {} seconds", .0.as_secs())]
    Stalled(Duration),
    /// What came is not a frame.
    #[error("the peer broke the protocol")]
    Frame(#[from] FrameError),
    /// What came is not a message.
    #[error("the peer broke the protocol")]
    Message(#[from] MessageError),
    /// A frame came at the wrong time.
    #[error("the peer broke the protocol")]
    Phase(#[from] OutOfPhase),
    /// The receiver said no.
    #[error("the receiver refused: {reason}")]
    Refused {
        /// Its class of reason.
        code: RefuseCode,
        /// Its reason, in words.
        reason: String,
    },
    /// The sender gave up.
    #[error("the sender gave up: {0}")]
    Aborted(String),
}

/// The connection's phase, shared by its two directions.
#[derive(Debug, Clone)]
pub struct SharedPhase(Arc<Mutex<Phase>>);

impl Default for SharedPhase {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Phase::Fresh)))
    }
}

impl SharedPhase {
    /// Where the connection stands.
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

/// The longest time without progress, shared by a connection's two directions and whoever changes it.
#[derive(Debug, Clone)]
pub struct Patience(Arc<AtomicU64>);

impl Patience {
    /// How long it is now.
    #[must_use]
    pub fn get(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }

    /// Makes it as long, from now on and for what is awaited already.
    pub fn set(&self, stall: Duration) {
        let millis = u64::try_from(stall.as_millis()).unwrap_or(u64::MAX);
        self.0.store(millis, Ordering::Relaxed);
    }
}

impl From<Duration> for Patience {
    fn from(stall: Duration) -> Self {
        let patience = Self(Arc::default());
        patience.set(stall);
        patience
    }
}

/// How often it is looked whether a connection's patience is at its end.
const LOOK: Duration = Duration::from_millis(250);

/// The sending direction.
#[derive(Debug)]
pub struct FrameWriter<W> {
    io: W,
    phase: SharedPhase,
    stall: Patience,
    seq: u64,
    bytes: u64,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Writes frames to `io`; a frame that does not leave within `stall` is an error.
    pub fn new(io: W, phase: SharedPhase, stall: impl Into<Patience>) -> Self {
        Self {
            io,
            phase,
            stall: stall.into(),
            seq: 0,
            bytes: 0,
        }
    }

    /// Bytes written so far, headers and all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Sends a message other than a chunk.
    ///
    /// # Errors
    /// [`WireError`]; afterwards the connection is of no use.
    pub async fn send(&mut self, message: &Message) -> Result<(), WireError> {
        let meta = message.encode();
        self.frame(message.kind(), false, &meta, Bytes::new()).await
    }

    /// Sends a chunk: its encoded metadata and its pages, in one vectored write.
    ///
    /// # Errors
    /// [`WireError`]; afterwards the connection is of no use.
    pub async fn send_chunk(
        &mut self,
        meta: &[u8],
        compressed: bool,
        data: Bytes,
    ) -> Result<(), WireError> {
        self.frame(FrameKind::Chunk, compressed, meta, data).await
    }

    async fn frame(
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
        in_time(&self.stall, write).await?.map_err(WireError::Io)
    }
}

/// What arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// Any message but a chunk.
    Message(Message),
    /// A chunk; its data must be fetched with [`FrameReader::data`] before the next frame.
    Chunk {
        /// The decoded metadata.
        chunk: Chunk,
        /// The metadata as it came, for the round's digest.
        meta: Bytes,
        /// Whether the data is compressed.
        compressed: bool,
        /// Length of the data on the wire, bytes; at most [`crate::CHUNK_SIZE`].
        data_len: usize,
    },
}

/// The receiving direction.
#[derive(Debug)]
pub struct FrameReader<R> {
    io: R,
    phase: SharedPhase,
    stall: Patience,
    /// Phases in which the peer owes us nothing, however long they last.
    patient_in: &'static [Phase],
    seq: u64,
    bytes: u64,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads frames from `io`; a peer silent for longer than `stall` is an error.
    pub fn new(io: R, phase: SharedPhase, stall: impl Into<Patience>) -> Self {
        Self {
            io,
            phase,
            stall: stall.into(),
            patient_in: &[],
            seq: 0,
            bytes: 0,
        }
    }

    /// In these phases the peer may be silent between frames for as long as it likes.
    #[must_use]
    pub fn patient_in(self, phases: &'static [Phase]) -> Self {
        Self {
            patient_in: phases,
            ..self
        }
    }

    /// Bytes read so far, headers and all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The stream itself, for what is no frame any more.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.io
    }

    /// The next frame. Refusals and aborts of the peer come as errors.
    ///
    /// # Errors
    /// [`WireError`]; afterwards the connection is of no use.
    pub async fn next(&mut self) -> Result<Incoming, WireError> {
        let mut header = [0; HEADER_LEN];
        let first = self.first_bytes(&mut header).await?;
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

    /// The data of the chunk that [`FrameReader::next`] just returned, whole.
    ///
    /// # Errors
    /// [`WireError`]; afterwards the connection is of no use.
    pub async fn data(&mut self, buffer: &mut [u8]) -> Result<(), WireError> {
        self.read(buffer).await
    }

    async fn first_bytes(&mut self, buffer: &mut [u8]) -> Result<usize, WireError> {
        let mut silent_since = Instant::now();
        loop {
            let stall = self.stall.get();
            // A read that is given up has read nothing.
            match timeout(LOOK.min(stall), self.io.read(buffer)).await {
                Ok(got) => {
                    let got = got.map_err(WireError::Io)?;
                    self.bytes += got as u64;
                    return Ok(got);
                }
                Err(_) if self.patient_in.contains(&self.phase.get()) => {
                    silent_since = Instant::now();
                }
                Err(_) if silent_since.elapsed() < stall => {}
                Err(_) => return Err(WireError::Stalled(stall)),
            }
        }
    }

    /// Fills `buffer`. The deadline is a whole message's: a peer that trickles does not renew it.
    async fn read(&mut self, buffer: &mut [u8]) -> Result<(), WireError> {
        let got = in_time(&self.stall, self.io.read_exact(buffer)).await?;
        self.bytes += got.map_err(WireError::Io)? as u64;
        Ok(())
    }
}

/// Awaits what must not take longer than `patience` has, which may change meanwhile.
async fn in_time<T>(patience: &Patience, work: impl Future<Output = T>) -> Result<T, WireError> {
    let began = Instant::now();
    let mut work = pin!(work);
    loop {
        let stall = patience.get();
        match timeout(LOOK.min(stall), &mut work).await {
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
    fn frames_and_their_data_cross() {
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
                    reader.next().await.unwrap(),
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
            } = reader.next().await.unwrap()
            else {
                panic!("not a chunk");
            };
            let mut data = vec![0; data_len];
            reader.data(&mut data).await.unwrap();
            assert_eq!((got, &data[..]), (chunk, &page[..]));
            assert_eq!(writer.bytes(), reader.bytes());
        });
    }

    #[test]
    fn a_peer_that_goes_away_or_stalls_is_told_apart() {
        run(async {
            let (a, b) = tokio::io::duplex(64);
            drop(a);
            let mut reader = FrameReader::new(b, SharedPhase::default(), STALL);
            assert!(matches!(reader.next().await, Err(WireError::Closed)));

            let (_a, b) = tokio::io::duplex(64);
            let mut reader = FrameReader::new(b, SharedPhase::default(), Duration::from_millis(10));
            assert!(matches!(reader.next().await, Err(WireError::Stalled(_))));
        });
    }

    #[test]
    fn a_peer_that_owes_nothing_may_be_silent() {
        run(async {
            let (a, b) = tokio::io::duplex(256);
            let stall = Duration::from_millis(10);
            let mut reader =
                FrameReader::new(b, SharedPhase::default(), stall).patient_in(&[Phase::Fresh]);
            let mut writer = FrameWriter::new(a, SharedPhase::default(), STALL);
            let late = async {
                tokio::time::sleep(5 * stall).await;
                writer.send(&hello()).await.unwrap();
            };
            let (heard, ()) = tokio::join!(reader.next(), late);
            assert_eq!(heard.unwrap(), Incoming::Message(hello()));
            // Now an answer is due.
            assert!(matches!(reader.next().await, Err(WireError::Stalled(_))));
        });
    }

    #[test]
    fn patience_that_ends_ends_what_is_awaited_already() {
        run(async {
            let (_a, b) = tokio::io::duplex(256);
            let patience = Patience::from(STALL);
            let mut reader = FrameReader::new(b, SharedPhase::default(), patience.clone());
            let (heard, ()) = tokio::join!(reader.next(), async {
                tokio::task::yield_now().await;
                patience.set(Duration::from_millis(10));
            });
            let short = Duration::from_millis(10);
            assert!(matches!(heard, Err(WireError::Stalled(stall)) if stall == short));
        });
    }

    #[test]
    fn an_own_frame_out_of_phase_is_refused_before_it_is_sent() {
        run(async {
            let (a, _b) = tokio::io::duplex(64);
            let mut writer = FrameWriter::new(a, SharedPhase::default(), STALL);
            let sent = writer.send(&Message::Finish).await;
            assert!(matches!(sent, Err(WireError::Phase(_))));
            assert_eq!(writer.bytes(), 0);
        });
    }
}
