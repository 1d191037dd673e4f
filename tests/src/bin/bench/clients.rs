//! Measures what the clients of a service observe: the time and the latency of each answer.

use pageferry_tests::daemon::Daemon;
use pageferry_tests::servers::{Postgres, Redis};
use std::io::{BufRead, BufReader, Write};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// An answered request: its time, in seconds since 1970, and its latency, in seconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answer {
    /// Time of the answer.
    pub at: f64,
    /// Time since the request was due.
    pub took: f64,
}

/// Returns the current time, comparable with [`Answer::at`].
pub(crate) fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("it is after 1970").as_secs_f64()
}

/// A service under steady load.
pub(crate) trait Loaded {
    /// Returns the root of its tree.
    fn pid(&self) -> i32;

    /// Returns all requests answered so far.
    fn answers(&self) -> Vec<Answer>;
}

/// A redis, and a client that sets 1,000 bytes at a time.
pub(crate) struct LoadedRedis {
    server: Redis,
    answers: Arc<Mutex<Vec<Answer>>>,
    stop: Arc<AtomicBool>,
    client: Option<JoinHandle<()>>,
}

/// Requests a second.
const RATE: f64 = 5000.0;

/// Bytes of a value.
const VALUE: u32 = 1000;

impl LoadedRedis {
    /// Starts it with this many MiB of keys.
    pub(crate) fn start(mib: u32) -> Self {
        let server = Redis::start();
        let keys = mib * 1024 * 1024 / VALUE;
        let (count, size) = (keys.to_string(), VALUE.to_string());
        server
            .cli(&["debug", "populate", &count, "key", &size])
            .expect("redis can be filled");
        let mut stream = server.connect();
        let answers: Arc<Mutex<Vec<Answer>>> = Arc::default();
        let stop: Arc<AtomicBool> = Arc::default();
        let (collected, stopped) = (Arc::clone(&answers), Arc::clone(&stop));
        let client = thread::spawn(move || {
            let mut lines = BufReader::new(stream.try_clone().expect("it is a socket"));
            let value = "x".repeat(VALUE as usize);
            let (began, epoch) = (Instant::now(), now());
            let mut state = 1_u64;
            for number in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                // A request is due whether or not the previous one is answered.
                let due = f64::from(number) / RATE;
                let early = due - began.elapsed().as_secs_f64();
                if early > 0.0 {
                    thread::sleep(Duration::from_secs_f64(early));
                }
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let key = format!("key:{}", (state >> 33) % u64::from(keys));
                let request = format!(
                    "*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${VALUE}\r\n{value}\r\n",
                    key.len()
                );
                stream
                    .write_all(request.as_bytes())
                    .expect("redis takes it");
                let mut answer = String::new();
                lines.read_line(&mut answer).expect("redis answers");
                assert_eq!(answer, "+OK\r\n");
                let at = began.elapsed().as_secs_f64();
                let answer = Answer {
                    at: epoch + at,
                    took: at - due,
                };
                collected.lock().expect("no holder panics").push(answer);
            }
        });
        Self {
            server,
            answers,
            stop,
            client: Some(client),
        }
    }
}

impl Loaded for LoadedRedis {
    fn pid(&self) -> i32 {
        self.server.pid()
    }

    fn answers(&self) -> Vec<Answer> {
        self.answers.lock().expect("no holder panics").clone()
    }
}

impl Drop for LoadedRedis {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let client = self.client.take().map(JoinHandle::join);
        drop(client);
    }
}

/// A PostgreSQL with pgbench.
pub(crate) struct LoadedPostgres {
    server: Postgres,
    _client: Daemon,
}

/// Transactions a second.
const TRANSACTIONS: u32 = 300;

impl LoadedPostgres {
    /// Starts it with this many MiB of filled shared buffers.
    pub(crate) fn start(mib: u32) -> Self {
        let server = Postgres::start_full(&Command::new("env"), "", mib);
        let client = server.steady_load(TRANSACTIONS);
        Self {
            server,
            _client: client,
        }
    }
}

impl Loaded for LoadedPostgres {
    fn pid(&self) -> i32 {
        self.server.pid()
    }

    fn answers(&self) -> Vec<Answer> {
        // Client, transaction, its latency in µs, script, seconds and µs of its time, lag.
        let answer = |line: &str| {
            let fields: Vec<f64> = line.split(' ').filter_map(|it| it.parse().ok()).collect();
            match fields[..] {
                [_, _, took, _, seconds, micros, ..] => Some(Answer {
                    at: seconds + micros / 1e6,
                    took: took / 1e6,
                }),
                _ => None,
            }
        };
        let mut answers: Vec<_> = self.server.load_log().lines().filter_map(answer).collect();
        answers.sort_by(|one, other| one.at.total_cmp(&other.at));
        answers
    }
}
