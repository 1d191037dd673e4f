//! Where each step of the model is in the real programs.

use pageferry_model::{At, Halted, Moment, Step};
use pageferry_tests::gate::{Action, Call, Object};
use pageferry_tests::link;
use pageferry_tests::trial::Halt;

/// After one round of a running tree comes one during CRIU's dump, then the last.
const DURING: u32 = 2;
const LAST: u32 = 3;

/// What comes before the first state of the model, by the frames that are sent.
pub(crate) const ROUNDS: [link::Step; 7] = [
    (
        "the beginning of the round during the dump",
        3,
        false,
        DURING,
    ),
    ("the end of the round during the dump", 6, false, DURING),
    ("the ack of the round during the dump", 7, true, DURING),
    ("the last round's end", 6, false, LAST),
    ("the last round's ack", 7, true, LAST),
    ("a state image", 13, false, LAST),
    ("restore", 14, false, LAST),
];

/// Number of the first of these frames, during which CRIU's code is in the target. A CRIU that is killed then takes
/// the target with it, whatever Pageferry does.
pub(crate) const DUMPING: usize = 3;

/// What comes after the last message that decides something.
pub(crate) const FAREWELL: [link::Step; 2] =
    [("finish", 8, false, LAST), ("goodbye", 9, true, LAST)];

const RESTORED: link::Step = ("restored", 15, true, LAST);
const COMMIT: link::Step = ("commit", 16, false, LAST);
const RUNNING: link::Step = ("running", 17, true, LAST);

const fn does(action: Action, object: Object) -> Call {
    Call::exit(action, object)
}

const fn about_to(action: Action, object: Object) -> Call {
    Call::entry(action, object)
}

const RECORD: Object = Object::Path(".json");
const OUTCOME: Object = Object::Path("/outcome.json");
const CRIU: Object = Object::Criu;

/// At the source, CRIU has dumped the target.
const DUMPED: Call = does(Action::Receive, CRIU).with("post-dump");
const FROZEN: Call = does(Action::Read, Object::Path("/cgroup.events")).with("frozen 1");
/// At the destination, all processes wait in CRIU's restorer.
const HELD: Call = does(Action::Receive, CRIU).with("post-restore");
/// They have left it.
const CAUGHT: Call = does(Action::Receive, CRIU).with("pre-resume");
const COMMITTED: Call = does(Action::Write, OUTCOME).with("committed");
const RAN: Call = does(Action::Write, OUTCOME).with("running");

/// Where a step is in a run of the real programs.
#[derive(Debug)]
pub(crate) enum Place {
    /// Every move does it, between these two.
    Between(Halt, Halt),
    /// A `send --resolve` does it, between these two of its calls, if `send` dies at this point.
    Resolved(Halt, [Call; 2]),
    /// Only a move that was hit by a fault does it, or a move after that: for this reason it is in no row of the
    /// table, which hits a move once.
    AfterFault(&'static str),
    /// It cannot be halted, for this reason.
    Unseen(&'static str),
}

use Halt::{Frame, Receive, Send};
use Place::{AfterFault, Between, Resolved, Unseen};

/// Returns where a step is. There is no default: a new step has to be placed.
pub(crate) fn place(step: Step) -> Place {
    const REFUSED: &str = "the receiver refuses only after a fault";
    const ASKED: &str = "send asks again only if the answer is lost";
    const RESOLVED: &str = "between two calls of a send --resolve that are halted";
    const SECOND: &str = "the second send --resolve does what the first does";
    const FINISHED: &str = "a receiver finishes only what another has left";
    match step {
        Step::SendHearsRestored => Between(
            Frame(RESTORED, false),
            Send(vec![DUMPED, about_to(Action::Open, Object::Path(".lock"))]),
        ),
        Step::SendRecords => Between(
            Send(vec![DUMPED, about_to(Action::Rename, RECORD)]),
            Send(vec![
                DUMPED,
                does(Action::Rename, RECORD),
                does(Action::Sync, Object::Path("/run/pageferry")),
            ]),
        ),
        Step::SendHolds => Between(
            Send(vec![
                DUMPED,
                about_to(Action::Write, Object::Path("/cgroup.freeze")).with("1"),
            ]),
            Send(vec![DUMPED, FROZEN]),
        ),
        Step::SendCommits => Between(
            Send(vec![DUMPED, FROZEN, about_to(Action::Wait, Object::Any)]),
            Frame(COMMIT, false),
        ),
        Step::SendHearsRunning => Between(
            Frame(RUNNING, false),
            Send(vec![DUMPED, FROZEN, about_to(Action::Send, CRIU)]),
        ),
        Step::SendKills => Between(
            Send(vec![DUMPED, FROZEN, about_to(Action::Send, CRIU)]),
            Send(vec![
                DUMPED,
                FROZEN,
                does(Action::Send, CRIU),
                does(Action::Receive, CRIU),
            ]),
        ),
        Step::SendIsDone => Between(
            Send(vec![DUMPED, about_to(Action::Unlink, RECORD)]),
            Send(vec![DUMPED, does(Action::Unlink, RECORD)]),
        ),
        Step::CriuHolds => Between(
            Receive(vec![does(Action::Receive, CRIU).with("pre-restore")]),
            Receive(vec![HELD]),
        ),
        Step::SessionCommits => Between(Frame(COMMIT, false), Receive(vec![HELD, COMMITTED])),
        Step::CommittedIsDurable => Between(
            Receive(vec![COMMITTED, about_to(Action::Sync, OUTCOME)]),
            Receive(vec![COMMITTED, does(Action::Sync, OUTCOME)]),
        ),
        Step::SessionContinues => Between(
            Receive(vec![COMMITTED, about_to(Action::Send, CRIU)]),
            Receive(vec![COMMITTED, does(Action::Send, CRIU)]),
        ),
        Step::CriuCatches => Between(
            Receive(vec![COMMITTED, does(Action::Send, CRIU)]),
            Receive(vec![COMMITTED, CAUGHT]),
        ),
        Step::SessionReleases => Between(
            Receive(vec![CAUGHT, about_to(Action::Send, CRIU)]),
            Receive(vec![CAUGHT, does(Action::Send, CRIU)]),
        ),
        Step::CriuReleases => Between(
            Receive(vec![CAUGHT, does(Action::Send, CRIU)]),
            Receive(vec![
                CAUGHT,
                does(Action::Send, CRIU),
                does(Action::Receive, CRIU),
            ]),
        ),
        Step::SessionIsDone => Between(
            Receive(vec![
                CAUGHT,
                does(Action::Send, CRIU),
                does(Action::Receive, CRIU),
            ]),
            Frame(RUNNING, false),
        ),
        Step::RunningIsDurable => Between(
            Receive(vec![RAN, about_to(Action::Sync, OUTCOME)]),
            Receive(vec![RAN, does(Action::Sync, OUTCOME)]),
        ),
        Step::SendGivesUp => AfterFault("send gives up only if it is refused, or the link is cut"),
        Step::SendFindsCriuDead => AfterFault("CRIU dies only if it is killed"),
        Step::SendHearsRefuse | Step::SendReleases | Step::SendFails => AfterFault(REFUSED),
        Step::SendLosesAnswer
        | Step::SendLearnsRunning
        | Step::SendLearnsAborted
        | Step::SendExitsInDoubt => AfterFault(ASKED),
        Step::SendTriesAgain => AfterFault("the first hand-over was refused"),
        // If send dies while it holds the target, the receiver aborts.
        Step::Resolve0Releases => Resolved(
            Send(vec![DUMPED, FROZEN]),
            [
                about_to(Action::Write, Object::Path("/cgroup.freeze")),
                does(Action::Write, Object::Path("/cgroup.freeze")),
            ],
        ),
        Step::Resolve0IsDone => Resolved(
            Send(vec![DUMPED, FROZEN]),
            [
                about_to(Action::Unlink, RECORD),
                does(Action::Unlink, RECORD),
            ],
        ),
        Step::Resolve0Kills => Resolved(
            Frame(RUNNING, false),
            [
                about_to(Action::Signal, Object::Any),
                does(Action::Signal, Object::Any),
            ],
        ),
        Step::Resolve0 | Step::Resolve0LearnsRunning | Step::Resolve0LearnsAborted => {
            AfterFault(RESOLVED)
        }
        Step::Resolve0Fails => AfterFault("no receiver answers"),
        Step::RetryElsewhere => AfterFault("this hand-over is in doubt"),
        Step::Resolve1
        | Step::Resolve1LearnsRunning
        | Step::Resolve1LearnsAborted
        | Step::Resolve1Kills
        | Step::Resolve1Releases
        | Step::Resolve1IsDone
        | Step::Resolve1Fails => AfterFault(SECOND),
        Step::SessionFails
        | Step::SessionAborts
        | Step::SessionRestoresAgain
        | Step::SessionFindsItRunning
        | Step::SessionKillsIt => AfterFault("a session fails only after a fault"),
        Step::ReceiveStarts
        | Step::ReceiveEndsLeftovers
        | Step::FinishRestores
        | Step::FinishFindsItRan
        | Step::FinishEndsCriu => AfterFault(FINISHED),
        Step::FillerIsReplaced => AfterFault("a filler is replaced only if it dies"),
        Step::FillerIsDone => Unseen("the filler may be done before the copy runs"),
    }
}

/// Returns every point at which a `send --resolve` can be halted: where `send` dies before, the call, the point.
pub(crate) fn points_of_resolve() -> Vec<(Halt, Call, At)> {
    let mut points = Vec::new();
    for &step in Step::ALL {
        let Resolved(send_dies, [before, after]) = place(step) else {
            continue;
        };
        for (call, moment) in [(before, Moment::Before), (after, Moment::After)] {
            let halted = Halted::Resolve;
            let at = At {
                step,
                moment,
                halted,
            };
            points.push((send_dies.clone(), call, at));
        }
    }
    points
}

/// Returns every point at which a move can be halted, in the order of the model's steps. A point after one step
/// may be the point before the next: then it is there once.
pub(crate) fn points() -> Vec<(Halt, At)> {
    let mut points: Vec<(Halt, At)> = Vec::new();
    for &step in Step::ALL {
        let Between(before, after) = place(step) else {
            continue;
        };
        for (halt, moment) in [(before, Moment::Before), (after, Moment::After)] {
            if !points.iter().any(|(known, _)| *known == halt) {
                let halted = match &halt {
                    Frame(..) => Halted::Link,
                    Send(_) => Halted::Send,
                    Receive(_) => Halted::Receive,
                };
                let at = At {
                    step,
                    moment,
                    halted,
                };
                points.push((halt, at));
            }
        }
    }
    points
}
