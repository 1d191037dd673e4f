//! The freezer process: the one tracer, single-threaded, told what to do over a socket.

use super::procs::{self, TreeError};
use super::{FrozenProcess, MESSAGE_MAX, Reply, Request, Then, inject};
use crate::sys::pidfd;
use crate::sys::ptrace::{self, Stop, Tid};
use crate::sys::sched::RealtimePriority;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pageferry_common::proc::process::{children, threads};
use pageferry_common::sys::fdpass;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// How long a thread may take to stop (a system call on a dead NFS server never does).
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// How long a thread that does not stop is left alone before we ask whether it waits for a vfork
/// child, and how often we ask again: such a wait ends without a signal to us.
const VFORK_GRACE: Duration = Duration::from_millis(3);

/// How long the death of what was killed is waited for (a thread may be in the middle of I/O).
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// Runs the freezer on the socket that is its standard input, until the peer is gone. On return
/// everything that was stopped runs.
///
/// # Errors
/// The kernel's, from the socket; the process then ends, and the kernel detaches what is traced.
pub fn serve() -> io::Result<()> {
    // Ctrl-C and a terminal's hangup go to the whole process group; only the sender decides.
    let _ = nix::unistd::setsid();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        crate::sys::signals::ignore(signal)?;
    }
    // Ignored, as some parent may have left it, it would not tell of stops.
    crate::sys::signals::reset(Signal::SIGCHLD)?;
    let _urgent = RealtimePriority::raise();
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    children.thread_block()?;
    let stdin = io::stdin();
    let mut freezer = Freezer {
        socket: stdin.as_fd(),
        signals: SignalFd::with_flags(&children, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?,
        threads: BTreeMap::new(),
        settled: BTreeSet::new(),
        since: Instant::now(),
    };
    let served = freezer.run();
    freezer.let_go(Then::Run);
    served
}

/// A thread we trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Told to stop.
    Stopping,
    /// Stopped.
    Stopped,
    /// In the kernel, waiting for its vfork child: it runs no instruction until that runs, but
    /// does not count as stopped for ptrace.
    InVfork,
    /// Was in a vfork, or dying, when the tree was let go: to be detached as soon as it stops, or
    /// reaped.
    Leaving,
}

struct Thread {
    pid: i32,
    state: State,
    /// Its stop is that of a stop signal: it lasts when we let it go.
    in_group_stop: bool,
}

struct Freezer<'a> {
    socket: BorrowedFd<'a>,
    signals: SignalFd,
    threads: BTreeMap<Tid, Thread>,
    /// Processes that have their SIGSTOP from us.
    settled: BTreeSet<i32>,
    since: Instant,
}

impl Freezer<'_> {
    fn run(&mut self) -> io::Result<()> {
        let mut buffer = [0; MESSAGE_MAX];
        loop {
            self.release_leaving()?;
            self.wait_for_events(None)?;
            if !self.readable(PollTimeout::ZERO)? {
                continue;
            }
            let Some((len, _)) = fdpass::receive(self.socket, &mut buffer)? else {
                return Ok(());
            };
            match serde_json::from_slice(&buffer[..len])? {
                Request::Freeze { root } => match self.freeze(root) {
                    Ok(processes) => {
                        for process in processes {
                            self.reply(&Reply::Process(process), None)?;
                        }
                        self.reply(&Reply::Frozen, None)?;
                    }
                    Err(why) => self.give_up(why)?,
                },
                Request::Sigstop => match self.sigstop() {
                    Ok(()) => self.reply(&Reply::Sigstopped, None)?,
                    Err(why) => self.give_up(why)?,
                },
                Request::Userfaultfd { pid } => match self.userfaultfd(pid) {
                    Ok(fd) => self.reply(&Reply::Userfaultfd, Some(fd.as_fd()))?,
                    Err(why) => self.reply(&Reply::NoUserfaultfd(why.to_string()), None)?,
                },
                Request::Thaw { then } => {
                    self.let_go(then);
                    let stopped_ns = self.since.elapsed().as_nanos() as u64;
                    self.reply(&Reply::Thawed { stopped_ns }, None)?;
                }
            }
        }
    }

    fn give_up(&mut self, why: TreeError) -> io::Result<()> {
        self.let_go(Then::Run);
        self.reply(&Reply::Failed(why), None)
    }

    fn reply(&self, reply: &Reply, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bytes = serde_json::to_vec(reply).expect("replies have string keys only");
        fdpass::send(self.socket, &bytes, fd)
    }

    /// Stops the tree: lists and seizes until a pass over the wholly stopped tree finds nothing
    /// new. What is stopped makes no threads or children, so such a pass is the last.
    fn freeze(&mut self, root: i32) -> Result<Vec<FrozenProcess>, TreeError> {
        self.since = Instant::now();
        for (&tid, thread) in &mut self.threads {
            // Left over in a vfork from the time before: its stop is still asked for.
            debug_assert_eq!(thread.state, State::Leaving, "thread {tid}");
            thread.state = State::Stopping;
        }
        let deadline = self.since + STOP_DEADLINE;
        let mut pids = loop {
            let (pids, news) = self.seize_new(root)?;
            self.wait_for_stops(deadline)?;
            if !news {
                break pids;
            }
        };
        for pid in self.vfork_children() {
            pids.retain(|&other| other != pid);
        }
        let live = pids.iter().filter_map(|&pid| {
            // One thread in a vfork and no other: it has no stop, but its memory stands still.
            let tid = self
                .stopped_thread_of(pid)
                .or_else(|| self.thread_in_vfork_of(pid))?;
            Some(FrozenProcess { pid, tid })
        });
        let live: Vec<FrozenProcess> = live.collect();
        match live.first() {
            Some(first) if first.pid == root => Ok(live),
            _ => Err(TreeError::NoProcess(root)),
        }
    }

    /// One pass over the tree. Returns its processes, the root first, and whether any thread was
    /// new.
    fn seize_new(&mut self, root: i32) -> Result<(Vec<i32>, bool), TreeError> {
        let ours = [nix::unistd::getpid(), nix::unistd::getppid()].map(nix::unistd::Pid::as_raw);
        let (mut pids, mut news) = (vec![root], false);
        let mut next = 0;
        while let Some(&pid) = pids.get(next) {
            next += 1;
            if ours.contains(&pid) {
                return Err(TreeError::OwnTree(root));
            }
            for tid in threads(pid) {
                if !self.threads.contains_key(&tid) {
                    news |= self.seize(pid, tid)?;
                }
                pids.extend(children(pid, tid));
            }
        }
        if next == 1 && threads(root).is_empty() {
            return Err(TreeError::NoProcess(root));
        }
        Ok((pids, news))
    }

    /// Whether there was a thread to seize.
    fn seize(&mut self, pid: i32, tid: Tid) -> Result<bool, TreeError> {
        match ptrace::seize(tid).and_then(|()| ptrace::interrupt(tid)) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return procs::why_not_traceable(pid, tid).map_or(Ok(false), Err);
            }
            Err(error) => return Err(TreeError::io(pid, &error)),
        }
        let thread = Thread {
            pid,
            state: State::Stopping,
            in_group_stop: false,
        };
        self.threads.insert(tid, thread);
        Ok(true)
    }

    fn wait_for_stops(&mut self, deadline: Instant) -> Result<(), TreeError> {
        let mut ask_for_vfork = Instant::now() + VFORK_GRACE;
        loop {
            let root = self.threads.values().next().map_or(0, |thread| thread.pid);
            self.collect_stops()
                .map_err(|error| TreeError::io(root, &error))?;
            let now = Instant::now();
            if now >= ask_for_vfork {
                ask_for_vfork = now + VFORK_GRACE;
                for (&tid, thread) in &mut self.threads {
                    if thread.state == State::Stopping && procs::waits_for_vfork(thread.pid, tid) {
                        thread.state = State::InVfork;
                    }
                }
            }
            let running = |(_, t): &(&Tid, &Thread)| t.state == State::Stopping;
            let Some((&tid, thread)) = self.threads.iter().find(running) else {
                return Ok(());
            };
            if now >= deadline {
                let pid = thread.pid;
                return Err(TreeError::Stuck { pid, tid });
            }
            self.wait_for_events(Some(ask_for_vfork.saturating_duration_since(now)))
                .map_err(|error| TreeError::io(root, &error))?;
        }
    }

    /// Takes note of every stop there is by now.
    fn collect_stops(&mut self) -> io::Result<()> {
        let mut gone = Vec::new();
        for (&tid, thread) in &mut self.threads {
            while thread.state != State::Stopped {
                match ptrace::poll(tid)? {
                    None => break,
                    Some(stop @ (Stop::Event | Stop::Group)) => {
                        thread.state = State::Stopped;
                        thread.in_group_stop = stop == Stop::Group;
                    }
                    // A signal on its way got ahead of our stop: deliver it, then stop. Asked for
                    // again, for any stop uses up the asking.
                    Some(Stop::Signal(signal)) => ignore_gone(
                        ptrace::interrupt(tid).and_then(|()| ptrace::resume(tid, signal)),
                    )?,
                    Some(Stop::Syscall) => {
                        ignore_gone(ptrace::interrupt(tid).and_then(|()| ptrace::resume(tid, 0)))?
                    }
                    Some(Stop::Gone) => {
                        gone.push(tid);
                        break;
                    }
                }
            }
        }
        for tid in gone {
            self.threads.remove(&tid);
        }
        Ok(())
    }

    /// Gives every process its SIGSTOP while we still hold its threads, so that none executes an
    /// instruction more: each thread gets one of its own, and goes from our stop into that.
    fn sigstop(&mut self) -> Result<(), TreeError> {
        let mut going = Vec::new();
        for (&tid, thread) in &self.threads {
            if thread.state == State::Stopped && !thread.in_group_stop {
                procs::check_signal_permission(thread.pid)?;
                self.settled.insert(thread.pid);
                going.push(tid);
            }
        }
        for &tid in &going {
            let thread = self.threads.get_mut(&tid).expect("it was just listed");
            let pid = thread.pid;
            let sent = ptrace::signal_thread(pid, tid, libc::SIGSTOP)
                .and_then(|()| ptrace::resume(tid, 0));
            ignore_gone(sent).map_err(|error| TreeError::io(pid, &error))?;
            thread.state = State::Stopping;
        }
        let deadline = Instant::now() + STOP_DEADLINE;
        loop {
            self.wait_for_stops(deadline)?;
            // A stop for us alone (that another thread began its group stop) is not the one meant.
            let early = going.iter().copied().find(|tid| {
                let thread = self.threads.get(tid);
                thread.is_some_and(|t| t.state == State::Stopped && !t.in_group_stop)
            });
            let Some(tid) = early else {
                return Ok(());
            };
            let thread = self.threads.get_mut(&tid).expect("it was just found");
            let pid = thread.pid;
            ignore_gone(ptrace::resume(tid, 0)).map_err(|error| TreeError::io(pid, &error))?;
            thread.state = State::Stopping;
        }
    }

    /// Lets everything go. Errors mean that a thread is gone, which is fine. What was killed is
    /// waited for.
    fn let_go(&mut self, then: Then) {
        let pids: BTreeSet<i32> = self.threads.values().map(|thread| thread.pid).collect();
        // Sent to all while all stand still: nobody sees another die and reacts.
        let settled = std::mem::take(&mut self.settled);
        match then {
            Then::Run => signal_all(&settled, libc::SIGCONT),
            Then::Stop => {}
            Then::Kill => signal_all(&pids, libc::SIGKILL),
        }
        let mut detached = Vec::with_capacity(self.threads.len());
        self.threads.retain(|&tid, thread| {
            // One that just died cannot be detached; it stays ours, and its parent's SIGCHLD held
            // back, until it is waited for.
            let left = thread.state == State::Stopped && ptrace::detach(tid).is_ok();
            thread.state = State::Leaving;
            if left {
                detached.push((thread.pid, tid));
            }
            !left
        });
        if then == Then::Stop {
            wait_until_stopped(&detached);
        }
        let deadline = Instant::now() + KILL_DEADLINE;
        while then == Then::Kill && !self.threads.is_empty() && Instant::now() < deadline {
            let reaped = self
                .release_leaving()
                .and_then(|()| self.wait_for_events(Some(VFORK_GRACE)));
            if reaped.is_err() {
                break;
            }
        }
    }

    /// Detaches or reaps threads that were in a vfork, or dying, when the rest was let go.
    fn release_leaving(&mut self) -> io::Result<()> {
        if self.threads.values().any(|t| t.state == State::Leaving) {
            let standing: BTreeSet<Tid> = self.stopped().collect();
            self.collect_stops()?;
            self.threads.retain(|&tid, thread| {
                let leaves = thread.state == State::Stopped && !standing.contains(&tid);
                if leaves {
                    let _ = ptrace::detach(tid);
                }
                !leaves
            });
        }
        Ok(())
    }

    /// Children that borrow the memory of a thread in vfork: they have none of their own.
    fn vfork_children(&self) -> Vec<i32> {
        let in_vfork = |(_, t): &(&Tid, &Thread)| t.state == State::InVfork;
        self.threads
            .iter()
            .filter(in_vfork)
            .flat_map(|(&tid, thread)| {
                let pid = thread.pid;
                children(pid, tid)
                    .into_iter()
                    .filter(move |&child| crate::sys::signals::share_memory(pid, child))
            })
            .collect()
    }

    fn stopped(&self) -> impl Iterator<Item = Tid> + '_ {
        let stopped = |(&tid, t): (&Tid, &Thread)| (t.state == State::Stopped).then_some(tid);
        self.threads.iter().filter_map(stopped)
    }

    /// A stopped thread of a process, its leader if that lives.
    fn stopped_thread_of(&self, pid: i32) -> Option<Tid> {
        let of_pid = |tid: &Tid| self.threads[tid].pid == pid;
        let leader = self.stopped().filter(of_pid).find(|&tid| tid == pid);
        leader.or_else(|| self.stopped().find(of_pid))
    }

    fn thread_in_vfork_of(&self, pid: i32) -> Option<Tid> {
        let in_vfork = |(_, t): &(&Tid, &Thread)| t.pid == pid && t.state == State::InVfork;
        self.threads.iter().find(in_vfork).map(|(&tid, _)| tid)
    }

    fn userfaultfd(&self, pid: i32) -> io::Result<std::os::fd::OwnedFd> {
        let tid = self
            .stopped_thread_of(pid)
            .ok_or_else(|| io::Error::other("it has no stopped thread"))?;
        inject::userfaultfd(pid, tid)
    }

    /// Waits for a message or for a traced thread to stop. A closed socket counts as a message.
    fn wait_for_events(&self, limit: Option<Duration>) -> io::Result<()> {
        let timeout = limit.map_or(PollTimeout::NONE, |limit| {
            // Rounded up: a poll of 0 ms would spin.
            let ms = u16::try_from(limit.as_millis() + 1).unwrap_or(u16::MAX);
            PollTimeout::from(ms)
        });
        // While threads are on their way to a stop, of the socket only its end counts.
        let of_socket = match limit {
            Some(_) => PollFlags::empty(),
            None => PollFlags::POLLIN,
        };
        let mut fds = [
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.socket, of_socket),
        ];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let socket = fds[1].revents().unwrap_or(PollFlags::empty());
        if limit.is_some() && socket.contains(PollFlags::POLLHUP) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        while let Ok(Some(_)) = self.signals.read_signal() {}
        Ok(())
    }

    fn readable(&self, timeout: PollTimeout) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.socket, PollFlags::POLLIN)];
        Ok(poll(&mut fds, timeout)? > 0)
    }
}

/// Waits until threads that run into a SIGSTOP stand. They execute nothing more before, but a
/// debugger or CRIU that comes next wants to see them stopped. Nothing but `/proc` tells.
fn wait_until_stopped(threads: &[(i32, Tid)]) {
    let deadline = Instant::now() + STOP_DEADLINE;
    for &(pid, tid) in threads {
        while matches!(procs::state(pid, tid), Some('R' | 'S' | 'D' | 't')) {
            if Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

fn signal_all(pids: &BTreeSet<i32>, signal: i32) {
    for &pid in pids {
        if let Ok(pidfd) = pidfd::open(pid) {
            // It may have ended; nothing else can go wrong with a process we trace.
            let _ = pidfd::signal(pidfd.as_fd(), signal);
        }
    }
}

fn ignore_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}
