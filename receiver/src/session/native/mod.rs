//! The native protocol's receiving end: one task on the socket, one thread on the disk.
//!
//! Memory for one sender: `--buffers` of 4 MiB, two chunks more to decompress and to copy, and what is stated in
//! `docs/security.md`. Until it has greeted: a message.

mod restore;
pub use restore::finish_all;

use crate::image::DirName;
use crate::image::durable::{sync, sync_all};
use crate::image::writer::{DirWriter, write_state};
use crate::quota::Quota;
use crate::refusal::{Failure, Refusal};
use crate::restore::cache::RestoreCache;
use crate::restore::{Outcome, Restorer};
use crate::session::admission::{Pending, SenderSlot};
use crate::session::{Limits, Migration};
use crate::storage::lease::{Disconnect, Lease};
use crate::storage::store::Store;
use crate::storage::writer_thread::Disk;
use crate::with_causes;
use bytes::Bytes;
use pageferry_common::criu::preload;
use pageferry_common::criu::session::{CriuSession, Options};
use pageferry_common::digest::{RoundDigest, digest};
use pageferry_common::needed_files::FILES_MAX;
use pageferry_common::sys::perf::TaskEvents;
use pageferry_common::wire::{
    self, Chunk, FrameReader, FrameWriter, Incoming, Message, RefuseCode, RoundKind, SharedPhase,
    Totals, WireError,
};
use pageferry_common::{BufferPool, CHUNK_SIZE, Claim, ImageId, MemfdName, PAGE_SIZE, StateName};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

/// How often a sender that waits for a long fsync is told that we live.
pub(super) const WORKING_INTERVAL: Duration = Duration::from_secs(1);

/// How often it is looked whether somebody still works on a migration.
const LOOK: Duration = Duration::from_millis(20);

/// How long a sender may take to stop sending after it was refused: closing earlier would reset
/// the connection and destroy our reason on its way.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Takes one migration, or the rest of one whose connection was lost; its progress is in `migration` however
/// it ends. With `restorer`, the process itself may follow its memory. The sender is a pending until it has said
/// that it sends.
///
/// # Errors
/// [`Failure`]; the sender was told why, if it could be.
pub async fn receive<R, W>(
    read: R,
    write: W,
    pending: Pending,
    store: &Store,
    limits: Limits,
    restorer: Option<&Restorer>,
    migration: &mut Migration,
) -> Result<(), Failure>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut session = Session::new(read, write, limits.stall);
    let result = session.run(pending, store, limits, restorer, migration);
    let result = result.await;
    migration.bytes_wire = session.reader.bytes();
    if let Err(error) = &result {
        session.say_why(error).await;
    }
    result
}

/// Tells a sender why it is not let in.
pub async fn refuse<R, W>(read: R, write: W, limits: Limits, why: String)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut session = Session::new(read, write, limits.handshake);
    // It takes a refusal only once it has greeted.
    if session.message().await.is_ok() {
        let refusal = Refusal::new(RefuseCode::Unsupported, why);
        session.say_why(&refusal.into()).await;
    }
}

pub(super) struct Session<R, W> {
    reader: FrameReader<R>,
    pub(super) writer: FrameWriter<W>,
    /// Empty as long as there is no place.
    pool: BufferPool,
    /// From the greeting of one that sends on.
    slot: Option<SenderSlot>,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Session<R, W> {
    fn new(read: R, write: W, stall: Duration) -> Self {
        let phase = SharedPhase::default();
        Self {
            reader: FrameReader::new(read, phase.clone(), stall),
            writer: FrameWriter::new(write, phase, stall),
            pool: BufferPool::new(0),
            slot: None,
        }
    }

    async fn run(
        &mut self,
        pending: Pending,
        store: &Store,
        limits: Limits,
        restorer: Option<&Restorer>,
        migration: &mut Migration,
    ) -> Result<(), Failure> {
        let quota = Quota::new(limits.bounds, store.dir());
        let cut = pending.cut();
        let hello = match pending.in_time(self.message()).await? {
            // Who only asks needs no place.
            Message::Resolve(claim) => {
                let criu = restorer.map(|restorer| &restorer.criu);
                return self.resolve(store, criu, &cut, &claim).await;
            }
            hello => hello,
        };
        let restores = restorer.is_some();
        let greeted = self.greet(hello, pending, store, &quota, restores).await?;
        self.pool = BufferPool::new(limits.buffers);
        let Greeted {
            home,
            moves,
            rounds,
            taken: _taken,
        } = greeted;
        let kept = match restorer.filter(|restorer| moves && restorer.lazy) {
            Some(_) => {
                let home = home.clone();
                let load = spawn_blocking(move || RestoreCache::load(&home, rounds));
                let cache = load.await.expect("reading pagemaps does not panic");
                Some(Arc::new(Mutex::new(cache)))
            }
            None => None,
        };
        // What the first hardware breakpoint costs, CRIU's would cost the process that waits to be restored.
        let _warm = moves.then(TaskEvents::keep);
        migration.directory.clone_from(&home);
        migration.rounds = rounds;
        let mut ready = None;
        if let (true, Some(restorer)) = (moves, restorer) {
            Outcome::preallocate(&home).map_err(Refusal::from)?;
            ready = Some(restorer.start_criu(&home)?);
        }
        let work = {
            let (kept, quota) = (kept.clone(), Arc::clone(&quota));
            move |jobs| work(&home, &quota, kept.as_deref(), jobs)
        };
        let mut disk = Disk::start(BufferPool::chunks(limits.buffers), work)?;
        let rounds = Rounds {
            restorer,
            ready,
            kept: kept.as_deref(),
            quota: &quota,
        };
        let result = self.rounds(&mut disk, rounds, migration).await;
        // A torn round is gone when the sender hears of it.
        disk.end().await;
        // CRIU has loaded it by now, if it ever will; there may be none.
        let home = &migration.directory;
        let _ = fs::remove_file(home.join(preload::NAME));
        if migration.rounds == 0 {
            Outcome::discard_blank(home);
        }
        result
    }

    async fn rounds(
        &mut self,
        disk: &mut Disk<Job>,
        rounds: Rounds<'_>,
        migration: &mut Migration,
    ) -> Result<(), Failure> {
        let Rounds {
            restorer,
            mut ready,
            kept,
            quota,
        } = rounds;
        // Files asked for, and what is wrong with them.
        let (mut files, mut lacks) = (0, Vec::new());
        // The state image whose pieces are coming, and how many have begun.
        let (mut state, mut states): (Option<StateName>, _) = (None, 0);
        loop {
            match self.message().await? {
                Message::RoundBegin {
                    round,
                    kind,
                    uptime_us,
                } => {
                    let began = Instant::now();
                    let parent = (migration.rounds > 0).then_some(migration.rounds);
                    if round != migration.rounds + 1 {
                        let what = format!("round {round} after {}", migration.rounds);
                        return Err(Refusal::new(RefuseCode::Protocol, what).into());
                    }
                    quota.check_round(round)?;
                    let begin = Job::Begin {
                        round,
                        parent,
                        uptime_us,
                    };
                    disk.give(begin).await?;
                    // Somebody waits for a final one, and the process is restored from it only once it
                    // is durable, too.
                    let waits = ready.is_some() && kind == RoundKind::Final;
                    let totals = self.round(disk, !waits).await?;
                    self.writer
                        .send(&Message::RoundAck { round, totals })
                        .await?;
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
                }
                Message::File(file) => {
                    if restorer.is_none() || files == FILES_MAX {
                        let what = "this receiver does not look for so many files, or any";
                        return Err(Refusal::new(RefuseCode::Limit, what).into());
                    }
                    files += 1;
                    let problem = file.problem_here();
                    lacks.extend(problem.map(|problem| format!("{} {problem}", file.path)));
                }
                Message::Check => {
                    for what in lacks.drain(..) {
                        self.writer.send(&Message::Lacks { what }).await?;
                    }
                    self.writer.send(&Message::Checked).await?;
                }
                Message::State { name, last, piece } => {
                    let first = state.as_ref() != Some(&name);
                    let images = images_of(migration)?;
                    if first {
                        quota.charge_image(states)?;
                        states += 1;
                    }
                    quota.charge_bytes(piece.len() as u64)?;
                    write_state(&images, &name, first, &piece)?;
                    state = (!last).then_some(name);
                }
                Message::Restore { options } => {
                    images_of(migration)?;
                    let options = Options::from_bits(options);
                    let (Some(restorer), Some(ready), Some(options)) =
                        (restorer, ready.take(), options)
                    else {
                        let what = "this receiver does not restore so: see its --restore";
                        return Err(Refusal::new(RefuseCode::Unsupported, what).into());
                    };
                    let home = &migration.directory;
                    let round = migration.rounds;
                    self.take_over(restorer, ready, home, round, kept, options)
                        .await?;
                    migration.restored = true;
                }
                Message::Finish => {
                    self.writer.send(&Message::FinishAck).await?;
                    return Ok(());
                }
                other => return Err(not_mine(&other).into()),
            }
        }
    }

    /// Agrees with a sender on what it begins, or goes on with.
    async fn greet(
        &mut self,
        hello: Message,
        pending: Pending,
        store: &Store,
        quota: &Arc<Quota>,
        restores: bool,
    ) -> Result<Greeted, Failure> {
        let Message::Hello {
            version,
            page_size,
            features,
            claim,
        } = hello
        else {
            unreachable!("the phase table lets nothing else begin");
        };
        let unsupported = |what: String| Refusal::new(RefuseCode::Unsupported, what);
        if version != wire::VERSION {
            let ours = wire::VERSION;
            let what = format!("the sender speaks version {version}, this receiver {ours}");
            return Err(unsupported(what).into());
        }
        if u64::from(page_size) != PAGE_SIZE {
            return Err(unsupported(format!("pages of {page_size} bytes")).into());
        }
        let ours = match restores {
            true => wire::FEATURES,
            false => wire::FEATURES & !wire::FEATURE_RESTORE,
        };
        let features = features & ours;
        let moves = features & wire::FEATURE_RESTORE != 0;
        let home = store.home(&claim);
        let cut = &pending.cut();
        let (taken, rounds) = match home.is_dir() {
            true => {
                let before = self.go_on(store, &claim, moves, cut).await?;
                // The one that its other connection had is free now.
                self.slot = Some(pending.promote()?);
                // There may be many files.
                let (quota, home) = (Arc::clone(quota), home.clone());
                let counted = spawn_blocking(move || quota.charge_existing(&home)).await;
                counted.expect("counting does not panic")?;
                before
            }
            false => {
                self.slot = Some(pending.promote()?);
                // Where no round could be, there is to be no directory.
                quota.check_round(1)?;
                let taken = self.take(store, &home, cut).await?;
                store.create(&claim)?;
                (taken, 0)
            }
        };
        let welcome = Message::Welcome {
            version: wire::VERSION,
            features,
            rounds,
            directory: home.display().to_string(),
        };
        self.writer.send(&welcome).await?;
        Ok(Greeted {
            home,
            moves,
            rounds,
            taken,
        })
    }

    /// Goes on with a migration whose sender comes again: takes it from the connection that is lost, and
    /// returns how many rounds it has.
    async fn go_on(
        &mut self,
        store: &Store,
        claim: &Claim,
        moves: bool,
        cut: &Disconnect,
    ) -> Result<(Lease, u32), Failure> {
        owned(store, claim)?;
        let home = store.home(claim);
        let taken = self.take(store, &home, cut).await?;
        match Outcome::read(&home)? {
            // It was not to run here in an attempt that its sender knows to have failed.
            None | Some(Outcome::Aborted) => {}
            Some(Outcome::Running | Outcome::Committed { .. }) => {
                let what = "this process has been moved here already";
                return Err(Refusal::new(RefuseCode::Restore, what).into());
            }
        }
        let rounds = store.rounds(&home, !moves)?;
        tracing::info!(event = "sender_resumed", home = %home.display(), rounds, "its sender is here again");
        Ok((taken, rounds))
    }

    /// Takes a migration, from a connection that has it if need be.
    pub(super) async fn take(
        &mut self,
        store: &Store,
        home: &Path,
        cut: &Disconnect,
    ) -> Result<Lease, Failure> {
        loop {
            if let Some(taken) = store.try_lease(home, cut) {
                return Ok(taken);
            }
            sleep(LOOK).await;
            self.writer.send(&Message::Working).await?;
        }
    }

    /// The next message other than "still working".
    pub(super) async fn message(&mut self) -> Result<Message, Failure> {
        loop {
            match self.reader.next().await? {
                Incoming::Message(Message::Working) => {}
                Incoming::Message(message) => return Ok(message),
                Incoming::Chunk { .. } => unreachable!("the phase table wants an image first"),
            }
        }
    }

    /// Takes a round from its beginning to its end, and makes it durable: before this returns, or soon.
    async fn round(&mut self, disk: &mut Disk<Job>, durable: bool) -> Result<Totals, Failure> {
        let mut totals = Totals::default();
        let mut digest = RoundDigest::default();
        loop {
            let incoming = tokio::select! {
                incoming = self.reader.next() => incoming?,
                // What was read of a frame is lost then, but so is the round.
                failure = disk.failure() => return Err(failure.into()),
            };
            match incoming {
                Incoming::Message(Message::Working) => {}
                Incoming::Message(Message::ImageOpen(image)) => {
                    totals.images += 1;
                    digest.open(image);
                    disk.give(Job::Open(image)).await?;
                }
                Incoming::Message(Message::Memfd(name)) => disk.give(Job::Memfd(name)).await?,
                Incoming::Chunk {
                    chunk,
                    meta,
                    compressed,
                    data_len,
                } => {
                    totals.count(&chunk.entries);
                    digest.chunk(&meta);
                    let mut buffer = self.pool.take().await;
                    self.reader.data(&mut buffer[..data_len]).await?;
                    let data = buffer.freeze(data_len);
                    if !compressed {
                        // Here, where it is in the processor's cache still.
                        check(&chunk, &data)?;
                    }
                    let put = Job::Put {
                        chunk,
                        compressed,
                        data,
                    };
                    disk.give(put).await?;
                }
                Incoming::Message(Message::RoundEnd(theirs)) => {
                    totals.digest = digest.value();
                    if theirs != totals {
                        let what = format!("this is not what was sent: {totals:?}, not {theirs:?}");
                        return Err(Refusal::new(RefuseCode::Protocol, what).into());
                    }
                    let (done, mut committed) = oneshot::channel();
                    disk.give(Job::Commit { durable, done }).await?;
                    loop {
                        let wait = tokio::time::timeout(WORKING_INTERVAL, &mut committed);
                        match wait.await {
                            Ok(Ok(())) => return Ok(totals),
                            Ok(Err(_)) => return Err(disk.why_it_ended().await.into()),
                            Err(_) => self.writer.send(&Message::Working).await?,
                        }
                    }
                }
                Incoming::Message(other) => return Err(not_mine(&other).into()),
            }
        }
    }

    /// Gives the sender the reason, if it is there to hear it.
    async fn say_why(&mut self, error: &Failure) {
        let (code, reason) = match error {
            Failure::Refusal(refusal) => (refusal.code, refusal.reason.clone()),
            Failure::Wire(
                error @ (WireError::Frame(_) | WireError::Message(_) | WireError::Phase(_)),
            ) => (RefuseCode::Protocol, with_causes(error)),
            Failure::Wire(error @ WireError::Stalled(_)) => (RefuseCode::Silent, error.to_string()),
            Failure::Wire(_) => return,
        };
        if self
            .writer
            .send(&Message::Refuse { code, reason })
            .await
            .is_ok()
        {
            let reader = self.reader.get_mut();
            let mut scrap = vec![0; 1 << 16];
            let drain = async { while matches!(reader.read(&mut scrap).await, Ok(1..)) {} };
            // It need not go away; we do.
            let _ = tokio::time::timeout(LAST_WORDS, drain).await;
        }
    }
}

/// What was agreed upon.
struct Greeted {
    home: PathBuf,
    /// Whether the process itself is to follow its memory.
    moves: bool,
    /// Complete rounds that are there.
    rounds: u32,
    taken: Lease,
}

/// Refuses who does not know a migration's secret.
pub(super) fn owned(store: &Store, claim: &Claim) -> Result<(), Failure> {
    match store.is_owner(claim)? {
        true => Ok(()),
        false => {
            let what = "this migration is somebody else's";
            Err(Refusal::new(RefuseCode::Denied, what).into())
        }
    }
}

pub(super) fn not_mine(message: &Message) -> Refusal {
    let what = format!("a {:?} message is not for a receiver", message.kind());
    Refusal::new(RefuseCode::Protocol, what)
}

/// Where the images are that a process can be restored from: those of a final round.
fn images_of(migration: &Migration) -> Result<PathBuf, Refusal> {
    match migration.finished_frozen {
        true => Ok(migration.directory.join(migration.rounds.to_string())),
        false => {
            let what = "a process's state without its last round";
            Err(Refusal::new(RefuseCode::Protocol, what))
        }
    }
}

/// What rounds are received with.
struct Rounds<'a> {
    restorer: Option<&'a Restorer>,
    /// A CRIU that waits to restore.
    ready: Option<CriuSession>,
    kept: Option<&'a Mutex<RestoreCache>>,
    quota: &'a Quota,
}

enum Job {
    Begin {
        round: u32,
        parent: Option<u32>,
        uptime_us: u64,
    },
    Open(ImageId),
    Memfd(MemfdName),
    Put {
        chunk: Chunk,
        compressed: bool,
        data: Bytes,
    },
    Commit {
        /// Whether it is to be durable before it is said to be done.
        durable: bool,
        done: oneshot::Sender<()>,
    },
}

/// The writing thread. `kept` if the process itself is to follow its memory.
fn work(
    home: &Path,
    quota: &Arc<Quota>,
    kept: Option<&Mutex<RestoreCache>>,
    mut jobs: mpsc::Receiver<Job>,
) -> Result<(), Refusal> {
    let keep = || kept.map(|kept| kept.lock().unwrap_or_else(PoisonError::into_inner));
    let mut has_parent = false;
    let mut round: Option<DirWriter> = None;
    let mut decompressor = zstd::bulk::Decompressor::new()
        .map_err(|error| Refusal::new(RefuseCode::Limit, error.to_string()))?;
    let mut scratch = Vec::new();
    while let Some(job) = jobs.blocking_recv() {
        match job {
            Job::Begin {
                round: number,
                parent,
                uptime_us,
            } => {
                let writer = DirWriter::begin(home, DirName::Round(number))?;
                let mut writer = writer.with_quota(quota);
                parent.map_or(Ok(()), |parent| writer.follow(DirName::Round(parent)))?;
                writer.write_inventory(uptime_us)?;
                round = Some(writer);
            }
            Job::Open(image) => {
                has_parent = in_round(&mut round).open(image)?;
                if let Some(mut kept) = keep() {
                    kept.open_image(image, has_parent);
                }
            }
            Job::Memfd(name) => {
                if let Some(mut kept) = keep() {
                    kept.set_memfd_name(home, &name, has_parent);
                }
            }
            Job::Put {
                chunk,
                compressed,
                data,
            } => {
                let pages = match compressed {
                    true => decompress(&mut decompressor, &data, &chunk, &mut scratch)?,
                    false => &data[..],
                };
                in_round(&mut round).put(&chunk.entries, pages)?;
                if let Some(mut kept) = keep() {
                    kept.put(&chunk.entries, pages);
                }
            }
            Job::Commit { durable, done } => {
                let round = round.take().expect("the phase table begins rounds");
                let dir = match durable {
                    true => round.commit()?,
                    false => round.publish()?,
                };
                // Who restores waits until it has been brought up to date.
                let kept = keep();
                // The task is gone only if the sender is: the round is complete all the same.
                let _ = done.send(());
                if let Some(mut kept) = kept {
                    kept.advance(home);
                }
                if !durable {
                    sync_all(&dir)?;
                    sync(home)?;
                }
            }
        }
    }
    Ok(())
}

fn in_round(round: &mut Option<DirWriter>) -> &mut DirWriter {
    round.as_mut().expect("the phase table begins rounds")
}

/// Whether the pages of a chunk are what was sent.
fn check(chunk: &Chunk, pages: &[u8]) -> Result<(), Refusal> {
    match digest(pages) == chunk.digest {
        true => Ok(()),
        false => {
            let what = "the pages of a chunk were damaged on their way";
            Err(Refusal::new(RefuseCode::Protocol, what))
        }
    }
}

/// Decompresses into `scratch`, and checks; never more than the chunk announced.
fn decompress<'a>(
    decompressor: &mut zstd::bulk::Decompressor<'_>,
    data: &[u8],
    chunk: &Chunk,
    scratch: &'a mut Vec<u8>,
) -> Result<&'a [u8], Refusal> {
    scratch.resize(CHUNK_SIZE, 0);
    let room = &mut scratch[..chunk.raw_len()];
    let len = room.len();
    match decompressor.decompress_to_buffer(data, room) {
        Ok(got) if got == len => {
            let pages = &scratch[..len];
            check(chunk, pages)?;
            Ok(pages)
        }
        Ok(_) | Err(_) => {
            let what = "compressed pages do not have the size announced";
            Err(Refusal::new(RefuseCode::Protocol, what))
        }
    }
}
