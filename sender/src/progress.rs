//! A line that is redrawn on a terminal, and nothing elsewhere: there the log tells of each round.

use std::io::{IsTerminal, Write, stderr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Back to the start of the line, and everything in it gone.
const CLEAR: &str = "\r\x1b[K";

/// How often the line is redrawn.
const INTERVAL: Duration = Duration::from_millis(200);

/// What the sink counts as it goes.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes on the wire, framing and all.
    pub bytes: AtomicU64,
    /// Pages announced, with or without content.
    pub pages: AtomicU64,
}

/// What the line shows beside what the sink counts.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// The round in progress.
    pub round: u32,
    /// `pre-dump` or `final`.
    pub kind: &'static str,
    /// How long the tree was stopped in the last round, ms.
    pub frozen_ms: f64,
    /// Bytes dirtied a second during the last round.
    pub dirty_rate: f64,
}

/// The display. Dropping it ends it and leaves a clean line.
#[derive(Debug)]
pub struct Progress {
    status: Arc<Mutex<Status>>,
    /// Dropped to end the thread.
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Starts the display if standard error is a terminal.
    #[must_use]
    pub fn start(counters: Arc<Counters>) -> Self {
        let status = Arc::new(Mutex::new(Status::default()));
        let (end, ended) = mpsc::channel();
        let thread = stderr().is_terminal().then(|| {
            let status = Arc::clone(&status);
            std::thread::Builder::new()
                .name("progress".into())
                .spawn(move || draw(&status, &counters, &ended))
        });
        Self {
            status,
            end: Some(end),
            // Without a thread there is no display, which hurts nobody.
            thread: thread.and_then(Result::ok),
        }
    }

    /// Changes what is shown.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // It only writes to the terminal; how that went is of no interest.
            let _ = thread.join();
        }
    }
}

fn draw(status: &Mutex<Status>, counters: &Counters, ended: &mpsc::Receiver<()>) {
    const MIB: f64 = (1 << 20) as f64;
    let (mut before, mut at) = (counters.bytes.load(Ordering::Relaxed), Instant::now());
    while ended.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
        let (now, then) = (counters.bytes.load(Ordering::Relaxed), at);
        at = Instant::now();
        let rate = (now - before) as f64 / (at - then).as_secs_f64();
        before = now;
        let status = status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let _ = write!(
            stderr(),
            "{CLEAR}round {} ({}): {} pages, {:.0} MiB sent, {:.0} MiB/s; dirtied {:.1} MiB/s; stopped {:.2} ms",
            status.round,
            status.kind,
            counters.pages.load(Ordering::Relaxed),
            now as f64 / MIB,
            rate / MIB,
            status.dirty_rate / MIB,
            status.frozen_ms,
        );
    }
    let _ = write!(stderr(), "{CLEAR}");
}

/// Standard error for log lines: on a terminal each takes the place of the progress line.
#[derive(Debug, Default)]
pub struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let mut stderr = stderr().lock();
        if stderr.is_terminal() {
            stderr.write_all(CLEAR.as_bytes())?;
        }
        stderr.write_all(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        stderr().flush()
    }
}
