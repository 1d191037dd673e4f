//! The freezer process: the tracer, with a single thread, which takes requests over a socket.

use super::procs::{self, TreeError};
use super::stops::Stops;
use super::{FrozenProcess, MESSAGE_MAX, Reply, Request, Then, inject};
use crate::sys::ptrace::{self, Stop, Tid};
use crate::sys::sched::RealtimePriority;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pageferry_common::PageRange;
use pageferry_common::proc::process::{children, threads};
use pageferry_common::sys::fdpass;
use pageferry_common::sys::pidfd;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// Maximum time for a thread to stop. A thread in a system call on a dead NFS server never stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval at which threads that have not stopped are checked for a wait for a vfork child. The kernel sends
/// no signal when such a wait begins.
const VFORK_POLL_INTERVAL: Duration = Duration::from_millis(3);

/// Maximum time to wait for killed processes to exit. A thread may be in the middle of I/O.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval at which killed threads, and those in a vfork, are checked after the tree was released.
const REAP_POLL_INTERVAL: Duration = Duration::from_millis(3);

/// Interval at which threads are checked for having entered their group stop.
const GROUP_STOP_POLL_INTERVAL: Duration = Duration::from_micros(100);

/// Runs the freezer on its standard input, a socket, until the sender closes it. Thaws the tree before it
/// returns.
///
/// # Errors
/// Errors of the socket. The process exits then, and the kernel detaches all tracees.
pub fn serve() -> io::Result<()> {
    // Ctrl-C and the hangup of a terminal reach the whole process group; only the sender reacts to them.
    let _ = nix::unistd::setsid();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        crate::sys::signals::ignore(signal)?;
    }
    // If a parent left SIGCHLD ignored, the kernel would not notify about stops.
    crate::sys::signals::reset(Signal::SIGCHLD)?;
    let _priority = RealtimePriority::raise();
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    children.thread_block()?;
    let stdin = io::stdin();
    let mut freezer = Freezer {
        socket: stdin.as_fd(),
        signals: SignalFd::with_flags(&children, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?,
        threads: BTreeMap::new(),
        sigstopped: BTreeSet::new(),
        frozen_since: Instant::now(),
    };
    let result = freezer.run();
    freezer.release(Then::Run);
    result
}

/// State of a traced thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Asked to stop.
    Stopping,
    /// Stopped.
    Stopped,
    /// In the kernel, waiting for its vfork child. Such a thread runs no instruction before the child exits
    /// or calls exec, but ptrace does not report it as stopped.
    InVfork,
    /// In a vfork, or exiting, when the tree was released: to be detached when it stops, or reaped.
    Releasing,
}

/// A traced thread.
struct Thread {
    pid: i32,
    state: State,
    /// Whether a stop signal stopped the thread, so that it stays stopped when it is detached.
    in_group_stop: bool,
}

/// Whether a pass over the tree found threads that were not traced yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PassResult {
    /// All threads were traced already.
    Complete,
    /// Threads were seized, so another pass is needed.
    NewThreads,
}

struct Freezer<'a> {
    socket: BorrowedFd<'a>,
    signals: SignalFd,
    threads: BTreeMap<Tid, Thread>,
    /// PIDs of the processes that the freezer sent SIGSTOP to.
    sigstopped: BTreeSet<i32>,
    frozen_since: Instant,
}

impl Freezer<'_> {
    /// Serves requests until the sender closes the socket.
    fn run(&mut self) -> io::Result<()> {
        let mut buffer = [0; MESSAGE_MAX];
        loop {
            self.finish_releasing()?;
            self.wait_for_events(None)?;
            if !self.is_readable()? {
                continue;
            }
            let Some((len, fd)) = fdpass::recv(self.socket, &mut buffer)? else {
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
                    Err(error) => self.fail(error)?,
                },
                Request::Sigstop => match self.sigstop() {
                    Ok(()) => self.reply(&Reply::Sigstopped, None)?,
                    Err(error) => self.fail(error)?,
                },
                Request::Userfaultfd { pid } => match self.userfaultfd(pid) {
                    Ok(fd) => self.reply(&Reply::Userfaultfd, Some(fd.as_fd()))?,
                    Err(error) => self.reply(&Reply::NoUserfaultfd(error.to_string()), None)?,
                },
                Request::Read { pid, start, pages } => {
                    let file = fd.map(File::from).ok_or(io::ErrorKind::InvalidInput)?;
                    let range = PageRange::new(start, pages).map_err(io::Error::other)?;
                    let bytes = self.read(pid, range, &file).unwrap_or(0);
                    self.reply(&Reply::Read { bytes }, None)?;
                }
                Request::Thaw { then } => {
                    self.release(then);
                    let stopped_ns = self.frozen_since.elapsed().as_nanos() as u64;
                    self.reply(&Reply::Thawed { stopped_ns }, None)?;
                }
            }
        }
    }

    /// Thaws the tree, and reports why it could not be stopped.
    fn fail(&mut self, error: TreeError) -> io::Result<()> {
        self.release(Then::Run);
        self.reply(&Reply::Failed(error), None)
    }

    fn reply(&self, reply: &Reply, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bytes = serde_json::to_vec(reply).expect("replies have string keys only");
        fdpass::send(self.socket, &bytes, fd)
    }

    /// Stops the tree under `root`. Lists and seizes threads until a pass over the stopped tree finds no new
    /// thread: stopped threads create no threads or children, so the tree is complete then.
    fn freeze(&mut self, root: i32) -> Result<Vec<FrozenProcess>, TreeError> {
        self.frozen_since = Instant::now();
        for (&tid, thread) in &mut self.threads {
            // In a vfork since the last freeze: the interrupt of that freeze is still pending.
            debug_assert_eq!(thread.state, State::Releasing, "thread {tid}");
            thread.state = State::Stopping;
        }
        let deadline = self.frozen_since + STOP_TIMEOUT;
        let mut pids = loop {
            let (pids, pass) = self.seize_new(root)?;
            self.wait_for_stops(deadline)?;
            if pass == PassResult::Complete {
                break pids;
            }
        };
        for pid in self.vfork_children() {
            pids.retain(|&other| other != pid);
        }
        let live = pids.iter().filter_map(|&pid| {
            // A process whose only thread is in a vfork has no stopped thread, but its memory does not
            // change.
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

    /// Walks the tree once, and seizes threads that are not traced yet. Returns the PIDs of the tree, the
    /// root first.
    fn seize_new(&mut self, root: i32) -> Result<(Vec<i32>, PassResult), TreeError> {
        let own_pids =
            [nix::unistd::getpid(), nix::unistd::getppid()].map(nix::unistd::Pid::as_raw);
        let (mut pids, mut result) = (vec![root], PassResult::Complete);
        let mut next = 0;
        while let Some(&pid) = pids.get(next) {
            next += 1;
            if own_pids.contains(&pid) {
                return Err(TreeError::OwnTree(root));
            }
            for tid in procs::list_threads(pid)? {
                if !self.threads.contains_key(&tid) && self.seize(pid, tid)? {
                    result = PassResult::NewThreads;
                }
                pids.extend(procs::list_children(pid, tid)?);
            }
        }
        if next == 1 && threads(root).is_empty() {
            return Err(TreeError::NoProcess(root));
        }
        Ok((pids, result))
    }

    /// Seizes a thread and asks it to stop. Returns `false` if the thread has exited.
    fn seize(&mut self, pid: i32, tid: Tid) -> Result<bool, TreeError> {
        match ptrace::seize(tid).and_then(|()| ptrace::interrupt(tid)) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return procs::untraceable_reason(pid, tid).map_or(Ok(false), Err);
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

    /// Waits until no thread is [`State::Stopping`].
    fn wait_for_stops(&mut self, deadline: Instant) -> Result<(), TreeError> {
        let mut next_vfork_check = Instant::now() + VFORK_POLL_INTERVAL;
        loop {
            let root = self.threads.values().next().map_or(0, |thread| thread.pid);
            self.collect_stops()
                .map_err(|error| TreeError::io(root, &error))?;
            let now = Instant::now();
            if now >= next_vfork_check {
                next_vfork_check = now + VFORK_POLL_INTERVAL;
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
            self.wait_for_events(Some(next_vfork_check.saturating_duration_since(now)))
                .map_err(|error| TreeError::io(root, &error))?;
        }
    }

    /// Records all stops reported so far, without blocking. Resumes threads that stopped for another reason.
    fn collect_stops(&mut self) -> io::Result<()> {
        let mut exited = Vec::new();
        for (&tid, thread) in &mut self.threads {
            while thread.state != State::Stopped {
                match ptrace::poll(tid)? {
                    None => break,
                    Some(stop @ (Stop::Event | Stop::Group)) => {
                        thread.state = State::Stopped;
                        thread.in_group_stop = stop == Stop::Group;
                    }
                    // A pending signal came before the interrupt: deliver it, then stop. Any ptrace stop uses
                    // up a pending interrupt, so it has to be sent again.
                    Some(Stop::Signal(signal)) => ignore_exited(
                        ptrace::interrupt(tid).and_then(|()| ptrace::resume(tid, signal)),
                    )?,
                    Some(Stop::Syscall) => {
                        ignore_exited(
                            ptrace::interrupt(tid).and_then(|()| ptrace::resume(tid, 0)),
                        )?;
                    }
                    Some(Stop::Gone) => {
                        exited.push(tid);
                        break;
                    }
                }
            }
        }
        for tid in exited {
            self.threads.remove(&tid);
        }
        Ok(())
    }

    /// Moves every thread from its ptrace stop into a group stop. Each thread gets a SIGSTOP of its own
    /// before it is resumed, so that none executes another instruction.
    fn sigstop(&mut self) -> Result<(), TreeError> {
        let mut resumed = Vec::new();
        for (&tid, thread) in &self.threads {
            if thread.state == State::Stopped && !thread.in_group_stop {
                procs::check_signal_permission(thread.pid)?;
                self.sigstopped.insert(thread.pid);
                resumed.push(tid);
            }
        }
        for &tid in &resumed {
            let thread = self
                .threads
                .get_mut(&tid)
                .expect("the loop above listed it");
            let pid = thread.pid;
            let sent = ptrace::signal_thread(pid, tid, libc::SIGSTOP)
                .and_then(|()| ptrace::resume(tid, 0));
            ignore_exited(sent).map_err(|error| TreeError::io(pid, &error))?;
            thread.state = State::Stopping;
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        loop {
            self.wait_for_stops(deadline)?;
            // A thread also stops when another thread of its process begins the group stop; resume it from
            // there.
            let early = resumed.iter().copied().find(|tid| {
                let thread = self.threads.get(tid);
                thread.is_some_and(|t| t.state == State::Stopped && !t.in_group_stop)
            });
            let Some(tid) = early else {
                return Ok(());
            };
            let thread = self.threads.get_mut(&tid).expect("find returned it");
            let pid = thread.pid;
            ignore_exited(ptrace::resume(tid, 0)).map_err(|error| TreeError::io(pid, &error))?;
            thread.state = State::Stopping;
        }
    }

    /// Detaches all threads, and resumes, stops or kills the processes. Waits for killed processes to exit.
    /// Ignores errors: they mean that a thread has exited.
    fn release(&mut self, then: Then) {
        let pids: BTreeSet<i32> = self.threads.values().map(|thread| thread.pid).collect();
        // Signals are sent while all threads are stopped, so that no process sees another die and reacts.
        let sigstopped = std::mem::take(&mut self.sigstopped);
        match then {
            Then::Run => signal_all(&sigstopped, libc::SIGCONT),
            Then::Stop => {}
            Then::Kill => signal_all(&pids, libc::SIGKILL),
        }
        let mut detached = Vec::with_capacity(self.threads.len());
        self.threads.retain(|&tid, thread| {
            // A thread that has just died cannot be detached. It stays traced, and the kernel withholds
            // SIGCHLD from its parent, until the freezer has waited for it.
            let is_detached = thread.state == State::Stopped && ptrace::detach(tid).is_ok();
            thread.state = State::Releasing;
            if is_detached {
                detached.push((thread.pid, tid));
            }
            !is_detached
        });
        if then == Then::Stop {
            wait_until_stopped(&detached);
        }
        let deadline = Instant::now() + KILL_TIMEOUT;
        while then == Then::Kill && !self.threads.is_empty() && Instant::now() < deadline {
            let reaped = self
                .finish_releasing()
                .and_then(|()| self.wait_for_events(Some(REAP_POLL_INTERVAL)));
            if reaped.is_err() {
                break;
            }
        }
    }

    /// Detaches or reaps threads that were in a vfork, or exiting, when the tree was released.
    fn finish_releasing(&mut self) -> io::Result<()> {
        if self.threads.values().any(|t| t.state == State::Releasing) {
            let stopped_before: BTreeSet<Tid> = self.stopped().collect();
            self.collect_stops()?;
            self.threads.retain(|&tid, thread| {
                let stopped_now = thread.state == State::Stopped && !stopped_before.contains(&tid);
                if stopped_now {
                    let _ = ptrace::detach(tid);
                }
                !stopped_now
            });
        }
        Ok(())
    }

    /// Returns the vfork children that still share the memory of their parent.
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

    /// Returns the stopped threads.
    fn stopped(&self) -> impl Iterator<Item = Tid> + '_ {
        let stopped = |(&tid, t): (&Tid, &Thread)| (t.state == State::Stopped).then_some(tid);
        self.threads.iter().filter_map(stopped)
    }

    /// Returns a stopped thread of a process: its leader, unless that has exited.
    fn stopped_thread_of(&self, pid: i32) -> Option<Tid> {
        let of_pid = |tid: &Tid| self.threads[tid].pid == pid;
        let leader = self.stopped().filter(of_pid).find(|&tid| tid == pid);
        leader.or_else(|| self.stopped().find(of_pid))
    }

    /// Returns a thread of a process that waits for its vfork child.
    fn thread_in_vfork_of(&self, pid: i32) -> Option<Tid> {
        let in_vfork = |(_, t): &(&Tid, &Thread)| t.pid == pid && t.state == State::InVfork;
        self.threads.iter().find(in_vfork).map(|(&tid, _)| tid)
    }

    /// Creates a userfaultfd in a process.
    fn userfaultfd(&self, pid: i32) -> io::Result<std::os::fd::OwnedFd> {
        let tid = self
            .stopped_thread_of(pid)
            .ok_or_else(|| io::Error::other("it has no stopped thread"))?;
        let stops = Stops {
            signals: &self.signals,
            socket: self.socket,
        };
        inject::userfaultfd(pid, tid, stops)
    }

    /// Copies a prefix of `range` of the memory of a process to a file. Returns its length in bytes.
    fn read(&self, pid: i32, range: PageRange, file: &File) -> io::Result<usize> {
        let stopped = self.stopped_thread_of(pid);
        let tid = stopped.or_else(|| self.thread_in_vfork_of(pid));
        procs::copy_memory(tid.ok_or(io::ErrorKind::NotFound)?, range, file)
    }

    /// Waits until a traced thread changes its state. Without a limit, also returns when a request arrives or
    /// the sender closes the socket.
    ///
    /// With a limit, the freezer is in the middle of a request: it does not look at further requests, but
    /// fails with `BrokenPipe` if the sender has closed the socket.
    fn wait_for_events(&self, limit: Option<Duration>) -> io::Result<()> {
        let timeout = limit.map_or(PollTimeout::NONE, |limit| {
            // Rounded up, for a timeout of 0 ms would make the caller spin.
            let ms = u16::try_from(limit.as_millis() + 1).unwrap_or(u16::MAX);
            PollTimeout::from(ms)
        });
        let socket_events = match limit {
            // poll always reports POLLHUP.
            Some(_) => PollFlags::empty(),
            None => PollFlags::POLLIN,
        };
        let mut fds = [
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.socket, socket_events),
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

    /// Returns whether a request is pending, or the sender has closed the socket.
    fn is_readable(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.socket, PollFlags::POLLIN)];
        Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
    }
}

/// Waits until detached threads have entered their group stop. They execute no instruction before that, but a
/// debugger or CRIU that attaches next expects them to be stopped. Only `/proc` reports it.
fn wait_until_stopped(threads: &[(i32, Tid)]) {
    let deadline = Instant::now() + STOP_TIMEOUT;
    for &(pid, tid) in threads {
        while matches!(procs::state(pid, tid), Some('R' | 'S' | 'D' | 't')) {
            if Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(GROUP_STOP_POLL_INTERVAL);
        }
    }
}

/// Sends a signal to each process, by pidfd.
fn signal_all(pids: &BTreeSet<i32>, signal: i32) {
    for &pid in pids {
        if let Ok(pidfd) = pidfd::open(pid) {
            // Fails only if the process has exited: it is traced, so signals are permitted.
            let _ = pidfd::signal(pidfd.as_fd(), signal);
        }
    }
}

/// Treats `ESRCH`, the error for a thread that has exited, as success.
fn ignore_exited(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}
