//! Moves with random faults.

use crate::places::{ROUNDS, points};
use pageferry_tests::actors::Actor;
use pageferry_tests::criu::Criu;
use pageferry_tests::random::XorShift64;
use pageferry_tests::trial::{Fault, Halt, Kind, Place, Trial, panic_text};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Number of moves at a time.
const WORKERS: u64 = 2;

/// Longest time from one fault of a move to the next.
const NEXT_FAULT_MS: u64 = 300;

/// What one seed stands for.
#[derive(Debug)]
struct Plan {
    features: String,
    restore: &'static str,
    send: Vec<String>,
    /// The first halt, then those after it, each with a limit of time.
    halts: Vec<(Halt, Duration)>,
    faults: Vec<Fault>,
}

struct Dice(XorShift64);

impl Dice {
    fn new(seed: u64) -> Self {
        // Neighbouring seeds become different states.
        let mut state = XorShift64::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            state.next_u64();
        }
        Self(state)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.0.next_u64() >> 11) % limit
    }

    fn one_of<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }
}

impl Plan {
    fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let mut features = format!("heap={} dirty=20 history", 1 + dice.below(8));
        for (feature, most) in [("children", 3), ("threads", 4), ("shared", 2), ("memfd", 1)] {
            match dice.below(most + 1) {
                0 => {}
                number => features += &format!(" {feature}={number}"),
            }
        }
        let restore = dice.one_of(&["--restore=lazy", "--restore=eager"]);
        let rounds = dice.below(3).to_string();
        let patience = dice.one_of(&["0", "0", "30s"]);
        let send = format!("--max-rounds {rounds} --reconnect-for {patience} --timeout 5s");
        let send = send.split(' ').map(str::to_owned).collect();
        let mut halts: Vec<_> = points().into_iter().map(|(halt, _)| halt).collect();
        // Frames of the rounds are there with one round before the dump.
        if rounds == "1" {
            let frames = ROUNDS
                .iter()
                .flat_map(|&frame| [(frame, false), (frame, true)]);
            halts.extend(frames.map(|(frame, after)| Halt::Frame(frame, after)));
        } else {
            halts.retain(|halt| !matches!(halt, Halt::Frame(..)));
        }
        let mut faults: Vec<_> = (0..1 + dice.below(3)).map(|_| fault(&mut dice)).collect();
        let halts = (0..faults.len()).map(|number| {
            let time = Duration::from_millis(dice.below(NEXT_FAULT_MS));
            let halt = dice.one_of(&halts);
            match number {
                0 => (halt, time),
                _ => (last_call(halt), time),
            }
        });
        let halts: Vec<_> = halts.collect();
        // A CRIU that is killed while its code is in the target takes the target with it.
        let is_early = ROUNDS
            .iter()
            .any(|&frame| matches!(halts[0].0, Halt::Frame(it, _) if it == frame));
        for fault in &mut faults[usize::from(!is_early)..] {
            if *fault == Fault::Kill(Actor::SourceCriu) {
                *fault = Fault::Kill(Actor::Send);
            }
        }
        Self {
            halts,
            features,
            restore,
            send,
            faults,
        }
    }

    /// Runs the move. Returns where the target runs, and the number of faults at a halt.
    fn run(&self, criu: &Criu) -> (Place, usize) {
        let send: Vec<_> = self.send.iter().map(String::as_str).collect();
        let kind = Kind {
            criu,
            features: &self.features,
            restore: self.restore,
            send: &send,
        };
        let (first, _) = self.halts[0].clone();
        let mut trial = Trial::start(kind, Some(first), Fault::Nothing);
        let mut halted = trial.is_halted();
        let mut hits = 0;
        for (number, &fault) in self.faults.iter().enumerate() {
            if number > 0 {
                let (halt, time) = self.halts[number].clone();
                halted = trial.halt_again(halt, time);
            }
            hits += usize::from(halted);
            trial.hit(fault);
            trial.go_on(fault);
        }
        (trial.settle(false), hits)
    }
}

/// What comes before the call may be over already.
fn last_call(halt: Halt) -> Halt {
    let last = |calls: Vec<_>| calls.last().copied().into_iter().collect();
    match halt {
        Halt::Send(calls) => Halt::Send(last(calls)),
        Halt::Receive(calls) => Halt::Receive(last(calls)),
        Halt::Frame(..) => halt,
    }
}

fn fault(dice: &mut Dice) -> Fault {
    match dice.below(10) {
        0..=5 => Fault::Kill(dice.one_of(&Actor::ALL)),
        6..=7 => Fault::Cut,
        8 => Fault::Continue,
        _ => Fault::Resolve,
    }
}

/// A number from the environment.
fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is a number")),
    )
}

/// Runs the move of a seed.
fn check(criu: &Criu, seed: u64) -> Result<(), String> {
    let (plan, began) = (Plan::new(seed), Instant::now());
    let done = catch_unwind(AssertUnwindSafe(|| plan.run(criu)));
    let (place, hits) =
        done.map_err(|why| format!("seed {seed}: {plan:?}: {}", panic_text(&*why)))?;
    let (faults, took) = (&plan.faults, began.elapsed());
    eprintln!("seed {seed}: {place:?}, {hits} of {faults:?} halted, {took:.1?}");
    Ok(())
}

#[test]
fn moves_with_random_faults_leave_one_copy_with_one_history() {
    let Some(criu) = Criu::stable("moves with random faults") else {
        return;
    };
    // The same moves in every run of the suite; by hand, others.
    let seed = variable("PAGEFERRY_SEED");
    let default = if seed.is_some() { 1 } else { 15 };
    let first = seed.unwrap_or(1);
    let moves = variable("PAGEFERRY_RANDOM_MOVES").unwrap_or(default);
    eprintln!(
        "seeds {first} to {}; PAGEFERRY_SEED repeats one",
        first + moves - 1
    );
    let (next, failed) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let began = Instant::now();
    let run_all = || {
        loop {
            let number = next.fetch_add(1, Ordering::SeqCst);
            if number >= moves {
                return;
            }
            if let Err(why) = check(&criu, first + number) {
                eprintln!("{why}");
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.push(why);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(run_all);
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    let count = failed.len();
    eprintln!("{moves} moves in {:.0?}, {count} failed", began.elapsed());
    assert!(
        failed.is_empty(),
        "{count} of {moves} moves:\n{}",
        failed.join("\n")
    );
}
