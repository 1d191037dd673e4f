//! What the model predicts of a fault at a step: where the target may run when all is over.

use crate::state::{Resolver, Session, State};
use crate::{Event, Fault, HandOver, Party, Step};
use stateright::Model;
use std::collections::{BTreeSet, HashSet};

/// Where the target runs when all is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum End {
    /// At the source.
    Source,
    /// At the destination, or it ran to its end there.
    Destination,
    /// The destination's host lost its power, and the process with it.
    Lost,
}

/// A moment beside a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Moment {
    /// The step is the next that its party does.
    Before,
    /// The step is done.
    After,
}

/// What stands still from this moment until the fault has happened. Everything else goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Halted {
    /// `send`.
    Send,
    /// `send --resolve`.
    Resolve,
    /// `receive`.
    Receive,
    /// The connection: nothing arrives.
    Link,
}

impl Halted {
    /// Whether a step cannot be done now.
    fn stops(self, step: Step) -> bool {
        let hears = matches!(
            step,
            Step::SendHearsRestored
                | Step::SendHearsRunning
                | Step::SendHearsRefuse
                | Step::SessionCommits
        );
        match self {
            Self::Link => hears,
            Self::Send => step.party() == Party::Send,
            Self::Resolve => step.party() == Party::Resolve,
            Self::Receive => step.party() == Party::Receive,
        }
    }
}

/// A point of a run at which a fault happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct At {
    /// The step.
    pub step: Step,
    /// Before it or after it.
    pub moment: Moment,
    /// What stands still there.
    pub halted: Halted,
}

/// What may come of a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prediction {
    /// Where the target may run when all is over; nothing if the point is never reached.
    pub ends: BTreeSet<End>,
    /// Whether no promise of the protocol may be broken.
    pub keeps_promises: bool,
}

/// Whether a `send` hands over again after a refused hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Retries {
    /// It exits.
    Never,
    /// It does once.
    Once,
}

impl HandOver {
    /// Predicts what may come of it if these faults happen, one after another: the `earlier` ones
    /// at any time, the `last` at this point. A fault that cannot happen, such as the death of a program that has
    /// exited, changes nothing.
    #[must_use]
    pub fn predict(
        &self,
        earlier: &[Fault],
        at: At,
        last: Option<Fault>,
        retries: Retries,
    ) -> Prediction {
        let goes_on = |step| retries == Retries::Once || step != Step::SendTriesAgain;
        let mut states: HashSet<_> = self.init_states().into_iter().collect();
        states = self.reachable(states, &goes_on);
        for &fault in earlier {
            let hit = |state: &State| self.next_state(state, Event::Fault(fault));
            states = self.reachable(states.iter().filter_map(hit).collect(), &goes_on);
        }
        let beside = |state: &State| {
            let done = self.next_state(state, Event::Step(at.step))?;
            Some(match at.moment {
                Moment::Before => state.clone(),
                Moment::After => done,
            })
        };
        states = states.iter().filter_map(beside).collect();
        states = self.reachable(states, &|step| goes_on(step) && !at.halted.stops(step));
        if let Some(fault) = last {
            let hit = |state| {
                self.next_state(&state, Event::Fault(fault))
                    .unwrap_or(state)
            };
            states = states.into_iter().map(hit).collect();
        }
        let over = self.reachable(states, &goes_on);
        let properties = self.properties();
        let keeps = |state: &State| properties.iter().all(|it| (it.condition)(self, state));
        Prediction {
            ends: over.iter().filter_map(State::end).collect(),
            keeps_promises: over.iter().all(keeps),
        }
    }

    /// These states, and all that such steps lead to.
    fn reachable(&self, from: HashSet<State>, goes_on: &dyn Fn(Step) -> bool) -> HashSet<State> {
        let mut open: Vec<_> = from.iter().cloned().collect();
        let mut found = from;
        while let Some(state) = open.pop() {
            for &step in Step::ALL.iter().filter(|&&step| goes_on(step)) {
                let next = self.next_state(&state, Event::Step(step));
                open.extend(next.filter(|next| found.insert(next.clone())));
            }
        }
        found
    }
}

impl State {
    /// Where the target runs, if all is over: no program handles the hand-over, and nothing is in doubt.
    fn end(&self) -> Option<End> {
        let handled = self.send.is_alive() || self.resolvers != [Resolver::Idle; 2];
        if handled {
            return None;
        }
        if self.destination_lost {
            return Some(End::Lost);
        }
        let over = !self.record && self.session == Session::Absent && self.receive;
        match over && self.is_settled() {
            true if self.source_runs() => Some(End::Source),
            true => Some(End::Destination),
            false => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rule;

    fn ends(step: Step, moment: Moment, halted: Halted, last: Option<Fault>) -> Vec<End> {
        let at = At {
            step,
            moment,
            halted,
        };
        let prediction = HandOver::new(0).predict(&[], at, last, Retries::Never);
        assert!(prediction.keeps_promises);
        prediction.ends.into_iter().collect()
    }

    #[test]
    fn target_moves_if_nothing_fails() {
        let moved = ends(Step::SendHolds, Moment::Before, Halted::Send, None);
        assert_eq!(moved, [End::Destination]);
    }

    #[test]
    fn the_commit_decides_where_the_target_runs() {
        let kill = Some(Fault::KillSend);
        let (before, after) = (Moment::Before, Moment::After);
        let kept = ends(Step::SendCommits, before, Halted::Send, kill);
        assert_eq!(kept, [End::Source]);
        let dropped = ends(Step::SendCommits, after, Halted::Link, kill);
        assert_eq!(dropped, [End::Source]);
        // The receiver may have received it.
        let sent = ends(Step::SendCommits, after, Halted::Send, kill);
        assert_eq!(sent, [End::Source, End::Destination]);
        let moved = ends(Step::CommittedIsDurable, after, Halted::Receive, kill);
        assert_eq!(moved, [End::Destination]);
    }

    #[test]
    fn committed_process_is_lost_with_the_power_of_its_host() {
        let power = Some(Fault::DestinationPower);
        let after = |step| ends(step, Moment::After, Halted::Receive, power);
        assert_eq!(after(Step::SessionCommits), [End::Source]);
        assert_eq!(after(Step::CommittedIsDurable), [End::Lost]);
    }

    #[test]
    fn missing_rule_breaks_a_promise() {
        let at = At {
            step: Step::CriuReleases,
            moment: Moment::After,
            halted: Halted::Receive,
        };
        let mut model = HandOver::new(0);
        model.without.insert(Rule::DeathMeansRunning);
        let fault = Some(Fault::KillRestore);
        assert!(!model.predict(&[], at, fault, Retries::Never).keeps_promises);
    }

    #[test]
    fn a_step_that_follows_a_fault_is_reached_only_after_it() {
        let at = At {
            step: Step::SendLearnsAborted,
            moment: Moment::After,
            halted: Halted::Send,
        };
        let model = HandOver::new(0);
        let ends = |earlier: &[Fault]| model.predict(earlier, at, None, Retries::Never).ends;
        assert_eq!(ends(&[]), BTreeSet::new());
        assert_eq!(ends(&[Fault::CutLink]), BTreeSet::from([End::Source]));
    }
}
