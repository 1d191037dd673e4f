//! Decides when to stop pre-copying: pure policy over what the rounds have shown.

use std::time::Duration;

/// Limits set by the user.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest acceptable freeze of the final round; exceeded if more rounds would not reach it.
    pub max_downtime: Duration,
    /// Maximum number of pre-dump rounds before the final one.
    pub max_rounds: u32,
    /// Exact number of pre-dump rounds, without a final one.
    pub exact_rounds: Option<u32>,
}

/// Measurements of one round.
#[derive(Debug, Clone, Copy)]
pub struct Observed {
    /// Bytes of pages sent, before compression.
    pub sent: u64,
    /// Time from the freeze to the ack.
    pub took: Duration,
    /// Part of `took` that does not depend on the amount sent: freezing and scanning.
    pub overhead: Duration,
    /// Bytes that were dirty when the round was acked.
    pub dirty_after: u64,
}

/// Next step of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another round while the target runs.
    PreDump,
    /// The final round, while the target is frozen.
    Final(Why),
    /// Nothing: all rounds that were asked for are done.
    Done,
}

/// Why pre-copying ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// The dirty pages can be sent within the downtime allowed.
    Converged,
    /// The target dirties memory faster than the sender can send it.
    Diverging,
    /// Further rounds leave as much dirty as earlier ones.
    Plateau,
    /// The maximum number of rounds is reached.
    MaxRounds,
}

/// Number of consecutive rounds after which a workload counts as diverging.
const DIVERGING_ROUNDS: usize = 3;

/// Number of rounds over which the dirty memory must shrink by a tenth.
const PLATEAU_ROUNDS: usize = 4;

/// If sending the last pages takes less time than this, another round does not pay.
const NEGLIGIBLE_TRANSFER: Duration = Duration::from_millis(5);

/// Bytes that a round must have sent to be a sample of the link's rate.
const MIN_RATE_SAMPLE: u64 = 8 << 20;

/// Returns what to do next, from all rounds so far, the oldest first.
#[must_use]
pub fn decide(history: &[Observed], limits: &Limits) -> Next {
    if let Some(rounds) = limits.exact_rounds {
        return match history.len() < rounds as usize {
            true => Next::PreDump,
            false => Next::Done,
        };
    }
    let Some(last) = history.last() else {
        return match limits.max_rounds {
            0 => Next::Final(Why::MaxRounds),
            _ => Next::PreDump,
        };
    };
    let more = history.len() < limits.max_rounds as usize;
    if downtime(history).is_some_and(|estimate| estimate <= limits.max_downtime)
        && !(more && is_worthwhile(history))
    {
        return Next::Final(Why::Converged);
    }
    let recent = |rounds| {
        history
            .len()
            .checked_sub(rounds)
            .map(|from| &history[from..])
    };
    let outrun = |rounds: &[Observed]| rounds.iter().all(|round| round.dirty_after >= round.sent);
    if recent(DIVERGING_ROUNDS).is_some_and(outrun) {
        return Next::Final(Why::Diverging);
    }
    let stuck = |rounds: &[Observed]| {
        let before = rounds[..PLATEAU_ROUNDS]
            .iter()
            .map(|round| round.dirty_after)
            .min();
        before.is_some_and(|before| last.dirty_after >= before - before / 10)
    };
    if recent(PLATEAU_ROUNDS + 1).is_some_and(stuck) {
        return Next::Final(Why::Plateau);
    }
    match more {
        true => Next::PreDump,
        false => Next::Final(Why::MaxRounds),
    }
}

/// Returns whether another round would at least halve what is left for the final round: a round that takes less
/// than half as long as the last one leaves less than half as much dirty.
fn is_worthwhile(history: &[Observed]) -> bool {
    let (Some(last), Some(next)) = (history.last(), downtime(history)) else {
        return false;
    };
    next.saturating_sub(last.overhead) > NEGLIGIBLE_TRANSFER && next * 2 < last.took
}

/// Estimates for how long the final round would freeze the target; `None` before the first round.
#[must_use]
pub fn downtime(history: &[Observed]) -> Option<Duration> {
    let last = history.last()?;
    let rate_of = |round: &Observed| round.sent as f64 / round.took.as_secs_f64().max(1e-9);
    let sample = history
        .iter()
        .rev()
        .find(|round| round.sent >= MIN_RATE_SAMPLE);
    let rate = match sample {
        Some(round) => rate_of(round),
        // All rounds were small: even the fastest underestimates the link.
        None => history.iter().map(rate_of).fold(0.0, f64::max),
    };
    let transfer = match last.dirty_after {
        0 => 0.0,
        dirty => dirty as f64 / rate.max(1.0),
    };
    Some(last.overhead + Duration::try_from_secs_f64(transfer).unwrap_or(Duration::MAX / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn round(sent_mib: u64, ms: u64, dirty_mib: u64) -> Observed {
        Observed {
            sent: sent_mib * MIB,
            took: Duration::from_millis(ms),
            overhead: Duration::from_millis(10),
            dirty_after: dirty_mib * MIB,
        }
    }

    fn limits() -> Limits {
        Limits {
            max_downtime: Duration::from_millis(300),
            max_rounds: 30,
            exact_rounds: None,
        }
    }

    #[test]
    fn each_history_leads_to_its_step() {
        let converging = [round(1000, 1000, 400), round(400, 400, 250)];
        let halving = [round(1000, 1000, 400), round(400, 400, 100)];
        let diverging = [
            round(100, 1000, 150),
            round(150, 1500, 200),
            round(200, 2000, 250),
        ];
        let flat = [
            round(1000, 1000, 500),
            round(500, 500, 490),
            round(490, 490, 480),
            round(480, 480, 470),
            round(470, 470, 469),
        ];
        for (history, next) in [
            (&[][..], Next::PreDump),
            (&converging[..1], Next::PreDump),
            (&converging[..], Next::Final(Why::Converged)),
            (&halving[..], Next::PreDump),
            (&diverging[..2], Next::PreDump),
            (&diverging[..], Next::Final(Why::Diverging)),
            (&flat[..4], Next::PreDump),
            (&flat[..], Next::Final(Why::Plateau)),
            (&[round(1000, 1000, 0)][..], Next::Final(Why::Converged)),
            (&[round(0, 5, 0)][..], Next::Final(Why::Converged)),
        ] {
            assert_eq!(decide(history, &limits()), next, "{history:?}");
        }
    }

    #[test]
    fn limits_are_obeyed() {
        let slow = [round(1000, 1000, 500), round(500, 500, 400)];
        let max_rounds = |max_rounds| Limits {
            max_rounds,
            ..limits()
        };
        assert_eq!(decide(&slow, &max_rounds(2)), Next::Final(Why::MaxRounds));
        assert_eq!(decide(&slow, &max_rounds(3)), Next::PreDump);
        assert_eq!(decide(&[], &max_rounds(0)), Next::Final(Why::MaxRounds));
        let exact = |rounds| Limits {
            exact_rounds: Some(rounds),
            ..limits()
        };
        assert_eq!(decide(&[round(1, 1, 0)], &exact(2)), Next::PreDump);
        assert_eq!(decide(&slow, &exact(2)), Next::Done);
    }

    #[test]
    fn the_estimate_takes_the_rate_from_the_last_large_round() {
        let history = [round(1000, 1000, 100), round(1, 500, 100)];
        let estimate = downtime(&history).unwrap();
        assert_eq!(estimate.as_millis(), 110);
    }
}
