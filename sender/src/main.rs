//! `send`: copies the memory of a running process tree to another host, or moves the tree itself.

#![forbid(unsafe_code)]

use clap::Parser;
use pageferry_sender::cli::Cli;
use pageferry_sender::freeze::{self, FREEZER_ARG};
use pageferry_sender::run;
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|arg| arg == FREEZER_ARG)
    {
        return match freeze::freezer::serve() {
            Ok(()) => ExitCode::SUCCESS,
            // The sender detects that the socket is closed.
            Err(_) => ExitCode::FAILURE,
        };
    }
    run::run(&Cli::parse())
}
