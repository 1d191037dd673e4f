//! Difficult targets, users without permission, and receivers that run out of resources: the images equal the
//! memory byte by byte, or an error names the reason; and the target runs on, unharmed.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tests::criu::{Criu, skip};
use pageferry_tests::daemon::until;
use pageferry_tests::host::Host;
use pageferry_tests::log;
use pageferry_tests::memory;
use pageferry_tests::pair::{Sent, receive_command, send_command};
use pageferry_tests::privileges::{DAEMON, NOBODY, Public, as_user, open_to_all};
use pageferry_tests::scenario::{
    assert_arrived, assert_arrived_unharmed, assert_sent, assert_verified, has_tracker, resume,
    the_migration,
};
use pageferry_tests::{Pair, Program, Receiver, Victim};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Rounds that continue until they no longer leave fewer dirty pages.
const MANY_ROUNDS: [&str; 4] = ["--max-downtime", "0ms", "--max-rounds", "4"];

/// Capabilities that `send` needs for processes of other users; the last two for shared memory, and to stop or kill.
const FOR_OTHERS: [&str; 4] = [
    "sys_ptrace",
    "dac_read_search",
    "checkpoint_restore",
    "kill",
];

/// Capabilities that a move needs as root, whatever the owner of the process.
const TO_MOVE: [&str; 4] = ["sys_ptrace", "dac_read_search", "kill", "sys_admin"];

/// Capabilities that `receive --restore` needs as root.
const TO_RESTORE: [&str; 8] = [
    "chown",
    "setgid",
    "setuid",
    "setpcap",
    "net_admin",
    "sys_chroot",
    "sys_admin",
    "sys_time",
];

/// For a `send` whose receiver refuses or disappears.
const FAIL_SOON: [&str; 2] = ["--reconnect-for", "0"];

/// Returns the fields of a process's status that a send must not change.
fn status(pid: i32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let kept = [
        "Uid",
        "Gid",
        "Groups",
        "TracerPid",
        "Threads",
        "SigIgn",
        "SigCgt",
        "CapEff",
        "CapBnd",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
    ];
    let name = |line: &&str| kept.contains(&line.split(':').next().unwrap());
    text.lines().filter(name).collect::<Vec<_>>().join("\n")
}

/// Returns these fields, the descriptors, and the owner of the files in /proc, which shows whether a process is
/// dumpable.
fn identity(pid: i32) -> (String, Vec<PathBuf>, u32) {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut descriptors: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    descriptors.sort_unstable();
    let owner = fs::metadata(format!("/proc/{pid}/maps")).unwrap().uid();
    (status(pid), descriptors, owner)
}

/// Returns the identities of the processes of a tree once they no longer change: a thread of a victim holds its
/// report open while it writes to it.
fn settled_identities(tree: &[i32]) -> Vec<(String, Vec<PathBuf>, u32)> {
    let identities = || -> Vec<_> { tree.iter().map(|&pid| identity(pid)).collect() };
    let mut last = identities();
    loop {
        let now = identities();
        if now == last {
            return now;
        }
        last = now;
    }
}

/// Sends a victim with each of these trackers, and asserts that its identity is unchanged and that it is unharmed.
fn assert_sent_unchanged(victim: &mut Victim, trackers: &[&str]) {
    let tree = victim.tree();
    let before = settled_identities(&tree);
    for tracker in trackers {
        let options = [&MANY_ROUNDS[..], &["--tracker", tracker]].concat();
        let report = assert_sent(victim, &options);
        assert!(report.rounds.len() >= 2);
        assert_eq!(victim.tree(), tree);
        assert_eq!(settled_identities(&tree), before);
    }
}

/// Starts `send` through a command that executes it.
fn start_send(mut send: Command, to: SocketAddr, pid: i32, options: &[&str]) -> Program {
    send.args(["--to", &to.to_string(), &pid.to_string(), "--json"]);
    Program::start(send.args(options))
}

fn send_by(send: Command, to: SocketAddr, pid: i32, options: &[&str]) -> Sent {
    start_send(send, to, pid, options).finish().into()
}

fn without<'a>(capabilities: &[&'a str], one: &str) -> Vec<&'a str> {
    let mut rest = capabilities.to_vec();
    rest.retain(|capability| *capability != one);
    rest
}

/// Starts a victim that has changed its user ID. glibc does that with a signal to each thread, which interrupts
/// some calls for good: use few threads.
fn owned_by(user: u32, dumpable: bool, features: &str) -> Victim {
    let mut victim = Victim::start(features);
    assert_eq!(victim.ask(&format!("setuid {user}")), format!("ok {user}"));
    if dumpable {
        assert_eq!(victim.ask("dumpable 1"), "ok 1");
    }
    victim
}

#[test]
fn target_with_changed_user_or_not_dumpable_is_sent_unchanged() {
    let mut changed = owned_by(DAEMON, false, "heap=8 shared=1 threads=2 dirty=20");
    assert_sent_unchanged(&mut changed, &["uffd", "hash"]);
    let mut others = owned_by(
        NOBODY,
        true,
        "heap=8 memfd=1 memfd_unmapped=1 signals dirty=20",
    );
    assert_sent_unchanged(&mut others, &["uffd"]);
    let mut hidden = Victim::start("heap=8 children=1 dirty=20");
    assert_eq!(hidden.ask("dumpable 0"), "ok 0");
    assert_sent_unchanged(&mut hidden, &["uffd"]);
}

#[test]
fn target_may_change_its_user_during_a_send() {
    let mut victim = Victim::start("heap=32 shared=1 dirty=50");
    let pair = Pair::start(&[]);
    let mut send = pair.start_send(victim.pid(), &["--rounds", "1000"]);
    send.program().await_round(2);
    assert_eq!(victim.ask("setuid 1"), "ok 1");
    send.program().skip_stderr();
    send.program().await_event("round_done");
    kill(Pid::from_raw(send.program().pid()), Signal::SIGINT).unwrap();
    send.finish().assert_failed(130, &["interrupted"]);
    victim.assert_unharmed();
}

#[test]
fn target_with_a_thousand_threads_is_sent() {
    let mut victim = Victim::start("heap=4 threads=1000 signals dirty=20");
    assert_sent_unchanged(&mut victim, &["uffd"]);
}

#[test]
fn target_with_ten_thousand_mappings_is_sent() {
    let mut victim = Victim::start("heap=4 mappings=10000 dirty=20");
    let maps = fs::read_to_string(format!("/proc/{}/maps", victim.pid())).unwrap();
    assert!(maps.lines().count() > 10_000);
    assert_sent_unchanged(&mut victim, &["uffd", "hash"]);
}

/// The sender opens a descriptor for each segment: more than the usual limit.
#[test]
fn target_with_many_shared_segments_needs_descriptors() {
    let mut victim = Victim::start("heap=4 segments=150 dirty=20");
    let pair = Pair::start(&[]);
    let limited = |limit: &str| {
        let mut send = Command::new("prlimit");
        send.arg(format!("--nofile={limit}"))
            .arg(send_command().get_program());
        send
    };
    let to = pair.address();
    let hard = send_by(limited("100:100"), to, victim.pid(), &["--rounds", "2"]);
    hard.assert_failed(
        1,
        &["Too many open files", "LimitNOFILE", "the target runs"],
    );
    victim.assert_unharmed();
    let soft = send_by(
        limited("100:4000"),
        to,
        victim.pid(),
        &["--max-rounds", "1", "--then", "stop"],
    );
    let report = soft.expect_report();
    assert_arrived_unharmed(&mut victim, &report);
}

#[test]
fn fork_bomb_is_sent_and_leaves_no_traced_process() {
    let mut victim = Victim::start("heap=8 shared=1 bomb=60 dirty=20");
    let pair = Pair::start(&[]);
    for tracker in ["uffd", "hash"] {
        let options = [&MANY_ROUNDS[..], &["--tracker", tracker, "--then", "stop"]].concat();
        let report = pair.send(victim.pid(), &options).expect_report();
        assert_arrived_unharmed(&mut victim, &report);
        // No process is left traced, or dead and unreaped.
        let root = victim.pid();
        until("the bomb's children are reaped", || {
            let left = memory::tree(root).into_iter().find(|&pid| {
                let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                text.contains("TracerPid:") && !text.contains("TracerPid:\t0\n")
            });
            left.map_or(Ok(()), |pid| Err(format!("{pid} is traced")))
        });
    }
}

/// Pauses the receiver in the middle of the first round, has the victim call exec, and resumes the receiver.
fn exec_in_a_round(command: &str) -> (Victim, Pair, Sent) {
    let mut victim = Victim::start("heap=40 threads=4 dirty=10");
    let mut pair = Pair::start(&["--buffers", "2"]);
    let options = [
        "--buffers",
        "2",
        "--max-downtime",
        "0ms",
        "--max-rounds",
        "2",
        "--then",
        "stop",
    ];
    let send = pair.start_send(victim.pid(), &options);
    let dir = pair.dir().to_owned();
    let of_round = |name: &'static str| {
        let homes = fs::read_dir(&dir).unwrap().flatten();
        homes
            .map(move |home| home.path().join(name))
            .find(|path| path.exists())
    };
    // Some of its pages have arrived, but by far not all: the sockets hold only part of them.
    let receiver = Pid::from_raw(pair.receiver().program().pid());
    until("the first round begins", || {
        of_round(".1.tmp")
            .map(drop)
            .ok_or_else(|| "not yet".to_owned())
    });
    kill(receiver, Signal::SIGSTOP).unwrap();
    until("the receiver stops", || {
        memory::is_stopped(receiver.as_raw())
            .then_some(())
            .ok_or_else(|| "it runs".to_owned())
    });
    assert!(
        of_round("1").is_none(),
        "the round was over before its middle"
    );
    victim.exec_with(command);
    kill(receiver, Signal::SIGCONT).unwrap();
    let sent = send.finish();
    (victim, pair, sent)
}

#[test]
fn target_may_call_exec_during_a_round() {
    for command in ["exec", "exec-by-thread", "exec-other"] {
        let (mut victim, _pair, sent) = exec_in_a_round(command);
        let report = sent.expect_report();
        assert!(report.rounds.len() >= 2, "{command}");
        assert_arrived(victim.pid(), &report);
        resume(victim.pid());
        match command {
            "exec-other" => assert_eq!(victim.ask("ok here"), "ok here"),
            _ => victim.assert_unharmed(),
        }
    }
}

/// Without CAP_SYS_ADMIN, seccomp cannot be suspended for the injected system call, and would kill the target for
/// it; so contents are compared instead.
#[test]
fn seccomp_stays_enabled_without_cap_sys_admin() {
    let mut victim = Victim::start("heap=8 seccomp=strict seccomp=filter dirty=20");
    let before: Vec<_> = victim.tree().into_iter().map(identity).collect();
    assert!(before[1].0.contains("Seccomp:\t1") && before[2].0.contains("Seccomp:\t2"));
    let (programs, pair) = (Public::copy(), Pair::start(&[]));
    let all = [&MANY_ROUNDS[..], &["--tracker", "uffd", "--then", "stop"]].concat();
    let sent = send_by(
        programs.run("send", NOBODY, &FOR_OTHERS),
        pair.address(),
        victim.pid(),
        &all,
    );
    let warnings = log::lines(&sent.stderr, "process_untracked");
    let of_seccomp = warnings.filter(|line| line.contains("seccomp")).count();
    assert_eq!(of_seccomp, 2, "{}", sent.stderr);
    let report = sent.expect_report();
    assert_arrived_unharmed(&mut victim, &report);
    let after: Vec<_> = victim.tree().into_iter().map(identity).collect();
    assert_eq!(after, before);
}

#[test]
fn users_may_send_only_their_own_processes() {
    let programs = Public::copy();
    let dir = tempfile::tempdir().unwrap();
    open_to_all(dir.path());
    let images = dir.path().join("images");
    let receiver = Receiver::run(programs.run("receive", NOBODY, &[]), "0", &images, &[]);
    let send = |pid, options: &[&str]| {
        send_by(
            programs.run("send", NOBODY, &[]),
            receiver.address(),
            pid,
            options,
        )
    };
    let mut own = owned_by(
        NOBODY,
        true,
        "--alone heap=8 fileprivate=1 threads=2 signals dirty=20",
    );
    let before = identity(own.pid());
    let yama = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    let sent = send(own.pid(), &["--tracker", "uffd", "--then", "stop"]);
    match yama.map_or(0, |scope| scope.trim().parse::<u32>().unwrap()) {
        0 => {
            let report = sent.expect_report();
            let round = Path::new(report.totals["directory"].as_str().unwrap())
                .join(report.rounds.last().unwrap().round.to_string());
            let truth =
                memory::Snapshot::take(&memory::Frozen::from_stopped(own.pid()).unwrap()).unwrap();
            pageferry_tests::scenario::compare_chain(&truth, &round);
            resume(own.pid());
        }
        _ => sent.assert_failed(5, &["not permitted to trace", "CAP_SYS_PTRACE"]),
    }
    own.assert_unharmed();
    assert_eq!(identity(own.pid()), before);
    for mut other in [
        // Not dumpable, of another user, of root, and one with shared memory.
        owned_by(NOBODY, false, "--alone heap=1"),
        owned_by(DAEMON, true, "--alone heap=1"),
        Victim::start("--alone heap=1"),
    ] {
        let before = identity(other.pid());
        send(other.pid(), &[]).assert_failed(5, &["not permitted to trace", "CAP_SYS_PTRACE"]);
        other.assert_unharmed();
        assert_eq!(identity(other.pid()), before);
    }
    let mut shares = owned_by(NOBODY, true, "heap=1 shared=1");
    send(shares.pid(), &[]).assert_failed(5, &["shared", "CAP_CHECKPOINT_RESTORE"]);
    shares.assert_unharmed();
    send(own.pid(), &["--migrate"]).assert_failed(5, &["user ID 0", "CAP_SYS_ADMIN"]);
    own.assert_unharmed();
}

#[test]
fn process_of_another_user_requires_exactly_four_capabilities() {
    let features =
        "heap=8 shared=1 memfd=1 memfd_unmapped=1 sysv=1 protnone=1 children=1 threads=2 dirty=20";
    let mut victim = owned_by(DAEMON, true, features);
    let (programs, pair) = (Public::copy(), Pair::start(&[]));
    let send = |capabilities: &[&str], then| {
        let send = programs.run("send", NOBODY, capabilities);
        send_by(
            send,
            pair.address(),
            victim.pid(),
            &["--tracker", "uffd", "--then", then],
        )
    };
    let missing = [
        ("sys_ptrace", "CAP_SYS_PTRACE"),
        ("dac_read_search", "CAP_DAC_READ_SEARCH"),
        ("checkpoint_restore", "CAP_CHECKPOINT_RESTORE"),
        ("kill", "CAP_KILL"),
    ];
    for (one, name) in missing {
        for then in ["stop", "kill"] {
            send(&without(&FOR_OTHERS, one), then).assert_failed(5, &[name]);
        }
    }
    // Here the tree is neither stopped nor killed at the end.
    let _ = send(&without(&FOR_OTHERS, "kill"), "run").expect_report();
    let report = send(&FOR_OTHERS, "stop").expect_report();
    assert_arrived_unharmed(&mut victim, &report);
}

/// Moves a process with these capabilities at each end.
fn moved_with(
    criu: &Criu,
    sends: &[&str],
    restores: &[&str],
) -> (Victim, Vec<i32>, Sent, Host, Receiver) {
    let (host, dir) = (Host::start(), tempfile::tempdir().unwrap());
    let path = criu.path().to_str().unwrap();
    let mut receive = host.enter();
    let limited = as_user(0, restores);
    receive.arg(limited.get_program()).args(limited.get_args());
    receive.arg(receive_command().get_program());
    let restore = ["--restore=eager", "--criu", path];
    let receiver = Receiver::run(receive, "0", &dir.keep(), &restore);
    // A restore cannot give capabilities that it lacks, so the process has none.
    let powerless = as_user(0, &[]);
    let mut through = vec![powerless.get_program()];
    through.extend(powerless.get_args());
    let through: Vec<_> = through.iter().map(|word| word.to_str().unwrap()).collect();
    let features = "heap=4 shared=1 memfd=1 children=1 threads=2 dirty=20";
    let victim = Victim::detached_in(&through, features);
    let tree = victim.tree();
    let mut send = as_user(0, sends);
    send.arg(send_command().get_program());
    let options = ["--migrate", "--criu", path];
    let sent = send_by(send, receiver.address(), victim.pid(), &options);
    (victim, tree, sent, host, receiver)
}

#[test]
fn move_requires_few_capabilities_of_root() {
    let Some(criu) = Criu::stable("moving with few capabilities") else {
        return;
    };
    let (mut victim, tree, sent, _host, _receiver) = moved_with(&criu, &TO_MOVE, &TO_RESTORE);
    let _ = sent.expect_report();
    assert!(!tree.iter().any(|&pid| memory::lives(pid)));
    victim.await_end();
    let (mut victim, _, sent, _host, mut receiver) = moved_with(
        &criu,
        &without(&TO_MOVE, "sys_admin"),
        &without(&TO_RESTORE, "setuid"),
    );
    sent.assert_failed(5, &["cannot move a process without CAP_SYS_ADMIN"]);
    receiver
        .program()
        .await_stderr(|line| line.contains("CAP_SETUID").then_some(()));
    victim.assert_unharmed();
}

/// A tmpfs. Dropping it unmounts it.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(size: &str) -> Self {
        let tmpfs = Self(tempfile::tempdir().unwrap());
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]);
        assert!(mount.arg(tmpfs.0.path()).status().unwrap().success());
        tmpfs
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn assert_rounds_are_whole(home: &Path) {
    assert!(home.join("1").is_dir());
    let names = fs::read_dir(home)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    assert!(
        !names
            .into_iter()
            .any(|name| name.to_string_lossy().ends_with(".tmp"))
    );
    assert_verified(home);
}

#[test]
fn disk_that_fills_up_keeps_complete_rounds() {
    let mut victim = Victim::start("heap=12 dirty=100");
    let disk = Tmpfs::mount("40m");
    let receiver = Receiver::start(&disk.0.path().join("images"), &["--keep-free", "0"]);
    let options = [&["--rounds", "1000"][..], &FAIL_SOON].concat();
    let sent = pageferry_tests::Send::start(receiver.address(), victim.pid(), &options).finish();
    sent.assert_failed(4, &["No space left on device", "the target runs"]);
    drop(receiver);
    assert_rounds_are_whole(&the_migration(&disk.0.path().join("images")));
    victim.assert_unharmed();
}

/// Waits until a receiver has two rounds, then has `take_away` remove something from it.
fn after_two_rounds(user: u32, take_away: impl Fn(&Path)) -> (Sent, PathBuf, tempfile::TempDir) {
    let mut victim = Victim::start("heap=12 dirty=100");
    let (programs, dir) = (Public::copy(), tempfile::tempdir().unwrap());
    open_to_all(dir.path());
    let images = dir.path().join("images");
    let receiver = Receiver::run(programs.run("receive", user, &[]), "0", &images, &[]);
    let options = [&["--rounds", "1000"][..], &FAIL_SOON].concat();
    let mut send = pageferry_tests::Send::start(receiver.address(), victim.pid(), &options);
    send.program().await_round(2);
    let home = the_migration(&images);
    take_away(&home);
    let sent = send.finish();
    victim.assert_unharmed();
    (sent, home, dir)
}

#[test]
fn removed_directory_is_a_refusal() {
    let (sent, ..) = after_two_rounds(0, |home| {
        // The receiver may be creating the next round.
        while home.exists() {
            let _ = fs::remove_dir_all(home);
        }
    });
    sent.assert_failed(4, &["the receiver refused", "the target runs"]);
}

#[test]
fn lost_permission_is_a_refusal() {
    use std::os::unix::fs::PermissionsExt;
    let (sent, home, _dir) = after_two_rounds(NOBODY, |home| {
        fs::set_permissions(home, fs::Permissions::from_mode(0o500)).unwrap();
    });
    sent.assert_failed(
        4,
        &[
            "the receiver refused",
            "Permission denied",
            "the target runs",
        ],
    );
    // The incomplete round is left behind, for the receiver cannot remove it; it does not count as a round.
    assert_verified(&home);
}

/// Whatever the limit, with too few descriptors a round is refused, or the receiver does not start.
#[test]
fn too_few_descriptors_refuse_a_round_or_the_start() {
    let mut victim = Victim::start("heap=4 shared=1 children=1 dirty=50");
    let (mut refused, mut done) = (0, 0);
    for limit in 8..32 {
        let dir = tempfile::tempdir().unwrap();
        let mut receive = Command::new("prlimit");
        receive.arg(format!("--nofile={limit}:{limit}"));
        receive.arg(receive_command().get_program());
        receive.args(["--listen", "0", "--dir"]).arg(dir.path());
        let mut receive = Program::start(&mut receive);
        let address = receive.await_stderr(|line| {
            let listens = pageferry_tests::pair::listening_on(line);
            let fails = line.contains("Too many open files");
            (fails || listens.is_some()).then_some(listens)
        });
        let Some(to) = address else {
            continue;
        };
        let options = [&["--rounds", "3", "--timeout", "5s"][..], &FAIL_SOON].concat();
        let sent = pageferry_tests::Send::start(to, victim.pid(), &options).finish();
        victim.assert_unharmed();
        if sent.status.success() {
            done += 1;
            break;
        }
        refused += 1;
        sent.assert_failed(sent.status.code().unwrap(), &["send: "]);
        let refusal = sent.stderr.contains("Too many open files");
        assert!(
            refusal || sent.status.code() == Some(1),
            "{limit}: {}",
            sent.stderr
        );
    }
    assert!(refused > 0 && done == 1, "{refused} {done}");
}

/// Returns the command of a `send` whose kernel lets only a tracer read memory that the process itself may not read.
fn send_where_only_tracers_read() -> Command {
    let mut send = send_command();
    send.env("LD_PRELOAD", env!("PAGEFERRY_FORCE_PTRACE_BUILT"));
    send
}

fn send_to(pair: &mut Pair, mut send: Command, pid: i32, options: &[&str]) -> Sent {
    send.arg("--to").arg(pair.receiver().address().to_string());
    send.arg("--json").args(options).arg(pid.to_string());
    Program::start(&mut send).finish().into()
}

#[test]
fn pages_that_only_a_tracer_may_read_arrive() {
    let mut victim = Victim::start("heap=2 protnone=3 guard=1 children=1 dirty=20");
    let mut pair = Pair::start(&[]);
    let options = [&MANY_ROUNDS[..], &["--then", "stop"]].concat();
    let sent = send_to(
        &mut pair,
        send_where_only_tracers_read(),
        victim.pid(),
        &options,
    );
    let unreadable = sent
        .stderr
        .lines()
        .any(|line| log::event(line) == Some("pages_unreadable"));
    assert!(unreadable, "{}", sent.stderr);
    assert_arrived_unharmed(&mut victim, &sent.expect_report());
}

#[test]
fn page_that_no_process_may_read_fails_the_final_round_by_name() {
    let mut victim = Victim::start("heap=2 protnone=1 dirty=20");
    let mut pair = Pair::start(&[]);
    let mut send = send_where_only_tracers_read();
    send.env("PAGEFERRY_NO_FORCE", "1");
    let sent = send_to(&mut pair, send, victim.pid(), &[]);
    let process = format!("of process {}", victim.pid());
    sent.assert_failed(
        1,
        &["cannot read the page at 0x", &process, "the target runs"],
    );
    victim.assert_unharmed();
}

/// The kernel admits one userfaultfd for a mapping.
#[test]
fn mapping_with_a_userfaultfd_of_the_target_is_compared_by_content() {
    if !has_tracker("uffd") {
        return;
    }
    let mut victim = Victim::start("uffd=16 heap=2 dirty=5");
    if !victim.skipped().is_empty() {
        skip("a userfaultfd of the target", &victim.skipped().join(", "));
        return;
    }
    let pair = Pair::start(&[]);
    let options = ["--tracker", "uffd", "--max-rounds", "5", "--then", "stop"];
    let sent = pair.send(victim.pid(), &options);
    let events: Vec<_> = sent.stderr.lines().filter_map(log::event).collect();
    let reported = events.iter().filter(|&&event| event == "pages_untracked");
    assert_eq!(reported.count(), 1, "{}", sent.stderr);
    assert!(!events.contains(&"not_converged"), "{}", sent.stderr);
    let report = sent.expect_report();
    for round in &report.rounds[1..] {
        assert!(round.sent_pages < 1000, "{round:?}");
    }
    assert_arrived_unharmed(&mut victim, &report);
}
