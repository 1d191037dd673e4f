//! Measures how fast a process's memory is sent and kept, in the clear and encrypted: `scripts/bench.sh`.

use pageferry_tests::certs::{Certs, strs};
use pageferry_tests::{Pair, Victim};
use std::env;

/// What is compared, side by side.
const WAYS: [&str; 2] = ["in the clear", "TLS"];

fn main() {
    let number = |name, default| -> usize {
        env::var(name).map_or(default, |text| text.parse().expect("it is a number"))
    };
    let (mib, runs) = (number("MIB", 1024), number("RUNS", 5));
    let victim = Victim::start(&format!("heap={mib}"));
    let certs = Certs::new();
    let mut rates = WAYS.map(|_| Vec::new());
    for _ in 0..runs {
        // One after the other in turn: what else the machine does hits both.
        for (way, rates) in WAYS.into_iter().zip(&mut rates) {
            let options = |end| match way {
                "TLS" => certs.options(end),
                _ => Vec::new(),
            };
            let (here, there) = (options("send"), options("receive"));
            let pair = Pair::start(&strs(&there));
            let one = [&["--rounds", "1"], &strs(&here)[..]].concat();
            let report = pair.send(victim.pid(), &one).expect_report();
            let round = &report.rounds[0];
            rates.push(round.bytes_raw as f64 / 1e6 / round.seconds);
        }
    }
    println!("| {mib} MiB, {runs} runs | median MB/s | min | max |");
    println!("|---|---|---|---|");
    for (way, mut rates) in WAYS.into_iter().zip(rates) {
        rates.sort_by(f64::total_cmp);
        let (min, max) = (rates[0], rates[rates.len() - 1]);
        let median = rates[rates.len() / 2];
        println!("| {way} | {median:.0} | {min:.0} | {max:.0} |");
    }
}
