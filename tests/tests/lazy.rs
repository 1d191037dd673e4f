//! `receive serve-pages`: a process is restored without its memory, which `criu lazy-pages` fetches from the
//! receiver.

use pageferry_tests::criu::{Criu, await_gone, merge};
use pageferry_tests::daemon::until;
use pageferry_tests::log;
use pageferry_tests::program::{Finished, Program};
use pageferry_tests::scenario::receive;
use pageferry_tests::{Pair, Victim};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Returns the bytes that pages files in a directory occupy on disk.
fn pages_on_disk(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    let pages = files.filter(|file| file.file_name().to_string_lossy().starts_with("pages-"));
    pages
        .map(|file| file.metadata().unwrap().blocks() * 512)
        .sum()
}

fn serve_pages(dir: &Path) -> (Program, SocketAddr) {
    let mut server = Program::start(
        pageferry_tests::pair::receive_command()
            .arg("serve-pages")
            .arg(dir)
            .args(["--listen", "0", "--once"]),
    );
    let address = server.await_stderr(pageferry_tests::pair::listening_on);
    (server, address)
}

/// Returns the number of pages served, from the log.
fn pages_given(finished: &Finished) -> u64 {
    let mut done = log::lines(&finished.stderr, "page_client_done");
    let line = done.find(|line| log::field(line, "complete") == Some("true"));
    let pages = line.and_then(|line| log::field(line, "pages"));
    pages
        .and_then(|pages| pages.parse().ok())
        .expect(&finished.stderr)
}

#[test]
fn process_is_restored_before_its_memory_arrives() {
    for criu in Criu::all("restore with lazy pages") {
        for features in [
            "heap=32 threads=3 dirty=20",
            "heap=16 children=2 shared=2 dirty=20",
        ] {
            let mut victim = Victim::detached(features);
            let (pid, tree) = (victim.pid(), victim.tree());
            let (pair, state) = (Pair::start(&[]), tempfile::tempdir().unwrap());
            criu.dump_to(pair.address(), pid, state.path(), &[])
                .unwrap();
            victim.await_end();
            await_gone(&tree);
            let dump = pair.dir().join("criu-1");
            merge(state.path(), &dump);

            let small = state.path().join("small");
            let made = receive(&[&"flatten", &"--skeleton", &dump, &small]);
            assert!(made.status.success(), "{}", made.stderr);
            let (all, few) = (pages_on_disk(&dump), pages_on_disk(&small));
            assert!(few * 4 < all, "{few} of {all} bytes");

            let (server, address) = serve_pages(&dump);
            let mut daemon = criu.command("lazy-pages", &small);
            daemon.args(["--page-server", "--address", "127.0.0.1", "--port"]);
            daemon.arg(address.port().to_string());
            let daemon = Program::start(&mut daemon);
            until("the daemon listens", || {
                match small.join("lazy-pages.socket").exists() {
                    true => Ok(()),
                    false => Err("no socket".to_owned()),
                }
            });
            let _restored = criu.restore(&small, pid, &["--lazy-pages"]).unwrap();
            let verdict = victim.report().verdict(pid);
            verdict.unwrap_or_else(|error| panic!("{features}: {error}"));
            assert!(daemon.finish().status.success());
            let served = server.finish();
            assert!(served.status.success(), "{}", served.stderr);
            assert!(pages_given(&served) * 4096 > all / 2, "{}", served.stderr);
            // All pages are present now, and stay correct without a server.
            victim.report().verdict(pid).unwrap();
        }
    }
}

#[test]
fn request_for_missing_pages_ends_the_client() {
    let victim = Victim::start("heap=1");
    let pair = Pair::start(&[]);
    let report = pair.send(victim.pid(), &["--rounds", "1"]).expect_report();
    let round = report.last_round();
    let (mut server, address) = serve_pages(&round);
    let request = |command: u32, pages: u32, address: u64, process: u64| {
        let parts: [&[u8]; 4] = [
            &command.to_le_bytes(),
            &pages.to_le_bytes(),
            &address.to_le_bytes(),
            &process.to_le_bytes(),
        ];
        parts.concat()
    };
    let pid = u64::from(victim.pid().unsigned_abs());
    for (request, word) in [
        (request(7, 1, 0x1000, pid), "which are not in the images"),
        (request(7, 1, 0x1001, pid), "which are not in the images"),
        (request(7, u32::MAX, 0, pid), "which are not in the images"),
        (request(4, 0, 0, pid), "to send pages"),
        (request(99, 0, 0, pid), "violated the protocol"),
    ] {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(&request).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert!(answer.is_empty());
        let line = server.await_event("page_client_failed");
        assert!(line.contains(word), "{word}: {line}");
    }
    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(&request(0x1023, 0, 0, 0)).unwrap();
    let mut status = [1; 4];
    client.read_exact(&mut status).unwrap();
    assert_eq!(status, [0; 4]);
    assert!(server.finish().status.success());
}
