//! Cases 3 and 4: pre-copy of memory that is written meanwhile.

use crate::clients::{Answer, Loaded, LoadedPostgres, LoadedRedis, now};
use crate::report::{Table, lines};
use crate::{Bench, transfer};
use pageferry_tests::Victim;
use pageferry_tests::daemon::until;
use pageferry_tests::net::Net;
use std::error::Error;
use std::thread::sleep;
use std::time::Duration;

/// Size of redis' data, and of PostgreSQL's shared buffers, in MiB.
const SIZE: u32 = 2048;

/// Time for which clients are observed before and after a move, in seconds.
const WATCHED: f64 = 5.0;

/// Case 3: databases under load, over 1 Gbit/s, and what their clients observe.
pub(crate) fn measure(bench: &Bench, tables: &mut Vec<Table>) -> Result<(), Box<dyn Error>> {
    let net = Net::up("1gbit");
    for service in ["redis", "PostgreSQL"] {
        let loaded: Box<dyn Loaded> = match service {
            "redis" => Box::new(LoadedRedis::start(SIZE)),
            _ => Box::new(LoadedPostgres::start(SIZE)),
        };
        for place in &bench.places {
            let name = format!("precopy-{}-{}", service.to_lowercase(), place.name);
            let title = format!(
                "Pre-copy of {service} over 1 Gbit/s, images on {}",
                place.name
            );
            let columns = ["round", "frozen, ms", "s", "pages sent", "MB on the wire"];
            let mut rounds = Table::new(&name, &title, &columns);
            let title = format!(
                "What clients of {service} see meanwhile, images on {}",
                place.name
            );
            let columns = ["when", "requests/s", "p50, ms", "p99, ms", "most, ms"];
            let mut seen = Table::new(&format!("{name}-clients"), &title, &columns);
            for run in 0..bench.runs {
                // Observation time of the clients.
                sleep(Duration::from_secs_f64(WATCHED));
                let began = now();
                let done = transfer::ours(loaded.pid(), place, Some(&net), &[], &[]);
                let ended = now();
                until("the clients were watched", || {
                    match loaded.answers().last().map(|answer| answer.at) {
                        Some(last) if last > ended + WATCHED => Ok(()),
                        last => Err(format!("until {last:?}")),
                    }
                });
                let report = done.report.expect("it is ours");
                let last = report.rounds.len();
                for round in &report.rounds {
                    // The number of rounds differs from run to run: report the first, the last, and those in between.
                    let which = match round.round as usize {
                        1 => "first".to_owned(),
                        number if number == last => "last, frozen".to_owned(),
                        number => format!("{number}"),
                    };
                    let values = [
                        round.frozen_ms,
                        round.seconds,
                        round.sent_pages as f64,
                        round.bytes_wire as f64 / 1e6,
                    ];
                    rounds.add(&which, &values);
                }
                let answers = loaded.answers();
                for (when, from, to) in [
                    ("before", began - WATCHED, began),
                    ("during", began, ended),
                    ("after", ended, ended + WATCHED),
                ] {
                    seen.add(when, &summary(&answers, from, to));
                }
                if run == 0 {
                    let latencies = longest(&answers, began, ended);
                    let title = format!(
                        "Longest answer of {service} in each 100 ms, images on {}",
                        place.name
                    );
                    lines(&bench.plot(&name), &title, ("s", "ms"), false, &[latencies])?;
                }
            }
            tables.extend([rounds, seen]);
        }
    }
    Ok(())
}

/// Returns requests a second, and the median, the 99th percentile and the maximum of their latencies, in ms.
fn summary(answers: &[Answer], from: f64, to: f64) -> [f64; 4] {
    let within = answers.iter().filter(|it| (from..to).contains(&it.at));
    let mut took: Vec<f64> = within.map(|it| it.took * 1e3).collect();
    took.sort_by(f64::total_cmp);
    let part = |share: f64| {
        let index = (took.len() as f64 * share) as usize;
        took.get(index.min(took.len().saturating_sub(1)))
            .copied()
            .unwrap_or_default()
    };
    [
        took.len() as f64 / (to - from),
        part(0.5),
        part(0.99),
        part(1.0),
    ]
}

/// Returns the largest latency in each tenth of a second, in ms, from shortly before to shortly after the move.
fn longest(answers: &[Answer], began: f64, ended: f64) -> (String, Vec<(f64, f64)>) {
    let slots = ((ended - began + 2.0 * WATCHED) * 10.0) as usize;
    let mut most = vec![0.0_f64; slots];
    for answer in answers {
        let slot = (answer.at - began + WATCHED) * 10.0;
        if slot >= 0.0
            && let Some(most) = most.get_mut(slot as usize)
        {
            *most = most.max(answer.took * 1e3);
        }
    }
    let points = most.iter().enumerate();
    let points = points.map(|(slot, &most)| (slot as f64 / 10.0 - WATCHED, most));
    (String::new(), points.collect())
}

/// Case 4: 64 bytes written in each of up to 100,000 pages a second.
pub(crate) fn small_writes(bench: &Bench, tables: &mut Vec<Table>) -> Result<(), Box<dyn Error>> {
    const WRITES: u64 = 100_000;
    let victim = Victim::detached(&format!("heap=1024 dirty64={WRITES}"));
    for place in &bench.places {
        let title = format!(
            "Pages of which 64 bytes change, over loopback, images on {}",
            place.name
        );
        let columns = [
            "round",
            "s",
            "pages sent",
            "MB on the wire",
            "bytes on the wire a page",
        ];
        let mut table = Table::new(&format!("small-{}", place.name), &title, &columns);
        for _ in 0..bench.runs {
            let options = ["--rounds", "4"];
            let done = transfer::ours(victim.pid(), place, None, &[], &options);
            for round in &done.report.expect("it is ours").rounds {
                let (pages, wire) = (round.sent_pages as f64, round.bytes_wire as f64);
                let values = [round.seconds, pages, wire / 1e6, wire / pages];
                table.add(&round.round.to_string(), &values);
            }
        }
        tables.push(table);
    }
    Ok(())
}
