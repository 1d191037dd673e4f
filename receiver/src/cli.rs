//! The command line of `receive`.

use clap::{Args, Parser, Subcommand};
use pageferry_common::cli::{duration, non_zero_duration, size};
use pageferry_common::tls::TlsFiles;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Takes the memory of process trees from `send`, and writes it as CRIU image files.
///
/// Each migration gets a directory of its own under DIR, with one directory for each round, linked
/// by CRIU's `parent` symlinks. A round appears when it is complete and on disk, or not at all.
///
/// It is a `criu page-server` too, on the same port: a dump or pre-dump by CRIU, runc or podman with
/// --page-server gets the directory DIR/criu-N.
#[derive(Debug, Parser)]
#[command(name = "receive", version, after_help = EXAMPLES,
          args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    /// What to do instead of receiving
    #[command(subcommand)]
    pub command: Option<Command>,

    /// How to receive
    #[command(flatten)]
    pub serve: Serve,
}

const EXAMPLES: &str = "\
Examples:
  receive --listen 7700 --dir /var/lib/pageferry
      take any number of migrations from this host (or through a tunnel)
  receive certs certs --host dst.example 192.0.2.1
  receive --listen 192.0.2.1:7700 --dir images --tls-ca certs/ca.pem --tls-cert certs/receive.pem
          --tls-key certs/receive.key
      the same from other hosts, which take ca.pem, send.pem and send.key
  receive --listen 7700 --dir images --once --json
      take one, report, and exit with its result
  criu dump -t 4711 -D state --page-server --address 127.0.0.1 --port 7700
      CRIU's memory images go to DIR/criu-1; copy them to the images in `state`, and restore
  receive verify /var/lib/pageferry/4711-0123456789abcdef0123456789abcdef
      check the rounds of a migration
  receive flatten /var/lib/pageferry/4711-0123456789abcdef0123456789abcdef flat
      merge them into one directory that needs no other

  receive serve-pages /var/lib/pageferry/criu-1 --listen 7701
      let a process be restored elsewhere before its memory is there: with
      criu lazy-pages --page-server --address 127.0.0.1 --port 7701 -D small
      and criu restore --lazy-pages -D small, `small` being made by receive flatten --skeleton

Exit codes:
  0 done, 1 failed, 2 usage, 7 port or directory unusable, 130 or 143 stopped by a signal";

/// What to do with images that are there.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make an authority, and certificates for both ends: receive.pem with the names that senders call this
    /// host by, and send.pem
    Certs {
        /// Where to; must not be there yet
        dir: PathBuf,
        /// Names or addresses of the host that receives
        #[arg(long, value_name = "NAME", num_args = 1.., required = true)]
        host: Vec<String>,
        /// For so many days from now
        #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u16).range(1..))]
        days: u16,
    },
    /// Merge a chain of rounds into one self-contained directory
    Flatten {
        /// A round, or a migration (then its newest round)
        dir: PathBuf,
        /// Where to; must be new or empty
        out: PathBuf,
        /// Leave holes where a restored process can do without pages at first: a small directory for
        /// `criu restore --lazy-pages`, with `receive serve-pages` for the rest
        #[arg(long)]
        skeleton: bool,
    },
    /// Give the pages of finished images to `criu lazy-pages --page-server`
    ServePages(ServePages),
    /// Check a chain of rounds; exits with 1 if anything is wrong
    Verify {
        /// A round, or a migration (then its newest round)
        dir: PathBuf,
    },
}

/// Options of serving pages.
#[derive(Debug, Args)]
pub struct ServePages {
    /// A round, or a migration (then its newest round), or a dump by CRIU
    pub dir: PathBuf,

    /// Where to listen; a bare PORT is of 127.0.0.1, and port 0 any that is free
    #[arg(long, value_name = "[ADDR:]PORT", value_parser = parse_listen)]
    pub listen: SocketAddr,

    /// Exit when a client has fetched everything
    #[arg(long)]
    pub once: bool,

    /// Drop a client that reads nothing for this time
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = non_zero_duration)]
    pub timeout: Duration,

    /// Give memory in the clear to other hosts
    #[arg(long)]
    pub insecure: bool,
}

/// When a restored process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum RestoreHow {
    /// `lazy` if CRIU and the kernel can, else `eager`.
    Auto,
    /// When all its memory is in its place.
    Eager,
    /// At once; its memory comes as it is touched, and by and by.
    Lazy,
}

/// Options of receiving.
#[derive(Debug, Args)]
pub struct Serve {
    /// Where to listen; a bare PORT is of 127.0.0.1, and port 0 any that is free
    #[arg(long, value_name = "[ADDR:]PORT", value_parser = parse_listen, required = true)]
    pub listen: Option<SocketAddr>,

    /// Where migrations go; made if it is not there
    #[arg(long, required = true)]
    pub dir: Option<PathBuf>,

    /// Each dump by CRIU has the one before of the same process as its parent: for CRIU run with
    /// --track-mem and, from the second on, --prev-images-dir
    #[arg(long)]
    pub chain_dumps: bool,

    /// Let processes follow their memory: restore them with CRIU, and let them run. `lazy` is the
    /// default where CRIU and the kernel can
    #[arg(long, value_enum, value_name = "HOW", num_args = 0..=1, require_equals = true,
          default_missing_value = "auto")]
    pub restore: Option<RestoreHow>,

    /// Cancel a restore that takes longer; the process is stopped meanwhile, and then resumes at the source
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = non_zero_duration,
          requires = "restore")]
    pub restore_timeout: Duration,

    /// The CRIU to restore with, 4.1 or later; by default the one in PATH
    #[arg(long, value_name = "PATH", requires = "restore")]
    pub criu: Option<PathBuf>,

    /// More options for `criu restore`, by their long names
    #[arg(last = true, value_name = "CRIU OPTIONS", requires = "restore")]
    pub criu_args: Vec<String>,

    /// Take one migration (or dump by CRIU), and exit with its result
    #[arg(long)]
    pub once: bool,

    /// With --once: how long to wait for the sender to reconnect when the connection is lost
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    pub reconnect_for: Duration,

    /// Drop a sender that is silent for this time
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = non_zero_duration)]
    pub timeout: Duration,

    /// Most rounds of a migration
    #[arg(long, value_name = "N", default_value_t = 1000,
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_rounds: u32,

    /// Most that a migration may write to the disk in all its rounds; with K, M, G or T
    #[arg(long, value_name = "SIZE", default_value = "16T", value_parser = size)]
    pub max_bytes: u64,

    /// Most processes and shared segments of a round, and images of CRIU's of the state
    #[arg(long, value_name = "N", default_value_t = 65536,
          value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub max_images: u32,

    /// Space to leave free on the disk, whoever takes the rest; with K, M, G or T. A migration is refused
    /// before it would take it
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    pub keep_free: u64,

    /// Buffers of 4 MiB for each sender. Memory is at most 48 MiB, and for each of --max-senders that many
    /// buffers, 7 MiB, 128 bytes of --max-images and 12 KiB of --max-rounds (docs/security.md)
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub buffers: u16,

    /// Most senders at once; others are told so, and refused
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u16).range(1..))]
    pub max_senders: u16,

    /// Who to trust, and who to be
    #[command(flatten)]
    pub tls: TlsFiles,

    /// Only take migrations from who has one of these names in the certificate
    #[arg(long, value_name = "NAME", num_args = 1.., requires = "tls_ca")]
    pub allow: Vec<String>,

    /// Drop connections that have not authenticated after this time
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = non_zero_duration)]
    pub handshake_timeout: Duration,

    /// Take memory in the clear from other hosts
    #[arg(long)]
    pub insecure: bool,

    /// With --once: print a report as one JSON object on standard output
    #[arg(long, requires = "once")]
    pub json: bool,

    /// Log more
    #[arg(long, short, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.parse() {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    text.parse()
        .map_err(|_| "it is a PORT, or ADDRESS:PORT like 192.0.2.1:7700 or [::1]:7700".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let parse = |args: &[&str]| Cli::try_parse_from([&["receive"], args].concat());
        let cli = parse(&["--listen", "7700", "--dir", "d"]).unwrap();
        assert_eq!(cli.serve.listen, Some(([127, 0, 0, 1], 7700).into()));
        assert!(parse(&["verify", "d"]).unwrap().command.is_some());
        for wrong in [
            &["--dir", "d"][..],
            &["--listen", "x", "--dir", "d"],
            &["flatten", "d"],
        ] {
            assert!(parse(wrong).is_err());
        }
    }
}
