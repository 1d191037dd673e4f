//! The native protocol over TCP: a thread of its own with the socket, fed by a bounded channel.

use super::link::{Link, dial};
use super::{Destination, Lost, PageSink, Receipt, SinkError};
use crate::progress::Counters;
use bytes::Bytes;
use pageferry_common::criu::Options;
use pageferry_common::digest::{RoundDigest, digest};
use pageferry_common::needed::NeededFile;
use pageferry_common::wire::message::PIECE_MAX;
use pageferry_common::wire::{
    self, Chunk, Entry, FrameReader, FrameWriter, Incoming, Message, Phase, RoundKind, SharedPhase,
    Totals, WireError,
};
use pageferry_common::{BufferPool, Claim, ImageId, MemfdName, PAGE_SIZE, StateName};
use rustls::ClientConfig;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, split};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// How often a side that has nothing to say says so.
const WORKING_INTERVAL: Duration = Duration::from_secs(1);

/// How long, after a write failed, the receiver's reason is waited for.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How often a receiver that cannot be reached is asked again.
const RETRY: Duration = Duration::from_millis(200);

/// Whether and how hard pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// zstd at this level.
    Zstd(i32),
}

/// Where to connect, and as whom.
#[derive(Debug, Clone)]
pub struct Connect {
    /// `HOST:PORT`.
    pub to: String,
    /// Which migration this is.
    pub claim: Claim,
    /// Longest silence of the receiver, and longest time for one frame to leave.
    pub stall: Duration,
    /// How to prove who we are, and check who the receiver is; `None` to send in the clear.
    pub tls: Option<Arc<ClientConfig>>,
    /// What to do with pages.
    pub compression: Compression,
    /// Whether the process itself is to follow its memory.
    pub moves: bool,
}

enum Outgoing {
    Message(Message),
    Chunk {
        meta: Vec<u8>,
        compressed: bool,
        data: Bytes,
    },
}

/// The native sink.
pub struct NativeSink {
    link: Link<Outgoing, Message>,
    pool: BufferPool,
    compressor: Option<zstd::bulk::Compressor<'static>>,
    counters: Arc<Counters>,
    /// Bytes sent when the round began.
    round_start: u64,
    round: u32,
    totals: Totals,
    digest: RoundDigest,
    directory: String,
    /// The receiver restores processes.
    restores: bool,
    connect: Connect,
}

impl NativeSink {
    /// Connects and greets. Buffers for compressed pages come out of `pool`.
    ///
    /// # Errors
    /// [`SinkError`].
    pub fn connect(connect: Connect, pool: &BufferPool) -> Result<Self, SinkError> {
        let counters = Arc::new(Counters::default());
        let compressor = match connect.compression {
            Compression::None => None,
            Compression::Zstd(level) => {
                Some(zstd::bulk::Compressor::new(level).map_err(SinkError::Io)?)
            }
        };
        let moves = if connect.moves {
            wire::FEATURE_RESTORE
        } else {
            0
        };
        let features = moves
            | match compressor {
                Some(_) => wire::FEATURE_ZSTD,
                None => 0,
            };
        let hello = Message::Hello {
            version: wire::VERSION,
            page_size: PAGE_SIZE as u32,
            features,
            claim: connect.claim,
        };
        let link = {
            let (connect, counters) = (connect.clone(), Arc::clone(&counters));
            Link::start(|commands, replies| converse(connect, commands, replies, counters))?
        };
        let mut sink = Self {
            link,
            pool: pool.clone(),
            compressor,
            counters,
            round_start: 0,
            round: 0,
            totals: Totals::default(),
            digest: RoundDigest::default(),
            directory: String::new(),
            restores: false,
            connect,
        };
        sink.say(hello)?;
        match sink.link.hear()? {
            Message::Welcome {
                directory,
                features: theirs,
                ..
            } => {
                sink.directory = directory;
                sink.restores = theirs & wire::FEATURE_RESTORE != 0;
                if theirs & wire::FEATURE_ZSTD == 0 {
                    sink.compressor = None;
                }
                Ok(sink)
            }
            _ => Err(SinkError::Disagreement),
        }
    }

    fn say(&mut self, message: Message) -> Result<(), SinkError> {
        self.link.say(Outgoing::Message(message))
    }

    /// Compresses a chunk's pages if that makes them at least an eighth smaller.
    fn compress(&mut self, pages: Bytes) -> Result<(bool, Bytes), SinkError> {
        let Some(compressor) = &mut self.compressor else {
            return Ok((false, pages));
        };
        if pages.is_empty() {
            return Ok((false, pages));
        }
        let goal = pages.len() - pages.len() / 8;
        let mut smaller = self.pool.take_blocking();
        // A result that does not fit in the room given is an error, and no gain.
        Ok(
            match compressor.compress_to_buffer(&pages, &mut smaller[..goal]) {
                Ok(len) if len > 0 => (true, smaller.freeze(len)),
                Ok(_) | Err(_) => (false, pages),
            },
        )
    }
}

impl PageSink for NativeSink {
    fn begin(&mut self, round: u32, kind: RoundKind, uptime_us: u64) -> Result<(), SinkError> {
        self.round = round;
        self.totals = Totals::default();
        self.digest = RoundDigest::default();
        self.round_start = self.counters.bytes.load(Ordering::Relaxed);
        self.say(Message::RoundBegin {
            round,
            kind,
            uptime_us,
        })
    }

    fn open(&mut self, image: ImageId) -> Result<(), SinkError> {
        self.totals.images += 1;
        self.digest.open(image);
        self.say(Message::ImageOpen(image))
    }

    fn memfd(&mut self, name: &MemfdName) -> Result<(), SinkError> {
        match self.restores {
            true => self.say(Message::Memfd(name.clone())),
            false => Ok(()),
        }
    }

    fn put(&mut self, entries: Vec<Entry>, pages: Bytes) -> Result<(), SinkError> {
        self.totals.count(&entries);
        self.counters
            .pages
            .store(self.totals.pages(), Ordering::Relaxed);
        let chunk = Chunk {
            entries,
            digest: digest(&pages),
        };
        let meta = Message::Chunk(chunk).encode();
        self.digest.chunk(&meta);
        let (compressed, data) = self.compress(pages)?;
        self.link.say(Outgoing::Chunk {
            meta,
            compressed,
            data,
        })
    }

    fn commit(&mut self) -> Result<Receipt, SinkError> {
        self.totals.digest = self.digest.value();
        self.say(Message::RoundEnd(self.totals))?;
        let expected = Message::RoundAck {
            round: self.round,
            totals: self.totals,
        };
        if self.link.hear()? != expected {
            return Err(SinkError::Disagreement);
        }
        Ok(Receipt {
            totals: self.totals,
            bytes_wire: self.counters.bytes.load(Ordering::Relaxed) - self.round_start,
        })
    }

    fn finish(&mut self) -> Result<(), SinkError> {
        self.say(Message::Finish)?;
        self.link.hear().map(drop)
    }

    fn check(&mut self) -> Result<(), SinkError> {
        self.link.check()
    }

    fn destination(&mut self) -> Option<&mut dyn Destination> {
        match self.restores {
            true => Some(self),
            false => None,
        }
    }

    fn directory(&self) -> &str {
        &self.directory
    }

    fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

impl Destination for NativeSink {
    fn check_files(&mut self, files: Vec<NeededFile>) -> Result<Vec<String>, SinkError> {
        let most = files.len();
        for file in files {
            self.say(Message::File(file))?;
        }
        self.say(Message::Check)?;
        let mut lacks = Vec::new();
        loop {
            match self.link.hear()? {
                Message::Lacks { what } if lacks.len() < most => lacks.push(what),
                Message::Checked => return Ok(lacks),
                _ => return Err(SinkError::Disagreement),
            }
        }
    }

    fn state(&mut self, name: &StateName, image: &mut dyn io::Read) -> Result<(), SinkError> {
        let mut last = false;
        while !last {
            let mut piece = Vec::new();
            let more = image.take(PIECE_MAX as u64).read_to_end(&mut piece);
            // An image that is a multiple of the piece ends with an empty one.
            last = more.map_err(SinkError::State)? < PIECE_MAX;
            let name = name.clone();
            self.say(Message::State { name, last, piece })?;
        }
        Ok(())
    }

    fn restore(&mut self, options: Options) -> Result<(), SinkError> {
        let options = options.bits();
        self.say(Message::Restore { options })?;
        match self.link.hear()? {
            Message::Restored => Ok(()),
            _ => Err(SinkError::Disagreement),
        }
    }

    fn commit(&mut self) -> Result<(), Lost> {
        let answer = match self.say(Message::Commit) {
            Ok(()) => self.link.hear(),
            Err(error) => Err(error),
        };
        match answer {
            Ok(Message::Running) => Ok(()),
            Ok(_) => Err(Lost::InDoubt(SinkError::Disagreement)),
            // Only these are the receiver's own words.
            Err(refused @ SinkError::Wire(WireError::Refused { .. })) => {
                Err(Lost::Refused(refused))
            }
            Err(error) => Err(Lost::InDoubt(error)),
        }
    }

    fn ask_again(&mut self) -> Result<bool, SinkError> {
        let Connect {
            to,
            claim,
            stall,
            tls,
            ..
        } = self.connect.clone();
        resolve(to, claim, stall, tls)
    }
}

/// Asks a receiver what became of a migration: whether it runs there. If not, it never will. Tries
/// for as long as `patience`.
///
/// # Errors
/// [`SinkError`]; then it has not answered.
pub fn resolve(
    to: String,
    claim: Claim,
    patience: Duration,
    tls: Option<Arc<ClientConfig>>,
) -> Result<bool, SinkError> {
    let conversation = move |_: mpsc::Receiver<()>, replies: mpsc::UnboundedSender<bool>| async move {
        let began = Instant::now();
        loop {
            match ask(&to, claim, patience, tls.as_ref()).await {
                Ok(running) => {
                    // The one who asks waits for it.
                    let _ = replies.send(running);
                    return Ok(());
                }
                Err(error) if began.elapsed() > patience => return Err(error),
                Err(error) => tracing::debug!(why = %error, "it does not answer yet"),
            }
            sleep(RETRY).await;
        }
    };
    Link::start(conversation)?.hear()
}

async fn ask(
    to: &str,
    claim: Claim,
    stall: Duration,
    tls: Option<&Arc<ClientConfig>>,
) -> Result<bool, SinkError> {
    let (read, write) = split(dial(to, stall, tls).await?);
    let phase = SharedPhase::default();
    let mut reader = FrameReader::new(read, phase.clone(), stall);
    let mut writer = FrameWriter::new(write, phase, stall);
    writer.send(&Message::Resolve(claim)).await?;
    loop {
        match reader.next().await? {
            Incoming::Message(Message::Working) => {}
            Incoming::Message(Message::Outcome { running }) => return Ok(running),
            Incoming::Message(_) | Incoming::Chunk { .. } => return Err(SinkError::Disagreement),
        }
    }
}

/// The network thread.
async fn converse(
    connect: Connect,
    commands: mpsc::Receiver<Outgoing>,
    replies: mpsc::UnboundedSender<Message>,
    counters: Arc<Counters>,
) -> Result<(), SinkError> {
    let stream = dial(&connect.to, connect.stall, connect.tls.as_ref()).await?;
    let (read, write) = split(stream);
    let phase = SharedPhase::default();
    // A receiver speaks when a round is over; that it takes what we send is seen by writing.
    let mut reader = FrameReader::new(read, phase.clone(), connect.stall).patient_in(&[
        Phase::Ready,
        Phase::Round,
        Phase::Image,
    ]);
    let mut writer = FrameWriter::new(write, phase.clone(), connect.stall);
    let listening = listen(&mut reader, replies);
    tokio::pin!(listening);
    let ended = tokio::select! {
        said = talk(&mut writer, commands, &phase, &counters.bytes) => match said {
            Ok(()) => return Ok(()),
            // The receiver's own reason, if it gave one, says more than our failed write.
            Err(ours) => match timeout(LAST_WORDS, &mut listening).await {
                Ok(Err(refused @ WireError::Refused { .. })) => refused,
                _ => ours,
            },
        },
        heard = &mut listening => match heard {
            Ok(()) => return Ok(()),
            Err(error) => error,
        },
    };
    Err(ended.into())
}

/// Sends what the migration says, and that we are alive when it says nothing.
async fn talk(
    writer: &mut FrameWriter<impl AsyncWrite + Unpin>,
    mut commands: mpsc::Receiver<Outgoing>,
    phase: &SharedPhase,
    bytes_sent: &AtomicU64,
) -> Result<(), WireError> {
    loop {
        match timeout(WORKING_INTERVAL, commands.recv()).await {
            Ok(Some(Outgoing::Message(message))) => writer.send(&message).await?,
            Ok(Some(Outgoing::Chunk {
                meta,
                compressed,
                data,
            })) => writer.send_chunk(&meta, compressed, data).await?,
            Ok(None) => {
                if phase.get() != Phase::Closed {
                    let reason = "the sender gave up".to_owned();
                    writer.send(&Message::Abort { reason }).await?;
                }
                return Ok(());
            }
            Err(_) => match phase.get() {
                Phase::Fresh | Phase::Greeting | Phase::Closed => {}
                Phase::Ready
                | Phase::Round
                | Phase::Image
                | Phase::Sealing
                | Phase::Finishing
                | Phase::Checking
                | Phase::Restoring
                | Phase::Restored
                | Phase::Committing
                | Phase::Resolving => writer.send(&Message::Working).await?,
            },
        }
        bytes_sent.store(writer.bytes(), Ordering::Relaxed);
    }
}

/// Passes on what the receiver says, until it says goodbye.
async fn listen(
    reader: &mut FrameReader<impl AsyncRead + Unpin>,
    replies: mpsc::UnboundedSender<Message>,
) -> Result<(), WireError> {
    loop {
        match reader.next().await? {
            Incoming::Message(Message::Working) => {}
            Incoming::Message(
                message @ (Message::Welcome { .. }
                | Message::Lacks { .. }
                | Message::Checked
                | Message::RoundAck { .. }
                | Message::Restored
                | Message::Running
                | Message::FinishAck),
            ) => {
                let last = message == Message::FinishAck;
                // Nobody waiting for it any more means that the migration is over.
                if replies.send(message).is_err() || last {
                    return Ok(());
                }
            }
            Incoming::Message(_) | Incoming::Chunk { .. } => {
                // The phase table has no direction; one that says such things is no receiver.
                return Err(WireError::Closed);
            }
        }
    }
}
