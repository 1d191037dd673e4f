//! The table of faults. Its rows are the points before and after each step of the model; each test is a column.
//! The model says where the target may run in the end.

use crate::places::{self, DUMPING, FAREWELL, ROUNDS, place, points, points_of_resolve};
use pageferry_model::{At, End, Fault as ModelFault, Halted, HandOver, Moment, Retries, Step};
use pageferry_tests::actors::Actor;
use pageferry_tests::criu::Criu;
use pageferry_tests::gate::Call;
use pageferry_tests::trial::{Fault, Halt, Kind, Place, Trial, panic_text};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Number of moves at a time.
const WORKERS: usize = 2;

/// A fault at a point, and where the target may run afterwards.
#[derive(Debug)]
struct Row {
    name: String,
    halt: Halt,
    fault: Fault,
    /// In a row of `send --resolve`, which runs once `send` was killed at the halt: the call at which the fault
    /// happens. `Kill(Send)` kills it.
    resolve: Option<Call>,
    ends: BTreeSet<Place>,
}

/// The faults of the model that one of the real faults may be, depending on how far it is noticed.
fn in_model(fault: Fault) -> &'static [Option<ModelFault>] {
    match fault {
        // The freezer has done its work before the hand-over.
        Fault::Nothing | Fault::Kill(Actor::Freezer) | Fault::Continue | Fault::Resolve => &[None],
        Fault::Kill(Actor::Send) => &[Some(ModelFault::KillSend)],
        Fault::Kill(Actor::SourceCriu) => &[Some(ModelFault::KillDump)],
        Fault::Kill(Actor::Receive) => &[Some(ModelFault::KillReceive)],
        Fault::Kill(Actor::DestinationCriu) => &[Some(ModelFault::KillRestore)],
        // CRIU needs it until the copy runs.
        Fault::Kill(Actor::Filler) => {
            &[Some(ModelFault::KillFiller), Some(ModelFault::KillRestore)]
        }
        Fault::Cut => &[Some(ModelFault::CutLink)],
        // A late frame is lost, for the connection is; a repeated one ends the connection.
        Fault::Delay | Fault::Repeat => &[None, Some(ModelFault::CutLink)],
        Fault::Power => &[Some(ModelFault::DestinationPower)],
    }
}

/// Returns where the target may run.
fn predict(
    earlier: &[ModelFault],
    at: At,
    last: &[Option<ModelFault>],
    retries: Retries,
) -> BTreeSet<Place> {
    let mut ends = BTreeSet::new();
    for &last in last {
        let prediction = HandOver::new(0).predict(earlier, at, last, retries);
        assert!(prediction.keeps_promises, "{at:?}");
        ends.extend(prediction.ends.into_iter().map(|end| match end {
            End::Source => Place::Source,
            End::Destination => Place::Destination,
            End::Lost => Place::Nowhere,
        }));
    }
    // A move that may be tried again is.
    if retries == Retries::Once && ends.contains(&Place::Destination) {
        ends.remove(&Place::Source);
    }
    ends
}

/// All points that a later step reaches.
fn following(at: At) -> impl Iterator<Item = At> {
    let points = points().into_iter().map(|(_, point)| point);
    points.skip_while(move |point| *point != at).skip(1)
}

/// The rows of a column: all points of the model, and the frames of the rounds before it and after it.
fn rows(fault: Fault, retries: Retries) -> Vec<Row> {
    let early = match (in_model(fault), retries) {
        ([None], _) | (_, Retries::Once) => Place::Destination,
        _ => Place::Source,
    };
    let done = At {
        step: Step::SendIsDone,
        moment: Moment::After,
        halted: Halted::Link,
    };
    let early = BTreeSet::from([early]);
    let late = predict(&[], done, in_model(fault), retries);
    let first = match fault {
        Fault::Kill(Actor::SourceCriu) => DUMPING,
        _ => 0,
    };
    let rounds = ROUNDS[first..].iter().map(|frame| (frame, &early));
    let frames = rounds.chain(FAREWELL.iter().map(|frame| (frame, &late)));
    let mut rows = Vec::new();
    for (&frame, ends) in frames {
        for after in [false, true] {
            let moment = if after { "after" } else { "before" };
            rows.push(Row {
                name: format!("{fault:?} {moment} {}", frame.0),
                halt: Halt::Frame(frame, after),
                fault,
                resolve: None,
                ends: ends.clone(),
            });
        }
    }
    for (halt, at) in points() {
        let mut ends = predict(&[], at, in_model(fault), retries);
        if fault == Fault::Repeat {
            // The connection ends after the frame has arrived.
            let later = |at| predict(&[], at, in_model(fault), retries);
            ends.extend(following(at).flat_map(later));
        }
        rows.push(Row {
            name: format!("{fault:?} {:?} {:?}", at.moment, at.step),
            halt,
            fault,
            resolve: None,
            ends,
        });
    }
    rows
}

/// Runs a row. Returns where the target runs, and whether the fault could be injected.
fn run(row: &Row, kind: Kind<'_>) -> (Place, bool) {
    let mut trial = Trial::start(kind, Some(row.halt.clone()), row.fault);
    assert!(trial.is_halted(), "the move ends before it is halted");
    let hit = match row.resolve {
        Some(call) => {
            let killed = Fault::Kill(Actor::Send);
            trial.hit(killed);
            trial.go_on(killed);
            trial.hit_resolve(call, row.fault);
            true
        }
        None => {
            let hit = trial.hit(row.fault);
            trial.go_on(row.fault);
            hit
        }
    };
    (trial.settle(row.ends.contains(&Place::Nowhere)), hit)
}

fn check(row: &Row, kind: Kind<'_>) -> Result<(), String> {
    let began = Instant::now();
    let (place, hit) = catch_unwind(AssertUnwindSafe(|| run(row, kind)))
        .map_err(|why| format!("{}: {}", row.name, panic_text(&*why)))?;
    let took = began.elapsed();
    eprintln!(
        "{}: {place:?} of {:?}, hit {hit}, {took:.1?}",
        row.name, row.ends
    );
    let expected = match hit {
        true => row.ends.contains(&place),
        false => place == Place::Destination,
    };
    match expected {
        true => Ok(()),
        false => Err(format!("{}: {place:?}, not {:?}", row.name, row.ends)),
    }
}

/// Runs all rows, a few at a time, and panics with those that failed.
fn check_all(rows: Vec<Row>, kind: Kind<'_>) {
    // PAGEFERRY_ROW selects rows by their names.
    let wanted = std::env::var("PAGEFERRY_ROW").unwrap_or_default();
    let rows = rows.into_iter().filter(|row| row.name.contains(&wanted));
    let (open, failed) = (Mutex::new(rows), Mutex::new(Vec::new()));
    let next = || open.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(row) = next() {
                    if let Err(why) = check(&row, kind) {
                        failed
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(why);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    assert!(
        failed.is_empty(),
        "{} rows:\n{}",
        failed.len(),
        failed.join("\n")
    );
}

const FEATURES: &str = "heap=8 children=1 dirty=20 history";

fn check_column(fault: Fault, retries: Retries) {
    let Some(criu) = Criu::stable("faults of a hand-over") else {
        return;
    };
    let patience = match retries {
        Retries::Never => "0",
        Retries::Once => "60s",
    };
    let mut send = vec!["--max-rounds", "1", "--reconnect-for", patience];
    match fault {
        // `send` gives up before the frame arrives.
        Fault::Delay => send.extend(["--timeout", "1s"]),
        // No receiver may ever answer.
        Fault::Power => send.extend(["--timeout", "3s"]),
        _ => {}
    }
    let kind = Kind {
        criu: &criu,
        features: FEATURES,
        restore: "--restore",
        send: &send,
    };
    let mut rows = rows(fault, retries);
    if matches!(fault, Fault::Delay | Fault::Repeat) {
        rows.retain(|row| matches!(row.halt, Halt::Frame(_, false)));
    }
    check_all(rows, kind);
}

/// The model confirms which steps a move without faults does.
#[test]
fn every_step_is_in_the_table_or_follows_a_fault() {
    let model = HandOver::new(0);
    let mut rows = 0;
    for &step in Step::ALL {
        let at = At {
            step,
            moment: Moment::Before,
            halted: Halted::Link,
        };
        let fault_free = model.predict(&[], at, None, Retries::Never);
        let in_every_move = !fault_free.ends.is_empty();
        match place(step) {
            places::Place::Between(..) => {
                assert!(in_every_move, "{step:?}");
                rows += 1;
            }
            places::Place::Resolved(..) => assert!(!in_every_move, "{step:?}"),
            places::Place::AfterFault(why) => assert!(!in_every_move, "{step:?}: {why}"),
            places::Place::Unseen(why) => eprintln!("not in the table: {step:?}: {why}"),
        }
    }
    assert!(rows > 15, "{rows}");
}

#[test]
fn link_cut_at_any_step_leaves_one_copy_running() {
    check_column(Fault::Cut, Retries::Never);
}

#[test]
fn link_cut_once_at_any_step_does_not_prevent_the_move() {
    check_column(Fault::Cut, Retries::Once);
}

#[test]
fn sender_killed_at_any_step_leaves_one_copy_running() {
    check_column(Fault::Kill(Actor::Send), Retries::Never);
}

#[test]
fn resolve_hit_at_any_step_leaves_one_copy_running() {
    let Some(criu) = Criu::stable("faults of send --resolve") else {
        return;
    };
    let mut rows = Vec::new();
    for (fault, last) in [
        (Fault::Kill(Actor::Send), ModelFault::KillResolve),
        (Fault::Kill(Actor::Receive), ModelFault::KillReceive),
        (Fault::Cut, ModelFault::CutLink),
    ] {
        for (halt, call, at) in points_of_resolve() {
            let killed = [ModelFault::KillSend];
            rows.push(Row {
                name: format!("{fault:?} {:?} {:?}", at.moment, at.step),
                halt,
                fault,
                resolve: Some(call),
                ends: predict(&killed, at, &[Some(last)], Retries::Never),
            });
        }
    }
    let kind = Kind {
        criu: &criu,
        features: FEATURES,
        restore: "--restore",
        send: &["--max-rounds", "1", "--reconnect-for", "0"],
    };
    check_all(rows, kind);
}

#[test]
fn freezer_killed_at_any_step_leaves_one_copy_running() {
    check_column(Fault::Kill(Actor::Freezer), Retries::Never);
}

#[test]
fn dumping_criu_killed_at_any_step_leaves_one_copy_running() {
    check_column(Fault::Kill(Actor::SourceCriu), Retries::Never);
}

#[test]
fn receiver_killed_at_any_step_leaves_one_copy_running() {
    check_column(Fault::Kill(Actor::Receive), Retries::Never);
}

#[test]
fn restoring_criu_killed_at_any_step_leaves_one_copy_running() {
    check_column(Fault::Kill(Actor::DestinationCriu), Retries::Never);
}

#[test]
fn filler_killed_at_any_step_leaves_one_copy_running() {
    check_column(Fault::Kill(Actor::Filler), Retries::Never);
}

#[test]
fn frame_that_comes_late_or_twice_leaves_one_copy_running() {
    for fault in [Fault::Delay, Fault::Repeat] {
        check_column(fault, Retries::Never);
    }
}

#[test]
fn power_of_the_destination_lost_at_any_step_leaves_no_second_copy() {
    check_column(Fault::Power, Retries::Never);
}
