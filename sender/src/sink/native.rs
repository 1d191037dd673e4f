//! The native protocol over TCP: a thread of its own with the socket, fed by a bounded channel.

use super::compress::{Compression, Compressor, Pace};
use super::link::{Duplex, Link, dial};
use super::{CommitError, Destination, Outcome, PageSink, Receipt, SinkError, TargetState};
use crate::progress::Counters;
use bytes::Bytes;
use pageferry_common::criu::session::Options;
use pageferry_common::digest::{RoundDigest, digest};
use pageferry_common::needed_files::NeededFile;
use pageferry_common::wire::message::PIECE_MAX;
use pageferry_common::wire::{
    self, Chunk, Entry, FrameReader, FrameWriter, Incoming, Message, Patience, Phase, RoundKind,
    SharedPhase, Totals, WireError,
};
use pageferry_common::{BufferPool, Claim, ImageId, MemfdName, PAGE_SIZE, StateName, with_causes};
use rustls::ClientConfig;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf, split};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// How often a side that has nothing to say says so.
const WORKING_INTERVAL: Duration = Duration::from_secs(1);

/// How long, after a write failed, the receiver's reason is waited for.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How often a receiver that cannot be reached is asked again.
const RETRY: Duration = Duration::from_millis(200);

/// How long to wait before connecting again: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// How long one attempt to connect again may take.
const ATTEMPT: Duration = Duration::from_secs(10);

/// Where to connect, and as whom.
#[derive(Debug, Clone)]
pub struct Connect {
    /// `HOST:PORT`.
    pub to: String,
    /// Which migration this is.
    pub claim: Claim,
    /// Longest silence of the receiver, and longest time for one frame to leave.
    pub stall: Duration,
    /// How long to try to connect again when the connection is lost; not at all if zero.
    pub reconnect_for: Duration,
    /// [`Connect::stall`] while the tree is frozen, if that is longer.
    pub max_frozen: Duration,
    /// How to prove who we are, and check who the receiver is; `None` to send in the clear.
    pub tls: Option<Arc<ClientConfig>>,
    /// What to do with pages.
    pub compression: Compression,
    /// Whether the process itself is to follow its memory.
    pub needs_restore: bool,
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
    compressor: Option<Compressor>,
    /// Of the link.
    pace: Arc<Pace>,
    counters: Arc<Counters>,
    /// Of the connection.
    patience: Patience,
    /// Bytes sent when the round began.
    round_start: u64,
    /// The last round that the receiver is known to have.
    acked: u32,
    /// Whether the round behind that was sent to its end.
    ended: bool,
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
        let compressor = Compressor::new(connect.compression, pool).map_err(SinkError::Io)?;
        let pace = Arc::default();
        let patience = Patience::from(connect.stall);
        let mut sink = Self {
            link: start(&connect, &counters, &pace, &patience, Duration::ZERO)?,
            compressor,
            pace,
            counters,
            patience,
            round_start: 0,
            acked: 0,
            ended: false,
            totals: Totals::default(),
            digest: RoundDigest::default(),
            directory: String::new(),
            restores: false,
            connect,
        };
        match sink.welcome()? {
            0 => Ok(sink),
            _ => Err(SinkError::UnexpectedReply),
        }
    }

    /// Waits until the receiver has greeted. Returns how many rounds it has.
    fn welcome(&mut self) -> Result<u32, SinkError> {
        let Message::Welcome {
            directory,
            features,
            rounds,
            ..
        } = self.link.hear()?
        else {
            return Err(SinkError::UnexpectedReply);
        };
        self.directory = directory;
        self.restores = features & wire::FEATURE_RESTORE != 0;
        if features & wire::FEATURE_ZSTD == 0 {
            self.compressor = None;
        }
        Ok(rounds)
    }

    fn receipt(&self) -> Receipt {
        Receipt {
            totals: self.totals,
            bytes_wire: self.counters.bytes.load(Ordering::Relaxed) - self.round_start,
        }
    }

    fn say(&mut self, message: Message) -> Result<(), SinkError> {
        self.link.say(Outgoing::Message(message))
    }
}

impl PageSink for NativeSink {
    fn set_target_state(&mut self, state: TargetState) {
        let Connect {
            stall, max_frozen, ..
        } = self.connect;
        self.patience.set(match state {
            TargetState::Running => stall,
            TargetState::Frozen => stall.min(max_frozen),
        });
    }

    fn reconnect(&mut self, broken: SinkError) -> Result<Option<Receipt>, SinkError> {
        let within = self.connect.reconnect_for;
        if within.is_zero() {
            return Err(broken);
        }
        self.set_target_state(TargetState::Running);
        let why = with_causes(&broken);
        tracing::warn!(
            event = "connection_lost",
            why,
            ?within,
            "the connection is lost, the target runs: connecting again"
        );
        self.pace = Arc::default();
        let (counters, pace) = (&self.counters, &self.pace);
        self.link = start(&self.connect, counters, pace, &self.patience, within)?;
        let rounds = self.welcome()?;
        tracing::info!(event = "reconnected", rounds, "connected again");
        let ended = std::mem::take(&mut self.ended);
        match rounds.checked_sub(self.acked) {
            Some(0) => Ok(None),
            Some(1) if ended => {
                self.acked = rounds;
                Ok(Some(self.receipt()))
            }
            _ => Err(SinkError::UnexpectedReply),
        }
    }

    fn begin(&mut self, round: u32, kind: RoundKind, uptime_us: u64) -> Result<(), SinkError> {
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

    fn memfd_name(&mut self, name: &MemfdName) -> Result<(), SinkError> {
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
        let (compressed, data) = match &mut self.compressor {
            Some(compressor) => compressor.compress(pages, &self.pace),
            None => (false, pages),
        };
        self.pace.queue(data.len());
        self.link.say(Outgoing::Chunk {
            meta,
            compressed,
            data,
        })
    }

    fn commit(&mut self) -> Result<Receipt, SinkError> {
        self.totals.digest = self.digest.value();
        self.ended = true;
        self.say(Message::RoundEnd(self.totals))?;
        let round = self.acked + 1;
        let totals = self.totals;
        if self.link.hear()? != (Message::RoundAck { round, totals }) {
            return Err(SinkError::UnexpectedReply);
        }
        self.ended = false;
        self.acked = round;
        Ok(self.receipt())
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
                _ => return Err(SinkError::UnexpectedReply),
            }
        }
    }

    fn put_state(&mut self, name: &StateName, image: &mut dyn io::Read) -> Result<(), SinkError> {
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
            _ => Err(SinkError::UnexpectedReply),
        }
    }

    fn commit(&mut self) -> Result<(), CommitError> {
        let answer = match self.say(Message::Commit) {
            Ok(()) => self.link.hear(),
            Err(error) => Err(error),
        };
        match answer {
            Ok(Message::Running) => Ok(()),
            Ok(_) => Err(CommitError::InDoubt(SinkError::UnexpectedReply)),
            // Only these are the receiver's own words.
            Err(refused @ SinkError::Wire(WireError::Refused { .. })) => {
                Err(CommitError::Refused(refused))
            }
            Err(error) => Err(CommitError::InDoubt(error)),
        }
    }

    fn query_outcome(&mut self) -> Result<Outcome, SinkError> {
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
) -> Result<Outcome, SinkError> {
    let conversation = move |_: mpsc::Receiver<()>, replies: mpsc::UnboundedSender<Outcome>| async move {
        let began = Instant::now();
        loop {
            match ask(&to, claim, patience, tls.as_ref()).await {
                Ok(outcome) => {
                    // The one who asks waits for it.
                    let _ = replies.send(outcome);
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
) -> Result<Outcome, SinkError> {
    let (read, write) = split(dial(to, stall, stall, tls).await?);
    let phase = SharedPhase::default();
    let mut reader = FrameReader::new(read, phase.clone(), stall);
    let mut writer = FrameWriter::new(write, phase, stall);
    writer.send(&Message::Resolve(claim)).await?;
    loop {
        match reader.next().await? {
            Incoming::Message(Message::Working) => {}
            Incoming::Message(Message::Outcome { running: true }) => return Ok(Outcome::Running),
            Incoming::Message(Message::Outcome { running: false }) => return Ok(Outcome::Aborted),
            Incoming::Message(_) | Incoming::Chunk { .. } => {
                return Err(SinkError::UnexpectedReply);
            }
        }
    }
}

/// Starts the network thread, which connects and greets first, trying again if need be for so long.
fn start(
    connect: &Connect,
    counters: &Arc<Counters>,
    pace: &Arc<Pace>,
    patience: &Patience,
    within: Duration,
) -> Result<Link<Outgoing, Message>, SinkError> {
    let (connect, patience) = (connect.clone(), patience.clone());
    let told = (Arc::clone(counters), Arc::clone(pace));
    Link::start(move |commands, replies| {
        converse(connect, patience, within, commands, replies, told)
    })
}

/// The network thread.
async fn converse(
    connect: Connect,
    patience: Patience,
    within: Duration,
    commands: mpsc::Receiver<Outgoing>,
    replies: mpsc::UnboundedSender<Message>,
    (counters, pace): (Arc<Counters>, Arc<Pace>),
) -> Result<(), SinkError> {
    let began = Instant::now();
    let mut pause = BACK_OFF.0;
    let attempt = match within.is_zero() {
        true => connect.stall,
        false => connect.stall.min(ATTEMPT),
    };
    let (mut reader, mut writer, phase) = loop {
        match greet(&connect, attempt, &patience, &replies, &pace).await {
            Ok(greeted) => break greeted,
            Err(error) if !error.is_transient() || began.elapsed() + pause > within => {
                return Err(error);
            }
            Err(error) => tracing::debug!(why = with_causes(&error), "not connected yet"),
        }
        sleep(pause).await;
        pause = BACK_OFF.1.min(pause * 2);
    };
    let listening = listen(&mut reader, replies);
    tokio::pin!(listening);
    let ended = tokio::select! {
        said = talk(&mut writer, commands, &phase, &counters.bytes, &pace) => match said {
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

type Greeted = (
    FrameReader<ReadHalf<Box<dyn Duplex>>>,
    FrameWriter<WriteHalf<Box<dyn Duplex>>>,
    SharedPhase,
);

/// Connects, says who we are, and passes on that we are welcome.
async fn greet(
    connect: &Connect,
    attempt: Duration,
    patience: &Patience,
    replies: &mpsc::UnboundedSender<Message>,
    pace: &Pace,
) -> Result<Greeted, SinkError> {
    let stream = dial(&connect.to, attempt, connect.stall, connect.tls.as_ref()).await?;
    pace.watch(stream.as_raw_fd());
    let (read, write) = split(stream);
    let phase = SharedPhase::default();
    // A receiver speaks when a round is over; that it takes what we send is seen by writing.
    let mut reader = FrameReader::new(read, phase.clone(), patience.clone()).patient_in(&[
        Phase::Ready,
        Phase::Round,
        Phase::Image,
    ]);
    let mut writer = FrameWriter::new(write, phase.clone(), patience.clone());
    let mut features = 0;
    if connect.needs_restore {
        features |= wire::FEATURE_RESTORE;
    }
    if connect.compression != Compression::None {
        features |= wire::FEATURE_ZSTD;
    }
    let hello = Message::Hello {
        version: wire::VERSION,
        page_size: PAGE_SIZE as u32,
        features,
        claim: connect.claim,
    };
    writer.send(&hello).await?;
    loop {
        match reader.next().await? {
            Incoming::Message(Message::Working) => {}
            Incoming::Message(welcome @ Message::Welcome { .. }) => {
                // Whoever waits for it is there as long as the link.
                let _ = replies.send(welcome);
                return Ok((reader, writer, phase));
            }
            Incoming::Message(_) | Incoming::Chunk { .. } => {
                return Err(SinkError::UnexpectedReply);
            }
        }
    }
}

/// Sends what the migration says, and that we are alive when it says nothing.
async fn talk(
    writer: &mut FrameWriter<impl AsyncWrite + Unpin>,
    mut commands: mpsc::Receiver<Outgoing>,
    phase: &SharedPhase,
    bytes_sent: &AtomicU64,
    pace: &Pace,
) -> Result<(), WireError> {
    // Those of the connections before this one.
    let before = bytes_sent.load(Ordering::Relaxed);
    loop {
        match timeout(WORKING_INTERVAL, commands.recv()).await {
            Ok(Some(Outgoing::Message(message))) => writer.send(&message).await?,
            Ok(Some(Outgoing::Chunk {
                meta,
                compressed,
                data,
            })) => {
                let (bytes, unsent, began) = (data.len(), pace.unsent(), Instant::now());
                writer.send_chunk(&meta, compressed, data).await?;
                pace.wrote(bytes, began.elapsed(), unsent);
            }
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
        bytes_sent.store(before + writer.bytes(), Ordering::Relaxed);
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
                message @ (Message::Lacks { .. }
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
