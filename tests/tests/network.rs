//! Services move to another host together with their address while they work: their clients only observe a pause.

use pageferry_tests::criu::Criu;
use pageferry_tests::net::Net;
use pageferry_tests::{mover, service};

fn moves(name: &str) {
    for criu in Criu::all(&format!("a {name} that moves while it works")) {
        let net = Net::up("1gbit");
        let mut service = service::start(name, &net, 128);
        let moved = mover::pageferry(&net, &criu, &mut *service, &[]);
        let pause = service.pause();
        service.check();
        let (version, downtime) = (criu.version(), moved.downtime_ms);
        eprintln!("CRIU {version:?}: downtime {downtime:.0} ms, longest pause {pause} ms");
        // No copy ran for this long, so every client observed a pause at least as long.
        assert!(pause as f64 + 1.0 >= downtime / 2.0, "{pause} {downtime}");
    }
}

#[test]
fn redis_moves_with_its_clients() {
    moves("redis");
}

#[test]
fn postgresql_moves_with_its_clients() {
    moves("postgresql");
}

#[test]
fn jvm_moves() {
    moves("jvm");
}

#[test]
fn python_moves() {
    moves("python");
}
