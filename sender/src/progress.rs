//! A progress line on a terminal. Elsewhere there is none: the log has a line for each round.

use std::io::{IsTerminal, Write, stderr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Escape sequence that returns to the start of the line and clears it.
const CLEAR: &str = "\r\x1b[K";

/// Time between two updates of the line.
const REDRAW_INTERVAL: Duration = Duration::from_millis(200);

/// Counters that the sink updates while it sends.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes on the wire, framing included.
    pub bytes: AtomicU64,
    /// Number of pages announced in the round, with or without content.
    pub pages: AtomicU64,
}

/// Content of the line besides the counters.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// Number of the round in progress.
    pub round: u32,
    /// Kind of the round in progress: `pre-dump` or `final`.
    pub kind: &'static str,
    /// Time for which the target was frozen in the last round, ms.
    pub frozen_ms: f64,
    /// Bytes dirtied per second during the last round.
    pub dirty_rate: f64,
}

/// The progress line. Dropping it stops the updates and clears the line.
#[derive(Debug)]
pub struct Progress {
    status: Arc<Mutex<Status>>,
    /// Dropped to stop the thread.
    stop_tx: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Starts the updates if standard error is a terminal.
    #[must_use]
    pub fn start(counters: Arc<Counters>) -> Self {
        let status = Arc::new(Mutex::new(Status::default()));
        let (stop_tx, stop_rx) = mpsc::channel();
        let thread = stderr().is_terminal().then(|| {
            let status = Arc::clone(&status);
            std::thread::Builder::new()
                .name("progress".into())
                .spawn(move || draw(&status, &counters, &stop_rx))
        });
        Self {
            status,
            stop_tx: Some(stop_tx),
            // The line is optional: without a thread there is none.
            thread: thread.and_then(Result::ok),
        }
    }

    /// Changes what the line shows.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop_tx = None;
        if let Some(thread) = self.thread.take() {
            // The thread only writes to the terminal; a failure there does not matter.
            let _ = thread.join();
        }
    }
}

fn draw(status: &Mutex<Status>, counters: &Counters, stop_rx: &mpsc::Receiver<()>) {
    const MIB: f64 = (1 << 20) as f64;
    let (mut before, mut at) = (counters.bytes.load(Ordering::Relaxed), Instant::now());
    while stop_rx.recv_timeout(REDRAW_INTERVAL) == Err(RecvTimeoutError::Timeout) {
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
            "{CLEAR}round {} ({}): {} pages, {:.0} MiB sent, {:.0} MiB/s; dirtied {:.1} MiB/s; frozen {:.2} ms",
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

/// Standard error for log lines. On a terminal, a log line replaces the progress line, which is redrawn below.
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
