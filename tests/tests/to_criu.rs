//! `send --dialect criu`: rounds sent to the real `criu page-server` equal the memory of the frozen victim, byte by
//! byte, and CRIU restores it from them.

use pageferry_tests::criu::{Criu, await_gone, await_listener, free_address, merge};
use pageferry_tests::daemon::until;
use pageferry_tests::huge::HugePages;
use pageferry_tests::memory::{Frozen, Snapshot};
use pageferry_tests::program::Program;
use pageferry_tests::scenario::{compare_chain, resume};
use pageferry_tests::{Send, Victim};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The page servers of several rounds, one after the other on the same port.
struct PageServers {
    dir: tempfile::TempDir,
    address: SocketAddr,
    last: Program,
    rounds: u32,
}

impl PageServers {
    fn start(criu: &Criu) -> Self {
        let (dir, address) = (tempfile::tempdir().unwrap(), free_address());
        let last = serve(criu, dir.path(), 1, address);
        Self {
            dir,
            address,
            last,
            rounds: 1,
        }
    }

    /// Starts the next server as soon as one has its round, until the sender exits.
    fn follow(&mut self, criu: &Criu, send: &mut Send) {
        let pid = send.program().pid();
        while until("the page server has its round", || {
            let sender = pageferry_tests::memory::lives(pid);
            let server = pageferry_tests::memory::lives(self.last.pid());
            match (sender, server) {
                (false, _) => Ok(false),
                (true, false) => Ok(true),
                (true, true) => Err("it runs".to_owned()),
            }
        }) {
            self.rounds += 1;
            self.last = serve(criu, self.dir.path(), self.rounds, self.address);
        }
    }

    fn round(&self, number: u32) -> PathBuf {
        self.dir.path().join(number.to_string())
    }
}

fn serve(criu: &Criu, dir: &Path, round: u32, address: SocketAddr) -> Program {
    let images = dir.join(round.to_string());
    fs::create_dir(&images).unwrap();
    let mut command = criu.command("page-server", &images);
    command.args(["--address", "127.0.0.1", "--port"]);
    command.arg(address.port().to_string());
    if round > 1 {
        command.arg("--prev-images-dir");
        command.arg(format!("../{}", round - 1));
    }
    Program::start(&mut command)
}

fn assert_sent_and_restored(criu: &Criu, features: &str) {
    let mut victim = Victim::detached(features);
    let (pid, tree) = (victim.pid(), victim.tree());
    let mut servers = PageServers::start(criu);
    await_listener("/proc/net/tcp", servers.address.port());
    let options = ["--dialect", "criu", "--max-downtime", "0ms"];
    let options = [&options[..], &["--max-rounds", "2", "--then", "stop"]].concat();
    let mut send = Send::start(servers.address, pid, &options);
    servers.follow(criu, &mut send);
    let report = send.finish().expect_report();
    let rounds = u32::try_from(report.rounds.len()).unwrap();
    assert!(rounds >= 2, "{report:?}");
    let last = servers.round(rounds);
    let truth = Snapshot::take(&Frozen::from_stopped(pid).unwrap()).unwrap();
    let stats = compare_chain(&truth, &last);
    assert!(stats.required > 1000, "{stats:?}");
    // Not everything is sent again: the remaining pages come from earlier rounds.
    let (all, again) = (&report.rounds[0], &report.rounds[1]);
    assert!(again.bytes_wire < all.bytes_wire / 2, "{report:?}");

    let state = tempfile::tempdir().unwrap();
    criu.run("dump", state.path(), &["-t", &pid.to_string()])
        .unwrap();
    victim.await_end();
    await_gone(&tree);
    merge(state.path(), &last);
    let _restored = criu.restore(&last, pid, &[]).unwrap();
    resume(pid);
    let verdict = victim.report().verdict(pid);
    verdict.unwrap_or_else(|error| panic!("{features}: {error}"));
}

#[test]
fn rounds_are_sent_to_crius_page_server() {
    for criu in Criu::all("rounds into criu page-server") {
        for features in [
            "heap=16 zero=4 text=2 protnone=1 fileprivate=2 dirty=5",
            "heap=8 shared=4 memfd=2 children=2 dirty=5",
        ] {
            assert_sent_and_restored(&criu, features);
        }
        let _pages = HugePages::reserve(16);
        assert_sent_and_restored(&criu, "hugetlb=4 heap=8 dirty=5");
    }
}

#[test]
fn page_server_without_the_previous_round_is_reported() {
    let Some(criu) = Criu::stable("page servers that are no chain") else {
        return;
    };
    let mut victim = Victim::start("heap=8");
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (server, address) = criu.page_server(first.path(), &[]);
    let options = ["--dialect", "criu", "--rounds", "2"];
    let send = Send::start(address, victim.pid(), &options);
    assert!(server.finish().status.success());
    let mut command = criu.command("page-server", second.path());
    command.args(["--address", "127.0.0.1", "--port"]);
    let second = Program::start(command.arg(address.port().to_string()));
    let sent = send.finish();
    assert_eq!(sent.status.code(), Some(1), "{}", sent.stderr);
    for words in ["does not have", "--prev-images-dir"] {
        assert!(sent.stderr.contains(words), "{words}: {}", sent.stderr);
    }
    // It has received an incomplete round.
    assert!(!second.finish().status.success());
    victim.assert_unharmed();
}

#[test]
fn limits_of_crius_protocol_are_reported() {
    let Some(criu) = Criu::stable("what CRIU's protocol lacks") else {
        return;
    };
    let victim = Victim::start("heap=1");
    let dir = tempfile::tempdir().unwrap();
    let (server, address) = criu.page_server(dir.path(), &[]);
    let options = ["--dialect", "criu", "--rounds", "1"];
    let sent = Send::start(address, victim.pid(), &options).finish();
    assert!(sent.status.success(), "{}", sent.stderr);
    for word in ["checksums", "compression", "resume"] {
        assert!(sent.stderr.contains(word), "{}", sent.stderr);
    }
    assert!(server.finish().status.success());
    let compressed = [&options[..], &["--compress", "zstd"]].concat();
    let refused = Send::start(address, victim.pid(), &compressed).finish();
    assert_eq!(refused.status.code(), Some(1));
    assert!(refused.stderr.contains("--compress"), "{}", refused.stderr);
}
