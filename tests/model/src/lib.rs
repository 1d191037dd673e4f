//! A model of the hand-over's commit protocol, checked over all states. `docs/design/commit-protocol.md` is its
//! specification. Every [`Step`] names the function that does it, or none if the programs do not do it yet.
//!
//! Both hosts, both CRIUs, the record, the outcome file and the connection are in one [`State`]. A [`Step`] is
//! a guarded transition of one party; a [`Fault`] is what the world does to them: kills, cut links, lost power,
//! a full disk, another directory. At most [`HandOver::faults`] of them happen. [`Rule`]s are the parts of the
//! protocol that keep its promises: without any one of them, the checker finds a violation.

mod ends;
mod faults;
mod state;
mod steps;

pub use ends::{At, End, Halted, Moment, Prediction, Retries};
pub use faults::Fault;
pub use state::{
    Answer, Copy, Dir, Lock, Outcome, Request, Resolver, Restore, Sender, Session, State, Stranger,
};
pub use steps::{Party, Step};

use stateright::{Checker, CheckerVisitor, Model, Path, Property};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

/// A part of the protocol that keeps one of its promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rule {
    /// After the tree is frozen and before `Commit`, CRIU must be alive: the tree has not run since its dump.
    CriuAlive,
    /// A receiver that has no such migration refuses to answer for it.
    RefuseUnknown,
    /// The tree is held by a frozen cgroup, which no signal and no death of a process thaws.
    Hold,
    /// One lock on the record, from its creation to its removal.
    Lock,
    /// `send --migrate` refuses a tree whose hand-over is in doubt.
    RefuseInDoubt,
    /// The record is in one place, whatever the environment says.
    OnePlace,
    /// Processes are identified by PID, start time and boot.
    ProcessIdentity,
    /// A copy that waits in CRIU's restorer does not run: it is ended and restored again.
    JudgeByRestorer,
    /// From pre-resume on, the death of CRIU means that the copy runs.
    DeathMeansRunning,
    /// CRIU keeps our end of its socket open: the death of `receive` undoes and releases nothing.
    SocketKept,
    /// A committed copy that is gone has run.
    GoneHasRun,
    /// An outcome that was read is made durable before it is answered or acted on.
    Resync,
    /// A directory belongs to one host: its copy answers for nothing and restores nothing.
    DirectoryIdentity,
    /// Several processes hold the userfaultfd of a lazy restore.
    SeveralHolders,
}

impl Rule {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::CriuAlive,
        Self::RefuseUnknown,
        Self::Hold,
        Self::Lock,
        Self::RefuseInDoubt,
        Self::OnePlace,
        Self::ProcessIdentity,
        Self::JudgeByRestorer,
        Self::DeathMeansRunning,
        Self::SocketKept,
        Self::GoneHasRun,
        Self::Resync,
        Self::DirectoryIdentity,
        Self::SeveralHolders,
    ];
}

/// The protocol, and what may happen to it.
#[derive(Debug, Clone)]
pub struct HandOver {
    /// Largest number of faults.
    pub faults: u8,
    /// The kinds of faults that may happen.
    pub kinds: Vec<Fault>,
    /// The rules that are left out.
    pub without: BTreeSet<Rule>,
}

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// A party does its next step.
    Step(Step),
    /// The world intervenes.
    Fault(Fault),
}

impl HandOver {
    /// The whole protocol with at most this many faults of every kind.
    #[must_use]
    pub fn new(faults: u8) -> Self {
        let (kinds, without) = (Fault::ALL.to_vec(), BTreeSet::new());
        Self {
            faults,
            kinds,
            without,
        }
    }

    /// Whether a rule is part of the protocol.
    #[must_use]
    pub fn has(&self, rule: Rule) -> bool {
        !self.without.contains(&rule)
    }
}

impl Model for HandOver {
    type State = State;
    type Action = Event;

    fn init_states(&self) -> Vec<State> {
        vec![State::after_dump()]
    }

    fn actions(&self, state: &State, events: &mut Vec<Event>) {
        let enabled = |step: &&Step| step.apply(self, state).is_some();
        events.extend(
            Step::ALL
                .iter()
                .filter(enabled)
                .map(|&step| Event::Step(step)),
        );
        if state.faults < self.faults {
            let possible = |fault: &&Fault| fault.apply(self, state).is_some();
            events.extend(
                self.kinds
                    .iter()
                    .filter(possible)
                    .map(|&fault| Event::Fault(fault)),
            );
        }
    }

    fn next_state(&self, state: &State, event: Event) -> Option<State> {
        let mut next = match event {
            Event::Step(step) => step.apply(self, state)?,
            Event::Fault(fault) => {
                let mut next = fault.apply(self, state)?;
                next.faults += 1;
                next
            }
        };
        next.settle(self);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two copies run", |_, state: &State| {
                let running = [
                    state.source_runs(),
                    state.copy_runs(),
                    state.third,
                    state.twin_runs,
                ];
                running.into_iter().filter(|runs| *runs).count() < 2
            }),
            Property::always("no history forks", |_, state: &State| {
                !(state.ran_on && (state.released > 0 || state.twin_runs))
            }),
            Property::always("the copy is released at most once", |_, state: &State| {
                state.released < 2
            }),
            Property::always(
                "what was said to run is not restored elsewhere",
                |_, state: &State| !(state.third && (state.told_running || state.released > 0)),
            ),
            Property::always(
                "no process of another user is killed",
                |_, state: &State| state.stranger != Stranger::Killed,
            ),
            Property::always("no copy runs on zero pages", |_, state: &State| {
                !state.zero_pages
            }),
        ]
    }
}

/// What a search found.
#[derive(Debug)]
pub struct Found {
    /// Number of states.
    pub states: usize,
    /// The violated properties, each with the events that lead there.
    pub violations: Vec<(String, Vec<Event>)>,
}

/// Remembers every state, for the search for states that nothing leads out of.
struct Recorder(Arc<Mutex<Vec<State>>>);

impl CheckerVisitor<HandOver> for Recorder {
    fn visit(&self, _: &HandOver, path: Path<State, Event>) {
        let mut states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        states.push(path.last_state().clone());
    }
}

/// Searches all states. Beside the properties of the model: from every state, some path without further faults
/// leads to exactly one running copy ("never none for ever"), unless the power of a host took the only one.
#[must_use]
pub fn check(model: &HandOver) -> Found {
    let states = Arc::new(Mutex::new(Vec::new()));
    let checker = model
        .clone()
        .checker()
        .visitor(Recorder(Arc::clone(&states)))
        .threads(1)
        .spawn_bfs()
        .join();
    let mut violations: Vec<_> = checker
        .discoveries()
        .into_iter()
        .map(|(property, path)| (property.to_owned(), path.into_actions()))
        .collect();
    let states = std::mem::take(&mut *states.lock().unwrap_or_else(PoisonError::into_inner));
    if let Some(stuck) = never_recovers(model, &states) {
        violations.push(("never none for ever".to_owned(), path_to(model, &stuck)));
    }
    Found {
        states: states.len(),
        violations,
    }
}

/// A state from which no path without faults leads to one running copy.
fn never_recovers(model: &HandOver, states: &[State]) -> Option<State> {
    let mut predecessors: HashMap<&State, Vec<usize>> = HashMap::new();
    let mut next = Vec::with_capacity(states.len());
    for state in states {
        let steps = Step::ALL.iter();
        let after = steps.filter_map(|&step| model.next_state(state, Event::Step(step)));
        next.push(after.collect::<Vec<_>>());
    }
    let known: HashMap<&State, usize> = states.iter().enumerate().map(|(i, s)| (s, i)).collect();
    for (from, after) in next.iter().enumerate() {
        for state in after {
            if let Some(&to) = known.get(state) {
                predecessors.entry(&states[to]).or_default().push(from);
            }
        }
    }
    let mut recovers: HashSet<usize> = HashSet::new();
    let mut open: Vec<usize> = (0..states.len())
        .filter(|&i| states[i].is_settled())
        .collect();
    recovers.extend(&open);
    while let Some(index) = open.pop() {
        for &before in predecessors.get(&states[index]).into_iter().flatten() {
            if recovers.insert(before) {
                open.push(before);
            }
        }
    }
    (0..states.len())
        .find(|index| !recovers.contains(index))
        .map(|index| states[index].clone())
}

/// The shortest path to a state.
fn path_to(model: &HandOver, wanted: &State) -> Vec<Event> {
    let mut seen: HashMap<State, Option<(State, Event)>> = HashMap::new();
    let mut open: std::collections::VecDeque<State> = model.init_states().into();
    seen.extend(open.iter().map(|state| (state.clone(), None)));
    while let Some(state) = open.pop_front() {
        if state == *wanted {
            break;
        }
        let mut events = Vec::new();
        model.actions(&state, &mut events);
        for event in events {
            let next = model
                .next_state(&state, event)
                .expect("only enabled events are listed");
            if !seen.contains_key(&next) {
                seen.insert(next.clone(), Some((state.clone(), event)));
                open.push_back(next);
            }
        }
    }
    let mut path = Vec::new();
    let mut at = wanted.clone();
    while let Some(Some((before, event))) = seen.get(&at) {
        path.push(*event);
        at = before.clone();
    }
    path.reverse();
    path
}
