//! What the writer thread does for a native migration.

use crate::image::DirName;
use crate::image::durable::{sync, sync_all};
use crate::image::writer::DirWriter;
use crate::quota::Quota;
use crate::refusal::Refusal;
use crate::restore::cache::RestoreCache;
use crate::storage::Durability;
use bytes::Bytes;
use pageferry_common::digest::digest;
use pageferry_common::wire::{Chunk, RefuseCode};
use pageferry_common::{CHUNK_SIZE, ImageId, MemfdName};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, oneshot};
use zstd::bulk::Decompressor;

/// A step of writing a round.
pub(crate) enum Job {
    /// Creates the directory of a round.
    Begin {
        round: u32,
        /// The round before, if there is one.
        parent: Option<u32>,
        /// Uptime of the sender's host when the round began, in microseconds.
        uptime_us: u64,
    },
    /// Begins an image of the round.
    OpenImage(ImageId),
    /// Names the memfd that the open image belongs to.
    SetMemfdName(MemfdName),
    /// Appends a chunk to the open image.
    Put { chunk: Chunk, payload: Payload },
    /// Completes the round.
    Commit {
        durability: Durability,
        /// Notified when the round may be acknowledged.
        done_tx: oneshot::Sender<()>,
    },
}

/// Pages of a chunk as they were received.
pub(crate) enum Payload {
    /// Uncompressed, and checked against the chunk's digest.
    Checked(Bytes),
    /// Compressed with zstd, to be checked after decompression.
    Compressed(Bytes),
}

/// Writes the rounds of one migration.
pub(crate) struct RoundWriter {
    /// Directory of the migration.
    home: PathBuf,
    quota: Arc<Quota>,
    /// Filled with what is written, if the process is to be restored from it lazily.
    cache: Option<Arc<Mutex<RestoreCache>>>,
    /// The round being written.
    round: Option<DirWriter>,
    /// Whether the previous round has the open image, too.
    has_parent: bool,
    /// Room for the pages of one chunk; allocated for the first that is compressed.
    scratch: Vec<u8>,
}

impl RoundWriter {
    /// Returns a writer of the migration in `home`, which may take what `quota` allows.
    pub(crate) fn new(
        home: PathBuf,
        quota: Arc<Quota>,
        cache: Option<Arc<Mutex<RestoreCache>>>,
    ) -> Self {
        Self {
            home,
            quota,
            cache,
            round: None,
            has_parent: false,
            scratch: Vec::new(),
        }
    }

    /// Performs jobs until the channel is closed. A round that is not complete then is removed.
    ///
    /// # Errors
    /// [`Refusal`] of the job that failed.
    pub(crate) fn run(mut self, mut jobs_rx: mpsc::Receiver<Job>) -> Result<(), Refusal> {
        let mut decompressor = Decompressor::new()
            .map_err(|error| Refusal::new(RefuseCode::Limit, error.to_string()))?;
        while let Some(job) = jobs_rx.blocking_recv() {
            match job {
                Job::Begin {
                    round,
                    parent,
                    uptime_us,
                } => self.begin(round, parent, uptime_us)?,
                Job::OpenImage(image) => {
                    self.has_parent = in_round(&mut self.round).open(image)?;
                    if let Some(mut cache) = lock(self.cache.as_deref()) {
                        cache.open_image(image, self.has_parent);
                    }
                }
                Job::SetMemfdName(name) => {
                    if let Some(mut cache) = lock(self.cache.as_deref()) {
                        cache.set_memfd_name(&self.home, &name, self.has_parent);
                    }
                }
                Job::Put { chunk, payload } => self.put(&mut decompressor, &chunk, &payload)?,
                Job::Commit {
                    durability,
                    done_tx,
                } => self.commit(durability, done_tx)?,
            }
        }
        Ok(())
    }

    fn begin(&mut self, round: u32, parent: Option<u32>, uptime_us: u64) -> Result<(), Refusal> {
        let writer = DirWriter::begin(&self.home, DirName::Round(round))?;
        let mut writer = writer.with_quota(&self.quota);
        if let Some(parent) = parent {
            writer.follow(DirName::Round(parent))?;
        }
        writer.write_inventory(uptime_us)?;
        self.round = Some(writer);
        Ok(())
    }

    fn put(
        &mut self,
        decompressor: &mut Decompressor<'_>,
        chunk: &Chunk,
        payload: &Payload,
    ) -> Result<(), Refusal> {
        let pages = match payload {
            Payload::Checked(pages) => &pages[..],
            Payload::Compressed(data) => decompress(decompressor, data, chunk, &mut self.scratch)?,
        };
        in_round(&mut self.round).put(&chunk.entries, pages)?;
        if let Some(mut cache) = lock(self.cache.as_deref()) {
            cache.put(&chunk.entries, pages);
        }
        Ok(())
    }

    fn commit(
        &mut self,
        durability: Durability,
        done_tx: oneshot::Sender<()>,
    ) -> Result<(), Refusal> {
        let round = self.round.take().expect("the phase table begins rounds");
        let dir = match durability {
            Durability::BeforeAck => round.commit()?,
            Durability::AfterAck => round.publish()?,
        };
        // Locked before the round is reported complete: a restore then waits for the update below.
        let cache = lock(self.cache.as_deref());
        // The receiver is gone only if the connection has ended; the round is complete all the same.
        let _ = done_tx.send(());
        if let Some(mut cache) = cache {
            cache.advance(&self.home);
        }
        if durability == Durability::AfterAck {
            sync_all(&dir)?;
            sync(&self.home)?;
        }
        Ok(())
    }
}

fn lock(cache: Option<&Mutex<RestoreCache>>) -> Option<MutexGuard<'_, RestoreCache>> {
    cache.map(|cache| cache.lock().unwrap_or_else(PoisonError::into_inner))
}

fn in_round(round: &mut Option<DirWriter>) -> &mut DirWriter {
    round.as_mut().expect("the phase table begins rounds")
}

/// Checks uncompressed pages against the digest of their chunk.
///
/// # Errors
/// [`Refusal`] if they differ from what was sent.
pub(crate) fn check(chunk: &Chunk, pages: &[u8]) -> Result<(), Refusal> {
    match digest(pages) == chunk.digest {
        true => Ok(()),
        false => {
            let reason = "the pages of a chunk were damaged in transit";
            Err(Refusal::new(RefuseCode::Protocol, reason))
        }
    }
}

/// Decompresses pages into `scratch` and checks them; never more than the chunk announced.
fn decompress<'a>(
    decompressor: &mut Decompressor<'_>,
    data: &[u8],
    chunk: &Chunk,
    scratch: &'a mut Vec<u8>,
) -> Result<&'a [u8], Refusal> {
    scratch.resize(CHUNK_SIZE, 0);
    let pages = &mut scratch[..chunk.raw_len()];
    match decompressor.decompress_to_buffer(data, pages) {
        Ok(len) if len == pages.len() => {
            check(chunk, pages)?;
            Ok(pages)
        }
        Ok(_) | Err(_) => {
            let reason = "compressed pages do not have the announced size";
            Err(Refusal::new(RefuseCode::Protocol, reason))
        }
    }
}
