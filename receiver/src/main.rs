//! `receive`: takes the memory of process trees from `send` and writes CRIU image files.

#![forbid(unsafe_code)]

use clap::Parser;
use pageferry_receiver::cli::Cli;
use pageferry_receiver::restore::PAGES_ARG;
use pageferry_receiver::run::{run, run_pages};
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match (arguments.next(), arguments.next()) {
        (Some(hidden), Some(dir)) if hidden == PAGES_ARG => run_pages(Path::new(&dir)),
        _ => run(&Cli::parse()),
    }
}
