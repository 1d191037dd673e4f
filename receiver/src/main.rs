//! `receive`: takes the memory of process trees from `send` and writes CRIU image files.

#![forbid(unsafe_code)]

use clap::Parser;
use pageferry_receiver::cli::Cli;
use pageferry_receiver::run::run;
use std::process::ExitCode;

fn main() -> ExitCode {
    run(&Cli::parse())
}
