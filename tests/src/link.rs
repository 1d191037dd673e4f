//! A TCP proxy that pauses or cuts a connection at a chosen frame of the protocol.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, RwLock, mpsc};

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
}

/// What happens to the connection at the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    Forward,
    Cut,
}

impl Link {
    /// Starts a proxy to this receiver. It pauses before the frame is forwarded, or `after` that.
    ///
    /// # Panics
    /// If no port is free.
    #[must_use]
    pub fn start(receiver: SocketAddr, step: Step, after: bool) -> Self {
        let (_, kind, from_receiver, round) = step;
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it listens");
        let (reach, reached) = mpsc::channel();
        let (decision, decisions) = mpsc::channel();
        let open = Arc::new(AtomicBool::new(true));
        let is_open = Arc::clone(&open);
        std::thread::spawn(move || {
            let mut watch = Some((reach, decisions));
            let current = Arc::new(AtomicU32::new(0));
            let gate = Arc::new(RwLock::new(()));
            for sender in listener.incoming().flatten() {
                if !is_open.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(receiver) = TcpStream::connect(receiver) else {
                    continue;
                };
                let directions = [(&sender, &receiver, false), (&receiver, &sender, true)];
                for (from, to, is_receiver) in directions {
                    let clone = |end: &TcpStream| end.try_clone().expect("there are descriptors");
                    let (from, to) = (clone(from), clone(to));
                    let watch = match is_receiver == from_receiver {
                        true => watch.take(),
                        false => None,
                    };
                    let (current, gate) = (Arc::clone(&current), Arc::clone(&gate));
                    std::thread::spawn(move || {
                        let _ = pass(&from, &to, (kind, round), after, watch, &current, &gate);
                        for end in [from, to] {
                            let _ = end.shutdown(Shutdown::Both);
                        }
                    });
                }
            }
        });
        Self {
            address,
            reached,
            decision,
            open,
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

    /// Continues the paused connection.
    ///
    /// # Panics
    /// If it has ended.
    pub fn forward(&self) {
        self.decide(Decision::Forward);
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

    /// Refuses later connections.
    pub fn close(&self) {
        self.open.store(false, Ordering::SeqCst);
    }

    /// Accepts later connections again.
    pub fn reopen(&self) {
        self.open.store(true, Ordering::SeqCst);
    }
}

type Watch = (mpsc::Sender<()>, mpsc::Receiver<Decision>);

/// Forwards frames in one direction; pauses at the watched one.
fn pass(
    mut from: &TcpStream,
    mut to: &TcpStream,
    (kind, round): (u8, u32),
    after: bool,
    mut watch: Option<Watch>,
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
        let here = frame[4] == kind && current.load(Ordering::SeqCst) >= round;
        let Some((reach, decisions)) = watch.take_if(|_| here) else {
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
            Ok(Decision::Forward) if !after => to.write_all(&frame)?,
            Ok(Decision::Forward) => {}
            Ok(Decision::Cut) | Err(_) => {
                to.shutdown(Shutdown::Both)?;
                return from.shutdown(Shutdown::Both);
            }
        }
    }
}
