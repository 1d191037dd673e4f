//! Compressing pages, and judging whether it is worth it.

use crate::sys::socket::unsent;
use bytes::Bytes;
use pageferry_common::BufferPool;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Whether and how hard pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// zstd at this level.
    Zstd(i32),
    /// zstd, at [`DEFAULT_LEVEL`] or faster, while the link is what is waited for, and pages become smaller.
    Auto,
}

/// The level that is meant where none is said.
pub const DEFAULT_LEVEL: i32 = 1;

/// The levels of [`Compression::Auto`]; the other takes about half the time.
const LEVELS: [i32; 2] = [DEFAULT_LEVEL, -5];

/// What pages must become at most, of what they were, to be sent so.
const MOST: f64 = 7.0 / 8.0;

/// Bytes of pages that are compressed only to see what would come of it.
const SAMPLE: usize = 128 << 10;

/// Samples take at most one part in so many of all time.
const SAMPLE_SHARE: u32 = 50;

/// Bytes that leave until most of what is believed of a link is what was seen last.
const WINDOW: f64 = (4 << 20) as f64;

/// How fast a link takes what is written to it. The thread that writes tells, the one that compresses asks.
#[derive(Debug)]
pub struct Pace {
    /// Bytes that wait to be written.
    queued: AtomicU64,
    /// Seconds a byte; the bits of an `f64`. Only one thread writes it.
    cost: AtomicU64,
    /// What is written to, to ask how much of that it has sent.
    socket: AtomicI32,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            queued: AtomicU64::new(0),
            cost: AtomicU64::new(0),
            socket: AtomicI32::new(-1),
        }
    }
}

impl Pace {
    /// This is the socket.
    pub fn watch(&self, socket: RawFd) {
        self.socket.store(socket, Ordering::Relaxed);
    }

    /// So many bytes more wait to be written.
    pub fn queue(&self, bytes: usize) {
        self.queued.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes that the socket has yet to send, or that are not acknowledged: it takes megabytes at once, however
    /// slow the link is.
    pub fn unsent(&self) -> u64 {
        unsent(self.socket.load(Ordering::Relaxed)).unwrap_or_default()
    }

    /// So many of them were written, in this time, in which the socket had so many to send at first.
    pub fn wrote(&self, bytes: usize, took: Duration, unsent_before: u64) {
        self.queued.fetch_sub(bytes as u64, Ordering::Relaxed);
        let unsent = self.unsent();
        let left = (unsent_before + bytes as u64).saturating_sub(unsent);
        self.learn(left, took, unsent == 0);
    }

    /// So many bytes left in this time. If the link ran `dry` in it, it is at least as fast as that.
    fn learn(&self, bytes: u64, took: Duration, dry: bool) {
        let (before, now) = (self.cost(), took.as_secs_f64() / bytes as f64);
        if bytes == 0 || dry && before > 0.0 && now > before {
            return;
        }
        let weight = 1.0 - (-(bytes as f64) / WINDOW).exp();
        let cost = before + weight * (now - before);
        self.cost.store(cost.to_bits(), Ordering::Relaxed);
    }

    /// Seconds that the link takes for a byte; 0 before anything was written.
    fn cost(&self) -> f64 {
        f64::from_bits(self.cost.load(Ordering::Relaxed))
    }

    /// Nothing has been written yet.
    fn is_unknown(&self) -> bool {
        self.cost() == 0.0
    }

    /// Something waits to be written.
    fn is_busy(&self) -> bool {
        self.queued.load(Ordering::Relaxed) > 0
    }

    /// Seconds until all that waits has left.
    fn backlog(&self) -> f64 {
        (self.queued.load(Ordering::Relaxed) + self.unsent()) as f64 * self.cost()
    }
}

/// What compressing has led to lately.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Outlook {
    /// Seconds that it takes for a byte.
    cost: f64,
    /// Bytes that become of one.
    ratio: f64,
}

impl Outlook {
    /// Of pages that are left as they are.
    const RAW: Self = Self {
        cost: 0.0,
        ratio: 1.0,
    };

    /// So many bytes became so many, in this time.
    fn new(bytes: usize, made: usize, took: Duration) -> Self {
        Self {
            cost: took.as_secs_f64() / bytes as f64,
            ratio: made as f64 / bytes as f64,
        }
    }

    /// Whether it is worth while to compress so many bytes for such a link: if they have left sooner, and if the
    /// processor is not kept busy for twice what the link is spared (it may have others to serve).
    fn pays(self, bytes: usize, link: f64, backlog: f64) -> bool {
        let until = |it: Self| it.until_sent(bytes, link, backlog);
        until(self) < until(Self::RAW) && self.cost < 2.0 * link * (1.0 - self.ratio)
    }

    /// Seconds until so many bytes have left over a link that takes `link` seconds a byte, and has `backlog`
    /// seconds to go on meanwhile.
    fn until_sent(self, bytes: usize, link: f64, backlog: f64) -> f64 {
        let bytes = bytes as f64;
        (bytes * self.cost).max(backlog) + bytes * self.ratio * link
    }

    /// Whether pages become small enough to be sent so.
    fn is_gain(self) -> bool {
        self.ratio < MOST
    }

    /// Half of what it was, half of what is seen now.
    fn learn(self, now: Self) -> Self {
        Self {
            cost: f64::midpoint(self.cost, now.cost),
            ratio: f64::midpoint(self.ratio, now.ratio),
        }
    }
}

/// Decides chunk by chunk.
#[derive(Debug)]
struct Judge {
    /// Of each level.
    outlooks: Option<[Outlook; LEVELS.len()]>,
    next_sample: Instant,
    /// For what a sample becomes.
    room: Vec<u8>,
}

/// Compresses chunks, or leaves them as they are.
pub(super) struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    /// `None`: always.
    judge: Option<Judge>,
    pool: BufferPool,
}

impl Compressor {
    /// `None` if nothing is ever compressed. Buffers come out of `pool`.
    pub(super) fn new(how: Compression, pool: &BufferPool) -> io::Result<Option<Self>> {
        let (level, judge) = match how {
            Compression::None => return Ok(None),
            Compression::Zstd(level) => (level, None),
            Compression::Auto => {
                let judge = Judge {
                    outlooks: None,
                    next_sample: Instant::now(),
                    room: vec![0; SAMPLE],
                };
                (LEVELS[0], Some(judge))
            }
        };
        Ok(Some(Self {
            zstd: zstd::bulk::Compressor::new(level)?,
            judge,
            pool: pool.clone(),
        }))
    }

    /// The pages as they are to be sent, and whether they are compressed: if that makes them at least an
    /// eighth smaller, and is worth while.
    pub(super) fn compress(&mut self, pages: Bytes, pace: &Pace) -> (bool, Bytes) {
        if pages.is_empty() {
            return (false, pages);
        }
        let level = match &mut self.judge {
            Some(judge) => judge.decide(&mut self.zstd, &pages, pace),
            None => Some(0),
        };
        let Some(level) = level else {
            return (false, pages);
        };
        let goal = (pages.len() as f64 * MOST) as usize;
        // Until there is one, the link is waited for.
        let mut smaller = self.pool.take_blocking();
        let began = Instant::now();
        // A result that does not fit in the room given is an error, and no gain.
        let result = self.zstd.compress_to_buffer(&pages, &mut smaller[..goal]);
        let len = result.unwrap_or(0);
        let made = if len > 0 { len } else { pages.len() };
        if let Some(judge) = &mut self.judge {
            judge.learn(level, Outlook::new(pages.len(), made, began.elapsed()));
        }
        match len {
            0 => (false, pages),
            len => (true, smaller.freeze(len)),
        }
    }
}

impl Judge {
    /// The level to compress pages at, by its place among [`LEVELS`], to which `zstd` is set then; `None` to leave
    /// them as they are.
    fn decide(
        &mut self,
        zstd: &mut zstd::bulk::Compressor<'static>,
        pages: &[u8],
        pace: &Pace,
    ) -> Option<usize> {
        let began = Instant::now();
        if began >= self.next_sample {
            // From the middle: the first pages of a mapping are often unlike the others.
            let sample = SAMPLE.min(pages.len());
            let from = (pages.len() - sample) / 2;
            let sampled = &pages[from..from + sample];
            for (place, level) in LEVELS.into_iter().enumerate() {
                let began = Instant::now();
                zstd.set_compression_level(level).ok()?;
                let result = zstd.compress_to_buffer(sampled, &mut self.room[..sample]);
                let made = result.unwrap_or(sample);
                self.learn(place, Outlook::new(sample, made, began.elapsed()));
            }
            self.next_sample = began + SAMPLE_SHARE * began.elapsed();
        }
        let outlooks = self.outlooks?;
        let (bytes, link, backlog) = (pages.len(), pace.cost(), pace.backlog());
        let place = match pace.is_unknown() {
            // The chunk before is still on its way: better than to wait for it.
            true => (pace.is_busy() && outlooks[0].is_gain()).then_some(0),
            false => {
                let until = |place: &usize| outlooks[*place].until_sent(bytes, link, backlog);
                (0..LEVELS.len())
                    .filter(|place| outlooks[*place].pays(bytes, link, backlog))
                    .min_by(|one, other| until(one).total_cmp(&until(other)))
            }
        }?;
        zstd.set_compression_level(LEVELS[place]).ok()?;
        Some(place)
    }

    /// This was seen at a level.
    fn learn(&mut self, place: usize, now: Outlook) {
        // Until each has been seen, one stands for the others.
        let outlooks = self.outlooks.get_or_insert([now; LEVELS.len()]);
        outlooks[place] = outlooks[place].learn(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_common::CHUNK_SIZE as CHUNK;

    /// Seconds a byte, of a rate in MB/s.
    fn at(megabytes: f64) -> f64 {
        1e-6 / megabytes
    }

    #[test]
    fn it_pays_where_the_link_is_waited_for() {
        let (text, random) = (0.3, 1.0);
        for (link, ratio, chunks_waiting, pays) in [
            (at(117.0), text, 1.0, true),
            (at(117.0), 0.8, 1.0, true),
            (at(117.0), random, 1.0, false),
            // The link would stand still meanwhile, and even so.
            (at(117.0), text, 0.0, true),
            (at(117.0), 0.8, 0.0, false),
            // Faster than the compressor.
            (at(2000.0), text, 2.0, false),
            // Not known yet.
            (0.0, text, 1.0, false),
        ] {
            let outlook = Outlook {
                cost: at(500.0),
                ratio,
            };
            let backlog = chunks_waiting * CHUNK as f64 * link;
            let what = format!("{link} {ratio} {chunks_waiting}");
            assert_eq!(outlook.pays(CHUNK, link, backlog), pays, "{what}");
        }
    }

    #[test]
    fn what_has_left_sooner_is_better() {
        let [good, fast] = [(200.0, 0.38), (500.0, 0.55)].map(|(rate, ratio)| Outlook {
            cost: at(rate),
            ratio,
        });
        let link = at(117.0);
        for (chunks_waiting, better) in [(0.0, fast), (0.2, fast), (0.5, good), (2.0, good)] {
            let backlog = chunks_waiting * CHUNK as f64 * link;
            let until = |it: Outlook| it.until_sent(CHUNK, link, backlog);
            let other = if better == fast { good } else { fast };
            assert!(until(better) < until(other), "{chunks_waiting}");
        }
    }

    #[test]
    fn how_fast_a_link_is_shows_by_what_leaves() {
        let pace = Pace::default();
        let leave = |bytes, rate: f64, dry| {
            let took = Duration::from_secs_f64(bytes as f64 * at(rate));
            pace.learn(bytes, took, dry);
        };
        let (chunk, about) = (8 * CHUNK as u64, |rate| pace.cost() / at(rate));
        (0..2).for_each(|_| leave(chunk, 100.0, false));
        assert!((0.8..1.0).contains(&about(100.0)));
        // What the socket takes in no time has not left.
        leave(10_000, 100.0, false);
        // Less to do than it could: that says nothing.
        (0..8).for_each(|_| leave(chunk, 20.0, true));
        let before = about(100.0);
        assert!(before < 1.0, "{before}");
        (0..6).for_each(|_| leave(chunk, 2000.0, true));
        assert!(about(2000.0) < 1.2);
        pace.queue(1_000_000);
        assert!(pace.backlog() > 0.0);
    }

    #[test]
    fn on_a_slow_link_it_comes_to_compress_what_can_be_and_nothing_else() {
        let pool = BufferPool::new(1);
        let text = b"for a slow link, this is small. ".repeat(CHUNK / 32);
        let mut random = vec![0; CHUNK];
        let mut state = 1_u64;
        for word in random.chunks_exact_mut(8) {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        for (pages, smaller) in [(text, true), (random, false)] {
            let mut compressor = Compressor::new(Compression::Auto, &pool).unwrap().unwrap();
            let pace = Pace::default();
            let pages = Bytes::from(pages);
            let (compressed, sent) = compressor.compress(pages.clone(), &pace);
            assert!(!compressed && sent == pages);
            // While the first is on its way, and when it is known how long that took.
            pace.queue(CHUNK);
            let (compressed, _) = compressor.compress(pages.clone(), &pace);
            assert_eq!(compressed, smaller);
            pace.learn(CHUNK as u64, Duration::from_secs(100), false);
            let (compressed, sent) = compressor.compress(pages.clone(), &pace);
            assert_eq!(compressed, smaller);
            assert_eq!(sent.len() < CHUNK, smaller);
        }
    }
}
