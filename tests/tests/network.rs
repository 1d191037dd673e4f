//! A service that moves with its address: its clients only see a pause.

use pageferry_tests::criu::Criu;
use pageferry_tests::daemon::{Daemon, output, until};
use pageferry_tests::host::Host;
use pageferry_tests::memory;
use pageferry_tests::program::Program;
use std::process::{Command, Stdio};

/// Two hosts and a client, each in a network namespace, and a router between them: the service's
/// address is on both hosts, and the router says which of them has it.
struct Net(String);

const SERVICE: &str = "10.78.9.10";

impl Net {
    fn up() -> Self {
        let net = Self(format!("pf{}", std::process::id()));
        for name in ["R", "A", "B", "C"] {
            run("ip", &["netns", "add", &net.name(name)]);
            run("ip", &["-n", &net.name(name), "link", "set", "lo", "up"]);
        }
        for (number, name) in ["A", "B", "C"].into_iter().enumerate() {
            let (here, router) = (net.name(name), net.name("R"));
            let wire = format!("to{name}");
            let link = [
                "link", "add", "wire", "netns", &here, "type", "veth", "peer", "name",
            ];
            run("ip", &[&link[..], &[&wire, "netns", &router]].concat());
            let (near, far) = (format!("10.78.{number}.2/24"), format!("10.78.{number}.1"));
            run("ip", &["-n", &here, "address", "add", &near, "dev", "wire"]);
            run(
                "ip",
                &[
                    "-n",
                    &router,
                    "address",
                    "add",
                    &format!("{far}/24"),
                    "dev",
                    &wire,
                ],
            );
            run("ip", &["-n", &here, "link", "set", "wire", "up"]);
            run("ip", &["-n", &router, "link", "set", &wire, "up"]);
            run("ip", &["-n", &here, "route", "add", "default", "via", &far]);
            if name != "C" {
                run("ip", &["-n", &here, "address", "add", SERVICE, "dev", "lo"]);
            }
        }
        let forward = ["sysctl", "-qw", "net.ipv4.ip_forward=1"];
        run("nsenter", &[&[&*net.enter("R")], &forward[..]].concat());
        net.route("10.78.0.2");
        net
    }

    fn name(&self, host: &str) -> String {
        format!("{}{host}", self.0)
    }

    /// The option of `nsenter` that leads there.
    fn enter(&self, host: &str) -> String {
        format!("--net=/run/netns/{}", self.name(host))
    }

    /// Sends whatever is for the service to a host.
    fn route(&self, via: &str) {
        let router = self.name("R");
        run(
            "ip",
            &["-n", &router, "route", "replace", SERVICE, "via", via],
        );
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in ["R", "A", "B", "C"] {
            let _ = Command::new("ip")
                .args(["netns", "delete", &self.name(name)])
                .status();
        }
    }
}

fn run(program: &str, words: &[&str]) {
    let done = output(Command::new(program).args(words).stderr(Stdio::piped()));
    done.unwrap_or_else(|error| panic!("{program} {words:?}: {error}"));
}

/// A client that counts in the service: each answer must be one more than the last, on one and the
/// same connection. It says how far it is, and its longest pause, ms.
const CLIENT: &str = "
import socket, sys, time
server = socket.create_connection((sys.argv[1], 6379))
lines = server.makefile()
expected, longest, last = 1, 0, time.monotonic()
while True:
    server.sendall(b'*2\\r\\n$4\\r\\nINCR\\r\\n$1\\r\\nn\\r\\n')
    line = lines.readline()
    now = time.monotonic()
    longest, last = max(longest, now - last), now
    if line != f':{expected}\\r\\n' and line != f':{expected}\\n':
        print('WRONG', expected, repr(line), flush=True)
        sys.exit(1)
    if expected % 500 == 0: print(expected, int(longest * 1000), file=sys.stderr, flush=True)
    expected += 1
";

/// The client's next line: how far it is, and its longest pause, ms.
fn progress(client: &mut Program) -> (u64, u64) {
    client.await_stderr(|line| {
        let (count, pause) = line.split_once(' ')?;
        Some((count.parse().ok()?, pause.parse().ok()?))
    })
}

#[test]
fn a_client_of_redis_keeps_its_connection() {
    for criu in Criu::all("connections that move") {
        let net = Net::up();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("redis.sock");
        let mut server = Command::new("nsenter");
        server
            .arg(net.enter("A"))
            .args(["redis-server", "--bind", SERVICE]);
        server
            .args(["--save", "", "--protected-mode", "no", "--dir"])
            .arg(dir.path());
        server.arg("--unixsocket").arg(&socket);
        let mut server = Daemon::detached(&server);
        let cli =
            |words: &[&str]| output(Command::new("redis-cli").arg("-s").arg(&socket).args(words));
        until("redis comes up", || cli(&["ping"]));
        let mut client = Command::new("nsenter");
        client
            .arg(net.enter("C"))
            .args(["python3", "-c", CLIENT, SERVICE]);
        let mut client = Program::start(&mut client);
        progress(&mut client);

        let host = Host::start_in(&["nsenter", &net.enter("B")]);
        let images = tempfile::tempdir().unwrap();
        let path = criu.path().to_str().unwrap();
        let options = ["--restore", "--criu", path, "--insecure"];
        let _receiver = host.receiver("10.78.1.2:7700", images.path(), &options);
        let mut send = Command::new("nsenter");
        send.arg(net.enter("A"));
        send.arg(pageferry_tests::pair::send_command().get_program());
        send.args([
            "--to",
            "10.78.1.2:7700",
            "--insecure",
            "--migrate",
            "--tcp-established",
        ]);
        send.args(["--criu", path, &server.pid().to_string()]);
        let sent = Program::start(&mut send).finish();
        assert!(sent.status.success(), "{}", sent.stderr);
        server.child().wait().unwrap();
        assert!(!memory::lives(server.pid()));
        net.route("10.78.1.2");

        // Nothing that was acknowledged is lost, and nothing was done twice: the client sees to it.
        let reached: u64 = cli(&["get", "n"]).unwrap().trim().parse().unwrap();
        let (count, pause) = until("the client goes on", || match progress(&mut client) {
            (count, pause) if count > reached + 2000 => Ok((count, pause)),
            (count, _) => Err(format!("it is at {count}")),
        });
        let version = criu.version();
        eprintln!("CRIU {version:?}: {count} answers, the longest pause was {pause} ms");
        let downtime = sent.stderr.contains("handed over");
        assert!(downtime && pause > 10, "{pause} ms: {}", sent.stderr);
        client.kill();
        let stored: u64 = cli(&["get", "n"]).unwrap().trim().parse().unwrap();
        assert!(stored >= count, "{stored} {count}");
    }
}
