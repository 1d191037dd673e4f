//! Sink for CRIU's page-server protocol.
//!
//! Each round is one connection to `criu page-server`, which the user starts once for each round, with the
//! directory of the previous round as its parent. The server only replies whether its parent directory has an
//! image, and, at the end of the round, with a status: 0 if it has everything.

use super::compress::Compression;
use super::link::{Connect, Duplex, Link, dial};
use super::{PageSink, Receipt, SinkError};
use crate::progress::Counters;
use bytes::Bytes;
use pageferry_common::criu::page_server::{self, Command, Header, PageLocation, Width};
use pageferry_common::wire::{Entry, EntryKind, RoundKind, Totals, WireError};
use pageferry_common::{ImageId, PageRange};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// How long to wait for the first reply, before assuming that the server waits for the rest of a wide header.
const FIRST_REPLY_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause between two attempts to connect to a page server that is not started yet.
const RETRY_DELAY: Duration = Duration::from_millis(20);

/// Maximum number of pages in an entry: the narrow header has 32 bits for it.
const ENTRY_PAGES_MAX: u64 = 1 << 31;

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

enum Outgoing {
    Connect,
    Open(ImageId),
    Put { entries: Vec<Entry>, pages: Bytes },
    Close,
}

enum Reply {
    Connected,
    Opened { has_parent: bool },
    Closed,
}

/// Sink for `criu page-server`.
pub struct CriuSink {
    link: Link<Outgoing, Reply>,
    connected: bool,
    image: Option<OpenImage>,
    counters: Arc<Counters>,
    /// Bytes sent when the round began.
    round_start: u64,
    totals: Totals,
}

/// Image that later `put` calls belong to.
#[derive(Debug, Clone, Copy)]
struct OpenImage {
    id: ImageId,
    /// Whether the parent directory of the server has this image.
    has_parent: bool,
}

impl CriuSink {
    /// Connects for the first round.
    ///
    /// # Errors
    /// [`SinkError`].
    pub fn connect(connect: Connect) -> Result<Self, SinkError> {
        if matches!(connect.compression, Compression::Zstd(_)) {
            let what = "takes no compressed pages: leave out --compress".to_owned();
            return Err(SinkError::PageServer(what));
        }
        tracing::warn!(
            "CRIU's protocol has no checksums, compression, resume or progress reports, and takes one start \
             of `criu page-server` for each round"
        );
        let counters = Arc::new(Counters::default());
        let thread_counters = Arc::clone(&counters);
        let mut sink = Self {
            link: Link::start(|commands_rx, replies_tx| {
                converse(connect, commands_rx, replies_tx, thread_counters)
            })?,
            connected: false,
            image: None,
            counters,
            round_start: 0,
            totals: Totals::default(),
        };
        sink.prepare()?;
        Ok(sink)
    }
}

impl PageSink for CriuSink {
    fn prepare(&mut self) -> Result<(), SinkError> {
        if !self.connected {
            self.link.send(Outgoing::Connect)?;
            self.link.recv()?;
            self.connected = true;
        }
        Ok(())
    }

    fn begin(&mut self, _: u32, _: RoundKind, _: u64) -> Result<(), SinkError> {
        self.totals = Totals::default();
        self.round_start = self.counters.bytes.load(Ordering::Relaxed);
        Ok(())
    }

    fn open(&mut self, image: ImageId) -> Result<(), SinkError> {
        self.totals.images += 1;
        self.link.send(Outgoing::Open(image))?;
        let has_parent = matches!(self.link.recv()?, Reply::Opened { has_parent: true });
        self.image = Some(OpenImage {
            id: image,
            has_parent,
        });
        Ok(())
    }

    fn put(&mut self, entries: Vec<Entry>, pages: Bytes) -> Result<(), SinkError> {
        if let Some(image) = self.image
            && !image.has_parent
            && entries.iter().any(|entry| entry.kind == EntryKind::Parent)
        {
            let what = format!("does not have {} of the previous round", image.id);
            return Err(SinkError::PageServer(what));
        }
        self.totals.count(&entries);
        let counted = &self.counters.pages;
        counted.store(self.totals.pages(), Ordering::Relaxed);
        self.link.send(Outgoing::Put { entries, pages })
    }

    fn commit(&mut self) -> Result<Receipt, SinkError> {
        self.link.send(Outgoing::Close)?;
        self.link.recv()?;
        self.connected = false;
        Ok(Receipt {
            totals: self.totals,
            bytes_wire: self.counters.bytes.load(Ordering::Relaxed) - self.round_start,
        })
    }

    fn finish(&mut self) -> Result<(), SinkError> {
        Ok(())
    }

    fn supports_copy(&self) -> bool {
        false
    }

    fn directory(&self) -> &str {
        ""
    }

    fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

/// The network thread.
async fn converse(
    connect: Connect,
    mut commands_rx: mpsc::Receiver<Outgoing>,
    replies_tx: mpsc::UnboundedSender<Reply>,
    counters: Arc<Counters>,
) -> Result<(), SinkError> {
    // Detected in the first round, and the same in all rounds.
    let mut width = None;
    // In the first round the server must be there; in later rounds the user may still be starting it.
    let mut retry_for = Duration::ZERO;
    while let Some(Outgoing::Connect) = commands_rx.recv().await {
        let stream = dial_with_retries(&connect, retry_for).await?;
        retry_for = connect.stall;
        // This and the other replies fail only if the sink was dropped, which ends the conversation anyway.
        let _ = replies_tx.send(Reply::Connected);
        let mut server = Server {
            stream: BufStream::with_capacity(64, ZEROS.len(), stream),
            width,
            object: 0,
            stall: connect.stall,
            counters: &counters,
        };
        loop {
            match commands_rx.recv().await {
                Some(Outgoing::Open(image)) => {
                    let has_parent = server.open(image).await?;
                    let _ = replies_tx.send(Reply::Opened { has_parent });
                }
                Some(Outgoing::Put { entries, pages }) => server.put(&entries, &pages).await?,
                Some(Outgoing::Close) => {
                    server.close().await?;
                    break;
                }
                // The migration failed: the server sees the connection close before the end of the dump.
                Some(Outgoing::Connect) | None => return Ok(()),
            }
        }
        width = server.width;
        drop(server);
        let _ = replies_tx.send(Reply::Closed);
    }
    Ok(())
}

/// Connects; retries for `retry_for` while nothing listens at the address.
async fn dial_with_retries(
    connect: &Connect,
    retry_for: Duration,
) -> Result<Box<dyn Duplex>, SinkError> {
    let Connect { to, stall, tls, .. } = connect;
    let began = Instant::now();
    loop {
        match dial(to, *stall, *stall, tls.as_ref()).await {
            Err(SinkError::Connect { source, .. })
                if source.kind() == io::ErrorKind::ConnectionRefused
                    && began.elapsed() < retry_for =>
            {
                sleep(RETRY_DELAY).await;
            }
            result => return result,
        }
    }
}

/// Connection to a page server.
struct Server<'a> {
    stream: BufStream<Box<dyn Duplex>>,
    /// Width of headers; `None` until the first reply.
    width: Option<Width>,
    /// Number of the open image in CRIU's protocol.
    object: u64,
    stall: Duration,
    counters: &'a Counters,
}

impl Server<'_> {
    /// Opens an image. Returns whether the parent directory of the server has it.
    async fn open(&mut self, image: ImageId) -> Result<bool, SinkError> {
        self.object = page_server::object(image)
            .ok_or_else(|| SinkError::PageServer(format!("has no number for {image}")))?;
        let open = Header::bare(Command::Open { answered: true }, self.object);
        self.header(open).await?;
        self.flush().await?;
        let [has_parent] = match self.width {
            Some(_) => self.read().await?,
            None => self.read_first_reply().await?,
        };
        Ok(has_parent != 0)
    }

    /// Detects the width of headers. The protocol does not negotiate it, but the server replies as soon as it
    /// has read a whole header. The first 24 bytes are valid in both widths; if no reply to them arrives, the
    /// rest of a wide header follows, which is the number of the object.
    async fn read_first_reply(&mut self) -> Result<[u8; 1], SinkError> {
        if let Ok(reply) = timeout(FIRST_REPLY_TIMEOUT, self.read()).await {
            self.width = Some(Width::Narrow);
            return reply;
        }
        let rest = self.object.to_le_bytes();
        self.write(&rest).await?;
        self.flush().await?;
        self.width = Some(Width::Wide);
        tracing::debug!("page server of CRIU 4.2 or later");
        self.read().await
    }

    /// Sends entries and the pages of the data entries.
    async fn put(&mut self, entries: &[Entry], pages: &[u8]) -> Result<(), SinkError> {
        let mut rest = pages;
        for entry in entries {
            let present = PageLocation::Present { lazy: false };
            match entry.kind {
                EntryKind::Data => {
                    let (now, later) = rest.split_at(entry.range.bytes() as usize);
                    rest = later;
                    self.entry(entry.range, present).await?;
                    self.write(now).await?;
                }
                EntryKind::Zero => {
                    self.entry(entry.range, present).await?;
                    let mut left = entry.range.bytes() as usize;
                    while left > 0 {
                        let now = left.min(ZEROS.len());
                        self.write(&ZEROS[..now]).await?;
                        left -= now;
                    }
                }
                EntryKind::Parent => {
                    let mut rest = Some(entry.range);
                    while let Some(range) = rest {
                        let (now, later) = range.split_at(ENTRY_PAGES_MAX);
                        let now = now.expect("ranges are not empty");
                        self.entry(now, PageLocation::Parent).await?;
                        rest = later;
                    }
                }
                EntryKind::Copy => unreachable!("supports_copy() returns false"),
            }
        }
        Ok(())
    }

    async fn entry(&mut self, range: PageRange, place: PageLocation) -> Result<(), SinkError> {
        self.header(Header {
            command: Command::Add(place),
            pages: range.pages(),
            address: range.start(),
            object: self.object,
        })
        .await
    }

    /// Ends the round, and reads the status of the server.
    async fn close(&mut self) -> Result<(), SinkError> {
        self.header(Header::bare(Command::Close, 0)).await?;
        self.flush().await?;
        let status = self.read().await.map(i32::from_le_bytes)?;
        match status {
            0 => Ok(()),
            _ => Err(SinkError::PageServer(format!(
                "failed with status {status}"
            ))),
        }
    }

    async fn header(&mut self, header: Header) -> Result<(), SinkError> {
        let mut bytes = Vec::with_capacity(page_server::HEADER_MAX);
        header.encode(self.width.unwrap_or(Width::Narrow), &mut bytes);
        self.write(&bytes).await
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        let written = timeout(self.stall, self.stream.write_all(bytes)).await;
        self.map_timeout(written)?;
        let counted = &self.counters.bytes;
        counted.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), SinkError> {
        let flushed = timeout(self.stall, self.stream.flush()).await;
        self.map_timeout(flushed)
    }

    async fn read<const N: usize>(&mut self) -> Result<[u8; N], SinkError> {
        let mut bytes = [0; N];
        let read = timeout(self.stall, self.stream.read_exact(&mut bytes)).await;
        self.map_timeout(read).map(|_| bytes)
    }

    /// Converts the result of an operation limited to `stall`.
    fn map_timeout<T>(
        &self,
        result: Result<io::Result<T>, tokio::time::error::Elapsed>,
    ) -> Result<T, SinkError> {
        match result {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => match error.kind() {
                io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe => Err(SinkError::PageServer(
                    "closed the connection; see its log".to_owned(),
                )),
                _ => Err(WireError::Io(error).into()),
            },
            Err(_) => Err(WireError::Stalled(self.stall).into()),
        }
    }
}
