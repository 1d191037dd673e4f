//! A connection that is lost ends no migration: what was acked stays, what was not is sent again, and
//! what arrives in the end is what the process holds.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tests::daemon::until;
use pageferry_tests::kills::{kills, spread};
use pageferry_tests::link::{Link, Step};
use pageferry_tests::net::{B, Net};
use pageferry_tests::pair::{Sent, receive_command, send_command};
use pageferry_tests::program::Program;
use pageferry_tests::scenario::{assert_arrived, assert_verified, go_on, has_tracker};
use pageferry_tests::{Pair, Receiver, Report, Send, Victim};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Two rounds of a tree that runs, and the last.
const ROUNDS: [&str; 6] = [
    "--max-downtime",
    "0ms",
    "--max-rounds",
    "2",
    "--then",
    "stop",
];

const STEPS: [Step; 9] = [
    ("the first round's beginning", 3, false, 1),
    ("pages of the first round", 5, false, 1),
    ("the first round's end", 6, false, 1),
    ("the first round's ack", 7, true, 1),
    ("an image of the second round", 4, false, 2),
    ("pages of the second round", 5, false, 2),
    ("the second round's ack", 7, true, 2),
    ("pages of the last round", 5, false, 3),
    ("the last round's ack", 7, true, 3),
];

fn reconnects(report: &Report) -> u64 {
    report.totals["totals"]["reconnects"].as_u64().unwrap()
}

/// A target of every sort of image, of which little is written.
fn victim() -> Victim {
    Victim::start("heap=24 children=2 shared=2 memfd=2 fileprivate=2 dirty=4")
}

/// Cuts the link once at each of these steps, before and after its frame.
fn cut_at_every_step(steps: &[Step], tracker: &str) {
    if !has_tracker(tracker) {
        return;
    }
    let mut victim = victim();
    for &step in steps {
        for after in [false, true] {
            let what = format!("{tracker}, {} ({after})", step.0);
            let pair = Pair::start(&[]);
            let link = Link::to(pair.address(), step, after);
            let options = [&["--tracker", tracker], &ROUNDS[..]].concat();
            let send = Send::start(link.address, victim.pid(), &options);
            link.reached.recv().unwrap();
            link.go_on.send(false).unwrap();
            let report = send.finish().expect_report();
            // After the last ack, there is nothing that it would be good for.
            let over = after && step == STEPS[8];
            assert_eq!(reconnects(&report), u64::from(!over), "{what}");
            assert_arrived(victim.pid(), &report);
            go_on(victim.pid());
            // Each round is there once, and what one has, none of the others sends again.
            let numbers: Vec<_> = report.rounds.iter().map(|round| round.round).collect();
            let expected: Vec<_> = (1..=numbers.len() as u64).collect();
            assert_eq!(numbers, expected, "{what}");
            let sent: Vec<_> = report.rounds.iter().map(|round| round.sent_pages).collect();
            assert!(sent[1..].iter().sum::<u64>() < sent[0], "{what}: {sent:?}");
            victim.assert_unharmed();
        }
    }
}

#[test]
fn the_link_is_cut_at_every_step_with_uffd() {
    cut_at_every_step(&STEPS, "uffd");
}

#[test]
fn the_link_is_cut_at_every_step_with_soft_dirty() {
    cut_at_every_step(&STEPS, "soft-dirty");
}

#[test]
fn the_link_is_cut_at_every_step_with_content_hashes() {
    // It has no bits to lose.
    cut_at_every_step(&STEPS[4..8], "hash");
}

#[test]
fn who_is_not_to_reconnect_gives_up() {
    let mut victim = victim();
    let pair = Pair::start(&[]);
    let link = Link::to(pair.address(), STEPS[5], false);
    let options = [&ROUNDS[..], &["--reconnect-for", "0"]].concat();
    let send = Send::start(link.address, victim.pid(), &options);
    link.reached.recv().unwrap();
    link.go_on.send(false).unwrap();
    let sent = send.finish();
    assert_eq!(sent.status.code(), Some(1), "{}", sent.stderr);
    assert!(sent.stderr.contains("the target runs"), "{}", sent.stderr);
    victim.assert_unharmed();
}

/// The directory of the one migration below `dir`, once there is one.
fn migration(dir: &Path) -> PathBuf {
    until("there is a migration", || {
        let homes = fs::read_dir(dir).map_err(|error| error.to_string())?;
        let mut homes = homes.flatten().map(|entry| entry.path());
        homes
            .find(|path| path.is_dir())
            .ok_or_else(|| "none yet".to_owned())
    })
}

/// Waits until some of a round's pages are written, and no more.
fn await_pages(dir: &Path, round: u32) {
    until("pages of the round arrive", || {
        let torn = migration(dir).join(format!(".{round}.tmp"));
        let files = fs::read_dir(&torn).map_err(|error| error.to_string())?;
        let pages = files.flatten().any(|file| {
            let pages = file.file_name().to_string_lossy().starts_with("pages-");
            pages && file.metadata().is_ok_and(|it| it.len() > 0)
        });
        pages.then_some(()).ok_or_else(|| "none yet".to_owned())
    });
}

#[test]
fn a_receiver_that_is_killed_and_started_again_goes_on() {
    let mut victim = Victim::start("heap=64 children=1 shared=2 dirty=20");
    // Whatever it does when it is killed, the rounds that it had acked are there.
    let kills = kills(10);
    let mut killed = 0;
    while killed < kills {
        let dir = tempfile::tempdir().unwrap();
        let mut receiver = Receiver::start(dir.path(), &[]);
        let port = receiver.address().port().to_string();
        let mut send = Send::start(receiver.address(), victim.pid(), &["--rounds", "1000"]);
        send.program().await_round(1);
        for _ in 0..10.min(kills - killed) {
            std::thread::sleep(Duration::from_millis(400).mul_f64(spread(killed)));
            receiver.program().end();
            killed += 1;
            assert_verified(&migration(dir.path()));
            receiver = Receiver::listen(&port, dir.path(), &[]);
            send.program().await_event("reconnected");
            assert_verified(&migration(dir.path()));
        }
        send.program().await_event("round_done");
        send.program().kill();
        victim.assert_unharmed();
    }
}

#[test]
fn rounds_of_before_a_restart_are_parents_of_those_after() {
    let mut victim = victim();
    let dir = tempfile::tempdir().unwrap();
    let mut receiver = Receiver::start(dir.path(), &[]);
    let port = receiver.address().port().to_string();
    // Killed in the middle of the second round.
    let link = Link::to(receiver.address(), STEPS[5], true);
    let send = Send::start(link.address, victim.pid(), &ROUNDS);
    link.reached.recv().unwrap();
    receiver.program().end();
    let _receiver = Receiver::listen(&port, dir.path(), &[]);
    link.go_on.send(false).unwrap();
    let report = send.finish().expect_report();
    assert_eq!(reconnects(&report), 1);
    assert_arrived(victim.pid(), &report);
    go_on(victim.pid());
    victim.assert_unharmed();
}

/// Times for which a link is cut, s: few, or with `PAGEFERRY_LONG` all that are promised.
fn cuts() -> &'static [u64] {
    match std::env::var_os("PAGEFERRY_LONG") {
        Some(_) => &[1, 2, 5, 10, 20],
        None => &[1],
    }
}

/// A `send` at host A and a `receive` at host B, with a real wire between them.
struct Wired {
    net: Net,
    _receiver: Receiver,
    dir: tempfile::TempDir,
    send: Program,
}

impl Wired {
    fn start(rate: &str, victim: &Victim, receive: &[&str], options: &[&str]) -> Self {
        let net = Net::up(rate);
        let dir = tempfile::tempdir().unwrap();
        let mut there = net.enter("B");
        there.arg(receive_command().get_program()).arg("--insecure");
        let receiver = Receiver::run(there, &format!("{B}:7700"), dir.path(), receive);
        let mut here = net.enter("A");
        here.arg(send_command().get_program());
        here.args(["--to", &format!("{B}:7700"), "--insecure", "--json"]);
        let send = Program::start(here.args(options).arg(victim.pid().to_string()));
        Self {
            net,
            _receiver: receiver,
            dir,
            send,
        }
    }

    /// Waits for the end; claims that what arrived is what there is.
    fn assert_arrived(self, victim: &mut Victim) -> Report {
        let patience = Duration::from_secs(300);
        let report = Sent::from(self.send.finish_within(patience)).expect_report();
        assert_arrived(victim.pid(), &report);
        go_on(victim.pid());
        victim.assert_unharmed();
        report
    }
}

#[test]
fn a_link_that_is_down_for_a_while() {
    let mut victim = Victim::start("heap=24 children=1 dirty=10");
    for &seconds in cuts() {
        // In the first round, in one behind it, and in the last, for which nobody waits long.
        for round in 1..=3 {
            let options = [&ROUNDS[..], &["--timeout", "3s", "--max-frozen", "500ms"]].concat();
            let wired = Wired::start("100mbit", &victim, &["--timeout", "3"], &options);
            await_pages(wired.dir.path(), round);
            wired.net.cut("B");
            // That is how long it is to be down.
            std::thread::sleep(Duration::from_secs(seconds));
            if round == 3 {
                // It runs on meanwhile.
                victim.assert_unharmed();
            }
            wired.net.mend("B");
            let report = wired.assert_arrived(&mut victim);
            eprintln!(
                "down for {seconds} s in round {round}: {} reconnects, {} rounds",
                reconnects(&report),
                report.rounds.len()
            );
        }
    }
}

#[test]
fn a_slow_link() {
    let mut victim = Victim::start("heap=4 dirty=1");
    let options = ["--max-downtime", "5s", "--then", "stop"];
    let wired = Wired::start("10mbit", &victim, &["--timeout", "5"], &options);
    let report = wired.assert_arrived(&mut victim);
    assert_eq!(reconnects(&report), 0);
}

/// A receiver that neither reads nor goes away.
#[test]
fn a_link_that_is_waited_for_is_sent_less() {
    let mut victim = Victim::start("heap=8 text=96");
    let wired = Wired::start("100mbit", &victim, &[], &["--then", "stop"]);
    let report = wired.assert_arrived(&mut victim);
    let (raw, wire) = report.rounds.iter().fold((0, 0), |(raw, wire), it| {
        (raw + it.bytes_raw, wire + it.bytes_wire)
    });
    assert!(wire < raw / 2, "{wire} of {raw} bytes");
}

#[test]
fn a_receiver_that_stalls() {
    let mut victim = Victim::start("heap=64 dirty=50");
    for comes_back in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let mut receiver = Receiver::start(dir.path(), &[]);
        let pid = Pid::from_raw(receiver.program().pid());
        let patience = if comes_back { "60s" } else { "1s" };
        let options = [
            &ROUNDS[..],
            &["--timeout", "1s", "--reconnect-for", patience],
        ]
        .concat();
        let mut send = Send::start(receiver.address(), victim.pid(), &options);
        send.program().await_round(1);
        kill(pid, Signal::SIGSTOP).unwrap();
        send.program().await_event("connection_lost");
        victim.assert_unharmed();
        if comes_back {
            kill(pid, Signal::SIGCONT).unwrap();
            let report = send.finish().expect_report();
            assert_eq!(reconnects(&report), 1);
            assert_arrived(victim.pid(), &report);
            go_on(victim.pid());
        } else {
            let sent = send.finish();
            assert_eq!(sent.status.code(), Some(1), "{}", sent.stderr);
            assert!(sent.stderr.contains("no progress"), "{}", sent.stderr);
            kill(pid, Signal::SIGCONT).unwrap();
        }
        victim.assert_unharmed();
    }
}

/// In the last round nobody waits long for a receiver that stalls: the tree runs again.
#[test]
fn a_frozen_tree_does_not_wait_for_a_receiver_that_stalls() {
    let mut victim = Victim::start("heap=64 dirty=50");
    let dir = tempfile::tempdir().unwrap();
    let mut receiver = Receiver::start(dir.path(), &[]);
    let pid = Pid::from_raw(receiver.program().pid());
    let link = Link::to(receiver.address(), STEPS[7], false);
    let options = [&ROUNDS[..], &["--max-frozen", "1s"]].concat();
    let mut send = Send::start(link.address, victim.pid(), &options);
    link.reached.recv().unwrap();
    // (Its answers stop, and soon the link is full.)
    kill(pid, Signal::SIGSTOP).unwrap();
    link.go_on.send(true).unwrap();
    send.program().await_event("connection_lost");
    victim.assert_unharmed();
    kill(pid, Signal::SIGCONT).unwrap();
    let report = send.finish().expect_report();
    assert_eq!(reconnects(&report), 1);
    assert_arrived(victim.pid(), &report);
    go_on(victim.pid());
    victim.assert_unharmed();
}
