//! What the world does to the parties of a hand-over.

use crate::state::{Copy, Dir, Outcome, Resolver, Restore, Sender, Session, State, Stranger};
use crate::{HandOver, Rule};

/// Declares the faults.
macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A fault.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Fault { $($(#[$doc])* $name,)* }

        impl Fault {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
        }
    };
}

faults! {
    /// `send` is killed.
    KillSend,
    /// CRIU at the source is killed.
    KillDump,
    /// A `send --resolve` is killed.
    KillResolve,
    /// The connection is lost.
    CutLink,
    /// `receive` is killed.
    KillReceive,
    /// CRIU at the destination is killed.
    KillRestore,
    /// A process that holds the userfaultfd of a lazy restore is killed.
    KillFiller,
    /// The source's host loses its power.
    SourcePower,
    /// The destination's host loses its power.
    DestinationPower,
    /// The record cannot be written: the disk is full.
    RecordDiskFull,
    /// `committed` cannot be written; it is on the disk all the same.
    CommitErrorButDurable,
    /// `committed` cannot be written.
    CommitError,
    /// `receive` is started with another `--dir`, or another host answers to the name.
    OtherDirectory,
    /// A copy of the directory is served by another host.
    CopiedDirectory,
    /// The tree at the source gets SIGCONT: from a user, or from the kernel as an orphaned process group.
    ContinueSource,
    /// The tree's PID goes to a process of another user.
    ReusePid,
    /// The copy exits (or moves on).
    CopyExits,
}

impl Fault {
    /// The state after this fault, if it can happen.
    #[must_use]
    pub fn apply(self, model: &HandOver, state: &State) -> Option<State> {
        let mut next = state.clone();
        let happens = match self {
            Self::KillSend => {
                let alive = next.send.is_alive();
                if alive {
                    next.send_exits(Sender::Dead);
                }
                alive
            }
            Self::KillDump => std::mem::take(&mut next.dump),
            Self::KillResolve => {
                let at = next
                    .resolvers
                    .iter()
                    .position(|resolver| *resolver != Resolver::Idle);
                at.inspect(|&index| next.resolve_exits(index)).is_some()
            }
            Self::CutLink => {
                let up = next.link;
                next.cut();
                up
            }
            Self::KillReceive => {
                let up = next.receive;
                next.receive_dies(model);
                up
            }
            Self::KillRestore => next.kill_restore(model),
            Self::KillFiller => {
                let one = next.missing && next.holders > 0;
                next.holders -= u8::from(one);
                one
            }
            Self::SourcePower => {
                let up = !next.source_lost;
                next.send_exits(match next.send.is_alive() {
                    true => Sender::Dead,
                    false => next.send,
                });
                next.resolve_exits(0);
                next.resolve_exits(1);
                next.tree = [false; 2];
                next.record = false;
                next.frozen = false;
                next.source_lost = true;
                up
            }
            Self::DestinationPower => next.destination_loses_power(),
            Self::RecordDiskFull => {
                let writes = next.send == Sender::Restored;
                if writes {
                    next.dump = false;
                    next.send_exits(Sender::Failed);
                }
                writes
            }
            Self::CommitErrorButDurable => next.commit_fails(Outcome::Committed),
            Self::CommitError => {
                let before = next.durable;
                next.commit_fails(before)
            }
            Self::OtherDirectory => {
                let down = !next.receive && next.dir == Dir::Own;
                if down {
                    next.receive = true;
                    next.dir = Dir::Other;
                }
                down
            }
            Self::CopiedDirectory => {
                let copied = next.durable == Outcome::Committed && !next.twin_runs;
                next.twin_runs |= copied && !model.has(Rule::DirectoryIdentity);
                copied && !model.has(Rule::DirectoryIdentity)
            }
            Self::ContinueSource => std::mem::take(&mut next.stopped),
            Self::ReusePid => {
                let free =
                    next.tree != [true; 2] && next.record && next.stranger == Stranger::Absent;
                if free {
                    next.stranger = Stranger::Alive;
                }
                free
            }
            Self::CopyExits => {
                let runs = next.copy == [Copy::Running; 2];
                if runs {
                    next.copy = [Copy::Exited; 2];
                }
                runs
            }
        };
        happens.then_some(next)
    }
}

impl State {
    fn receive_dies(&mut self, model: &HandOver) {
        self.receive = false;
        self.session_ends();
        self.cut();
        if model.has(Rule::SocketKept) {
            return;
        }
        // Its socket closes: CRIU undoes what it has not released, or, past that, releases it.
        match self.restore {
            Restore::Absent => {}
            Restore::Working | Restore::Holds => {
                self.restore = Restore::Absent;
                self.copy = [Copy::Absent; 2];
            }
            Restore::Catching => {
                self.copy = [Copy::Caught; 2];
                self.tracer_is_gone(model);
            }
            Restore::PreResume | Restore::Releasing => self.tracer_is_gone(model),
        }
    }

    fn kill_restore(&mut self, model: &HandOver) -> bool {
        match self.restore {
            Restore::Absent => return false,
            // What waits in the restorer waits for ever.
            Restore::Working | Restore::Holds | Restore::Catching => self.restore = Restore::Absent,
            Restore::PreResume | Restore::Releasing => self.tracer_is_gone(model),
        }
        true
    }

    fn destination_loses_power(&mut self) -> bool {
        self.receive = false;
        self.session_ends();
        self.cut();
        self.restore = Restore::Absent;
        // From the decision on, the process belongs to this host, and is lost with it.
        self.destination_lost |= matches!(self.durable, Outcome::Committed | Outcome::Running);
        self.copy = [Copy::Absent; 2];
        self.missing = false;
        self.holders = 0;
        self.cached = self.durable;
        self.this_boot = false;
        true
    }

    fn commit_fails(&mut self, on_disk: Outcome) -> bool {
        let writes = self.session == Session::WritingCommitted;
        if writes {
            // It is not known what is on the disk: CRIU goes on to hold the copy, and nothing is answered, until
            // the outcome is read again.
            self.durable = on_disk;
            self.cached = on_disk;
            self.session_ends();
            self.cut();
        }
        writes
    }
}
