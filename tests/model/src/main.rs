//! Checks the model of the hand-over from the command line.

use clap::Parser;
use pageferry_model::{Fault, HandOver, Rule, check};
use std::process::ExitCode;

/// Search all states of the hand-over's protocol for violations of its promises
#[derive(Debug, Parser)]
struct Cli {
    /// Largest number of faults
    #[arg(long, default_value_t = 3)]
    faults: u8,

    /// Leave out a rule of the protocol, by its name in the model
    #[arg(long, value_name = "RULE")]
    without: Vec<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut model = HandOver::new(cli.faults);
    for name in &cli.without {
        let rule = Rule::ALL
            .into_iter()
            .find(|rule| format!("{rule:?}") == *name);
        let Some(rule) = rule else {
            eprintln!("model: unknown rule {name}; there are {:?}", Rule::ALL);
            return ExitCode::from(2);
        };
        model.without.insert(rule);
    }
    let found = check(&model);
    println!(
        "{} states, at most {} faults of {} kinds: {} violations",
        found.states,
        cli.faults,
        Fault::ALL.len(),
        found.violations.len()
    );
    for (property, path) in &found.violations {
        println!("{property}:");
        for event in path {
            println!("    {event:?}");
        }
    }
    match found.violations.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
