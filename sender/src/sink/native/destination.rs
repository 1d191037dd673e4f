//! Restoring the process at the receiver after the last round, and asking for the outcome of a migration.

use super::NativeSink;
use crate::sink::link::{Connect, Link, dial};
use crate::sink::{CommitError, Destination, Outcome, SinkError};
use pageferry_common::criu::Options;
use pageferry_common::needed_files::NeededFile;
use pageferry_common::wire::{
    FrameReader, FrameWriter, Incoming, Message, PIECE_MAX, SharedPhase, WireError,
};
use pageferry_common::{Claim, ReceiverId, StateName};
use rustls::ClientConfig;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::split;
use tokio::sync::mpsc;
use tokio::time::sleep;

/// Pause between two attempts to ask an unreachable receiver for the outcome.
const RETRY_DELAY: Duration = Duration::from_millis(200);

impl Destination for NativeSink {
    fn check_files(&mut self, files: Vec<NeededFile>) -> Result<Vec<String>, SinkError> {
        let max_lacks = files.len();
        for file in files {
            self.send(Message::File(file))?;
        }
        self.send(Message::Check)?;
        let mut lacks = Vec::new();
        loop {
            match self.link.recv()? {
                Message::FileProblem { problem } if lacks.len() < max_lacks => lacks.push(problem),
                Message::Checked => return Ok(lacks),
                _ => return Err(SinkError::UnexpectedReply),
            }
        }
    }

    fn put_state(&mut self, name: &StateName, image: &mut dyn Read) -> Result<(), SinkError> {
        let mut last = false;
        while !last {
            let mut piece = Vec::new();
            let len = image.take(PIECE_MAX as u64).read_to_end(&mut piece);
            // If the length of the image is a multiple of PIECE_MAX, the last piece is empty.
            last = len.map_err(SinkError::State)? < PIECE_MAX;
            let name = name.clone();
            self.send(Message::State { name, last, piece })?;
        }
        Ok(())
    }

    fn restore(&mut self, options: Options) -> Result<(), SinkError> {
        let options = options.bits();
        self.send(Message::Restore { options })?;
        match self.link.recv()? {
            Message::Restored => Ok(()),
            _ => Err(SinkError::UnexpectedReply),
        }
    }

    fn commit(&mut self) -> Result<(), CommitError> {
        let reply = match self.send(Message::Commit) {
            Ok(()) => self.link.recv(),
            Err(error) => Err(error),
        };
        match reply {
            Ok(Message::Running) => Ok(()),
            Ok(_) => Err(CommitError::InDoubt(SinkError::UnexpectedReply)),
            // Only a refusal proves that the receiver has aborted; any other error leaves the outcome open.
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
        resolve(to, self.receiver, claim, stall, tls)
    }

    fn id(&self) -> ReceiverId {
        self.receiver
    }

    fn disconnect(&mut self) {
        self.link.close();
    }
}

/// Asks a receiver for the outcome of a migration, retrying for `patience` while it cannot be reached.
///
/// # Errors
/// [`SinkError`] of the last attempt; the outcome is still in doubt then.
pub fn resolve(
    to: String,
    receiver: ReceiverId,
    claim: Claim,
    patience: Duration,
    tls: Option<Arc<ClientConfig>>,
) -> Result<Outcome, SinkError> {
    let conversation = move |_: mpsc::Receiver<()>, replies_tx: mpsc::UnboundedSender<Outcome>| async move {
        let began = Instant::now();
        loop {
            match request_outcome(&to, claim, patience, tls.as_ref()).await {
                Ok((_, id)) if id != receiver => return Err(SinkError::AnotherReceiver),
                Ok((outcome, _)) => {
                    // The caller below still waits for the reply.
                    let _ = replies_tx.send(outcome);
                    return Ok(());
                }
                Err(error) if !error.is_transient() || began.elapsed() > patience => {
                    return Err(error);
                }
                Err(error) => tracing::debug!(why = %error, "no outcome yet, retrying"),
            }
            sleep(RETRY_DELAY).await;
        }
    };
    Link::start(conversation)?.recv()
}

/// Connects and asks for the outcome once. Returns it with the id of the receiver that answers.
async fn request_outcome(
    to: &str,
    claim: Claim,
    stall: Duration,
    tls: Option<&Arc<ClientConfig>>,
) -> Result<(Outcome, ReceiverId), SinkError> {
    let (read, write) = split(dial(to, stall, stall, tls).await?);
    let phase = SharedPhase::default();
    let mut reader = FrameReader::new(read, phase.clone(), stall);
    let mut writer = FrameWriter::new(write, phase, stall);
    writer.send(&Message::Resolve(claim)).await?;
    loop {
        match reader.recv().await? {
            Incoming::Message(Message::Working) => {}
            Incoming::Message(Message::Outcome { running, receiver }) => {
                let outcome = match running {
                    true => Outcome::Running,
                    false => Outcome::Aborted,
                };
                return Ok((outcome, receiver));
            }
            Incoming::Message(_) | Incoming::Chunk { .. } => {
                return Err(SinkError::UnexpectedReply);
            }
        }
    }
}
