//! A TCP proxy that pauses a connection at a chosen frame of the protocol, and then forwards, repeats, delays or
//! drops the frame. It can cut all connections at any time.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, mpsc};

/// A step of a migration: its name, the kind of its frame in the protocol, whether the receiver sends it, and
/// the first round in which a frame of this kind counts.
pub type Step = (&'static str, u8, bool, u32);

/// A proxy that forwards frames until the chosen step. It then reports the step, waits for a decision, and
/// either continues or cuts the connection. Later connections are forwarded without a pause.
#[derive(Debug)]
pub struct Link {
    /// Address that accepts connections.
    pub address: SocketAddr,
    reached: mpsc::Receiver<()>,
    decision: mpsc::Sender<Decision>,
    open: Arc<AtomicBool>,
    ends: Arc<Mutex<Vec<TcpStream>>>,
}

/// What happens to the connection at the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    Forward,
    Repeat,
    Cut,
}

type Watch = (mpsc::Sender<()>, mpsc::Receiver<Decision>);

impl Link {
    /// Starts a proxy to this receiver. It pauses before the frame is forwarded, or `after` that.
    ///
    /// # Panics
    /// If no port is free.
    #[must_use]
    pub fn start(receiver: SocketAddr, step: Step, after: bool) -> Self {
        Self::run(receiver, Some((step, after)))
    }

    /// Starts a proxy that pauses at no frame.
    ///
    /// # Panics
    /// If no port is free.
    #[must_use]
    pub fn plain(receiver: SocketAddr) -> Self {
        Self::run(receiver, None)
    }

    fn run(receiver: SocketAddr, pause: Option<(Step, bool)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it listens");
        let (reach, reached) = mpsc::channel();
        let (decision, decisions) = mpsc::channel();
        let open = Arc::new(AtomicBool::new(true));
        let ends = Arc::new(Mutex::new(Vec::new()));
        let (is_open, all) = (Arc::clone(&open), Arc::clone(&ends));
        std::thread::spawn(move || {
            let mut watch = pause.map(|_| (reach, decisions));
            for sender in listener.incoming().flatten() {
                if !is_open.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(receiver) = TcpStream::connect(receiver) else {
                    continue;
                };
                lock(&all).extend([clone(&sender), clone(&receiver)]);
                connect(&sender, &receiver, pause, &mut watch);
            }
        });
        Self {
            address,
            reached,
            decision,
            open,
            ends,
        }
    }

    /// Waits until the step is reached.
    ///
    /// # Panics
    /// If the connection ends before that.
    pub fn await_step(&self) {
        let reached = self.reached.recv();
        reached.expect("the connection reaches the step before it ends");
    }

    /// Waits until the step is reached; returns `false` if the connection ends before that.
    #[must_use]
    pub fn reaches_step(&self) -> bool {
        self.reached.recv().is_ok()
    }

    /// Continues the paused connection.
    ///
    /// # Panics
    /// If it has ended.
    pub fn forward(&self) {
        self.decide(Decision::Forward);
    }

    /// Continues the paused connection, and forwards the frame twice.
    ///
    /// # Panics
    /// If it has ended.
    pub fn repeat(&self) {
        self.decide(Decision::Repeat);
    }

    /// Cuts the paused connection.
    ///
    /// # Panics
    /// If it has ended.
    pub fn cut(&self) {
        self.decide(Decision::Cut);
    }

    fn decide(&self, decision: Decision) {
        let decided = self.decision.send(decision);
        decided.expect("the connection is paused");
    }

    /// Cuts all connections.
    pub fn sever(&self) {
        for end in lock(&self.ends).drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Refuses later connections.
    pub fn close(&self) {
        self.open.store(false, Ordering::SeqCst);
    }

    /// Accepts later connections again.
    pub fn reopen(&self) {
        self.open.store(true, Ordering::SeqCst);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn clone(end: &TcpStream) -> TcpStream {
    end.try_clone().expect("there are descriptors")
}

/// Forwards a connection in both directions, each on a thread of its own.
fn connect(
    sender: &TcpStream,
    receiver: &TcpStream,
    pause: Option<(Step, bool)>,
    watch: &mut Option<Watch>,
) {
    let current = Arc::new(AtomicU32::new(0));
    let gate = Arc::new(RwLock::new(()));
    for (from, to, is_receiver) in [(sender, receiver, false), (receiver, sender, true)] {
        let (from, to) = (clone(from), clone(to));
        let watch = pause
            .filter(|((_, _, from_receiver, _), _)| *from_receiver == is_receiver)
            .and_then(|(step, after)| Some((step, after, watch.take()?)));
        let (current, gate) = (Arc::clone(&current), Arc::clone(&gate));
        std::thread::spawn(move || {
            let _ = pass(&from, &to, watch, &current, &gate);
            for end in [from, to] {
                let _ = end.shutdown(Shutdown::Both);
            }
        });
    }
}

/// Forwards frames in one direction; pauses at the watched one.
fn pass(
    mut from: &TcpStream,
    mut to: &TcpStream,
    mut watch: Option<(Step, bool, Watch)>,
    current: &AtomicU32,
    gate: &RwLock<()>,
) -> io::Result<()> {
    loop {
        let mut frame = vec![0; 32];
        from.read_exact(&mut frame)?;
        let number = |frame: &[u8], at| {
            u32::from_le_bytes(frame[at..at + 4].try_into().expect("four bytes"))
        };
        let rest = number(&frame, 8) + number(&frame, 12);
        frame.resize(32 + rest as usize, 0);
        from.read_exact(&mut frame[32..])?;
        // RoundBegin carries the number of the round; later frames of either direction belong to it.
        if frame[4] == 3 {
            current.store(number(&frame, 32), Ordering::SeqCst);
        }
        let now = current.load(Ordering::SeqCst);
        let here = |((_, kind, _, round), _, _): &mut (Step, bool, Watch)| {
            frame[4] == *kind && now >= *round
        };
        let Some((_, after, (reach, decisions))) = watch.take_if(here) else {
            let _open = gate.read();
            to.write_all(&frame)?;
            continue;
        };
        // The other direction pauses as well until the decision.
        let _closed = gate.write();
        if after {
            to.write_all(&frame)?;
        }
        reach.send(()).map_err(io::Error::other)?;
        match decisions.recv() {
            Ok(Decision::Forward) if after => {}
            Ok(Decision::Forward) => to.write_all(&frame)?,
            Ok(Decision::Repeat) => {
                if !after {
                    to.write_all(&frame)?;
                }
                to.write_all(&frame)?;
            }
            Ok(Decision::Cut) | Err(_) => {
                to.shutdown(Shutdown::Both)?;
                return from.shutdown(Shutdown::Both);
            }
        }
    }
}
