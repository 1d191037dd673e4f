//! What the model knows of both hosts at one moment.

/// Where `send` is in a hand-over (`sender/src/handover/`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sender {
    /// CRIU has dumped the tree and holds it; the state is sent, the receiver restores.
    Dumped,
    /// The receiver holds a restored copy.
    Restored,
    /// The record of the hand-over is on the disk, its lock is held.
    Recorded,
    /// The tree is in a frozen cgroup.
    Held,
    /// `Commit` is sent.
    Committing,
    /// The answer is lost: `send` asks again.
    Asking,
    /// The copy runs: the tree here is killed, process by process.
    Killing,
    /// The copy never runs: the tree here is released.
    Releasing,
    /// The tree is released, and CRIU told to undo its dump; the record is still there.
    Released,
    /// Exit 0.
    Done,
    /// Exited with an error; the target runs.
    Failed,
    /// Exit 6: the receiver did not answer.
    InDoubt,
    /// Killed.
    Dead,
}

impl Sender {
    /// Whether the process exists.
    #[must_use]
    pub fn is_alive(self) -> bool {
        !matches!(self, Self::Done | Self::Failed | Self::InDoubt | Self::Dead)
    }
}

/// Where a `send --resolve` is (`sender/src/handover/resolve.rs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Resolver {
    /// Not started, or exited.
    Idle,
    /// It has read the record and asks the receiver.
    Asking,
    /// The copy runs: the tree here is killed, process by process.
    Killing,
    /// The copy never runs: the tree here is released.
    Releasing,
    /// It is done but for the record.
    Acted,
}

/// Who holds the lock on the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lock {
    /// No process.
    Free,
    /// `send`.
    Sender,
    /// A `send --resolve`.
    Resolver(usize),
}

/// A process of another user that got a PID of the tree after that one was gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stranger {
    /// There is none.
    Absent,
    /// It runs.
    Alive,
    /// One of ours has killed it.
    Killed,
}

/// A message to the receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Request {
    /// Commit.
    Commit,
}

/// A message to the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The copy is restored and held.
    Restored,
    /// The copy runs.
    Running,
    /// The copy never runs.
    Refuse,
}

/// The `--dir` that the listening receiver works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dir {
    /// The one that the migration went to.
    Own,
    /// Another one, or another host behind the same name.
    Other,
}

/// Where the receiver's session is (`receiver/src/session/native/restore.rs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Session {
    /// There is none: the migration's lease is free.
    Absent,
    /// CRIU restores.
    Restoring,
    /// CRIU holds the copy; the sender is told, its `Commit` awaited.
    Waiting,
    /// `committed` is written, not durable yet.
    WritingCommitted,
    /// `committed` is durable.
    Committed,
    /// CRIU goes on, up to the moment before it releases the copy.
    Continued,
    /// CRIU may release the copy.
    Releasing,
    /// `aborted` is written, not durable yet.
    WritingAborted,
}

/// CRIU at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Restore {
    /// Not there: never started, done, or dead.
    Absent,
    /// It restores.
    Working,
    /// Post-restore: all processes wait in the restorer.
    Holds,
    /// It has been told to go on, and attaches to the processes.
    Catching,
    /// Pre-resume: all processes have left the restorer and are traced.
    PreResume,
    /// It releases the processes, one by one.
    Releasing,
}

/// A process of the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Copy {
    /// Not there.
    Absent,
    /// It waits in CRIU's restorer: it runs only if CRIU lives to let it.
    InRestorer,
    /// It has left the restorer and is traced: it runs when its tracer is gone.
    Caught,
    /// It runs.
    Running,
    /// It ran and exited.
    Exited,
}

/// The outcome file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Undecided.
    Undecided,
    /// The copy is to run here.
    Committed,
    /// The copy was released: it runs here, or did.
    Running,
    /// The copy never runs here.
    Aborted,
}

/// The state of everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    /// Faults so far.
    pub faults: u8,
    /// `send`.
    pub send: Sender,
    /// Number of the hand-over: a second one may follow a refused first.
    pub handover: u8,
    /// CRIU at the source lives, and holds the tree.
    pub dump: bool,
    /// The processes of the tree that are alive.
    pub tree: [bool; 2],
    /// The tree is in a frozen cgroup.
    pub frozen: bool,
    /// The tree has a pending or effective SIGSTOP (only without [`crate::Rule::Hold`]).
    pub stopped: bool,
    /// The tree ran after its state was dumped.
    pub ran_on: bool,
    /// The source's host lost its power: the tree is gone.
    pub source_lost: bool,
    /// There is a record.
    pub record: bool,
    /// Who holds its lock.
    pub lock: Lock,
    /// `send --resolve`, two of them.
    pub resolvers: [Resolver; 2],
    /// A stranger has a PID of the tree.
    pub stranger: Stranger,
    /// A copy runs on a third host.
    pub third: bool,
    /// The connection is up.
    pub link: bool,
    /// In flight to the receiver.
    pub request: Option<Request>,
    /// In flight to the sender.
    pub answer: Option<Answer>,
    /// `receive` runs.
    pub receive: bool,
    /// On which directory.
    pub dir: Dir,
    /// Its session with the migration.
    pub session: Session,
    /// The session finishes what was committed, without a sender.
    pub finishing: bool,
    /// CRIU at the destination.
    pub restore: Restore,
    /// The processes of the copy.
    pub copy: [Copy; 2],
    /// How often the copy was released, at most 2.
    pub released: u8,
    /// The outcome that a read returns.
    pub cached: Outcome,
    /// The outcome on the disk.
    pub durable: Outcome,
    /// The outcome was written since the destination's host was booted.
    pub this_boot: bool,
    /// The sender (or a resolver) has been told that the copy runs.
    pub told_running: bool,
    /// The destination's host lost its power after the copy was committed: the process is lost with its host.
    pub destination_lost: bool,
    /// A copy of the directory is served by another host, where the migration runs, too.
    pub twin_runs: bool,
    /// Memory of the copy is missing.
    pub missing: bool,
    /// Processes that hold the userfaultfd.
    pub holders: u8,
    /// The copy ran on zero pages.
    pub zero_pages: bool,
}

impl State {
    /// Whether a process of the tree at the source can run.
    #[must_use]
    pub fn source_runs(&self) -> bool {
        self.tree.contains(&true) && !self.dump && !self.frozen && !self.stopped
    }

    /// Whether a process of the copy at the destination runs.
    #[must_use]
    pub fn copy_runs(&self) -> bool {
        self.copy.contains(&Copy::Running)
    }

    /// Whether the copy has run and exited.
    #[must_use]
    pub fn copy_exited(&self) -> bool {
        self.copy.contains(&Copy::Exited)
    }
}
