//! The command line of `send`.

use crate::converge::Limits;
use crate::dirty::TrackerChoice;
use crate::freeze::Then;
use crate::handover::StateDump;
use crate::sink::{Compression, DEFAULT_LEVEL, Dialect};
use clap::Parser;
use pageferry_common::cli::{duration, non_zero_duration};
use pageferry_common::criu::session::Options;
use pageferry_common::tls::TlsFiles;
use std::path::PathBuf;
use std::time::Duration;

/// Copies the memory of a running process tree to another host, in rounds, while it runs.
///
/// The target is stopped only for moments: to list its mappings in each round, and to read what is
/// still dirty in the last one. Whatever happens to this program, the target runs on.
#[derive(Debug, Parser)]
#[command(name = "send", version, after_help = EXAMPLES)]
pub struct Cli {
    /// Where `receive` listens
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "resolve")]
    pub to: Option<String>,

    /// Root of the process tree
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..),
          required_unless_present = "resolve")]
    pub pid: Option<i32>,

    /// Move the process itself, with CRIU: it runs on at the receiver, and no more here
    #[arg(long, conflicts_with_all = ["rounds", "then"])]
    pub migrate: bool,

    /// Find out how a move of PID ended whose end was lost sight of, and act on it
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..),
          conflicts_with_all = ["to", "pid", "migrate"])]
    pub resolve: Option<i32>,

    /// The CRIU to move with, 4.1 or later; by default the one in PATH
    #[arg(long, value_name = "PATH", requires = "migrate")]
    pub criu: Option<PathBuf>,

    /// How CRIU is kept from spending time on memory
    #[arg(long, value_enum, default_value = "preload", requires = "migrate")]
    pub state_dump: StateDump,

    /// Move established TCP connections too; their address must move with the process
    #[arg(long, requires = "migrate")]
    pub tcp_established: bool,

    /// Move a process that does not lead its terminal's session
    #[arg(long, requires = "migrate")]
    pub shell_job: bool,

    /// Move a process with Unix sockets that are connected to others, without them
    #[arg(long, requires = "migrate")]
    pub ext_unix_sk: bool,

    /// Move the process's cgroups too
    #[arg(long, requires = "migrate")]
    pub manage_cgroups: bool,

    /// More options for the `criu dump` of a move, by their long names
    #[arg(last = true, value_name = "CRIU OPTIONS", requires = "migrate")]
    pub criu_args: Vec<String>,

    /// How to find out which pages were written
    #[arg(long, value_enum, default_value = "auto")]
    pub tracker: TrackerChoice,

    /// Also compare written pages by content and do not send again what is the same (costs 4 MiB
    /// of memory a GiB)
    #[arg(long)]
    pub skip_unchanged: bool,

    /// What the receiver speaks: `receive` the native protocol, `criu page-server` its own
    #[arg(long, value_enum, default_value = "native")]
    pub dialect: Dialect,

    /// Compress pages: auto (as far, and as well, as the link leaves time for), none, or zstd or zstd:LEVEL
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = parse_compression)]
    pub compress: Compression,

    /// Begin the last, frozen round when it is estimated to take no longer than this
    #[arg(long, value_name = "DURATION", default_value = "300ms", value_parser = duration)]
    pub max_downtime: Duration,

    /// Most rounds before the last one
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub max_rounds: u32,

    /// Exactly N rounds while the target runs, and no last one
    #[arg(long, value_name = "N", conflicts_with_all = ["max_rounds", "max_downtime", "then"],
          value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: Option<u32>,

    /// What becomes of the target after the last round
    #[arg(long, value_enum, default_value = "run")]
    pub then: Then,

    /// Buffers of 4 MiB between reading and sending
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub buffers: u16,

    /// Give up when the receiver is silent, or takes nothing, for so long
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = non_zero_duration)]
    pub timeout: Duration,

    /// When the connection is lost, try for so long to connect again, and go on with the round that was on
    /// its way; 0 to give up at once
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    pub reconnect_for: Duration,

    /// While the target is frozen, wait for the receiver no longer than this; then the target runs again, and
    /// the last round is sent later
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = non_zero_duration)]
    pub max_frozen: Duration,

    /// Who to trust, and who to be
    #[command(flatten)]
    pub tls: TlsFiles,

    /// Send memory in the clear to another host
    #[arg(long)]
    pub insecure: bool,

    /// Print a report as one JSON object on standard output
    #[arg(long)]
    pub json: bool,

    /// Log more (twice: every chunk)
    #[arg(long, short, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

const EXAMPLES: &str = "\
Examples:
  send --to 127.0.0.1:7700 $(pidof redis-server)
      copy until little is dirty, copy the rest while frozen, let it run on
  send --to 127.0.0.1:7700 --rounds 3 4711
      three rounds, never frozen for longer than it takes to list mappings
  send --to 127.0.0.1:7700 --then stop --json 4711
      leave the target stopped (kill -CONT lets it go on), and report

  send --to dst:7700 --tls-ca ca.pem --tls-cert send.pem --tls-key send.key 4711
      to another host, encrypted; `receive certs` makes the files

  send --to 127.0.0.1:7700 --dialect criu --rounds 1 4711
      a round into `criu page-server --port 7700 -D DIR`; for each further round start another,
      with --prev-images-dir of the one before

  send --to 127.0.0.1:7700 --migrate $(pidof redis-server)
      move it, to `receive --restore`: it runs on there, and is gone here
  send --to 127.0.0.1:7700 --migrate 4711 -- --tcp-close --ghost-limit 8M
      the same, with more options for CRIU; those for its restore are receive's

Exit codes:
  0 done, 1 failed, 2 usage, 3 target gone, 4 receiver refused, 5 not permitted,
  6 in doubt (see --resolve), 130 interrupted";

impl Cli {
    /// What CRIU is to do about what reaches beyond the tree.
    #[must_use]
    pub fn criu_options(&self) -> Options {
        Options {
            tcp_established: self.tcp_established,
            shell_job: self.shell_job,
            ext_unix_sk: self.ext_unix_sk,
            manage_cgroups: self.manage_cgroups,
        }
    }

    /// When to stop.
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
            .ok_or_else(|| format!("zstd has levels {} to {}", levels.start(), levels.end())),
        _ => Err("it is auto, none, zstd or zstd:LEVEL".to_owned()),
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
