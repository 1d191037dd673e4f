//! The steps of the protocol: the party, its guard and its effect.

use crate::state::{
    Answer, Copy, Dir, Lock, Outcome, Request, Resolver, Restore, Sender, Session, State, Stranger,
};
use crate::{HandOver, Rule};

/// Declares the steps, each with the file and the function that do it; nothing if the programs do not do it yet.
macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident => $code:literal,)*) => {
        /// A step of one party.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Step { $($(#[$doc])* $name,)* }

        impl Step {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The file and the function that do it; `None` if the programs do not do it yet.
            #[must_use]
            pub fn code(self) -> Option<(&'static str, &'static str)> {
                let code = match self { $(Self::$name => $code,)* };
                code.split_once(' ')
            }
        }
    };
}

steps! {
    // The source.
    /// `send` receives `Restored`.
    SendHearsRestored => "sender/src/handover/mod.rs restore",
    /// The hand-over fails before the record is written: `send` lets CRIU undo its dump.
    SendGivesUp => "sender/src/handover/mod.rs run",
    /// `send` locks and writes the record, durably.
    SendRecords => "sender/src/handover/commit.rs record",
    /// `send` freezes the tree in a cgroup.
    SendHolds => "sender/src/handover/hold.rs freeze",
    /// CRIU is alive: `send` commits.
    SendCommits => "sender/src/handover/commit.rs commit",
    /// CRIU is dead: `send` releases the tree.
    SendFindsCriuDead => "sender/src/handover/commit.rs hold",
    /// `send` receives `Running`.
    SendHearsRunning => "sender/src/handover/commit.rs decide",
    /// `send` receives `Refuse`.
    SendHearsRefuse => "sender/src/handover/commit.rs decide",
    /// The connection is lost: `send` asks again.
    SendLosesAnswer => "sender/src/handover/commit.rs decide",
    /// `send` asks, and the copy runs.
    SendLearnsRunning => "sender/src/handover/commit.rs decide",
    /// `send` asks, and the copy never runs.
    SendLearnsAborted => "sender/src/handover/commit.rs decide",
    /// No receiver answers: exit 6.
    SendExitsInDoubt => "sender/src/handover/commit.rs commit",
    /// `send` kills a process of the tree.
    SendKills => "sender/src/handover/commit.rs kill_source",
    /// The tree is gone: `send` removes the record.
    SendIsDone => "sender/src/handover/record.rs remove",
    /// `send` thaws the tree, and CRIU releases it.
    SendReleases => "sender/src/handover/commit.rs release",
    /// `send` removes the record of a refused move.
    SendFails => "sender/src/handover/commit.rs remove_record",
    /// A second hand-over of the same `send`, after a refused first whose connection was lost.
    SendTriesAgain => "sender/src/migrate.rs run_rounds",
    /// `send --migrate` to a third host, after this one ended.
    RetryElsewhere => "sender/src/handover/record.rs check_in_doubt",
    /// A `send --resolve` reads the record.
    Resolve0 => "sender/src/handover/resolve.rs resolve",
    /// Another one.
    Resolve1 => "sender/src/handover/resolve.rs resolve",
    /// It hears that the copy runs.
    Resolve0LearnsRunning => "sender/src/handover/resolve.rs ask",
    /// The other one.
    Resolve1LearnsRunning => "sender/src/handover/resolve.rs ask",
    /// It hears that the copy never runs.
    Resolve0LearnsAborted => "sender/src/handover/resolve.rs ask",
    /// The other one.
    Resolve1LearnsAborted => "sender/src/handover/resolve.rs ask",
    /// It kills a process of the tree.
    Resolve0Kills => "sender/src/handover/record.rs kill",
    /// The other one.
    Resolve1Kills => "sender/src/handover/record.rs kill",
    /// It thaws the tree.
    Resolve0Releases => "sender/src/handover/record.rs release",
    /// The other one.
    Resolve1Releases => "sender/src/handover/record.rs release",
    /// It removes the record.
    Resolve0IsDone => "sender/src/handover/record.rs remove",
    /// The other one.
    Resolve1IsDone => "sender/src/handover/record.rs remove",
    /// It gets no answer.
    Resolve0Fails => "sender/src/handover/resolve.rs resolve",
    /// The other one.
    Resolve1Fails => "sender/src/handover/resolve.rs resolve",

    // The destination.
    /// CRIU has restored the copy and holds it; the sender is told.
    CriuHolds => "receiver/src/restore/process.rs drive",
    /// The session fails before `Commit`: the copy is ended.
    SessionFails => "receiver/src/session/native/restore.rs commit",
    /// `aborted` is durable; the sender is told.
    SessionAborts => "receiver/src/session/native/restore.rs record_aborted",
    /// The session receives `Commit`, and writes `committed`.
    SessionCommits => "receiver/src/session/native/restore.rs try_commit",
    /// `committed` is durable.
    CommittedIsDurable => "receiver/src/restore/outcome.rs overwrite",
    /// CRIU may go on, up to pre-resume.
    SessionContinues => "receiver/src/restore/process.rs hold_back",
    /// All processes have left the restorer.
    CriuCatches => "receiver/src/restore/process.rs drive",
    /// At pre-resume: CRIU may release the copy.
    SessionReleases => "receiver/src/restore/process.rs drive",
    /// CRIU releases a process of the copy.
    CriuReleases => "receiver/src/restore/process.rs drive",
    /// CRIU is done: `running` is written, and the sender is told that the copy runs.
    SessionIsDone => "receiver/src/session/native/restore.rs release",
    /// `running` is durable.
    RunningIsDurable => "receiver/src/restore/outcome.rs overwrite",
    /// CRIU died after the commit, and the copy waits in the restorer: it is ended and restored again.
    SessionRestoresAgain => "receiver/src/session/native/restore.rs settle",
    /// CRIU died after the commit, and the copy runs.
    SessionFindsItRunning => "receiver/src/session/native/restore.rs release",
    /// CRIU died after the commit: the copy is killed (only without [`Rule::DeathMeansRunning`]).
    SessionKillsIt => "",
    /// `receive` starts on the migration's directory.
    ReceiveStarts => "receiver/src/storage/store.rs open",
    /// What an earlier `receive` left of an undecided restore is ended.
    ReceiveEndsLeftovers => "receiver/src/restore/attempt.rs end_leftovers",
    /// What was committed and never ran is restored again.
    FinishRestores => "receiver/src/restore/settle.rs restore_again",
    /// What was committed runs, or has run.
    FinishFindsItRan => "receiver/src/restore/settle.rs has_run",
    /// The CRIU that an earlier `receive` left at pre-resume is ended, and the copy runs.
    FinishEndsCriu => "receiver/src/restore/copy.rs kill_criu",
    /// A filler starts in the place of one that died.
    FillerIsReplaced => "receiver/src/restore/filler/group.rs replace",
    /// All memory is filled in.
    FillerIsDone => "receiver/src/restore/filler/mod.rs fill",
}

/// What does a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Party {
    /// `send`.
    Send,
    /// `send --resolve`, or another `send`.
    Resolve,
    /// `receive`.
    Receive,
    /// CRIU at the destination.
    Criu,
    /// The processes that fill in memory.
    Filler,
}

impl Step {
    /// What does this step.
    #[must_use]
    pub fn party(self) -> Party {
        match self {
            Self::SendHearsRestored
            | Self::SendGivesUp
            | Self::SendRecords
            | Self::SendHolds
            | Self::SendCommits
            | Self::SendFindsCriuDead
            | Self::SendHearsRunning
            | Self::SendHearsRefuse
            | Self::SendLosesAnswer
            | Self::SendLearnsRunning
            | Self::SendLearnsAborted
            | Self::SendExitsInDoubt
            | Self::SendKills
            | Self::SendIsDone
            | Self::SendReleases
            | Self::SendFails
            | Self::SendTriesAgain => Party::Send,
            Self::RetryElsewhere
            | Self::Resolve0
            | Self::Resolve1
            | Self::Resolve0LearnsRunning
            | Self::Resolve1LearnsRunning
            | Self::Resolve0LearnsAborted
            | Self::Resolve1LearnsAborted
            | Self::Resolve0Kills
            | Self::Resolve1Kills
            | Self::Resolve0Releases
            | Self::Resolve1Releases
            | Self::Resolve0IsDone
            | Self::Resolve1IsDone
            | Self::Resolve0Fails
            | Self::Resolve1Fails => Party::Resolve,
            Self::SessionFails
            | Self::SessionAborts
            | Self::SessionCommits
            | Self::CommittedIsDurable
            | Self::SessionContinues
            | Self::SessionReleases
            | Self::SessionIsDone
            | Self::RunningIsDurable
            | Self::SessionRestoresAgain
            | Self::SessionFindsItRunning
            | Self::SessionKillsIt
            | Self::ReceiveStarts
            | Self::ReceiveEndsLeftovers
            | Self::FinishRestores
            | Self::FinishFindsItRan
            | Self::FinishEndsCriu => Party::Receive,
            Self::CriuHolds | Self::CriuCatches | Self::CriuReleases => Party::Criu,
            Self::FillerIsReplaced | Self::FillerIsDone => Party::Filler,
        }
    }

    /// The state after this step, if it can be done.
    #[must_use]
    pub fn apply(self, model: &HandOver, state: &State) -> Option<State> {
        let mut next = state.clone();
        let done = match self {
            Self::SendHearsRestored => next.send_hears_restored(),
            Self::SendGivesUp => next.send_gives_up(),
            Self::SendRecords => next.send_records(model),
            Self::SendHolds => next.send_holds(model),
            Self::SendCommits => next.send_commits(model),
            Self::SendFindsCriuDead => next.send_finds_criu_dead(model),
            Self::SendHearsRunning => next.send_hears(Answer::Running),
            Self::SendHearsRefuse => next.send_hears(Answer::Refuse),
            Self::SendLosesAnswer => next.send_loses_answer(),
            Self::SendLearnsRunning => next.send_asks(model, true),
            Self::SendLearnsAborted => next.send_asks(model, false),
            Self::SendExitsInDoubt => next.send_exits_in_doubt(),
            Self::SendKills => next.send == Sender::Killing && next.kill_one(model),
            Self::SendIsDone => next.send_is_done(),
            Self::SendReleases => next.send_releases(),
            Self::SendFails => next.send_fails(),
            Self::SendTriesAgain => next.send_tries_again(),
            Self::RetryElsewhere => next.retry_elsewhere(model),
            Self::Resolve0 => next.resolve_starts(model, 0),
            Self::Resolve1 => next.resolve_starts(model, 1),
            Self::Resolve0LearnsRunning => next.resolve_asks(model, 0, true),
            Self::Resolve1LearnsRunning => next.resolve_asks(model, 1, true),
            Self::Resolve0LearnsAborted => next.resolve_asks(model, 0, false),
            Self::Resolve1LearnsAborted => next.resolve_asks(model, 1, false),
            Self::Resolve0Kills => next.resolvers[0] == Resolver::Killing && next.kill_one(model),
            Self::Resolve1Kills => next.resolvers[1] == Resolver::Killing && next.kill_one(model),
            Self::Resolve0Releases => next.resolve_releases(0),
            Self::Resolve1Releases => next.resolve_releases(1),
            Self::Resolve0IsDone => next.resolve_is_done(0),
            Self::Resolve1IsDone => next.resolve_is_done(1),
            Self::Resolve0Fails => next.resolve_fails(0),
            Self::Resolve1Fails => next.resolve_fails(1),
            Self::CriuHolds => next.criu_holds(),
            Self::SessionFails => next.session_fails(),
            Self::SessionAborts => next.session_aborts(),
            Self::SessionCommits => next.session_commits(),
            Self::CommittedIsDurable => next.committed_is_durable(),
            Self::SessionContinues => next.session_continues(),
            Self::CriuCatches => next.criu_catches(),
            Self::RunningIsDurable => next.running_is_durable(),
            Self::SessionReleases => next.session_releases(),
            Self::CriuReleases => next.criu_releases(),
            Self::SessionIsDone => next.session_is_done(model),
            Self::SessionRestoresAgain => next.session_restores_again(model),
            Self::SessionFindsItRunning => next.session_finds_it_running(model),
            Self::SessionKillsIt => next.session_kills_it(model),
            Self::ReceiveStarts => next.receive_starts(),
            Self::ReceiveEndsLeftovers => next.receive_ends_leftovers(),
            Self::FinishRestores => next.finish_restores(model),
            Self::FinishFindsItRan => next.finish_finds_it_ran(model),
            Self::FinishEndsCriu => next.finish_ends_criu(model),
            Self::FillerIsReplaced => next.filler_is_replaced(model),
            Self::FillerIsDone => next.filler_is_done(),
        };
        done.then_some(next)
    }
}

/// Does what follows if `$when` holds.
macro_rules! when {
    ($when:expr => $($then:tt)*) => {{
        let enabled = $when;
        if enabled { $($then)* }
        enabled
    }};
}

/// Number of processes that hold a userfaultfd: the filler and three keepers.
pub(crate) const HOLDERS: u8 = 4;

impl State {
    /// CRIU has dumped the tree, and the receiver begins to restore: where a hand-over begins to matter.
    #[must_use]
    pub fn after_dump() -> Self {
        Self {
            faults: 0,
            send: Sender::Dumped,
            handover: 1,
            dump: true,
            tree: [true; 2],
            frozen: false,
            stopped: false,
            ran_on: false,
            source_lost: false,
            record: false,
            lock: Lock::Free,
            resolvers: [Resolver::Idle; 2],
            stranger: Stranger::Absent,
            third: false,
            link: true,
            request: None,
            answer: None,
            receive: true,
            dir: Dir::Own,
            session: Session::Restoring,
            finishing: false,
            restore: Restore::Working,
            copy: [Copy::InRestorer; 2],
            released: 0,
            cached: Outcome::Undecided,
            durable: Outcome::Undecided,
            this_boot: true,
            told_running: false,
            destination_lost: false,
            twin_runs: false,
            missing: false,
            holders: 0,
            zero_pages: false,
        }
    }

    /// What follows from every change.
    pub(crate) fn settle(&mut self, _model: &HandOver) {
        // A tree that runs although its dump may still be committed has a history of its own. A dump that was
        // refused (or never answered for) no longer matters.
        if self.source_runs() {
            self.ran_on = true;
        }
        if self.missing && self.copy_runs() && self.holders == 0 {
            self.zero_pages = true;
        }
        if self.missing
            && !self.copy_runs()
            && !self.copy.contains(&Copy::Caught)
            && self.copy_exited()
        {
            self.missing = false;
            self.holders = 0;
        }
    }

    /// Whether exactly one copy runs (or has run to its end, or went down with its host's power).
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let running = [self.source_runs(), self.copy_runs(), self.third];
        let one = running.into_iter().filter(|runs| *runs).count() == 1;
        // Both processes of a tree run, or none.
        let whole = !(self.copy.contains(&Copy::Running) && self.copy.contains(&Copy::InRestorer));
        (one && whole)
            || self.copy_exited()
            || self.source_lost && !matches!(self.cached, Outcome::Committed | Outcome::Running)
            || self.destination_lost
    }

    // ---- The source ----

    fn send_hears_restored(&mut self) -> bool {
        when!(self.send == Sender::Dumped && self.answer == Some(Answer::Restored) => {
            self.answer = None;
            self.send = Sender::Restored;
        })
    }

    fn send_gives_up(&mut self) -> bool {
        let refused = self.answer == Some(Answer::Refuse) || !self.link;
        let early = self.send == Sender::Dumped && refused;
        when!(early || self.send == Sender::Restored && !self.link => {
            self.dump = false;
            self.send = Sender::Failed;
            self.cut();
        })
    }

    fn send_records(&mut self, model: &HandOver) -> bool {
        let free = self.lock == Lock::Free || !model.has(Rule::Lock);
        when!(self.send == Sender::Restored && free => {
            self.record = true;
            self.lock = Lock::Sender;
            self.send = Sender::Recorded;
        })
    }

    fn send_holds(&mut self, model: &HandOver) -> bool {
        when!(self.send == Sender::Recorded => {
            if model.has(Rule::Hold) { self.frozen = true } else { self.stopped = true }
            self.send = Sender::Held;
        })
    }

    fn send_commits(&mut self, model: &HandOver) -> bool {
        let proven = self.dump || !model.has(Rule::CriuAlive);
        when!(self.send == Sender::Held && proven => {
            if self.link { self.request = Some(Request::Commit) }
            self.send = Sender::Committing;
        })
    }

    fn send_finds_criu_dead(&mut self, model: &HandOver) -> bool {
        when!(self.send == Sender::Held && !self.dump && model.has(Rule::CriuAlive) => {
            // Nothing was committed: the receiver aborts when the connection is gone.
            self.cut();
            self.send = Sender::Releasing;
        })
    }

    fn send_hears(&mut self, wanted: Answer) -> bool {
        when!(self.send == Sender::Committing && self.answer == Some(wanted) => {
            self.answer = None;
            self.hear(wanted);
        })
    }

    fn hear(&mut self, answer: Answer) {
        self.told_running |= answer == Answer::Running;
        self.send = if answer == Answer::Running {
            Sender::Killing
        } else {
            Sender::Releasing
        };
    }

    fn send_loses_answer(&mut self) -> bool {
        when!(self.send == Sender::Committing && !self.link => self.send = Sender::Asking)
    }

    fn send_asks(&mut self, model: &HandOver, runs: bool) -> bool {
        let asks = self.send == Sender::Asking && self.answers(model, runs);
        when!(asks => self.hear(if runs { Answer::Running } else { Answer::Refuse }))
    }

    fn send_exits_in_doubt(&mut self) -> bool {
        when!(self.send == Sender::Asking => {
            self.send_exits(Sender::InDoubt);
        })
    }

    /// `send` is no more: its connection, its lock and the CRIU that it started go with it.
    pub(crate) fn send_exits(&mut self, how: Sender) {
        self.send = how;
        self.dump = false;
        if self.lock == Lock::Sender {
            self.lock = Lock::Free;
        }
        self.cut();
    }

    /// Kills one process of the tree.
    fn kill_one(&mut self, model: &HandOver) -> bool {
        if self.stranger == Stranger::Alive && !model.has(Rule::ProcessIdentity) {
            self.stranger = Stranger::Killed;
        }
        match self.tree.iter_mut().find(|alive| **alive) {
            Some(alive) => {
                *alive = false;
                true
            }
            None => false,
        }
    }

    fn send_is_done(&mut self) -> bool {
        when!(self.send == Sender::Killing && self.tree == [false; 2] => {
            self.record = false;
            self.send_exits(Sender::Done);
        })
    }

    fn release(&mut self) {
        self.frozen = false;
        self.stopped = false;
    }

    fn send_releases(&mut self) -> bool {
        when!(self.send == Sender::Releasing => {
            self.release();
            self.dump = false;
            self.send = Sender::Released;
        })
    }

    fn send_fails(&mut self) -> bool {
        when!(self.send == Sender::Released => {
            self.record = false;
            self.send_exits(Sender::Failed);
        })
    }

    fn send_tries_again(&mut self) -> bool {
        let free = self.receive && self.dir == Dir::Own && self.session == Session::Absent;
        let undecided = matches!(self.cached, Outcome::Undecided | Outcome::Aborted);
        let nothing_left = self.restore == Restore::Absent && self.copy == [Copy::Absent; 2];
        let again = self.send == Sender::Failed && self.handover == 1 && !self.record;
        when!(again && free && undecided && nothing_left && self.tree == [true; 2] && !self.third => {
            self.handover = 2;
            self.send = Sender::Dumped;
            self.dump = true;
            self.ran_on = false;
            self.link = true;
            self.session = Session::Restoring;
            self.restore = Restore::Working;
            self.copy = [Copy::InRestorer; 2];
            self.cached = Outcome::Undecided;
            self.durable = Outcome::Undecided;
        })
    }

    fn retry_elsewhere(&mut self, model: &HandOver) -> bool {
        let noticed = model.has(Rule::RefuseInDoubt) && model.has(Rule::OnePlace);
        let in_doubt = self.record && !self.send.is_alive() && self.lock == Lock::Free;
        when!(in_doubt && !noticed && self.tree == [true; 2] && !self.third => {
            self.third = true;
            self.tree = [false; 2];
            self.record = false;
        })
    }

    fn resolve_starts(&mut self, model: &HandOver, index: usize) -> bool {
        let free = match model.has(Rule::Lock) {
            true => self.lock == Lock::Free,
            false => true,
        };
        when!(self.resolvers[index] == Resolver::Idle && self.record && free => {
            if model.has(Rule::Lock) { self.lock = Lock::Resolver(index) }
            self.resolvers[index] = Resolver::Asking;
        })
    }

    fn resolve_asks(&mut self, model: &HandOver, index: usize, runs: bool) -> bool {
        let asks = self.resolvers[index] == Resolver::Asking && self.answers(model, runs);
        when!(asks => {
            self.told_running |= runs;
            self.resolvers[index] = if runs { Resolver::Killing } else { Resolver::Releasing };
        })
    }

    fn resolve_releases(&mut self, index: usize) -> bool {
        when!(self.resolvers[index] == Resolver::Releasing => {
            self.release();
            self.resolvers[index] = Resolver::Acted;
        })
    }

    fn resolve_is_done(&mut self, index: usize) -> bool {
        let killed = self.resolvers[index] == Resolver::Killing && self.tree == [false; 2];
        when!(killed || self.resolvers[index] == Resolver::Acted => {
            self.record = false;
            self.resolve_exits(index);
        })
    }

    fn resolve_fails(&mut self, index: usize) -> bool {
        when!(self.resolvers[index] == Resolver::Asking => self.resolve_exits(index))
    }

    /// A `send --resolve` is no more.
    pub(crate) fn resolve_exits(&mut self, index: usize) {
        self.resolvers[index] = Resolver::Idle;
        if self.lock == Lock::Resolver(index) {
            self.lock = Lock::Free;
        }
    }

    /// Asks the receiver that listens whether the copy runs. Returns whether it answers `runs`. The connection
    /// that had the migration is cut by the question.
    fn answers(&mut self, model: &HandOver, runs: bool) -> bool {
        if !self.receive {
            return false;
        }
        if self.dir == Dir::Other {
            return !runs && !model.has(Rule::RefuseUnknown);
        }
        if self.session != Session::Absent {
            // The question takes the lease: the session ends at its next look at the connection. The answer
            // comes when it is over.
            return false;
        }
        match self.cached {
            Outcome::Running if runs => {}
            Outcome::Aborted if !runs => {}
            Outcome::Undecided
                if !runs && self.restore == Restore::Absent && self.copy == [Copy::Absent; 2] =>
            {
                self.cached = Outcome::Aborted;
                self.durable = Outcome::Aborted;
            }
            _ => return false,
        }
        self.resync(model);
        true
    }

    // ---- The destination ----

    /// The connection is lost, with what was in flight.
    pub(crate) fn cut(&mut self) {
        self.link = false;
        self.request = None;
        self.answer = None;
    }

    fn say(&mut self, answer: Answer) {
        if self.link {
            self.answer = Some(answer);
        }
    }

    fn criu_holds(&mut self) -> bool {
        when!(self.restore == Restore::Working => {
            self.restore = Restore::Holds;
            if self.session == Session::Restoring {
                if self.finishing {
                    self.session = Session::Committed;
                } else {
                    self.session = Session::Waiting;
                    self.say(Answer::Restored);
                }
            }
        })
    }

    /// CRIU is killed, and what waits in its restorer after it.
    fn end_restore(&mut self) {
        self.restore = Restore::Absent;
        for process in &mut self.copy {
            if *process == Copy::InRestorer {
                *process = Copy::Absent;
            }
        }
    }

    fn session_fails(&mut self) -> bool {
        let early =
            matches!(self.session, Session::Restoring | Session::Waiting) && !self.finishing;
        let why = !self.link || self.restore == Restore::Absent;
        when!(early && why && self.request.is_none() => {
            self.end_restore();
            self.cached = Outcome::Aborted;
            self.session = Session::WritingAborted;
        })
    }

    fn session_aborts(&mut self) -> bool {
        when!(self.session == Session::WritingAborted => {
            self.durable = Outcome::Aborted;
            self.session_ends();
            self.say(Answer::Refuse);
        })
    }

    pub(crate) fn session_ends(&mut self) {
        self.session = Session::Absent;
        self.finishing = false;
    }

    fn session_commits(&mut self) -> bool {
        when!(self.session == Session::Waiting && self.request == Some(Request::Commit) => {
            self.request = None;
            self.cached = Outcome::Committed;
            self.this_boot = true;
            self.session = Session::WritingCommitted;
        })
    }

    fn committed_is_durable(&mut self) -> bool {
        when!(self.session == Session::WritingCommitted => {
            self.durable = Outcome::Committed;
            self.session = Session::Committed;
        })
    }

    fn session_continues(&mut self) -> bool {
        when!(self.session == Session::Committed && self.restore == Restore::Holds => {
            self.restore = Restore::Catching;
            self.session = Session::Continued;
        })
    }

    fn criu_catches(&mut self) -> bool {
        when!(self.restore == Restore::Catching => {
            self.restore = Restore::PreResume;
            self.copy = [Copy::Caught; 2];
        })
    }

    fn session_releases(&mut self) -> bool {
        when!(self.session == Session::Continued && self.restore == Restore::PreResume => {
            self.restore = Restore::Releasing;
            self.session = Session::Releasing;
        })
    }

    fn running_is_durable(&mut self) -> bool {
        when!(self.receive && self.cached == Outcome::Running && self.durable != Outcome::Running => {
            self.durable = Outcome::Running;
        })
    }

    /// A process of the copy runs.
    fn run_one(&mut self) -> bool {
        let first = !self.copy_runs() && !self.copy_exited();
        let Some(process) = self
            .copy
            .iter_mut()
            .find(|process| **process == Copy::Caught)
        else {
            return false;
        };
        *process = Copy::Running;
        if first {
            self.released += 1;
            self.missing = true;
            self.holders = 0;
        }
        true
    }

    /// The tracer of the copy is gone: what has left the restorer runs.
    pub(crate) fn tracer_is_gone(&mut self, model: &HandOver) {
        self.restore = Restore::Absent;
        while self.run_one() {}
        self.start_holders(model);
    }

    fn start_holders(&mut self, model: &HandOver) {
        if self.missing && self.copy_runs() {
            let several = model.has(Rule::SeveralHolders);
            self.holders = if several { HOLDERS } else { 1 };
        }
    }

    fn criu_releases(&mut self) -> bool {
        let releases = self.restore == Restore::Releasing && self.run_one();
        if releases {
            // They were there before the first process ran.
            self.holders = HOLDERS;
        }
        releases
    }

    fn session_is_done(&mut self, model: &HandOver) -> bool {
        let released =
            !self.copy.contains(&Copy::Caught) && (self.copy_runs() || self.copy_exited());
        let by_criu = self.session == Session::Releasing && self.restore == Restore::Releasing;
        when!(by_criu && released => {
            self.restore = Restore::Absent;
            self.start_holders(model);
            self.cached = Outcome::Running;
            self.session_ends();
            self.say(Answer::Running);
        })
    }

    /// CRIU died after the commit.
    fn criu_died_late(&self) -> bool {
        let late = matches!(
            self.session,
            Session::Committed | Session::Continued | Session::Releasing
        );
        let again = self.session == Session::Restoring && self.finishing;
        (late || again) && self.restore == Restore::Absent
    }

    fn session_restores_again(&mut self, model: &HandOver) -> bool {
        let waits = self.copy.contains(&Copy::InRestorer);
        let ended = self.copy == [Copy::Absent; 2];
        when!(self.criu_died_late() && model.has(Rule::DeathMeansRunning) && (waits || ended) => {
            self.end_restore();
            self.restore_again();
        })
    }

    /// What was read is acted on: it is made durable before.
    fn resync(&mut self, model: &HandOver) {
        if model.has(Rule::Resync) {
            self.durable = self.cached;
        }
    }

    fn restore_again(&mut self) {
        self.restore = Restore::Working;
        self.copy = [Copy::InRestorer; 2];
        self.session = Session::Restoring;
        self.finishing = true;
    }

    fn session_finds_it_running(&mut self, model: &HandOver) -> bool {
        let runs = self.copy_runs() || self.copy_exited();
        when!(self.criu_died_late() && model.has(Rule::DeathMeansRunning) && runs => {
            self.cached = Outcome::Running;
            self.session_ends();
            self.say(Answer::Running);
        })
    }

    fn session_kills_it(&mut self, model: &HandOver) -> bool {
        when!(self.criu_died_late() && !model.has(Rule::DeathMeansRunning) => {
            self.copy = [Copy::Absent; 2];
            self.cached = Outcome::Aborted;
            self.session = Session::WritingAborted;
        })
    }

    fn receive_starts(&mut self) -> bool {
        when!(!self.receive || self.dir == Dir::Other => {
            self.receive = true;
            self.dir = Dir::Own;
            self.session_ends();
            self.cut();
        })
    }

    fn idle(&self) -> bool {
        self.receive && self.dir == Dir::Own && self.session == Session::Absent
    }

    fn receive_ends_leftovers(&mut self) -> bool {
        let undecided = matches!(self.cached, Outcome::Undecided | Outcome::Aborted);
        let left = self.restore != Restore::Absent || self.copy.contains(&Copy::InRestorer);
        when!(self.idle() && undecided && left => self.end_restore())
    }

    /// Whether the copy never ran, as far as can be seen now.
    fn never_ran(&self, model: &HandOver) -> bool {
        if self.copy.contains(&Copy::InRestorer) {
            return model.has(Rule::JudgeByRestorer);
        }
        let gone = !self.copy_runs() && !self.copy.contains(&Copy::Caught);
        gone && !model.has(Rule::GoneHasRun)
    }

    fn finish_restores(&mut self, model: &HandOver) -> bool {
        let committed = self.idle() && self.cached == Outcome::Committed && self.this_boot;
        when!(committed && self.restore != Restore::PreResume && self.never_ran(model) => {
            self.resync(model);
            self.end_restore();
            self.restore_again();
        })
    }

    fn finish_finds_it_ran(&mut self, model: &HandOver) -> bool {
        let committed = self.idle() && self.cached == Outcome::Committed && self.this_boot;
        let judged = self.restore == Restore::Absent && !self.never_ran(model);
        when!(committed && judged => {
            self.resync(model);
            self.cached = Outcome::Running;
        })
    }

    fn finish_ends_criu(&mut self, model: &HandOver) -> bool {
        let decided = matches!(self.cached, Outcome::Committed | Outcome::Running);
        let left = matches!(self.restore, Restore::PreResume | Restore::Releasing);
        when!(self.idle() && decided && left => {
            self.resync(model);
            self.cached = Outcome::Running;
            self.restore = Restore::Absent;
            while self.run_one() {}
            self.holders = HOLDERS;
        })
    }

    fn filler_is_replaced(&mut self, model: &HandOver) -> bool {
        let some_left = self.holders > 0;
        let several = model.has(Rule::SeveralHolders);
        when!(self.missing && self.copy_runs() && several && some_left && self.holders < HOLDERS => {
            self.holders = HOLDERS;
        })
    }

    fn filler_is_done(&mut self) -> bool {
        when!(self.missing && self.copy_runs() && self.holders > 0 && !self.zero_pages => {
            self.missing = false;
            self.holders = 0;
        })
    }
}
