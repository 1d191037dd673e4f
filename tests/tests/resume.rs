//! A lost connection does not end a migration: acknowledged rounds are kept, lost ones are sent again, and the
//! images finally equal the memory of the process.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tests::daemon::until;
use pageferry_tests::kills::{kills, spread};
use pageferry_tests::link::{Link, Step};
use pageferry_tests::net::{B, Net};
use pageferry_tests::pair::{Sent, receive_command, send_command};
use pageferry_tests::program::Program;
use pageferry_tests::scenario::{
    assert_arrived, assert_arrived_unharmed, assert_verified, has_tracker, resume, the_migration,
};
use pageferry_tests::{Pair, Receiver, Report, Send, Victim};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Two rounds of a running tree, then the last.
const ROUNDS: [&str; 6] = [
    "--max-downtime",
    "0ms",
    "--max-rounds",
    "2",
    "--then",
    "stop",
];

const LAST_ROUND: u32 = 3;

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

/// A target with every kind of image, which writes few pages.
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
            let link = Link::start(pair.address(), step, after);
            let options = [&["--tracker", tracker], &ROUNDS[..]].concat();
            let send = Send::start(link.address, victim.pid(), &options);
            link.await_step();
            link.cut();
            let report = send.finish().expect_report();
            // After the last ack there is nothing to reconnect for.
            let over = after && step == STEPS[8];
            assert_eq!(reconnects(&report), u64::from(!over), "{what}");
            assert_arrived(victim.pid(), &report);
            resume(victim.pid());
            // Each round exists once, and later rounds do not repeat the pages of earlier ones.
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
fn link_cut_at_any_step_loses_no_page_with_uffd() {
    cut_at_every_step(&STEPS, "uffd");
}

#[test]
fn link_cut_at_any_step_loses_no_page_with_soft_dirty() {
    cut_at_every_step(&STEPS, "soft-dirty");
}

#[test]
fn link_cut_at_any_step_loses_no_page_with_content_hashes() {
    // This tracker keeps no bits that could be lost.
    cut_at_every_step(&STEPS[4..8], "hash");
}

#[test]
fn sender_without_reconnect_fails_at_once() {
    let mut victim = victim();
    let pair = Pair::start(&[]);
    let link = Link::start(pair.address(), STEPS[5], false);
    let options = [&ROUNDS[..], &["--reconnect-for", "0"]].concat();
    let send = Send::start(link.address, victim.pid(), &options);
    link.await_step();
    link.cut();
    let sent = send.finish();
    assert_eq!(sent.status.code(), Some(1), "{}", sent.stderr);
    assert!(sent.stderr.contains("the target runs"), "{}", sent.stderr);
    victim.assert_unharmed();
}

/// Waits until a round has some of its pages.
fn await_pages(dir: &Path, round: u32) {
    until("pages of the round arrive", || {
        let incomplete = the_migration(dir).join(format!(".{round}.tmp"));
        let files = fs::read_dir(&incomplete).map_err(|error| error.to_string())?;
        let pages = files.flatten().any(|file| {
            let pages = file.file_name().to_string_lossy().starts_with("pages-");
            pages && file.metadata().is_ok_and(|it| it.len() > 0)
        });
        pages.then_some(()).ok_or_else(|| "none yet".to_owned())
    });
}

#[test]
fn restarted_receiver_continues_the_migration() {
    let mut victim = Victim::start("heap=64 children=1 shared=2 dirty=20");
    // Whatever the receiver does when it is killed, acknowledged rounds are complete.
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
            receiver.program().kill_and_wait();
            killed += 1;
            assert_verified(&the_migration(dir.path()));
            receiver = Receiver::listen(&port, dir.path(), &[]);
            send.program().await_event("reconnected");
            assert_verified(&the_migration(dir.path()));
        }
        send.program().await_event("round_done");
        send.program().kill();
        victim.assert_unharmed();
    }
}

#[test]
fn rounds_before_a_restart_are_parents_of_those_after() {
    let mut victim = victim();
    let dir = tempfile::tempdir().unwrap();
    let mut receiver = Receiver::start(dir.path(), &[]);
    let port = receiver.address().port().to_string();
    // Killed in the middle of the second round.
    let link = Link::start(receiver.address(), STEPS[5], true);
    let send = Send::start(link.address, victim.pid(), &ROUNDS);
    link.await_step();
    receiver.program().kill_and_wait();
    let _receiver = Receiver::listen(&port, dir.path(), &[]);
    link.cut();
    let report = send.finish().expect_report();
    assert_eq!(reconnects(&report), 1);
    assert_arrived_unharmed(&mut victim, &report);
}

/// Times for which a link is down, in seconds: few, or with `PAGEFERRY_LONG` all that the documentation promises.
fn cuts() -> &'static [u64] {
    match std::env::var_os("PAGEFERRY_LONG") {
        Some(_) => &[1, 2, 5, 10, 20],
        None => &[1],
    }
}

/// A `send` on host A and a `receive` on host B, connected by a virtual Ethernet link.
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

    /// Waits until `send` exits, and asserts that the images equal the memory of the victim.
    fn finish_and_compare(self, victim: &mut Victim) -> Report {
        let patience = Duration::from_secs(300);
        let report = Sent::from(self.send.finish_within(patience)).expect_report();
        assert_arrived_unharmed(victim, &report);
        report
    }
}

/// Takes the link down for a while during this round.
fn assert_outage_loses_nothing(round: u32) {
    let mut victim = Victim::start("heap=24 children=1 dirty=10");
    for &seconds in cuts() {
        let options = [&ROUNDS[..], &["--timeout", "3s", "--max-frozen", "500ms"]].concat();
        let wired = Wired::start("100mbit", &victim, &["--timeout", "3s"], &options);
        await_pages(wired.dir.path(), round);
        wired.net.cut("B");
        // The duration of the outage.
        std::thread::sleep(Duration::from_secs(seconds));
        if round == LAST_ROUND {
            // The tree runs meanwhile.
            victim.assert_unharmed();
        }
        wired.net.mend("B");
        let report = wired.finish_and_compare(&mut victim);
        eprintln!(
            "down for {seconds} s in round {round}: {} reconnects, {} rounds",
            reconnects(&report),
            report.rounds.len()
        );
    }
}

#[test]
fn link_outage_in_the_first_round_loses_nothing() {
    assert_outage_loses_nothing(1);
}

#[test]
fn link_outage_in_a_later_round_loses_nothing() {
    assert_outage_loses_nothing(2);
}

/// The sender does not wait long for the receiver while the tree is frozen.
#[test]
fn link_outage_in_the_last_round_loses_nothing() {
    assert_outage_loses_nothing(LAST_ROUND);
}

#[test]
fn slow_link_causes_no_reconnect() {
    let mut victim = Victim::start("heap=4 dirty=1");
    let options = ["--max-downtime", "5s", "--then", "stop"];
    let wired = Wired::start("10mbit", &victim, &["--timeout", "5s"], &options);
    let report = wired.finish_and_compare(&mut victim);
    assert_eq!(reconnects(&report), 0);
}

#[test]
fn slow_link_makes_the_sender_compress() {
    let mut victim = Victim::start("heap=8 text=96");
    let wired = Wired::start("100mbit", &victim, &[], &["--then", "stop"]);
    let report = wired.finish_and_compare(&mut victim);
    let (raw, wire) = report.rounds.iter().fold((0, 0), |(raw, wire), it| {
        (raw + it.bytes_raw, wire + it.bytes_wire)
    });
    assert!(wire < raw / 2, "{wire} of {raw} bytes");
}

#[test]
fn stalled_receiver_is_reconnected_or_given_up() {
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
            resume(victim.pid());
        } else {
            let sent = send.finish();
            assert_eq!(sent.status.code(), Some(1), "{}", sent.stderr);
            assert!(sent.stderr.contains("no progress"), "{}", sent.stderr);
            kill(pid, Signal::SIGCONT).unwrap();
        }
        victim.assert_unharmed();
    }
}

/// In the last round the sender does not wait long for a receiver that stalls: the tree runs again.
#[test]
fn frozen_tree_is_thawed_when_the_receiver_stalls() {
    let mut victim = Victim::start("heap=64 dirty=50");
    let dir = tempfile::tempdir().unwrap();
    let mut receiver = Receiver::start(dir.path(), &[]);
    let pid = Pid::from_raw(receiver.program().pid());
    let link = Link::start(receiver.address(), STEPS[7], false);
    let options = [&ROUNDS[..], &["--max-frozen", "1s"]].concat();
    let mut send = Send::start(link.address, victim.pid(), &options);
    link.await_step();
    // (Its acks stop, and the link soon fills up.)
    kill(pid, Signal::SIGSTOP).unwrap();
    link.forward();
    send.program().await_event("connection_lost");
    victim.assert_unharmed();
    kill(pid, Signal::SIGCONT).unwrap();
    let report = send.finish().expect_report();
    assert_eq!(reconnects(&report), 1);
    assert_arrived_unharmed(&mut victim, &report);
}
