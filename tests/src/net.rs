//! Two hosts and a client in network namespaces, and a service address that moves between the hosts.

use crate::daemon::output;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Address of the service. Both hosts have it; the router decides which one receives the packets.
pub const SERVICE: &str = "10.78.9.10";

/// Address of host B itself.
pub const B: &str = "10.78.1.2";

/// Hosts A and B, a client C, and a router between them. Dropping it deletes the namespaces.
#[derive(Debug)]
pub struct Net(String);

impl Net {
    /// Sets up the network with the service at A and each link at this rate (in the notation of `tc`: `1gbit`).
    ///
    /// # Panics
    /// If the setup fails; it requires root.
    #[must_use]
    pub fn up(rate: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let net = Self(format!("pf{}-{number}", std::process::id()));
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
                // The token bucket is more often built into kernels than netem.
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

    /// Returns a command that runs its next argument in the network of A, B or C.
    #[must_use]
    pub fn enter(&self, host: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(self.option(host));
        command
    }

    /// Returns the option of `nsenter` that enters the network of a host.
    #[must_use]
    pub fn option(&self, host: &str) -> String {
        format!("--net=/run/netns/{}", self.name(host))
    }

    fn route_to_a(&self) {
        self.route("10.78.0.2");
    }

    /// Moves the service address to B.
    ///
    /// # Panics
    /// If a command fails.
    pub fn route_to_b(&self) {
        self.route(B);
    }

    /// Takes the link to A, B or C down: packets in flight are lost, and no host is notified.
    ///
    /// # Panics
    /// If a command fails.
    pub fn cut(&self, host: &str) {
        run(&format!("ip -n {} link set to{host} down", self.name("R")));
    }

    /// Takes the link up again.
    ///
    /// # Panics
    /// If a command fails.
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
