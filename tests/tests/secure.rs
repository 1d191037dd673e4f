//! TLS: no third party can read the memory, no peer is accepted without a certificate, and both ends report why.

use pageferry_receiver::tools::certs;
use pageferry_tests::certs::{Certs, options, strs};
use pageferry_tests::criu::Criu;
use pageferry_tests::pair::send_command;
use pageferry_tests::program::Program;
use pageferry_tests::scenario::{assert_arrived, assert_verified, receive, resume};
use pageferry_tests::{Pair, Receiver, Send, Victim};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread::JoinHandle;
use std::{fs, thread};
use time::{Duration, OffsetDateTime};

/// Forwards one connection, and records the bytes of the client.
fn tap(to: SocketAddr) -> (SocketAddr, JoinHandle<io::Result<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let tap = thread::spawn(move || {
        let (mut client, _) = listener.accept()?;
        let mut server = TcpStream::connect(to)?;
        let (mut answers, mut back) = (server.try_clone()?, client.try_clone()?);
        let answering = thread::spawn(move || io::copy(&mut answers, &mut back));
        let (mut recorded, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        loop {
            let n = client.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            server.write_all(&buffer[..n])?;
            recorded.extend_from_slice(&buffer[..n]);
        }
        server.shutdown(Shutdown::Write)?;
        answering.join().unwrap()?;
        Ok(recorded)
    });
    (address, tap)
}

#[test]
fn certs_creates_certificates_for_both_ends() {
    let certs = Certs::new();
    let mode = |name: &str| {
        let metadata = fs::metadata(certs.dir().join(name)).unwrap();
        metadata.permissions().mode() & 0o777
    };
    for name in ["ca", "receive", "send"] {
        assert_eq!(mode(&format!("{name}.key")), 0o600);
        assert_eq!(mode(&format!("{name}.pem")), 0o644);
    }
    assert_eq!(mode("."), 0o700);
    let again = receive(&[&"certs", &certs.dir(), &"--host", &"x"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(again.stderr.contains("File exists"), "{}", again.stderr);
}

#[test]
fn memory_is_encrypted_on_the_wire() {
    let certs = Certs::new();
    // A frame begins with its magic number; kind and flags follow, then two zeros. Six fixed bytes: four alone turn up
    // by chance in ciphertext of this length, about once in 200 runs.
    let is_header = |window: &[u8]| window.starts_with(b"PFRY") && window.ends_with(&[0, 0]);
    for secure in [false, true] {
        let mut victim = Victim::start("heap=16 text=2 dirty=20");
        let (mut here, mut there) = (Vec::new(), Vec::new());
        if secure {
            (here, there) = (certs.options("send"), certs.options("receive"));
            there.extend(["--allow", "other", "send"].map(str::to_owned));
        }
        let pair = Pair::start(&strs(&there));
        let (address, tap) = tap(pair.address());
        here.extend(["--then", "stop"].map(str::to_owned));
        let report = Send::start(address, victim.pid(), &strs(&here)).finish();
        assert_arrived(victim.pid(), &report.expect_report());
        resume(victim.pid());
        victim.assert_unharmed();
        let recorded = tap.join().unwrap().unwrap();
        let plain = recorded.windows(8).any(is_header);
        assert_eq!(plain, !secure);
    }
}

/// Returns the exit code of a sender that is refused, its standard error, and the receiver's log line. The sender
/// connects to the receiver as `host`.
fn refused(there: &[String], here: &[String], host: &str) -> (i32, String, String) {
    let mut victim = Victim::start("heap=1");
    let dir = tempfile::tempdir().unwrap();
    let there = [&["--insecure".to_owned()], there].concat();
    let mut receiver = Receiver::listen("0.0.0.0:0", dir.path(), &strs(&there));
    let to = format!("{host}:{}", receiver.address().port());
    let mut send = send_command();
    send.args(["--to", &to, &victim.pid().to_string()])
        .args(here);
    let sent = Program::start(&mut send).finish();
    let line = receiver.program().await_event("connection_refused");
    victim.assert_unharmed();
    let mut left = fs::read_dir(dir.path()).unwrap().flatten();
    assert!(!left.any(|entry| entry.path().is_dir()));
    (sent.status.code().unwrap(), sent.stderr, line)
}

#[test]
fn untrusted_peer_is_refused_and_both_ends_report_why() {
    let (certs, others) = (Certs::new(), Certs::new());
    let old = tempfile::tempdir().unwrap();
    let now = OffsetDateTime::now_utc();
    let expired = |days| {
        let dir = old.path().join(format!("{days}"));
        let end = now - Duration::days(days);
        certs::make(
            &dir,
            &["127.0.0.1".to_owned()],
            end - Duration::days(1)..end,
        )
        .unwrap();
        dir
    };
    let (expired, future) = (expired(1), expired(-3));
    let both = |dir: &Path| {
        let side = |name: &str| options(&dir.join("ca.pem"), &dir.join(name));
        (side("receive"), side("send"))
    };
    let (receiver, sender) = both(&certs.dir());
    let allow = ["--allow", "other"].map(str::to_owned);
    let plain = Vec::new();
    const HERE: &str = "127.0.0.1";
    for (what, there, here, host, in_error, in_log) in [
        (
            "a sender without a certificate",
            receiver.clone(),
            plain.clone(),
            HERE,
            "takes encrypted connections only",
            "does not encrypt",
        ),
        (
            "a receiver without a certificate",
            plain,
            sender.clone(),
            HERE,
            "cannot establish a TLS connection",
            "has no certificates",
        ),
        (
            "a receiver of another authority",
            others.options("receive"),
            sender.clone(),
            HERE,
            "certificate of the peer was issued by another authority",
            "rejects our certificate",
        ),
        (
            "a sender of another authority",
            receiver.clone(),
            options(&certs.dir().join("ca.pem"), &others.dir().join("send")),
            HERE,
            "rejects our certificate",
            "certificate of the peer",
        ),
        (
            "certificates that have expired",
            both(&expired).0,
            both(&expired).1,
            HERE,
            "certificate of the peer has expired",
            "rejects our certificate: it has expired",
        ),
        (
            "certificates that are not valid yet",
            both(&future).0,
            both(&future).1,
            HERE,
            "is not valid yet",
            "rejects our certificate",
        ),
        (
            "a receiver under another name",
            others.options("receive"),
            others.options("send"),
            "127.0.0.2",
            "is for another host",
            "rejects our certificate",
        ),
        (
            "a sender that shows a receiver's certificate",
            receiver.clone(),
            receiver.clone(),
            HERE,
            "rejects our certificate",
            "is for the other program",
        ),
        (
            "a sender that is not among those allowed",
            [&receiver[..], &allow].concat(),
            sender.clone(),
            HERE,
            "\"send\" is not among those allowed",
            "is not among those allowed",
        ),
    ] {
        let (code, sent, line) = refused(&there, &here, host);
        assert_eq!(code, 4, "{what}: {sent}");
        assert!(sent.contains(in_error), "{what}: {sent}");
        assert!(line.contains(in_log), "{what}: {line}");
    }
}

#[test]
fn invalid_certificate_options_exit_2() {
    let certs = Certs::new();
    let victim = Victim::start("heap=1");
    let none = tempfile::NamedTempFile::new().unwrap();
    let cases = [
        (
            options(none.path(), &certs.dir().join("send")),
            2,
            "it contains no certificate",
        ),
        (
            options(Path::new("/nowhere"), &certs.dir().join("send")),
            2,
            "/nowhere",
        ),
        (certs.options("send")[..2].to_vec(), 2, "--tls-cert"),
    ];
    for (options, code, what) in cases {
        let address = ([127, 0, 0, 1], 1).into();
        let sent = Send::start(address, victim.pid(), &strs(&options)).finish();
        assert_eq!(sent.status.code(), Some(code), "{}", sent.stderr);
        assert!(sent.stderr.contains(what), "{what}: {}", sent.stderr);
    }
}

#[test]
fn dump_over_crius_own_tls_is_accepted() {
    for criu in Criu::all("a dump over CRIU's TLS") {
        let certs = Certs::new();
        let mut victim = Victim::detached("heap=8 dirty=20");
        let there = [&["--once".to_owned()], &certs.options("receive")[..]].concat();
        let pair = Pair::start(&strs(&there));
        let state = tempfile::tempdir().unwrap();
        let file = |name: &str| certs.dir().join(name).to_str().unwrap().to_owned();
        let (ca, cert, key) = (file("ca.pem"), file("send.pem"), file("send.key"));
        let tls = [
            "--tls",
            "--tls-cacert",
            &ca,
            "--tls-cert",
            &cert,
            "--tls-key",
            &key,
        ];
        let dump = [&["--leave-running"], &tls[..]].concat();
        criu.dump_to(pair.address(), victim.pid(), state.path(), &dump)
            .unwrap();
        let (dir, finished) = pair.finish();
        assert!(finished.status.success(), "{}", finished.stderr);
        assert_verified(&dir.path().join("images/criu-1"));
        victim.assert_unharmed();
    }
}
