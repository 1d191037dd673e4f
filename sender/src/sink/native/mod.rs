//! Sink for the native protocol of `receive`.
//!
//! The network thread owns the socket ([`conversation`]); a bounded channel feeds it. [`destination`]
//! restores the process after the last round.

mod conversation;
mod destination;

pub use destination::resolve;

use super::compress::{Compressor, LinkRate, Payload};
use super::link::{Connect, Link};
use super::{Destination, PageSink, Receipt, SinkError, TargetState};
use crate::progress::Counters;
use bytes::Bytes;
use conversation::{Conversation, Outgoing};
use pageferry_common::digest::{RoundDigest, digest};
use pageferry_common::wire::{self, Chunk, Entry, Message, RoundKind, StallLimit, Totals};
use pageferry_common::{BufferPool, ImageId, MemfdName, ReceiverId, with_causes};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Sink for the native protocol.
pub struct NativeSink {
    link: Link<Outgoing, Message>,
    compressor: Option<Compressor>,
    /// Rate of the current connection.
    rate: Arc<LinkRate>,
    counters: Arc<Counters>,
    /// Maximum time without progress on the connection.
    patience: StallLimit,
    /// Bytes sent when the round began.
    round_start: u64,
    /// Rounds that the receiver has acknowledged.
    acked: u32,
    /// Whether the end of the round in flight was sent.
    round_ended: bool,
    totals: Totals,
    digest: RoundDigest,
    directory: String,
    /// Id of the receiver.
    receiver: ReceiverId,
    /// Whether the receiver restores processes.
    restores: bool,
    connect: Connect,
}

impl NativeSink {
    /// Connects and exchanges greetings. Takes buffers for compressed pages from `pool`.
    ///
    /// # Errors
    /// [`SinkError`].
    pub fn connect(connect: Connect, pool: &BufferPool) -> Result<Self, SinkError> {
        let counters = Arc::new(Counters::default());
        let compressor = Compressor::new(connect.compression, pool).map_err(SinkError::Io)?;
        let rate = Arc::default();
        let patience = StallLimit::from(connect.stall);
        let conversation = Conversation {
            connect: connect.clone(),
            patience: patience.clone(),
            retry_for: Duration::ZERO,
            counters: Arc::clone(&counters),
            rate: Arc::clone(&rate),
        };
        let mut sink = Self {
            link: conversation.start()?,
            compressor,
            rate,
            counters,
            patience,
            round_start: 0,
            acked: 0,
            round_ended: false,
            totals: Totals::default(),
            digest: RoundDigest::default(),
            directory: String::new(),
            receiver: ReceiverId([0; 16]),
            restores: false,
            connect,
        };
        match sink.recv_welcome()? {
            0 => Ok(sink),
            _ => Err(SinkError::UnexpectedReply),
        }
    }

    /// Waits for the receiver's greeting. Returns the number of rounds that the receiver has.
    fn recv_welcome(&mut self) -> Result<u32, SinkError> {
        let Message::Welcome {
            directory,
            receiver,
            features,
            rounds,
            ..
        } = self.link.recv()?
        else {
            return Err(SinkError::UnexpectedReply);
        };
        self.directory = directory;
        self.receiver = receiver;
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

    fn send(&mut self, message: Message) -> Result<(), SinkError> {
        self.link.send(Outgoing::Message(message))
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
        let retry_for = self.connect.reconnect_for;
        if retry_for.is_zero() {
            return Err(broken);
        }
        self.set_target_state(TargetState::Running);
        tracing::warn!(
            event = "connection_lost",
            why = with_causes(&broken),
            ?retry_for,
            "connection lost: reconnecting; the target keeps running"
        );
        self.rate = Arc::default();
        let conversation = Conversation {
            connect: self.connect.clone(),
            patience: self.patience.clone(),
            retry_for,
            counters: Arc::clone(&self.counters),
            rate: Arc::clone(&self.rate),
        };
        self.link = conversation.start()?;
        let rounds = self.recv_welcome()?;
        tracing::info!(event = "reconnected", rounds, "reconnected");
        let round_ended = std::mem::take(&mut self.round_ended);
        match rounds.checked_sub(self.acked) {
            Some(0) => Ok(None),
            Some(1) if round_ended => {
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
        self.send(Message::RoundBegin {
            round,
            kind,
            uptime_us,
        })
    }

    fn open(&mut self, image: ImageId) -> Result<(), SinkError> {
        self.totals.images += 1;
        self.digest.open(image);
        self.send(Message::ImageOpen(image))
    }

    fn memfd_name(&mut self, name: &MemfdName) -> Result<(), SinkError> {
        match self.restores {
            true => self.send(Message::Memfd(name.clone())),
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
        let payload = match &mut self.compressor {
            Some(compressor) => compressor.compress(pages, &self.rate),
            None => Payload::raw(pages),
        };
        self.rate.queue(payload.data.len());
        self.link.send(Outgoing::Chunk { meta, payload })
    }

    fn commit(&mut self) -> Result<Receipt, SinkError> {
        self.totals.digest = self.digest.value();
        self.round_ended = true;
        self.send(Message::RoundEnd(self.totals))?;
        let round = self.acked + 1;
        let totals = self.totals;
        if self.link.recv()? != (Message::RoundAck { round, totals }) {
            return Err(SinkError::UnexpectedReply);
        }
        self.round_ended = false;
        self.acked = round;
        Ok(self.receipt())
    }

    fn finish(&mut self) -> Result<(), SinkError> {
        self.send(Message::Finish)?;
        self.link.recv().map(drop)
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
