//! CRIU's page-server protocol, receiving: what `criu page-server` does for `criu dump` and `criu pre-dump`.
//!
//! A connection is one dump, and gets one directory. CRIU sends nothing about a dump except the numbers of
//! its processes and segments, so nothing shows which dump is the parent of which, and a client that was not
//! started with a parent fails if it is offered one. Only [`DumpParents::Newest`] links dumps. The protocol
//! has no message for errors: a dump fails if the connection is closed, or if the status at the end is not
//! 0, and the dumped processes then resume.

use crate::image::DirName;
use crate::image::format::PagemapEntry;
use crate::image::writer::DirWriter;
use crate::quota::Quota;
use crate::refusal::{Failure, Refusal};
use crate::session::admission::Pending;
use crate::session::{DumpParents, Migration, ServerContext, SessionEnd};
use crate::storage::writer_thread::WriterThread;
use bytes::Bytes;
use pageferry_common::criu::page_server::{
    self, Command, Header, HeaderReader, PageLocation, Width,
};
use pageferry_common::wire::{RefuseCode, WireError};
use pageferry_common::{BufferPool, CHUNK_SIZE, ImageId, PAGE_SIZE, PageBuf, PageRange};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Largest number of entries in a batch. Entries without pages would otherwise grow the list without bound.
const ENTRIES_MAX: usize = 4096;

/// Largest number of pages in one entry. It only keeps sums from overflowing: pages are read in batches.
const ENTRY_PAGES_MAX: u64 = 1 << 40;

/// Status of a dump that was written completely.
const STATUS_OK: i32 = 0;
/// Status of a dump that could not be written.
const STATUS_FAILED: i32 = -1;

/// Receives one dump. The client takes a sender slot once it has sent the first header of a dump. An error
/// closes the connection, or sends a status other than 0.
pub async fn receive<R, W>(
    read: R,
    write: W,
    pending: Pending,
    context: &Arc<ServerContext>,
) -> SessionEnd
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut connection = Connection::new(read, write, context.limits.stall);
    let mut migration = Migration::default();
    let result = receive_dump(&mut connection, pending, context, &mut migration).await;
    migration.bytes_wire = connection.bytes;
    SessionEnd { migration, result }
}

async fn receive_dump<R, W>(
    connection: &mut Connection<R, W>,
    pending: Pending,
    context: &Arc<ServerContext>,
    migration: &mut Migration,
) -> Result<(), Failure>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let first = connection.recv_header();
    let first = pending.within_deadline(first).await?;
    let _slot = pending.promote()?;
    let (store, limits) = (&context.store, &context.limits);
    let name = store.new_dump();
    migration.directory = store.dir().join(name.to_string());
    let dump = DumpWriter {
        context: Arc::clone(context),
        name,
        quota: Quota::new(limits.bounds, store.dir()),
        parent: None,
        writer: None,
    };
    let depth = BufferPool::chunks(limits.buffers);
    let mut session = Session {
        connection,
        writer: WriterThread::start(depth, move |jobs_rx| dump.run(jobs_rx))?,
        pool: BufferPool::new(limits.buffers),
        batch: Batch::default(),
        began: Instant::now(),
    };
    let result = session.run(first, migration).await;
    // An incomplete dump is removed before the client notices.
    session.writer.join().await;
    if let Err(DumpError::Commit(_)) = &result {
        // A client that is gone needs no status.
        let _ = connection.send(&STATUS_FAILED.to_le_bytes()).await;
    }
    result.map_err(|error| match error {
        DumpError::BeforeCommit(failure) | DumpError::Commit(failure) => failure,
    })
}

/// When a dump failed.
enum DumpError {
    /// Before the client has sent everything: closing the connection is enough.
    BeforeCommit(Failure),
    /// While it was completed: the client waits for a status.
    Commit(Failure),
}

impl<E: Into<Failure>> From<E> for DumpError {
    fn from(error: E) -> Self {
        Self::BeforeCommit(error.into())
    }
}

/// A dump being received.
struct Session<'a, R, W> {
    connection: &'a mut Connection<R, W>,
    writer: WriterThread<Job>,
    pool: BufferPool,
    batch: Batch,
    began: Instant,
}

/// Entries that the writer thread does not have yet.
#[derive(Default)]
struct Batch {
    entries: Vec<PagemapEntry>,
    /// Their pages; `None` until there are any.
    buffer: Option<PageBuf>,
    /// Number of bytes of the buffer that are filled.
    filled: usize,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Session<'_, R, W> {
    async fn run(&mut self, first: Header, migration: &mut Migration) -> Result<(), DumpError> {
        let mut header = first;
        // Only a pre-dump asks for a parent before it opens an image.
        let pre_dump = header.command == Command::HasParent;
        loop {
            match header.command {
                Command::HasParent => {
                    let image = image(header)?;
                    let has_parent = self
                        .ask(|answer_tx| Job::HasParent(image, answer_tx))
                        .await?;
                    let answer = u32::from(has_parent);
                    self.connection.send(&answer.to_le_bytes()).await?;
                }
                Command::Open { answered } => {
                    let image = image(header)?;
                    self.flush().await?;
                    let has_parent = self.ask(|answer_tx| Job::Open(image, answer_tx)).await?;
                    if answered {
                        self.connection.send(&[u8::from(has_parent)]).await?;
                    }
                }
                Command::Add(location) => {
                    self.add(header, location).await?;
                    match location {
                        PageLocation::Present { .. } => migration.data_pages += header.pages,
                        PageLocation::Parent | PageLocation::Elsewhere => {}
                    }
                }
                Command::Get => {
                    let reason = "the client requests pages: use `receive serve-pages`";
                    return Err(Refusal::new(RefuseCode::Unsupported, reason).into());
                }
                Command::Close => break,
            }
            header = self.connection.recv_header().await?;
        }
        self.flush().await?;
        let committed = self.ask(Job::Commit).await.map_err(DumpError::Commit)?;
        migration.rounds = u32::from(committed);
        migration.finished_frozen = !pre_dump;
        tracing::info!(
            event = "dump_done",
            directory = %migration.directory.display(),
            pre_dump,
            data_mib = (migration.data_pages * PAGE_SIZE) >> 20,
            seconds = self.began.elapsed().as_secs_f64(),
            "dump by CRIU complete"
        );
        // The dump is durable, whether or not the client still receives the status.
        if self.connection.send(&STATUS_OK.to_le_bytes()).await.is_ok() {
            self.connection.wait_for_close().await;
        }
        Ok(())
    }

    /// Adds an entry to the batch and receives its pages, if it has any.
    async fn add(&mut self, header: Header, location: PageLocation) -> Result<(), Failure> {
        let mut rest = match PageRange::new(header.address, header.pages) {
            Ok(range) if header.pages <= ENTRY_PAGES_MAX => Some(range),
            Ok(_) => return Err(protocol(format!("entry of {} pages", header.pages))),
            Err(error) => return Err(protocol(error.to_string())),
        };
        while let Some(range) = rest {
            let (now, later) = match location {
                PageLocation::Present { .. } => {
                    let free = (CHUNK_SIZE - self.batch.filled) as u64 / PAGE_SIZE;
                    range.split_at(free)
                }
                PageLocation::Parent | PageLocation::Elsewhere => (Some(range), None),
            };
            let Some(range) = now else {
                self.flush().await?;
                continue;
            };
            if let PageLocation::Present { .. } = location {
                self.recv_pages(range).await?;
            }
            let place = location;
            self.batch.entries.push(PagemapEntry { range, place });
            if self.batch.entries.len() == ENTRIES_MAX {
                self.flush().await?;
            }
            rest = later;
        }
        Ok(())
    }

    /// Receives pages into the batch's buffer, which has room for them.
    async fn recv_pages(&mut self, range: PageRange) -> Result<(), WireError> {
        let buffer = match &mut self.batch.buffer {
            Some(buffer) => buffer,
            None => self.batch.buffer.insert(self.pool.take().await),
        };
        let end = self.batch.filled + range.bytes() as usize;
        self.connection
            .recv(&mut buffer[self.batch.filled..end])
            .await?;
        self.batch.filled = end;
        Ok(())
    }

    /// Hands the batch to the writer thread.
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
        self.writer.send(Job::Put { entries, pages }).await
    }

    /// Returns the answer of the writer thread to a question, which it reaches after all earlier jobs.
    async fn ask(
        &mut self,
        question: impl FnOnce(oneshot::Sender<bool>) -> Job,
    ) -> Result<bool, Failure> {
        let (answer_tx, answer_rx) = oneshot::channel();
        self.writer.send(question(answer_tx)).await?;
        match answer_rx.await {
            Ok(answer) => Ok(answer),
            Err(_) => Err(self.writer.exit_reason().await.into()),
        }
    }
}

fn image(header: Header) -> Result<ImageId, Failure> {
    let object = header.object;
    page_server::image(object).ok_or_else(|| {
        protocol(format!(
            "object {object:#x} is neither a process nor a segment"
        ))
    })
}

fn protocol(reason: String) -> Failure {
    Refusal::new(RefuseCode::Protocol, reason).into()
}

/// The connection to CRIU.
struct Connection<R, W> {
    reader: BufReader<R>,
    writer: W,
    headers: HeaderReader,
    stall: Duration,
    /// Number of bytes received.
    bytes: u64,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Connection<R, W> {
    fn new(read: R, write: W, stall: Duration) -> Self {
        Self {
            reader: BufReader::with_capacity(1 << 16, read),
            writer: write,
            headers: HeaderReader::default(),
            stall,
            bytes: 0,
        }
    }

    async fn recv_header(&mut self) -> Result<Header, Failure> {
        let mut headers = self.headers;
        loop {
            let missing = headers.missing();
            self.recv(missing).await?;
            let len = missing.len();
            let header = headers.advance(len, Width::of_dump);
            if let Some(header) = header.map_err(|unknown| protocol(unknown.to_string()))? {
                self.headers = headers;
                return Ok(header);
            }
        }
    }

    /// Fills `buffer`.
    async fn recv(&mut self, buffer: &mut [u8]) -> Result<(), WireError> {
        self.bytes += buffer.len() as u64;
        match timeout(self.stall, self.reader.read_exact(buffer)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(WireError::Closed)
            }
            Ok(Err(error)) => Err(WireError::Io(error)),
            Err(_) => Err(WireError::Stalled(self.stall)),
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        match timeout(self.stall, self.writer.write_all(bytes)).await {
            Ok(written) => written.map_err(WireError::Io),
            Err(_) => Err(WireError::Stalled(self.stall)),
        }
    }

    /// Waits until the client has closed its end, so that ours leaves no socket in TIME_WAIT.
    async fn wait_for_close(&mut self) {
        let mut scrap = [0; 64];
        let end = async { while matches!(self.reader.read(&mut scrap).await, Ok(1..)) {} };
        let _ = timeout(self.stall, end).await;
    }
}

/// A step of writing a dump.
enum Job {
    /// Answers whether the parent has the image.
    HasParent(ImageId, oneshot::Sender<bool>),
    /// Begins an image, and answers whether the parent has it.
    Open(ImageId, oneshot::Sender<bool>),
    /// Appends entries and their pages to the open image.
    Put {
        entries: Vec<PagemapEntry>,
        pages: Bytes,
    },
    /// Completes the dump, and answers whether it had any image.
    Commit(oneshot::Sender<bool>),
}

/// Writes one dump, in the writer thread.
struct DumpWriter {
    context: Arc<ServerContext>,
    name: DirName,
    quota: Arc<Quota>,
    parent: Option<DirName>,
    /// `None` until the first image is opened.
    writer: Option<DirWriter>,
}

impl DumpWriter {
    fn run(mut self, mut jobs_rx: mpsc::Receiver<Job>) -> Result<(), Refusal> {
        // If nothing waits for an answer any more, the connection has ended, and the jobs end, too.
        while let Some(job) = jobs_rx.blocking_recv() {
            match job {
                Job::HasParent(image, answer_tx) => {
                    let _ = answer_tx.send(self.has_parent(image)?);
                }
                Job::Open(image, answer_tx) => {
                    let _ = answer_tx.send(self.open(image)?);
                }
                Job::Put { entries, pages } => match &mut self.writer {
                    Some(writer) => writer.put_as_is(&entries, &pages)?,
                    None => {
                        let reason = "pages were sent before an image was opened";
                        return Err(Refusal::new(RefuseCode::Protocol, reason));
                    }
                },
                Job::Commit(answer_tx) => {
                    let has_images = self.writer.is_some();
                    self.writer.take().map(DirWriter::commit).transpose()?;
                    let _ = answer_tx.send(has_images);
                }
            }
        }
        Ok(())
    }

    /// Returns whether the parent has this image. The parent is chosen when a process is first named,
    /// because the numbers of segments are not unique enough.
    fn has_parent(&mut self, image: ImageId) -> Result<bool, Refusal> {
        let store = &self.context.store;
        let is_process = matches!(image, ImageId::Process(_));
        if self.context.dump_parents == DumpParents::Newest && self.parent.is_none() && is_process {
            self.parent = store.newest_dump_of(image)?;
            if let (Some(parent), Some(writer)) = (self.parent, &mut self.writer) {
                writer.follow(parent)?;
            }
        }
        Ok(self.parent.is_some_and(|parent| {
            let dir = store.dir().join(parent.to_string());
            dir.join(image.pagemap_name()).exists()
        }))
    }

    fn open(&mut self, image: ImageId) -> Result<bool, Refusal> {
        self.has_parent(image)?;
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => {
                self.quota.check_round(1)?;
                let writer = DirWriter::begin(self.context.store.dir(), self.name)?;
                let mut writer = writer.with_quota(&self.quota);
                if let Some(parent) = self.parent {
                    writer.follow(parent)?;
                }
                self.writer.insert(writer)
            }
        };
        Ok(writer.open(image)?)
    }
}
