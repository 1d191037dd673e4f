//! A link that is cut at a certain step of the conversation.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, RwLock, mpsc};

/// A step of a migration: its name, the number of its frame in the protocol, whether the receiver says it,
/// and the round from which on the first such frame is meant.
pub type Step = (&'static str, u8, bool, u32);

/// A link that passes frames on, until that step of the connection; then it says so, waits until it
/// may go on, and is cut if it is to be. Later connections pass freely.
#[derive(Debug)]
pub struct Link {
    /// Where it takes connections.
    pub address: SocketAddr,
    /// Says that the step is reached.
    pub reached: mpsc::Receiver<()>,
    /// Whether it goes on then; it is cut otherwise.
    pub go_on: mpsc::Sender<bool>,
    /// Whether later connections are let through.
    pub open: Arc<AtomicBool>,
}

impl Link {
    /// To that receiver; the step is before or `after` the frame has passed.
    ///
    /// # Panics
    /// If there is no port for it.
    #[must_use]
    pub fn to(receiver: SocketAddr, step: Step, after: bool) -> Self {
        let (_, kind, from_receiver, round) = step;
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it listens");
        let (reach, reached) = mpsc::channel();
        let (go_on, may_go_on) = mpsc::channel();
        let open = Arc::new(AtomicBool::new(true));
        let is_open = Arc::clone(&open);
        std::thread::spawn(move || {
            let mut watch = Some((reach, may_go_on));
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
            go_on,
            open,
        }
    }
}

type Watch = (mpsc::Sender<()>, mpsc::Receiver<bool>);

/// Passes frames on; at the one watched for, as above.
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
        // A round's beginning says which it is; what the other side says of it comes later.
        if frame[4] == 3 {
            current.store(number(&frame, 32), Ordering::SeqCst);
        }
        let here = frame[4] == kind && current.load(Ordering::SeqCst) >= round;
        let Some((reach, may_go_on)) = watch.take_if(|_| here) else {
            let _open = gate.read();
            to.write_all(&frame)?;
            continue;
        };
        // Nothing passes in the other direction either, until it is known how it goes on.
        let _closed = gate.write();
        if after {
            to.write_all(&frame)?;
        }
        reach.send(()).map_err(io::Error::other)?;
        match may_go_on.recv() {
            Ok(true) if !after => to.write_all(&frame)?,
            Ok(true) => {}
            Ok(false) | Err(_) => {
                to.shutdown(Shutdown::Both)?;
                return from.shutdown(Shutdown::Both);
            }
        }
    }
}
