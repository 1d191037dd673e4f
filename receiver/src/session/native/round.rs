//! The main phase: rounds, and between them the files and state images that a restore needs.

use super::Workspace;
use super::connection::{Connection, WORKING_INTERVAL, unexpected_message};
use super::restore::{RestorePlan, Restoring};
use crate::image::DirName;
use crate::image::writer::write_state;
use crate::quota::Quota;
use crate::refusal::{Failure, Refusal};
use crate::session::{Migration, ServerContext};
use crate::storage::Durability;
use crate::storage::jobs::{Job, Payload, check};
use crate::storage::writer_thread::WriterThread;
use pageferry_common::criu::Options;
use pageferry_common::digest::RoundDigest;
use pageferry_common::needed_files::{FILES_MAX, NeededFile};
use pageferry_common::wire::{Chunk, Incoming, Message, RefuseCode, RoundKind, Totals};
use pageferry_common::{BufferPool, PAGE_SIZE, StateName};
use std::path::PathBuf;
use std::time::Instant;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// A connection on which rounds are received.
pub(super) struct Receiving<'a, R, W> {
    connection: &'a mut Connection<R, W>,
    context: &'a ServerContext,
    migration: &'a mut Migration,
    writer: &'a mut WriterThread<Job>,
    quota: &'a Quota,
    restore: Option<RestorePlan<'a>>,
    pool: BufferPool,
    files: FileCheck,
    state: StateImages,
}

/// How receiving ended.
pub(super) enum Received<'a, R, W> {
    /// The sender has nothing more to send.
    All,
    /// The process is to be restored.
    Restore(Restoring<'a, R, W>),
}

/// Files that the process needs on this host.
#[derive(Default)]
struct FileCheck {
    /// Number of files checked so far.
    checked: u32,
    /// A description of each that is missing or differs, until it is sent.
    problems: Vec<String>,
}

/// CRIU's images of everything but memory, which arrive in pieces.
#[derive(Default)]
struct StateImages {
    /// The image whose pieces are arriving.
    current: Option<StateName>,
    /// Number of images begun.
    begun: usize,
}

impl<'a, R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Receiving<'a, R, W> {
    pub(super) fn new<'w: 'a>(
        connection: &'a mut Connection<R, W>,
        context: &'a ServerContext,
        workspace: &'a mut Workspace<'w>,
        migration: &'a mut Migration,
    ) -> Self {
        Self {
            connection,
            context,
            migration,
            writer: &mut workspace.writer,
            quota: &workspace.quota,
            restore: workspace.restore.take(),
            pool: BufferPool::new(context.limits.buffers),
            files: FileCheck::default(),
            state: StateImages::default(),
        }
    }

    /// Receives until the sender has finished or asks for the restore.
    ///
    /// # Errors
    /// [`Failure`]; complete rounds stay.
    pub(super) async fn run(mut self) -> Result<Received<'a, R, W>, Failure> {
        loop {
            match self.connection.recv().await? {
                Message::RoundBegin {
                    round,
                    kind,
                    uptime_us,
                } => self.receive_round(round, kind, uptime_us).await?,
                Message::File(file) => self.check_file(&file)?,
                Message::Check => self.send_file_problems().await?,
                Message::State { name, last, piece } => self.write_state(name, last, &piece)?,
                Message::Restore { options } => {
                    return Ok(Received::Restore(self.into_restoring(options)?));
                }
                Message::Finish => return Ok(Received::All),
                other => return Err(unexpected_message(&other).into()),
            }
        }
    }

    async fn receive_round(
        &mut self,
        round: u32,
        kind: RoundKind,
        uptime_us: u64,
    ) -> Result<(), Failure> {
        let began = Instant::now();
        let previous = self.migration.rounds;
        if round != previous + 1 {
            let reason = format!("round {round} cannot follow round {previous}");
            return Err(Refusal::new(RefuseCode::Protocol, reason).into());
        }
        self.quota.check_round(round)?;
        let begin = Job::Begin {
            round,
            parent: (previous > 0).then_some(previous),
            uptime_us,
        };
        self.writer.send(begin).await?;
        let totals = self.receive_images().await?;
        let durability = match kind {
            // The target is frozen meanwhile, and the process is restored only from durable images.
            RoundKind::Final if self.restore.is_some() => Durability::AfterAck,
            RoundKind::Final | RoundKind::PreDump => Durability::BeforeAck,
        };
        self.commit_round(durability).await?;
        let ack = Message::RoundAck { round, totals };
        self.connection.send(&ack).await?;
        let migration = &mut *self.migration;
        migration.rounds = round;
        migration.finished_frozen = kind == RoundKind::Final;
        migration.data_pages += totals.data_pages;
        tracing::info!(
            event = "round_done",
            directory = %migration.directory.display(),
            round,
            data_mib = (totals.data_pages * PAGE_SIZE) >> 20,
            pages = totals.pages(),
            seconds = began.elapsed().as_secs_f64(),
            "round complete"
        );
        Ok(())
    }

    /// Receives the images of a round, up to its end, and hands them to the writer thread.
    async fn receive_images(&mut self) -> Result<Totals, Failure> {
        let mut totals = Totals::default();
        let mut digest = RoundDigest::default();
        loop {
            let incoming = tokio::select! {
                incoming = self.connection.reader.recv() => incoming?,
                // A frame may have been read in part here; the round is lost anyway.
                failure = self.writer.failure() => return Err(failure.into()),
            };
            match incoming {
                Incoming::Message(Message::Working) => {}
                Incoming::Message(Message::ImageOpen(image)) => {
                    totals.images += 1;
                    digest.open(image);
                    self.writer.send(Job::OpenImage(image)).await?;
                }
                Incoming::Message(Message::Memfd(name)) => {
                    self.writer.send(Job::SetMemfdName(name)).await?;
                }
                Incoming::Chunk {
                    chunk,
                    meta,
                    compressed,
                    data_len,
                } => {
                    totals.count(&chunk.entries);
                    digest.chunk(&meta);
                    let payload = self.receive_payload(&chunk, compressed, data_len).await?;
                    self.writer.send(Job::Put { chunk, payload }).await?;
                }
                Incoming::Message(Message::RoundEnd(sent)) => {
                    totals.digest = digest.value();
                    return match sent == totals {
                        true => Ok(totals),
                        false => {
                            let reason = format!("received {totals:?}, but {sent:?} was sent");
                            Err(Refusal::new(RefuseCode::Protocol, reason).into())
                        }
                    };
                }
                Incoming::Message(other) => return Err(unexpected_message(&other).into()),
            }
        }
    }

    async fn receive_payload(
        &mut self,
        chunk: &Chunk,
        compressed: bool,
        len: usize,
    ) -> Result<Payload, Failure> {
        let mut buffer = self.pool.take().await;
        self.connection.reader.recv_data(&mut buffer[..len]).await?;
        let data = buffer.freeze(len);
        if compressed {
            return Ok(Payload::Compressed(data));
        }
        // Checked here, while the pages are in the processor's cache.
        check(chunk, &data)?;
        Ok(Payload::Checked(data))
    }

    /// Completes the round, and sends `Working` until it may be acknowledged.
    async fn commit_round(&mut self, durability: Durability) -> Result<(), Failure> {
        let (done_tx, mut done_rx) = oneshot::channel();
        let commit = Job::Commit {
            durability,
            done_tx,
        };
        self.writer.send(commit).await?;
        loop {
            match timeout(WORKING_INTERVAL, &mut done_rx).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(_)) => return Err(self.writer.exit_reason().await.into()),
                Err(_) => self.connection.send(&Message::Working).await?,
            }
        }
    }

    /// Compares a file that the process needs with the one on this host.
    fn check_file(&mut self, file: &NeededFile) -> Result<(), Refusal> {
        if self.context.restorer.is_none() {
            let reason = "this receiver does not check files without --restore";
            return Err(Refusal::new(RefuseCode::Unsupported, reason));
        }
        if self.files.checked == FILES_MAX {
            let reason = format!("this receiver checks no more than {FILES_MAX} files");
            return Err(Refusal::new(RefuseCode::Limit, reason));
        }
        self.files.checked += 1;
        if let Some(problem) = file.local_problem() {
            self.files.problems.push(format!("{} {problem}", file.path));
        }
        Ok(())
    }

    async fn send_file_problems(&mut self) -> Result<(), Failure> {
        for what in self.files.problems.drain(..) {
            self.connection
                .send(&Message::FileProblem { problem: what })
                .await?;
        }
        self.connection.send(&Message::Checked).await?;
        Ok(())
    }

    fn write_state(&mut self, name: StateName, last: bool, piece: &[u8]) -> Result<(), Refusal> {
        let dir = self.final_round()?;
        let is_first = self.state.current.as_ref() != Some(&name);
        if is_first {
            self.quota.charge_image(self.state.begun)?;
            self.state.begun += 1;
        }
        self.quota.charge_bytes(piece.len() as u64)?;
        write_state(&dir, &name, is_first, piece)?;
        self.state.current = (!last).then_some(name);
        Ok(())
    }

    fn into_restoring(self, options: u32) -> Result<Restoring<'a, R, W>, Refusal> {
        let round_dir = self.final_round()?;
        let (Some(plan), Some(options)) = (self.restore, Options::from_bits(options)) else {
            let reason =
                "this receiver runs without --restore, or does not support a requested option";
            return Err(Refusal::new(RefuseCode::Unsupported, reason));
        };
        Ok(Restoring {
            connection: self.connection,
            plan,
            home: self.migration.directory.clone(),
            round_dir,
            options,
        })
    }

    /// Returns the directory of the final round, the only one that a process can be restored from.
    fn final_round(&self) -> Result<PathBuf, Refusal> {
        match self.migration.finished_frozen {
            true => {
                let round = DirName::Round(self.migration.rounds).to_string();
                Ok(self.migration.directory.join(round))
            }
            false => {
                let reason = "the state of a process was sent before its final round";
                Err(Refusal::new(RefuseCode::Protocol, reason))
            }
        }
    }
}
