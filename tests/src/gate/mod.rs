//! A gate at a system call: stops an unmodified program of release at the entry or the exit of a chosen call.
//!
//! A thread of the test traces all threads of the program (ptrace), and no child of it: CRIU and the filler are
//! never traced. All threads of a program at a gate wait at their next system call. The kernel detaches
//! everything when the tracing thread ends, so that a released program runs on untraced, and one that was killed
//! is left to its parent.

mod tracer;

use std::cell::Cell;
use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;
use tracer::Tracer;

/// Longest time until a gate is reached. The programs under test act within seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// A group of system calls that do the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Sends a packet on a socket.
    Send,
    /// Receives a packet from a socket.
    Receive,
    /// Writes to a file.
    Write,
    /// Reads from a file.
    Read,
    /// Makes a file or a directory durable.
    Sync,
    /// Renames a file; the path is the new one.
    Rename,
    /// Removes a file.
    Unlink,
    /// Opens a file.
    Open,
    /// Waits for a child, or looks whether it lives.
    Wait,
    /// Sends a signal by a pidfd.
    Signal,
}

/// Whether a call is about to be done, or done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Edge {
    /// The kernel has not begun.
    Entry,
    /// The kernel is done.
    Exit,
}

/// What a call works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Object {
    /// Anything.
    Any,
    /// A path that ends like this.
    Path(&'static str),
    /// CRIU's socket: a socket of packets.
    Criu,
}

/// A system call at which a program is stopped, or that has to come before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Call {
    action: Action,
    edge: Edge,
    object: Object,
    contains: &'static str,
}

impl Call {
    /// The entry of a call.
    #[must_use]
    pub const fn entry(action: Action, object: Object) -> Self {
        let (edge, contains) = (Edge::Entry, "");
        Self {
            action,
            edge,
            object,
            contains,
        }
    }

    /// The exit of a call that succeeded.
    #[must_use]
    pub const fn exit(action: Action, object: Object) -> Self {
        let (edge, contains) = (Edge::Exit, "");
        Self {
            action,
            edge,
            object,
            contains,
        }
    }

    /// Only if its buffer contains this text.
    #[must_use]
    pub const fn with(self, contains: &'static str) -> Self {
        Self { contains, ..self }
    }
}

/// A call that the traced program is in.
#[derive(Debug)]
pub struct Seen<'a> {
    /// What it does.
    pub action: Action,
    /// Whether it is done.
    pub edge: Edge,
    /// Path that it works on, as the program sees it; `socket:[INODE]` for a socket.
    pub path: PathBuf,
    pid: i32,
    bytes: Vec<u8>,
    packets: &'a mut HashMap<PathBuf, bool>,
}

impl Seen<'_> {
    fn is(&mut self, call: &Call) -> bool {
        self.action == call.action
            && self.edge == call.edge
            && match call.object {
                Object::Any => true,
                Object::Path(end) => self.path.to_string_lossy().ends_with(end),
                Object::Criu => self.is_packet_socket(),
            }
            && contains(&self.bytes, call.contains)
    }

    fn is_packet_socket(&mut self) -> bool {
        let pid = self.pid;
        let find = |path: &PathBuf| {
            let inode = path.to_string_lossy();
            let inode = inode
                .strip_prefix("socket:[")
                .and_then(|it| it.strip_suffix(']'));
            let sockets = fs::read_to_string(format!("/proc/{pid}/net/unix"));
            let sockets = sockets.unwrap_or_default();
            // Num RefCount Protocol Flags Type State Inode Path
            sockets.lines().any(|line| {
                let mut fields = line.split_ascii_whitespace().skip(4);
                fields.next() == Some("0005") && fields.nth(1) == inode
            })
        };
        let path = &self.path;
        *self
            .packets
            .entry(path.clone())
            .or_insert_with(|| find(path))
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    text.is_empty()
        || bytes
            .windows(text.len())
            .any(|part| part == text.as_bytes())
}

/// Sees every call of the traced program. Calls of different threads come one after another.
pub type Observer = Box<dyn FnMut(&Seen<'_>) + Send>;

/// What the test wants next.
enum Order {
    /// Runs on to the last of these calls, in this order.
    RunTo(Vec<Call>),
}

/// A traced program. Dropping it releases the program.
#[derive(Debug)]
pub struct Gate {
    orders: Option<mpsc::Sender<Order>>,
    reached: mpsc::Receiver<()>,
    tracer: Option<std::thread::JoinHandle<()>>,
    /// The program is at its gate, or has ended: the tracer ends at once.
    waits: Cell<bool>,
}

impl Gate {
    /// Traces a program until it has done these calls, in this order. It stops at the last. Returns when it is
    /// traced.
    ///
    /// # Panics
    /// If it cannot be traced.
    #[must_use]
    pub fn attach(pid: i32, calls: &[Call]) -> Self {
        Self::observe(pid, calls, None)
    }

    /// Does the same, and shows all calls to an observer.
    ///
    /// # Panics
    /// As [`Gate::attach`].
    #[must_use]
    pub fn observe(pid: i32, calls: &[Call], observer: Option<Observer>) -> Self {
        Self::start(pid, calls, observer).expect("the program can be traced")
    }

    /// Does the same as [`Gate::attach`]; `None` if the program has exited.
    #[must_use]
    pub fn try_attach(pid: i32, calls: &[Call]) -> Option<Self> {
        Self::start(pid, calls, None)
    }

    fn start(pid: i32, calls: &[Call], observer: Option<Observer>) -> Option<Self> {
        let (order_tx, order_rx) = mpsc::channel();
        let (reached_tx, reached_rx) = mpsc::channel();
        let (ready_tx, ready_rx) = mpsc::channel();
        let calls = calls.to_vec();
        let tracer = std::thread::Builder::new()
            .name("gate".into())
            .spawn(move || {
                let Some(mut tracer) = Tracer::seize(pid, observer) else {
                    return;
                };
                ready_tx.send(()).expect("the test waits for it");
                let mut next = Some(calls);
                while let Some(calls) = next.take() {
                    if !tracer.run_to(&calls) || reached_tx.send(()).is_err() {
                        return;
                    }
                    if let Ok(Order::RunTo(calls)) = order_rx.recv() {
                        next = Some(calls);
                        tracer.resume();
                    }
                }
            });
        let gate = Self {
            orders: Some(order_tx),
            reached: reached_rx,
            tracer: Some(tracer.expect("there are threads")),
            waits: Cell::new(false),
        };
        ready_rx.recv().is_ok().then_some(gate)
    }

    /// Waits until the program has reached the gate.
    ///
    /// # Panics
    /// If it ends before that, or does not get there.
    pub fn await_reached(&self) {
        assert!(self.is_reached(), "the program ended before its gate");
    }

    /// Waits until the program has reached the gate. Returns `false` if it ended before that.
    ///
    /// # Panics
    /// If it does neither.
    #[must_use]
    pub fn is_reached(&self) -> bool {
        let reached = self.is_reached_within(PATIENCE);
        assert!(self.waits.get(), "the program does not reach its gate");
        reached
    }

    /// Waits for this time at most. Returns `false` if the program does not reach its gate by then, or has ended.
    #[must_use]
    pub fn is_reached_within(&self, time: Duration) -> bool {
        let reached = self.reached.recv_timeout(time);
        self.waits
            .set(reached != Err(mpsc::RecvTimeoutError::Timeout));
        reached.is_ok()
    }

    /// Lets a program at its gate run on to the next.
    ///
    /// # Panics
    /// If the program is not at a gate.
    pub fn run_to(&self, calls: &[Call]) {
        self.waits.set(false);
        let orders = self.orders.as_ref().expect("it is not released");
        let sent = orders.send(Order::RunTo(calls.to_vec()));
        sent.expect("the program is at its gate");
    }

    /// Lets the program run on untraced: at once if it is at its gate, else from the gate on.
    pub fn release(self) {
        drop(self);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        drop(self.orders.take());
        if let Some(tracer) = self.tracer.take()
            && self.waits.get()
        {
            let _ = tracer.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::Program;
    use std::process::Command;

    const WRITES: Call = Call::entry(Action::Write, Object::Path("/out")).with("two");

    fn program(script: &str, dir: &tempfile::TempDir) -> Program {
        let mut sh = Command::new("sh");
        sh.args(["-c", &format!("while ! test -e go; do :; done; {script}")]);
        Program::start(sh.current_dir(dir.path()))
    }

    #[test]
    fn program_waits_at_its_gate_and_runs_on_untraced() {
        let dir = tempfile::tempdir().unwrap();
        let sh = program("echo one > out; echo two > out; exit 7", &dir);
        let gate = Gate::attach(sh.pid(), &[WRITES]);
        fs::write(dir.path().join("go"), "").unwrap();
        gate.await_reached();
        // Truncated, and not written yet.
        let out = || fs::read_to_string(dir.path().join("out")).unwrap();
        assert_eq!(out(), "");
        gate.run_to(&[Call::exit(Action::Write, Object::Path("/out"))]);
        gate.await_reached();
        assert_eq!(out(), "two\n");
        gate.release();
        assert_eq!(sh.finish().status.code(), Some(7));
    }

    #[test]
    fn program_that_is_killed_at_its_gate_is_left_to_its_parent() {
        let dir = tempfile::tempdir().unwrap();
        let mut sh = program("echo one > out; echo two > out", &dir);
        let gate = Gate::attach(sh.pid(), &[WRITES]);
        fs::write(dir.path().join("go"), "").unwrap();
        gate.await_reached();
        sh.kill();
        gate.release();
        assert_eq!(sh.finish().status.code(), None);
        assert_eq!(fs::read_to_string(dir.path().join("out")).unwrap(), "");
    }

    #[test]
    fn program_that_ends_before_its_gate_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let sh = program("exit 3", &dir);
        let gate = Gate::attach(sh.pid(), &[WRITES]);
        fs::write(dir.path().join("go"), "").unwrap();
        assert!(!gate.is_reached());
        gate.release();
        assert_eq!(sh.finish().status.code(), Some(3));
    }
}
