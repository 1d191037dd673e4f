//! Compression of pages, and the decision whether it is worthwhile.

use crate::sys::socket::unacknowledged_bytes;
use bytes::Bytes;
use pageferry_common::BufferPool;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Whether to compress pages, and at which level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Never compress.
    None,
    /// Compress with zstd at this level.
    Zstd(i32),
    /// Compress with zstd, at [`DEFAULT_LEVEL`] or faster, while the link is the bottleneck and the pages
    /// become smaller.
    Auto,
}

/// zstd level used when the user gives none.
pub const DEFAULT_LEVEL: i32 = 1;

/// Levels of [`Compression::Auto`]. The second takes about half the time of the first.
const LEVELS: [i32; 2] = [DEFAULT_LEVEL, -5];

/// Maximum ratio of compressed to raw size at which pages are sent compressed.
const MAX_RATIO: f64 = 7.0 / 8.0;

/// Bytes of pages compressed to estimate speed and ratio.
const SAMPLE_BYTES: usize = 128 << 10;

/// Pause between two samples, in multiples of the time that a sample takes. Sampling uses 1/50 of the time.
const SAMPLE_PAUSE: u32 = 50;

/// Bytes sent until the newest measurements dominate the rate of the link.
const WINDOW_BYTES: f64 = (4 << 20) as f64;

/// Rate at which the link sends data. The network thread records its writes here; the thread that compresses
/// reads the rate and the backlog.
#[derive(Debug, Default)]
pub(super) struct LinkRate {
    /// Bytes queued for the network thread.
    queued: AtomicU64,
    /// Seconds per byte, as the bits of an `f64`; 0 while unknown. Written by one thread only.
    cost: AtomicU64,
    /// Duplicate of the connection's socket, owned by the conversation, which closes it with the connection.
    socket: Mutex<Weak<OwnedFd>>,
}

impl LinkRate {
    /// Sets the socket whose unsent bytes count as backlog. It is watched until its owner drops it.
    pub(super) fn watch(&self, socket: &Arc<OwnedFd>) {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(socket);
    }

    /// Adds bytes to the queue of the network thread.
    pub(super) fn queue(&self, bytes: usize) {
        self.queued.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Returns the bytes that the kernel has accepted but the peer has not acknowledged. The kernel accepts
    /// megabytes at once, however slow the link is. Returns 0 without a connection.
    pub(super) fn unsent(&self) -> u64 {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = socket
            .upgrade()
            .and_then(|socket| unacknowledged_bytes(socket.as_fd()).ok());
        bytes.unwrap_or_default()
    }

    /// Records that the network thread wrote `bytes` from its queue in time `took`; `unsent_before` is what
    /// [`LinkRate::unsent`] returned before the write.
    pub(super) fn record_write(&self, bytes: usize, took: Duration, unsent_before: u64) {
        self.queued.fetch_sub(bytes as u64, Ordering::Relaxed);
        let unsent = self.unsent();
        let sent = (unsent_before + bytes as u64).saturating_sub(unsent);
        let load = match unsent {
            0 => Load::Idle,
            _ => Load::Busy,
        };
        self.learn(sent, took, load);
    }

    /// Updates the rate: `bytes` left the host in time `took`. An idle link may be faster than that, so such
    /// a measurement never lowers the rate.
    fn learn(&self, bytes: u64, took: Duration, load: Load) {
        let now = took.as_secs_f64() / bytes as f64;
        let is_slower = self.seconds_per_byte().is_some_and(|before| now > before);
        if bytes == 0 || load == Load::Idle && is_slower {
            return;
        }
        let before = self.seconds_per_byte().unwrap_or_default();
        let weight = 1.0 - (-(bytes as f64) / WINDOW_BYTES).exp();
        let cost = before + weight * (now - before);
        self.cost.store(cost.to_bits(), Ordering::Relaxed);
    }

    /// Returns the time the link takes for a byte, in seconds; `None` while unknown.
    fn seconds_per_byte(&self) -> Option<f64> {
        let cost = f64::from_bits(self.cost.load(Ordering::Relaxed));
        (cost != 0.0).then_some(cost)
    }

    /// Returns whether bytes wait for the network thread.
    fn is_busy(&self) -> bool {
        self.queued.load(Ordering::Relaxed) > 0
    }

    /// Returns the bytes that have not left the host yet.
    fn backlog_bytes(&self) -> u64 {
        self.queued.load(Ordering::Relaxed) + self.unsent()
    }
}

/// State of the link after a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Load {
    /// All bytes were sent: the link may have been idle for part of the time.
    Idle,
    /// Bytes are still unsent: the link was busy all the time.
    Busy,
}

/// Speed and ratio of compression at one level, as seen lately.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Estimate {
    /// Seconds to compress a byte.
    cost: f64,
    /// Ratio of compressed to raw size.
    ratio: f64,
}

impl Estimate {
    /// Estimate for pages that are sent uncompressed.
    const RAW: Self = Self {
        cost: 0.0,
        ratio: 1.0,
    };

    /// Returns the estimate from one measurement: `bytes` were compressed to `compressed_bytes` in time
    /// `took`.
    fn new(bytes: usize, compressed_bytes: usize, took: Duration) -> Self {
        Self {
            cost: took.as_secs_f64() / bytes as f64,
            ratio: compressed_bytes as f64 / bytes as f64,
        }
    }

    /// Returns whether to compress `bytes` for a link that takes `link` seconds per byte and has a backlog of
    /// `backlog` seconds: if they are sent sooner than uncompressed, and the processor, which other programs
    /// need too, spends less than twice the time that the link saves.
    fn is_worthwhile(self, bytes: usize, link: f64, backlog: f64) -> bool {
        let time = |estimate: Self| estimate.seconds_until_sent(bytes, link, backlog);
        time(self) < time(Self::RAW) && self.cost < 2.0 * link * (1.0 - self.ratio)
    }

    /// Returns the seconds until `bytes` are compressed and sent. The link takes `link` seconds per byte, and
    /// works off its backlog of `backlog` seconds during the compression.
    fn seconds_until_sent(self, bytes: usize, link: f64, backlog: f64) -> f64 {
        let bytes = bytes as f64;
        (bytes * self.cost).max(backlog) + bytes * self.ratio * link
    }

    /// Returns whether the pages become small enough to be sent compressed.
    fn is_smaller(self) -> bool {
        self.ratio < MAX_RATIO
    }

    /// Returns the mean of this estimate and a new measurement.
    fn averaged(self, new: Self) -> Self {
        Self {
            cost: f64::midpoint(self.cost, new.cost),
            ratio: f64::midpoint(self.ratio, new.ratio),
        }
    }
}

/// Pages in the form in which they are sent.
pub(super) struct Payload {
    pub(super) compressed: bool,
    pub(super) data: Bytes,
}

impl Payload {
    pub(super) fn raw(data: Bytes) -> Self {
        Self {
            compressed: false,
            data,
        }
    }
}

/// Compresses chunks where that is worthwhile.
pub(super) struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    /// `None` to compress every chunk at the fixed level.
    adaptive: Option<AdaptiveLevel>,
    pool: BufferPool,
}

impl Compressor {
    /// Returns a compressor that takes buffers from `pool`; `None` for [`Compression::None`].
    pub(super) fn new(how: Compression, pool: &BufferPool) -> io::Result<Option<Self>> {
        let (level, adaptive) = match how {
            Compression::None => return Ok(None),
            Compression::Zstd(level) => (level, None),
            Compression::Auto => (LEVELS[0], Some(AdaptiveLevel::new())),
        };
        Ok(Some(Self {
            zstd: zstd::bulk::Compressor::new(level)?,
            adaptive,
            pool: pool.clone(),
        }))
    }

    /// Compresses pages if that is worthwhile and makes them at least an eighth smaller; otherwise returns
    /// them as they are.
    pub(super) fn compress(&mut self, pages: Bytes, link: &LinkRate) -> Payload {
        if pages.is_empty() {
            return Payload::raw(pages);
        }
        let level = match &mut self.adaptive {
            Some(adaptive) => adaptive.choose(&mut self.zstd, &pages, link),
            None => Some(0),
        };
        let Some(level) = level else {
            return Payload::raw(pages);
        };
        let max_len = (pages.len() as f64 * MAX_RATIO) as usize;
        // Blocks until the network thread has sent a chunk, if no buffer is free.
        let mut buffer = self.pool.take_blocking();
        let began = Instant::now();
        // zstd returns an error if the result is longer than max_len.
        let result = self.zstd.compress_to_buffer(&pages, &mut buffer[..max_len]);
        let compressed_len = result.ok().filter(|len| *len > 0);
        if let Some(adaptive) = &mut self.adaptive {
            let len = compressed_len.unwrap_or(pages.len());
            adaptive.learn(level, Estimate::new(pages.len(), len, began.elapsed()));
        }
        match compressed_len {
            None => Payload::raw(pages),
            Some(len) => Payload {
                compressed: true,
                data: buffer.freeze(len),
            },
        }
    }
}

/// Chooses a level for each chunk.
#[derive(Debug)]
struct AdaptiveLevel {
    /// Estimates for each of [`LEVELS`]; `None` before the first sample.
    estimates: Option<[Estimate; LEVELS.len()]>,
    next_sample: Instant,
    /// Buffer for compressed samples.
    scratch: Vec<u8>,
}

impl AdaptiveLevel {
    fn new() -> Self {
        Self {
            estimates: None,
            next_sample: Instant::now(),
            scratch: vec![0; SAMPLE_BYTES],
        }
    }

    /// Returns the level to compress pages at, as an index into [`LEVELS`], and sets `zstd` to it; `None` to
    /// send the pages uncompressed.
    fn choose(
        &mut self,
        zstd: &mut zstd::bulk::Compressor<'static>,
        pages: &[u8],
        link: &LinkRate,
    ) -> Option<usize> {
        if Instant::now() >= self.next_sample {
            self.sample(zstd, pages)?;
        }
        let estimates = self.estimates?;
        let index = match link.seconds_per_byte() {
            // Compress if the previous chunk is still in flight, rather than wait for it.
            None => (link.is_busy() && estimates[0].is_smaller()).then_some(0),
            Some(cost) => {
                let (bytes, backlog) = (pages.len(), link.backlog_bytes() as f64 * cost);
                let time =
                    |index: &usize| estimates[*index].seconds_until_sent(bytes, cost, backlog);
                (0..LEVELS.len())
                    .filter(|index| estimates[*index].is_worthwhile(bytes, cost, backlog))
                    .min_by(|one, other| time(one).total_cmp(&time(other)))
            }
        }?;
        zstd.set_compression_level(LEVELS[index]).ok()?;
        Some(index)
    }

    /// Compresses a part of the pages at each level, to update the estimates.
    fn sample(&mut self, zstd: &mut zstd::bulk::Compressor<'static>, pages: &[u8]) -> Option<()> {
        let sampling_began = Instant::now();
        // From the middle: the first pages of a mapping are often unlike the others.
        let len = SAMPLE_BYTES.min(pages.len());
        let start = (pages.len() - len) / 2;
        let sample = &pages[start..start + len];
        for (index, level) in LEVELS.into_iter().enumerate() {
            let began = Instant::now();
            zstd.set_compression_level(level).ok()?;
            let result = zstd.compress_to_buffer(sample, &mut self.scratch[..len]);
            let compressed_len = result.unwrap_or(len);
            self.learn(index, Estimate::new(len, compressed_len, began.elapsed()));
        }
        self.next_sample = sampling_began + SAMPLE_PAUSE * sampling_began.elapsed();
        Some(())
    }

    /// Updates the estimate of a level by a measurement.
    fn learn(&mut self, index: usize, measured: Estimate) {
        // The first measurement initialises all levels.
        let estimates = self.estimates.get_or_insert([measured; LEVELS.len()]);
        estimates[index] = estimates[index].averaged(measured);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_common::CHUNK_SIZE;

    /// Converts a rate in MB/s to seconds per byte.
    fn seconds_per_byte(megabytes_per_second: f64) -> f64 {
        1e-6 / megabytes_per_second
    }

    #[test]
    fn compression_is_worthwhile_while_the_link_is_the_bottleneck() {
        let (text, random) = (0.3, 1.0);
        for (link, ratio, chunks_waiting, expected) in [
            (seconds_per_byte(117.0), text, 1.0, true),
            (seconds_per_byte(117.0), 0.8, 1.0, true),
            (seconds_per_byte(117.0), random, 1.0, false),
            // The link would be idle during the compression.
            (seconds_per_byte(117.0), text, 0.0, true),
            (seconds_per_byte(117.0), 0.8, 0.0, false),
            // The link is faster than the compressor.
            (seconds_per_byte(2000.0), text, 2.0, false),
            // The link takes no time.
            (0.0, text, 1.0, false),
        ] {
            let estimate = Estimate {
                cost: seconds_per_byte(500.0),
                ratio,
            };
            let backlog = chunks_waiting * CHUNK_SIZE as f64 * link;
            let case = format!("{link} {ratio} {chunks_waiting}");
            let result = estimate.is_worthwhile(CHUNK_SIZE, link, backlog);
            assert_eq!(result, expected, "{case}");
        }
    }

    #[test]
    fn slower_level_is_better_only_with_a_backlog() {
        let [good, fast] = [(200.0, 0.38), (500.0, 0.55)].map(|(rate, ratio)| Estimate {
            cost: seconds_per_byte(rate),
            ratio,
        });
        let link = seconds_per_byte(117.0);
        for (chunks_waiting, better) in [(0.0, fast), (0.2, fast), (0.5, good), (2.0, good)] {
            let backlog = chunks_waiting * CHUNK_SIZE as f64 * link;
            let time = |estimate: Estimate| estimate.seconds_until_sent(CHUNK_SIZE, link, backlog);
            let other = if better == fast { good } else { fast };
            assert!(time(better) < time(other), "{chunks_waiting}");
        }
    }

    #[test]
    fn link_rate_follows_the_bytes_that_leave() {
        let rate = LinkRate::default();
        let send = |bytes, megabytes_per_second: f64, load| {
            let took = bytes as f64 * seconds_per_byte(megabytes_per_second);
            rate.learn(bytes, Duration::from_secs_f64(took), load);
        };
        assert_eq!(rate.seconds_per_byte(), None);
        let chunks = 8 * CHUNK_SIZE as u64;
        let relative_to =
            |megabytes| rate.seconds_per_byte().unwrap() / seconds_per_byte(megabytes);
        (0..2).for_each(|_| send(chunks, 100.0, Load::Busy));
        assert!((0.8..1.0).contains(&relative_to(100.0)));
        // A small write that the socket accepts at once weighs little.
        send(10_000, 100.0, Load::Busy);
        // A link that was idle may be faster than measured.
        (0..8).for_each(|_| send(chunks, 20.0, Load::Idle));
        let before = relative_to(100.0);
        assert!(before < 1.0, "{before}");
        (0..6).for_each(|_| send(chunks, 2000.0, Load::Idle));
        assert!(relative_to(2000.0) < 1.2);
        rate.queue(1_000_000);
        assert_eq!(rate.backlog_bytes(), 1_000_000);
    }

    #[test]
    fn unsent_bytes_of_a_closed_connection_are_zero() {
        use std::io::Write;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = Arc::new(OwnedFd::from(stream.try_clone().unwrap()));
        let rate = LinkRate::default();
        rate.watch(&socket);
        // More than both kernel buffers hold, for nothing reads it.
        stream.set_nonblocking(true).unwrap();
        while stream.write(&[0; 1 << 16]).is_ok() {}
        assert!(rate.unsent() > 0);
        drop(socket);
        assert_eq!(rate.unsent(), 0);
    }

    #[test]
    fn slow_link_compresses_only_compressible_chunks() {
        let pool = BufferPool::new(1);
        let text = b"for a slow link, this is small. ".repeat(CHUNK_SIZE / 32);
        let mut random = vec![0; CHUNK_SIZE];
        let mut state = 1_u64;
        for word in random.chunks_exact_mut(8) {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        for (pages, is_compressible) in [(text, true), (random, false)] {
            let mut compressor = Compressor::new(Compression::Auto, &pool).unwrap().unwrap();
            let rate = LinkRate::default();
            let pages = Bytes::from(pages);
            let first = compressor.compress(pages.clone(), &rate);
            assert!(!first.compressed && first.data == pages);
            // While the first chunk is in flight, the rate is unknown.
            rate.queue(CHUNK_SIZE);
            let second = compressor.compress(pages.clone(), &rate);
            assert_eq!(second.compressed, is_compressible);
            rate.learn(CHUNK_SIZE as u64, Duration::from_secs(100), Load::Busy);
            let third = compressor.compress(pages.clone(), &rate);
            assert_eq!(third.compressed, is_compressible);
            assert_eq!(third.data.len() < CHUNK_SIZE, is_compressible);
        }
    }
}
