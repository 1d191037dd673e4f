//! The command line of `send`.

use crate::converge::Limits;
use crate::dirty::TrackerChoice;
use crate::freeze::Then;
use crate::handover::{StateDump, Verdict};
use crate::sink::{Compression, DEFAULT_LEVEL, Dialect};
use clap::Parser;
use pageferry_common::cli::{duration, non_zero_duration};
use pageferry_common::criu::Options;
use pageferry_common::tls::TlsFiles;
use std::path::PathBuf;
use std::time::Duration;

/// Copy the memory of a running process tree to another host, or move the processes themselves.
///
/// Memory is sent in rounds while the target runs. Each round freezes the target for a moment to list its
/// mappings; the last round keeps it frozen while the pages that are still dirty are sent. If this program or
/// the connection fails, the target runs on.
#[derive(Debug, Parser)]
#[command(name = "send", version, after_help = EXAMPLES)]
pub struct Cli {
    /// Send to the `receive` at this address
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "resolve")]
    pub to: Option<String>,

    /// PID of the root of the process tree
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..),
          required_unless_present = "resolve")]
    pub pid: Option<i32>,

    /// Move the processes too, with CRIU: afterwards they run at the receiver, and not here
    #[arg(long, conflicts_with_all = ["rounds", "then"])]
    pub migrate: bool,

    /// Resolve an interrupted migration of PID: ask the receiver, then resume or kill the local copy
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..),
          num_args = 0..=1, conflicts_with_all = ["to", "pid", "migrate"])]
    pub resolve: Option<Option<i32>>,

    /// With --resolve: only list the interrupted migrations of this host (of PID, if given)
    #[arg(long, requires = "resolve")]
    pub list: bool,

    /// With --resolve: if the receiver does not answer, resume the local copy. Only if the other one is lost:
    /// otherwise two run
    #[arg(long, requires = "resolve", conflicts_with = "list")]
    pub take_back: bool,

    /// With --resolve: if the receiver does not answer, kill the local copy
    #[arg(long, requires = "resolve", conflicts_with_all = ["list", "take_back"])]
    pub give_up: bool,

    /// Use this CRIU, 4.1 or later [default: the criu in PATH]
    #[arg(long, value_name = "PATH", requires = "migrate")]
    pub criu: Option<PathBuf>,

    /// Select how CRIU is kept from spending time on memory
    #[arg(long, value_enum, default_value = "preload", requires = "migrate")]
    pub state_dump: StateDump,

    /// Move established TCP connections too; their local address must move with the target
    #[arg(long, requires = "migrate")]
    pub tcp_established: bool,

    /// Move processes of a terminal session whose leader is outside the tree
    #[arg(long, requires = "migrate")]
    pub shell_job: bool,

    /// Move processes with Unix sockets connected to processes outside the tree, and drop those connections
    #[arg(long, requires = "migrate")]
    pub ext_unix_sk: bool,

    /// Move processes with pipes or FIFOs that processes outside the tree use, too; the copy finds these broken
    #[arg(long, requires = "migrate")]
    pub break_pipes: bool,

    /// Move the cgroups of the processes too
    #[arg(long, requires = "migrate")]
    pub manage_cgroups: bool,

    /// Pass more options to `criu dump`, by their long names
    #[arg(last = true, value_name = "CRIU OPTIONS", requires = "migrate")]
    pub criu_args: Vec<String>,

    /// Select how dirty pages are found
    #[arg(long, value_enum, default_value = "auto")]
    pub tracker: TrackerChoice,

    /// Compare dirty pages by content, and skip those that are unchanged (needs 4 MiB of memory for each GiB)
    #[arg(long)]
    pub skip_unchanged: bool,

    /// Select the protocol: native for `receive`, criu for `criu page-server`
    #[arg(long, value_enum, default_value = "native")]
    pub dialect: Dialect,

    /// Compress pages: auto (when it makes them arrive sooner), none, zstd, or zstd:LEVEL
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = parse_compression)]
    pub compress: Compression,

    /// Begin the final round when it is estimated to take at most this
    #[arg(long, value_name = "DURATION", default_value = "300ms", value_parser = duration)]
    pub max_downtime: Duration,

    /// Limit the number of rounds before the last one
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub max_rounds: u32,

    /// Send exactly N rounds while the target runs, and no final round
    #[arg(long, value_name = "N", conflicts_with_all = ["max_rounds", "max_downtime", "then"],
          value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: Option<u32>,

    /// Select what happens to the target after the last round
    #[arg(long, value_enum, default_value = "run")]
    pub then: Then,

    /// Use N buffers of 4 MiB between reading and sending
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub buffers: u16,

    /// Treat the connection as lost after this time without progress
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = non_zero_duration)]
    pub timeout: Duration,

    /// Try to reconnect for this time after the connection is lost, then resend the round in flight; 0 to give
    /// up at once
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    pub reconnect_for: Duration,

    /// Wait at most this time for the receiver while the target is frozen; then thaw the target and send the
    /// last round again later
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = non_zero_duration)]
    pub max_frozen: Duration,

    /// TLS identity and trust
    #[command(flatten)]
    pub tls: TlsFiles,

    /// Allow sending memory to another host unencrypted
    #[arg(long)]
    pub insecure: bool,

    /// Print a report as one JSON object on standard output
    #[arg(long)]
    pub json: bool,

    /// Log more (-vv logs every chunk)
    #[arg(long, short, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

const EXAMPLES: &str = "\
Examples:
  send --to 127.0.0.1:7700 $(pidof redis-server)
      copy until little is dirty, copy the rest while frozen, let the target run
  send --to 127.0.0.1:7700 --rounds 3 4711
      send three rounds; the target is only frozen to list its mappings
  send --to 127.0.0.1:7700 --then stop --json 4711
      leave the target stopped (kill -CONT resumes it), and print a report

  send --to dst:7700 --tls-ca ca.pem --tls-cert send.pem --tls-key send.key 4711
      send to another host, encrypted; `receive certs` creates the files

  send --to 127.0.0.1:7700 --dialect criu --rounds 1 4711
      send one round to `criu page-server --port 7700 -D DIR`; each further round needs a new
      page server, with --prev-images-dir set to the directory of the previous one

  send --to 127.0.0.1:7700 --migrate $(pidof redis-server)
      move the processes to `receive --restore`: they run there, and are gone here
  send --to 127.0.0.1:7700 --migrate 4711 -- --tcp-close --ghost-limit 8M
      the same, with more options for `criu dump`; those for `criu restore` go to `receive`
  send --resolve --list
      list the moves whose end is unknown on this host; `send --resolve PID` ends one

Exit codes:
  0 done, 1 failed, 2 usage, 3 target gone, 4 receiver refused, 5 not permitted,
  6 in doubt (see --resolve), 130 interrupted";

impl Cli {
    /// Returns the options for CRIU's dump and restore.
    #[must_use]
    pub fn criu_options(&self) -> Options {
        Options {
            tcp_established: self.tcp_established,
            shell_job: self.shell_job,
            ext_unix_sk: self.ext_unix_sk,
            manage_cgroups: self.manage_cgroups,
        }
    }

    /// Returns what the user decides for a receiver that does not answer.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        match (self.take_back, self.give_up) {
            (true, _) => Some(Verdict::TakeBack),
            (false, true) => Some(Verdict::GiveUp),
            (false, false) => None,
        }
    }

    /// Returns the limits for pre-copying.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            max_downtime: self.max_downtime,
            max_rounds: self.max_rounds,
            exact_rounds: self.rounds,
        }
    }
}

fn parse_compression(text: &str) -> Result<Compression, String> {
    let levels = zstd::compression_level_range();
    match text.split_once(':') {
        None if text == "auto" => Ok(Compression::Auto),
        None if text == "none" => Ok(Compression::None),
        None if text == "zstd" => Ok(Compression::Zstd(DEFAULT_LEVEL)),
        Some(("zstd", level)) => level
            .parse()
            .ok()
            .filter(|level| levels.contains(level))
            .map(Compression::Zstd)
            .ok_or_else(|| format!("zstd levels are {} to {}", levels.start(), levels.end())),
        _ => Err("must be auto, none, zstd or zstd:LEVEL".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn compressions_parse() {
        assert_eq!(parse_compression("zstd:3"), Ok(Compression::Zstd(3)));
        assert!(parse_compression("zstd:99").is_err() && parse_compression("gzip").is_err());
    }
}
