//! Two hosts and a client in network namespaces, and a service's address that moves between the hosts.

use crate::daemon::output;
use std::process::{Command, Stdio};

/// The address of whatever service there is. Both hosts have it; the router says who is meant.
pub const SERVICE: &str = "10.78.9.10";

/// Host B's own address.
pub const B: &str = "10.78.1.2";

/// Hosts A and B, a client C, and a router between them. All gone when dropped.
#[derive(Debug)]
pub struct Net(String);

impl Net {
    /// Sets it up, the service at A, with every wire this fast (as `tc` writes it: `1gbit`).
    ///
    /// # Panics
    /// If it cannot be set up; it takes root.
    #[must_use]
    pub fn up(rate: &str) -> Self {
        let net = Self(format!("pf{}", std::process::id()));
        for name in ["R", "A", "B", "C"] {
            run(&format!("ip netns add {}", net.name(name)));
            run(&format!("ip -n {} link set lo up", net.name(name)));
        }
        let router = net.name("R");
        for (number, name) in ["A", "B", "C"].into_iter().enumerate() {
            let host = net.name(name);
            let wire = format!("to{name}");
            run(&format!(
                "ip link add wire netns {host} type veth peer name {wire} netns {router}"
            ));
            for (namespace, wire, last) in [(&host, "wire", 2), (&router, &*wire, 1)] {
                let ip = format!("ip -n {namespace}");
                run(&format!(
                    "{ip} address add 10.78.{number}.{last}/24 dev {wire}"
                ));
                run(&format!("{ip} link set {wire} up"));
                // The kernel has a token bucket built in more often than netem.
                run(&format!(
                    "ip netns exec {namespace} tc qdisc replace dev {wire} root \
                     tbf rate {rate} burst 1mb latency 50ms"
                ));
            }
            run(&format!(
                "ip -n {host} route add default via 10.78.{number}.1"
            ));
            if name != "C" {
                run(&format!("ip -n {host} address add {SERVICE} dev lo"));
            }
        }
        run(&format!(
            "ip netns exec {router} sysctl -qw net.ipv4.ip_forward=1"
        ));
        net.route_to_a();
        net
    }

    fn name(&self, host: &str) -> String {
        format!("{}{host}", self.0)
    }

    /// A command that runs, in the network of A, B or C, the program that is its next argument.
    #[must_use]
    pub fn enter(&self, host: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(self.option(host));
        command
    }

    /// The option of `nsenter` that leads there.
    #[must_use]
    pub fn option(&self, host: &str) -> String {
        format!("--net=/run/netns/{}", self.name(host))
    }

    fn route_to_a(&self) {
        self.route("10.78.0.2");
    }

    /// Moves the service's address to B.
    ///
    /// # Panics
    /// If it fails.
    pub fn route_to_b(&self) {
        self.route(B);
    }

    /// Takes the wire to A, B or C down: what is on it is lost, and nobody there is told.
    ///
    /// # Panics
    /// If it fails.
    pub fn cut(&self, host: &str) {
        run(&format!("ip -n {} link set to{host} down", self.name("R")));
    }

    /// Takes it up again.
    ///
    /// # Panics
    /// If it fails.
    pub fn mend(&self, host: &str) {
        run(&format!("ip -n {} link set to{host} up", self.name("R")));
    }

    fn route(&self, via: &str) {
        run(&format!(
            "ip -n {} route replace {SERVICE} via {via}",
            self.name("R")
        ));
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

fn run(line: &str) {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().expect("it is not empty"));
    let done = output(command.args(words).stderr(Stdio::piped()));
    done.unwrap_or_else(|error| panic!("{line}: {error}"));
}
