//! The command line of `receive`.

use clap::{Args, Parser, Subcommand};
use pageferry_common::cli::{duration, non_zero_duration, size};
use pageferry_common::tls::TlsFiles;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Receive the memory of process trees from `send`, and write it as CRIU image files.
///
/// Each migration gets a directory of its own under DIR, with one directory for each round, linked by CRIU's
/// `parent` symlinks. A round becomes visible only when it is complete.
///
/// On the same port it is also a `criu page-server`: a dump or pre-dump by CRIU, runc or podman with
/// --page-server gets the directory DIR/criu-N.
#[derive(Debug, Parser)]
#[command(name = "receive", version, after_help = EXAMPLES,
          args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    /// Do something other than receive
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Options for receiving
    #[command(flatten)]
    pub serve: Serve,
}

const EXAMPLES: &str = "\
Examples:
  receive --listen 7700 --dir /var/lib/pageferry
      Receive any number of migrations from this host (or through a tunnel)
  receive certs certs --host dst.example 192.0.2.1
  receive --listen 192.0.2.1:7700 --dir images --tls-ca certs/ca.pem --tls-cert certs/receive.pem
          --tls-key certs/receive.key
      Receive from other hosts, which need ca.pem, send.pem and send.key
  receive --listen 7700 --dir images --once --json
      Receive one migration, print a report, and exit with its result
  criu dump -t 4711 -D state --page-server --address 127.0.0.1 --port 7700
      Receive CRIU's memory images in DIR/criu-1; to restore, copy them to the images in `state`
  receive verify /var/lib/pageferry/4711-0123456789abcdef0123456789abcdef
      Check the rounds of a migration
  receive flatten /var/lib/pageferry/4711-0123456789abcdef0123456789abcdef flat
      Merge the rounds into one self-contained directory

  receive serve-pages /var/lib/pageferry/criu-1 --listen 7701
      Restore a process on another host before its memory is there: with
      criu lazy-pages --page-server --address 127.0.0.1 --port 7701 -D small
      and criu restore --lazy-pages -D small, where receive flatten --skeleton creates `small`

Exit codes:
  0 done, 1 failed, 2 usage, 7 port or directory unusable, 130 or 143 stopped by a signal";

/// Commands other than receiving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a certificate authority and certificates for both ends: receive.pem, with the names by which
    /// senders address this host, and send.pem
    Certs {
        /// Directory to create; must not exist
        dir: PathBuf,
        /// Names or addresses of the receiving host
        #[arg(long, value_name = "NAME", num_args = 1.., required = true)]
        host: Vec<String>,
        /// Days until the certificates expire
        #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u16).range(1..))]
        days: u16,
    },
    /// Merge a chain of rounds into one self-contained directory
    Flatten {
        /// Directory of a round, or of a migration (then its newest round)
        dir: PathBuf,
        /// Output directory; must be missing or empty
        out: PathBuf,
        /// Leave out the pages that a restored process can get later: creates a small directory for
        /// `criu restore --lazy-pages`, with `receive serve-pages` for the rest
        #[arg(long)]
        skeleton: bool,
    },
    /// Serve the pages of complete images to `criu lazy-pages --page-server`
    ServePages(ServePages),
    /// Check a chain of rounds; exit with 1 if anything is wrong
    Verify {
        /// Directory of a round, or of a migration (then its newest round)
        dir: PathBuf,
    },
}

/// Options of `receive serve-pages`.
#[derive(Debug, Args)]
pub struct ServePages {
    /// Directory of a round, of a migration (then its newest round), or of a dump by CRIU
    pub dir: PathBuf,

    /// Listen on this address; PORT alone means 127.0.0.1, and port 0 any free one
    #[arg(long, value_name = "[ADDR:]PORT", value_parser = parse_listen)]
    pub listen: SocketAddr,

    /// Exit when a client has fetched all pages
    #[arg(long)]
    pub once: bool,

    /// Drop a client that reads nothing for this time
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = non_zero_duration)]
    pub timeout: Duration,

    /// Allow other hosts to connect without TLS
    #[arg(long)]
    pub insecure: bool,
}

/// When a restored process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum RestoreHow {
    /// `lazy` if CRIU and the kernel support it, else `eager`
    Auto,
    /// Resume the process when all its memory is in place
    Eager,
    /// Resume the process at once, and fill its memory on access and in the background
    Lazy,
}

/// Options for receiving.
#[derive(Debug, Args)]
pub struct Serve {
    /// Listen on this address; PORT alone means 127.0.0.1, and port 0 any free one
    #[arg(long, value_name = "[ADDR:]PORT", value_parser = parse_listen, required = true)]
    pub listen: Option<SocketAddr>,

    /// Store migrations in this directory; created if missing
    #[arg(long, required = true)]
    pub dir: Option<PathBuf>,

    /// Make each dump by CRIU the parent of the next dump of the same process: for CRIU run with --track-mem
    /// and, from the second dump on, --prev-images-dir
    #[arg(long)]
    pub chain_dumps: bool,

    /// Restore received processes with CRIU, and resume them
    #[arg(long, value_enum, value_name = "HOW", num_args = 0..=1, require_equals = true,
          default_missing_value = "auto")]
    pub restore: Option<RestoreHow>,

    /// Cancel a restore that takes longer; the process is stopped meanwhile, and then resumes at the source
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = non_zero_duration,
          requires = "restore")]
    pub restore_timeout: Duration,

    /// Restore with this CRIU, 4.1 or later [default: the one in PATH]
    #[arg(long, value_name = "PATH", requires = "restore")]
    pub criu: Option<PathBuf>,

    /// Pass these options, by their long names, to `criu restore`
    #[arg(last = true, value_name = "CRIU OPTIONS", requires = "restore")]
    pub criu_args: Vec<String>,

    /// Receive one migration (or dump by CRIU), and exit with its result
    #[arg(long)]
    pub once: bool,

    /// With --once: wait this long for the sender to reconnect when the connection is lost
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    pub reconnect_for: Duration,

    /// Drop a sender that is silent for this time
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = non_zero_duration)]
    pub timeout: Duration,

    /// Limit the number of rounds of a migration
    #[arg(long, value_name = "N", default_value_t = 1000,
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_rounds: u32,

    /// Limit the bytes that a migration writes to disk in all its rounds; units K, M, G, T
    #[arg(long, value_name = "SIZE", default_value = "16T", value_parser = size)]
    pub max_bytes: u64,

    /// Limit the number of processes and shared segments of a round, and of CRIU's state images
    #[arg(long, value_name = "N", default_value_t = 65536,
          value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub max_images: u32,

    /// Refuse data that would leave less than this free on the disk; units K, M, G, T
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    pub keep_free: u64,

    /// Use N buffers of 4 MiB for each sender. Memory is at most 48 MiB, plus for each of --max-senders
    /// these buffers, 7 MiB, 128 bytes x --max-images and 12 KiB x --max-rounds (docs/security.md)
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub buffers: u16,

    /// Limit the number of senders at a time; refuse others
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u16).range(1..))]
    pub max_senders: u16,

    /// TLS identity and trust
    #[command(flatten)]
    pub tls: TlsFiles,

    /// Accept only senders that have one of these names in their certificate
    #[arg(long, value_name = "NAME", num_args = 1.., requires = "tls_ca")]
    pub allow: Vec<String>,

    /// Drop connections that have not authenticated after this time
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = non_zero_duration)]
    pub handshake_timeout: Duration,

    /// Allow other hosts to connect without TLS
    #[arg(long)]
    pub insecure: bool,

    /// With --once: print a report as one JSON object on standard output
    #[arg(long, requires = "once")]
    pub json: bool,

    /// Log more (-vv logs even more)
    #[arg(long, short, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.parse() {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    let expected = "expected PORT, or ADDRESS:PORT like 192.0.2.1:7700 or [::1]:7700";
    text.parse().map_err(|_| expected.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
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
