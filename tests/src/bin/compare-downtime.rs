//! Moves services between two emulated hosts with plain CRIU and with Pageferry, and prints the downtimes:
//! `scripts/compare-downtime`.

use pageferry_tests::criu::Criu;
use pageferry_tests::mover::{self, Moved};
use pageferry_tests::net::Net;
use pageferry_tests::service;
use std::env;

fn main() {
    let list = |name, default: &str| {
        let list = env::var(name).unwrap_or_else(|_| default.to_owned());
        let words = list.split_whitespace().map(str::to_owned);
        words.collect::<Vec<_>>()
    };
    let sizes: Vec<u32> = list("MIB", "2048")
        .iter()
        .map(|word| word.parse().expect("MIB is a list of numbers"))
        .collect();
    let rate = env::var("RATE").unwrap_or_else(|_| "1gbit".to_owned());
    let movers = list("WITH", "criu pageferry");
    let options = list("OPTIONS", "");
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let criu = Criu::stable("the comparison").expect("run scripts/install-criu");
    println!(
        "{:<12}{:>6}  {:<10}{:>12}{:>12}{:>9}  phases, ms",
        "service", "MiB", "with", "downtime ms", "pause ms", "all s"
    );
    for name in list("SERVICES", &service::NAMES.join(" ")) {
        for &mib in &sizes {
            for with in &movers {
                let net = Net::up(&rate);
                let mut service = service::start(&name, &net, mib);
                let moved: Moved = match &**with {
                    "criu" => mover::plain_criu(&net, &criu, &mut *service),
                    _ => mover::pageferry(&net, &criu, &mut *service, &options),
                };
                let pause = service.pause();
                service.check();
                println!(
                    "{name:<12}{mib:>6}  {with:<10}{:>12.0}{pause:>12}{:>9.1}  {}",
                    moved.downtime_ms, moved.seconds, moved.phases
                );
            }
        }
    }
}
