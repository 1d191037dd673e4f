//! `receive`: receives the memory of process trees from `send` and writes CRIU image files.

#![forbid(unsafe_code)]

use clap::Parser;
use pageferry_receiver::cli::Cli;
use pageferry_receiver::restore::filler;
use pageferry_receiver::run::run;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match (arguments.next(), arguments.next(), arguments.next()) {
        // The receiver starts itself again as a filler process.
        (Some(first), Some(round), Some(restored)) if first == filler::ARG => {
            filler::main(Path::new(&round), Path::new(&restored))
        }
        _ => run(&Cli::parse()),
    }
}
