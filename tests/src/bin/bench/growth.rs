//! Case 5: how the cost of a round grows with memory, mappings, threads and processes.

use crate::report::{Table, lines};
use crate::{Bench, transfer};
use pageferry_tests::Victim;
use std::error::Error;

/// Pages written a second, whatever the size.
const WRITES: u64 = 2000;

/// Measures case 5.
pub(crate) fn measure(bench: &Bench, tables: &mut Vec<Table>) -> Result<(), Box<dyn Error>> {
    let sizes = [1, 2, 4, 8, 16]
        .into_iter()
        .filter(|&gib| gib <= bench.growth);
    // Pages of zeros are scanned like all others, and do not load the disk.
    let sizes = sizes.map(|gib| (gib, format!("zero={} heap=16 dirty64={WRITES}", gib * 1024)));
    let mappings =
        [10, 1000, 50_000].map(|n| (n, format!("heap=64 mappings={n} dirty64={WRITES}")));
    let threads = [1, 32, 512].map(|n| (n, format!("heap=64 threads={n} dirty64={WRITES}")));
    let processes = [1, 8, 64].map(|n| {
        let children = if n > 1 {
            format!("children={}", n - 1)
        } else {
            String::new()
        };
        // Each process writes.
        (n, format!("heap=64 {children} dirty64={}", WRITES / n))
    });
    let columns = [
        "",
        "frozen, ms",
        "a round behind the first, ms",
        "its pages looked at",
    ];
    for (what, cases) in [
        ("GiB of memory", sizes.collect::<Vec<_>>()),
        ("mappings", mappings.to_vec()),
        ("threads", threads.to_vec()),
        ("processes", processes.to_vec()),
    ] {
        let name = format!("growth-{}", what.split(' ').next_back().unwrap_or(what));
        let title = format!("A pre-dump round, by {what}");
        let mut table = Table::new(&name, &title, &columns);
        for (n, features) in &cases {
            let victim = Victim::detached(features);
            for _ in 0..bench.runs {
                let options = ["--rounds", "5"];
                let done = transfer::ours(victim.pid(), &bench.places[0], None, &[], &options);
                for round in &done.report.expect("it is ours").rounds[1..] {
                    let pages = round.scanned_pages as f64;
                    let values = [round.frozen_ms, round.seconds * 1e3, pages];
                    table.add(&format!("{n} {what}"), &values);
                }
            }
        }
        let series = |column| {
            let points = cases.iter().map(|(n, _)| {
                let samples = table.get(&format!("{n} {what}"), column);
                (*n as f64, samples.median())
            });
            points.collect()
        };
        let all = [
            ("frozen".to_owned(), series(0)),
            ("the whole round".to_owned(), series(1)),
        ];
        lines(&bench.plot(&name), &title, (what, "ms"), true, &all)?;
        tables.push(table);
    }
    Ok(())
}
