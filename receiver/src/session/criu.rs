//! CRIU's page-server protocol, receiving: what `criu page-server` does for `criu dump` and
//! `criu pre-dump`.
//!
//! A connection is one dump, and gets one directory. CRIU says nothing of a dump but the numbers of
//! its processes and segments, so nothing tells which dump is to be the parent of which, and a
//! client that is not run for it fails if it is offered one: only `chain` links them. CRIU has no
//! message for errors: closing the connection, or at the end a status other than 0, is how its dump
//! fails, and the dumped processes then run on.

use crate::image::DirName;
use crate::image::format::PagemapEntry;
use crate::image::writer::DirWriter;
use crate::quota::Quota;
use crate::refusal::{Failure, Refusal};
use crate::session::admission::Pending;
use crate::session::{Limits, Migration};
use crate::storage::store::Store;
use crate::storage::writer_thread::Disk;
use pageferry_common::criu::page_server::{self, Command, Header, PageLocation, Width};
use pageferry_common::wire::{RefuseCode, WireError};
use pageferry_common::{BufferPool, CHUNK_SIZE, ImageId, PAGE_SIZE, PageBuf, PageRange};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Most entries given to the disk at once: bounds the list, for in-parent entries have no pages.
const ENTRIES_MAX: usize = 4096;

/// Most pages in one entry: bounds nothing but sums, for pages are taken as they come.
const ENTRY_PAGES_MAX: u64 = 1 << 40;

/// Takes one dump, whose outcome is in `migration` however it ends. With `chain` it continues the
/// newest dump of the same process. The client is a pending until it has said that it dumps.
///
/// # Errors
/// [`Failure`]; the client sees the connection close, or a status that is not 0.
pub async fn receive<R, W>(
    read: R,
    write: W,
    pending: Pending,
    store: &Arc<Store>,
    limits: Limits,
    chain: bool,
    migration: &mut Migration,
) -> Result<(), Failure>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut socket = Socket {
        reader: BufReader::with_capacity(1 << 16, read),
        writer: write,
        width: Width::Narrow,
        stall: limits.stall,
        bytes: 0,
    };
    let first = pending.in_time(socket.first_header()).await?;
    let _place = pending.promote()?;
    let name = store.new_dump();
    migration.directory = store.dir().join(name.to_string());
    let dump = Dump {
        store: Arc::clone(store),
        name,
        chain,
        quota: Quota::new(limits.bounds, store.dir()),
        parent: None,
        writer: None,
    };
    let mut session = Session {
        socket,
        disk: Disk::start(BufferPool::chunks(limits.buffers), move |jobs| {
            dump.work(jobs)
        })?,
        pool: BufferPool::new(limits.buffers),
        batch: Batch::default(),
        began: Instant::now(),
    };
    let result = session.run(first, migration).await;
    // What is torn is gone when the client hears of it.
    session.disk.end().await;
    migration.bytes_wire = session.socket.bytes;
    if let Err(Failed::InCommit(_)) = &result {
        // The client may be gone; then it needs no status.
        let _ = session.socket.say(&(-1i32).to_le_bytes()).await;
    }
    result.map_err(|failed| match failed {
        Failed::Early(failure) | Failed::InCommit(failure) => failure,
    })
}

enum Failed {
    Early(Failure),
    InCommit(Failure),
}

impl<E: Into<Failure>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::Early(error.into())
    }
}

struct Session<R, W> {
    socket: Socket<R, W>,
    disk: Disk<Job>,
    pool: BufferPool,
    batch: Batch,
    began: Instant,
}

/// Entries that are not at the disk yet.
#[derive(Default)]
struct Batch {
    entries: Vec<PagemapEntry>,
    /// Their pages, once there are any.
    buffer: Option<PageBuf>,
    /// Bytes of the buffer that are in use.
    filled: usize,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Session<R, W> {
    async fn run(&mut self, first: Header, migration: &mut Migration) -> Result<(), Failed> {
        let mut header = first;
        // Only a pre-dump asks before it names an object.
        let pre_dump = header.command == Command::HasParent;
        loop {
            match header.command {
                Command::HasParent => {
                    let image = image(header)?;
                    let has = self.ask(|answer| Job::HasParent(image, answer)).await?;
                    self.socket.say(&u32::from(has).to_le_bytes()).await?;
                }
                Command::Open { answered } => {
                    let image = image(header)?;
                    self.flush().await?;
                    let has = self.ask(|answer| Job::Open(image, answer)).await?;
                    if answered {
                        self.socket.say(&[u8::from(has)]).await?;
                    }
                }
                Command::Add(place) => {
                    self.add(header, place).await?;
                    if let PageLocation::Present { .. } = place {
                        migration.data_pages += header.pages;
                    }
                }
                Command::Get => {
                    let what = "it wants pages: that is what `receive serve-pages` is for";
                    return Err(Refusal::new(RefuseCode::Unsupported, what).into());
                }
                Command::Close => break,
            }
            header = self.socket.header().await?;
        }
        self.flush().await?;
        let committed = self.ask(Job::Commit).await;
        migration.rounds = u32::from(committed.map_err(Failed::InCommit)?);
        migration.finished_frozen = !pre_dump;
        tracing::info!(
            event = "dump_done",
            directory = %migration.directory.display(),
            pre_dump,
            data_mib = (migration.data_pages * PAGE_SIZE) >> 20,
            seconds = self.began.elapsed().as_secs_f64(),
            "CRIU's dump is complete"
        );
        // It is safe; whether the client still hears so is its affair.
        if self.socket.say(&0i32.to_le_bytes()).await.is_ok() {
            self.socket.await_end().await;
        }
        Ok(())
    }

    /// Takes an entry, and the pages behind it if there are any.
    async fn add(&mut self, header: Header, place: PageLocation) -> Result<(), Failure> {
        let mut rest = match PageRange::new(header.address, header.pages) {
            Ok(range) if header.pages <= ENTRY_PAGES_MAX => Some(range),
            Ok(_) => return Err(protocol(format!("an entry of {} pages", header.pages))),
            Err(bad) => return Err(protocol(bad.to_string())),
        };
        while let Some(range) = rest {
            let (now, later) = match place {
                PageLocation::Present { .. } => {
                    let room = (CHUNK_SIZE - self.batch.filled) as u64 / PAGE_SIZE;
                    range.split_at(room)
                }
                PageLocation::Parent | PageLocation::Elsewhere => (Some(range), None),
            };
            let Some(range) = now else {
                self.flush().await?;
                continue;
            };
            if let PageLocation::Present { .. } = place {
                if self.batch.buffer.is_none() {
                    self.batch.buffer = Some(self.pool.take().await);
                }
                let buffer = self.batch.buffer.as_mut().expect("there is one now");
                let end = self.batch.filled + range.bytes() as usize;
                self.socket
                    .read(&mut buffer[self.batch.filled..end])
                    .await?;
                self.batch.filled = end;
            }
            self.batch.entries.push(PagemapEntry { range, place });
            if self.batch.entries.len() == ENTRIES_MAX {
                self.flush().await?;
            }
            rest = later;
        }
        Ok(())
    }

    /// Gives the disk what there is.
    async fn flush(&mut self) -> Result<(), Failure> {
        let Batch {
            entries,
            buffer,
            filled,
        } = std::mem::take(&mut self.batch);
        if entries.is_empty() {
            return Ok(());
        }
        let pages = buffer.map(|buffer| buffer.freeze(filled));
        let pages = pages.unwrap_or_default();
        self.disk.give(Job::Put { entries, pages }).await
    }

    /// Has the disk answer, behind everything that it was given before.
    async fn ask(
        &mut self,
        question: impl FnOnce(oneshot::Sender<bool>) -> Job,
    ) -> Result<bool, Failure> {
        let (answer, answered) = oneshot::channel();
        self.disk.give(question(answer)).await?;
        match answered.await {
            Ok(answer) => Ok(answer),
            Err(_) => Err(self.disk.why_it_ended().await.into()),
        }
    }
}

fn image(header: Header) -> Result<ImageId, Failure> {
    let object = header.object;
    page_server::image(object)
        .ok_or_else(|| protocol(format!("{object:#x} is no process or segment")))
}

fn protocol(what: String) -> Failure {
    Refusal::new(RefuseCode::Protocol, what).into()
}

/// The connection.
struct Socket<R, W> {
    reader: BufReader<R>,
    writer: W,
    width: Width,
    stall: Duration,
    bytes: u64,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Socket<R, W> {
    /// The header that begins a dump, which tells how long headers are.
    async fn first_header(&mut self) -> Result<Header, Failure> {
        let mut bytes = [0; page_server::HEADER_MAX];
        let (first, more) = bytes.split_at_mut(Width::Narrow.header_len());
        self.read(first).await?;
        let first: &[u8; 24] = (&*first).try_into().expect("as long as a narrow header");
        let header = Header::decode(first, Width::Narrow);
        if header.is_ok_and(|header| header.command == Command::Close) {
            return self.decoded(header);
        }
        self.width = Width::of_dump(first);
        if self.width == Width::Wide {
            self.read(more).await?;
        }
        self.decoded(Header::decode(&bytes, self.width))
    }

    async fn header(&mut self) -> Result<Header, Failure> {
        let mut bytes = [0; page_server::HEADER_MAX];
        self.read(&mut bytes[..self.width.header_len()]).await?;
        self.decoded(Header::decode(&bytes, self.width))
    }

    fn decoded(
        &self,
        header: Result<Header, page_server::UnknownCommand>,
    ) -> Result<Header, Failure> {
        header.map_err(|unknown| protocol(unknown.to_string()))
    }

    async fn read(&mut self, into: &mut [u8]) -> Result<(), WireError> {
        self.bytes += into.len() as u64;
        match timeout(self.stall, self.reader.read_exact(into)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(WireError::Closed)
            }
            Ok(Err(error)) => Err(WireError::Io(error)),
            Err(_) => Err(WireError::Stalled(self.stall)),
        }
    }

    async fn say(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        match timeout(self.stall, self.writer.write_all(bytes)).await {
            Ok(written) => written.map_err(WireError::Io),
            Err(_) => Err(WireError::Stalled(self.stall)),
        }
    }

    /// Waits until the client has closed its end, so that ours does not linger.
    async fn await_end(&mut self) {
        let mut scrap = [0; 64];
        let end = async { while matches!(self.reader.read(&mut scrap).await, Ok(1..)) {} };
        let _ = timeout(self.stall, end).await;
    }
}

enum Job {
    HasParent(ImageId, oneshot::Sender<bool>),
    Open(ImageId, oneshot::Sender<bool>),
    Put {
        entries: Vec<PagemapEntry>,
        pages: bytes::Bytes,
    },
    /// Answers whether there was anything to complete.
    Commit(oneshot::Sender<bool>),
}

/// What the writing thread works on.
struct Dump {
    store: Arc<Store>,
    name: DirName,
    chain: bool,
    quota: Arc<Quota>,
    parent: Option<DirName>,
    /// From the first object on.
    writer: Option<DirWriter>,
}

impl Dump {
    fn work(mut self, mut jobs: mpsc::Receiver<Job>) -> Result<(), Refusal> {
        // Whoever does not wait for an answer any more has given up; then the jobs end, too.
        while let Some(job) = jobs.blocking_recv() {
            match job {
                Job::HasParent(image, answer) => {
                    let _ = answer.send(self.has_parent(image)?);
                }
                Job::Open(image, answer) => {
                    let _ = answer.send(self.open(image)?);
                }
                Job::Put { entries, pages } => match &mut self.writer {
                    Some(writer) => writer.put_as_is(&entries, &pages)?,
                    None => {
                        let what = "pages without an object";
                        return Err(Refusal::new(RefuseCode::Protocol, what));
                    }
                },
                Job::Commit(answer) => {
                    let something = self.writer.is_some();
                    self.writer.take().map(DirWriter::commit).transpose()?;
                    let _ = answer.send(something);
                }
            }
        }
        Ok(())
    }

    /// Whether the parent has this image. The parent is chosen when first a process is named:
    /// segments' numbers are not unique enough.
    fn has_parent(&mut self, image: ImageId) -> Result<bool, Refusal> {
        if self.chain && self.parent.is_none() && matches!(image, ImageId::Process(_)) {
            self.parent = self.store.newest_dump_of(image)?;
            if let (Some(parent), Some(writer)) = (self.parent, &mut self.writer) {
                writer.follow(parent)?;
            }
        }
        Ok(self.parent.is_some_and(|parent| {
            let dir = self.store.dir().join(parent.to_string());
            dir.join(image.pagemap_name()).exists()
        }))
    }

    fn open(&mut self, image: ImageId) -> Result<bool, Refusal> {
        self.has_parent(image)?;
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => {
                self.quota.check_round(1)?;
                let writer = DirWriter::begin(self.store.dir(), self.name)?;
                let mut writer = writer.with_quota(&self.quota);
                self.parent.map_or(Ok(()), |parent| writer.follow(parent))?;
                self.writer.insert(writer)
            }
        };
        Ok(writer.open(image)?)
    }
}
