//! CRIU's page-server protocol: rounds into `criu page-server`, which must be started anew, and with
//! the directory of the round before as its parent, for each round.
//!
//! A connection is a round. CRIU's server says nothing but whether it has an image in its parent,
//! and at the end a number, 0 if it has everything.

use super::compress::Compression;
use super::link::{Duplex, Link, dial};
use super::native::Connect;
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

/// How long a page server may take to answer before it is taken for one that waits for the rest of
/// a longer header.
const ANSWER: Duration = Duration::from_secs(2);

/// How often a page server that is not there yet is looked for.
const RETRY: Duration = Duration::from_millis(20);

/// Most pages in one entry: the narrow header has 32 bits for them.
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

/// The sink for CRIU's page server.
pub struct CriuSink {
    link: Link<Outgoing, Reply>,
    connected: bool,
    /// The open image, and whether the server has it in its parent.
    image: Option<(ImageId, bool)>,
    counters: Arc<Counters>,
    /// Bytes sent when the round began.
    round_start: u64,
    totals: Totals,
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
            "CRIU's protocol has no checksums, compression, resume or progress, and takes one round \
             for each start of `criu page-server`"
        );
        let counters = Arc::new(Counters::default());
        let told = Arc::clone(&counters);
        let mut sink = Self {
            link: Link::start(|commands, replies| converse(connect, commands, replies, told))?,
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
            self.link.say(Outgoing::Connect)?;
            self.link.hear()?;
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
        self.link.say(Outgoing::Open(image))?;
        let has_parent = matches!(self.link.hear()?, Reply::Opened { has_parent: true });
        self.image = Some((image, has_parent));
        Ok(())
    }

    fn put(&mut self, entries: Vec<Entry>, pages: Bytes) -> Result<(), SinkError> {
        if let Some((image, false)) = self.image
            && entries.iter().any(|entry| entry.kind == EntryKind::Parent)
        {
            let what = format!("does not have {image} of the round before");
            return Err(SinkError::PageServer(what));
        }
        self.totals.count(&entries);
        let counted = &self.counters.pages;
        counted.store(self.totals.pages(), Ordering::Relaxed);
        self.link.say(Outgoing::Put { entries, pages })
    }

    fn commit(&mut self) -> Result<Receipt, SinkError> {
        self.link.say(Outgoing::Close)?;
        self.link.hear()?;
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
    mut commands: mpsc::Receiver<Outgoing>,
    replies: mpsc::UnboundedSender<Reply>,
    counters: Arc<Counters>,
) -> Result<(), SinkError> {
    // Learnt in the first round, and the same in all.
    let mut width = None;
    let mut first = true;
    while let Some(Outgoing::Connect) = commands.recv().await {
        let stream = dial_patiently(&connect, first).await?;
        first = false;
        // The sink is gone only if the migration is over. So for all that follows.
        let _ = replies.send(Reply::Connected);
        let mut server = Server {
            stream: BufStream::with_capacity(64, ZEROS.len(), stream),
            width,
            object: 0,
            stall: connect.stall,
            counters: &counters,
        };
        loop {
            match commands.recv().await {
                Some(Outgoing::Open(image)) => {
                    let has_parent = server.open(image).await?;
                    let _ = replies.send(Reply::Opened { has_parent });
                }
                Some(Outgoing::Put { entries, pages }) => server.put(&entries, &pages).await?,
                Some(Outgoing::Close) => {
                    server.close().await?;
                    break;
                }
                // The server sees a dump that does not come to its end.
                Some(Outgoing::Connect) | None => return Ok(()),
            }
        }
        width = server.width;
        drop(server);
        let _ = replies.send(Reply::Closed);
    }
    Ok(())
}

/// Connects; in later rounds to a page server that may have to be started yet.
async fn dial_patiently(connect: &Connect, first: bool) -> Result<Box<dyn Duplex>, SinkError> {
    let began = Instant::now();
    loop {
        match dial(
            &connect.to,
            connect.stall,
            connect.stall,
            connect.tls.as_ref(),
        )
        .await
        {
            Err(SinkError::Connect { source, .. })
                if source.kind() == io::ErrorKind::ConnectionRefused
                    && !first
                    && began.elapsed() < connect.stall =>
            {
                sleep(RETRY).await;
            }
            result => return result,
        }
    }
}

/// A page server that is connected.
struct Server<'a> {
    stream: BufStream<Box<dyn Duplex>>,
    /// `None` until it has answered.
    width: Option<Width>,
    /// The open one.
    object: u64,
    stall: Duration,
    counters: &'a Counters,
}

impl Server<'_> {
    /// Names an image; whether the server has it in its parent.
    async fn open(&mut self, image: ImageId) -> Result<bool, SinkError> {
        self.object = page_server::object(image)
            .ok_or_else(|| SinkError::PageServer(format!("has no number for {image}")))?;
        let open = Header::bare(Command::Open { answered: true }, self.object);
        self.header(open).await?;
        self.flush().await?;
        let answer = match self.width {
            Some(_) => self.read().await?,
            None => self.first_answer().await?,
        };
        let [has_parent] = answer;
        Ok(has_parent != 0)
    }

    /// Nothing on the wire says how long the server's headers are, but it answers when it has one.
    /// The rest of a longer one is the object's number, here sent when no answer comes: the first
    /// 24 bytes are as good in both.
    async fn first_answer(&mut self) -> Result<[u8; 1], SinkError> {
        if let Ok(answer) = timeout(ANSWER, self.read()).await {
            self.width = Some(Width::Narrow);
            return answer;
        }
        let rest = self.object.to_le_bytes();
        self.write(&rest).await?;
        self.flush().await?;
        self.width = Some(Width::Wide);
        tracing::debug!("the page server is of CRIU 4.2 or later");
        self.read().await
    }

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
                        let now = now.expect("a range is not empty");
                        self.entry(now, PageLocation::Parent).await?;
                        rest = later;
                    }
                }
                EntryKind::Copy => unreachable!("a sink that does not copy is not asked to"),
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

    /// Ends the round.
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
        self.in_time(written)?;
        let counted = &self.counters.bytes;
        counted.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), SinkError> {
        let flushed = timeout(self.stall, self.stream.flush()).await;
        self.in_time(flushed)
    }

    async fn read<const N: usize>(&mut self) -> Result<[u8; N], SinkError> {
        let mut bytes = [0; N];
        let read = timeout(self.stall, self.stream.read_exact(&mut bytes)).await;
        self.in_time(read).map(|_| bytes)
    }

    fn in_time<T>(
        &self,
        result: Result<io::Result<T>, tokio::time::error::Elapsed>,
    ) -> Result<T, SinkError> {
        match result {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => match error.kind() {
                io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe => Err(SinkError::PageServer(
                    "gave up; its log says why".to_owned(),
                )),
                _ => Err(WireError::Io(error).into()),
            },
            Err(_) => Err(WireError::Stalled(self.stall).into()),
        }
    }
}
