//! Errors: one line with what to do about it, and an exit code.

use pageferry_tests::scenario::receive;
use pageferry_tests::{Pair, Receiver, Send, Victim};
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

fn program(name: &str) -> std::path::PathBuf {
    let exe = std::env::current_exe().unwrap();
    let profile = exe.ancestors().nth(2).unwrap();
    let variable = format!("PAGEFERRY_{}", name.to_uppercase());
    std::env::var_os(variable).map_or_else(|| profile.join(name), Into::into)
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn missing_target_exits_3() {
    let pair = Pair::start(&[]);
    pair.send(i32::MAX, &[])
        .assert_failed(3, &["process 2147483647", "PID"]);
}

#[test]
fn missing_receiver_exits_1() {
    let victim = Victim::start("heap=1");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let sent = Send::start(address, victim.pid(), &[]).finish();
    sent.assert_failed(1, &["cannot connect to", "receive --listen"]);
}

#[test]
fn traced_target_is_refused_until_the_tracer_detaches() {
    let mut victim = Victim::start("heap=1");
    // To the kernel strace is a debugger; so is another `send`.
    let mut strace = Command::new("strace");
    strace.args(["-q", "-o", "/dev/null", "-p", &victim.pid().to_string()]);
    let mut strace = strace.spawn().expect("strace is there: run scripts/setup");
    let tracer = || {
        let status = fs::read_to_string(format!("/proc/{}/status", victim.pid())).unwrap();
        status.contains(&format!("TracerPid:\t{}\n", strace.id()))
    };
    while !tracer() {
        std::thread::yield_now();
    }
    let pair = Pair::start(&[]);
    let sent = pair.send(victim.pid(), &[]);
    sent.assert_failed(1, &["already traced", "(strace)", "detach"]);
    strace.kill().unwrap();
    strace.wait().unwrap();
    let _ = pair.send(victim.pid(), &[]).expect_report();
    victim.check().unwrap();
}

#[test]
fn target_of_another_user_requires_cap_sys_ptrace() {
    let victim = Victim::start("heap=1");
    let mut pair = Pair::start(&[]);
    let to = pair.receiver().address().to_string();
    let scratch = tempfile::tempdir().unwrap();
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let send = scratch.path().join("send");
    fs::copy(program("send"), &send).unwrap();
    let nobody = 65534;
    let mut command = Command::new(&send);
    command.args(["--to", &to, &victim.pid().to_string()]);
    let output = run(command.uid(nobody).gid(nobody));
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("CAP_SYS_PTRACE"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn own_process_tree_is_refused() {
    let pair = Pair::start(&[]);
    let own = std::process::id().cast_signed();
    pair.send(own, &[])
        .assert_failed(2, &["contains this program", "outside"]);
}

#[test]
fn plaintext_beyond_loopback_requires_insecure() {
    let victim = Victim::start("heap=1");
    let elsewhere: SocketAddr = "192.0.2.1:7700".parse().unwrap();
    let sent = Send::start(elsewhere, victim.pid(), &[]).finish();
    sent.assert_failed(2, &["in the clear", "--insecure"]);
    let dir = tempfile::tempdir().unwrap();
    let refused = receive(&[&"--listen", &"0.0.0.0:0", &"--dir", &dir.path()]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(refused.stderr.contains("--insecure"), "{}", refused.stderr);
}

#[test]
fn missing_tracker_is_reported_with_the_kernel_option() {
    let victim = Victim::start("heap=1");
    let pair = Pair::start(&[]);
    let sent = pair.send(victim.pid(), &["--tracker", "soft-dirty"]);
    if sent.status.success() {
        eprintln!("SKIPPED: this kernel has soft-dirty");
        return;
    }
    sent.assert_failed(1, &["CONFIG_MEM_SOFT_DIRTY", "--tracker auto"]);
}

#[test]
fn refusal_by_the_receiver_exits_4() {
    let victim = Victim::start("heap=1");
    let mut pair = Pair::start(&[]);
    // Its directory is removed.
    let dir = pair.dir().to_owned();
    pair.receiver();
    fs::remove_dir_all(&dir).unwrap();
    let sent = pair.send(victim.pid(), &[]);
    let dir = dir.to_str().unwrap();
    sent.assert_failed(4, &["the receiver refused", dir, "the target runs"]);
}

#[test]
fn full_disk_exits_4_and_leaves_no_incomplete_round() {
    let mut victim = Victim::start("heap=48 dirty=10");
    let root = tempfile::tempdir().unwrap();
    let mount = |arguments: &[&str]| {
        let status = Command::new(arguments[0])
            .args(&arguments[1..])
            .arg(root.path())
            .status();
        assert!(status.unwrap().success(), "{arguments:?}");
    };
    mount(&["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs"]);
    let receiver = Receiver::start(&root.path().join("images"), &["--keep-free", "0"]);
    let sent = Send::start(receiver.address(), victim.pid(), &["--rounds", "2"]).finish();
    let incomplete = Command::new("find")
        .arg(root.path())
        .args(["-name", "*.tmp"])
        .output()
        .unwrap();
    drop(receiver);
    mount(&["umount"]);
    sent.assert_failed(4, &["No space left on device", "the target runs"]);
    assert!(incomplete.stdout.is_empty());
    victim.assert_unharmed();
}

#[test]
fn unusable_ports_and_directories_exit_7() {
    let mut pair = Pair::start(&[]);
    let port = pair.receiver().address().port().to_string();
    let dir = tempfile::tempdir().unwrap();
    let taken = receive(&[&"--listen", &port, &"--dir", &dir.path()]);
    assert_eq!(taken.status.code(), Some(7), "{}", taken.stderr);
    assert!(
        taken.stderr.contains("choose another port"),
        "{}",
        taken.stderr
    );

    let second = receive(&[&"--listen", &"0", &"--dir", &pair.dir()]);
    assert_eq!(second.status.code(), Some(7), "{}", second.stderr);
    assert!(
        second.stderr.contains("in use by another receiver"),
        "{}",
        second.stderr
    );

    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let no_directory = receive(&[&"--listen", &"0", &"--dir", &file]);
    assert_eq!(
        no_directory.status.code(),
        Some(7),
        "{}",
        no_directory.stderr
    );
    assert!(
        no_directory.stderr.contains("--dir needs"),
        "{}",
        no_directory.stderr
    );
}

#[test]
fn directory_without_rounds_exits_1() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("x"), "").unwrap();
    let out = dir.path().join("out");
    for finished in [
        receive(&[&"verify", &dir.path()]),
        receive(&[&"flatten", &dir.path(), &out]),
    ] {
        assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
        assert!(
            finished.stderr.contains("cannot find a round in"),
            "{}",
            finished.stderr
        );
    }
}

#[test]
fn once_exits_0_and_prints_a_report() {
    let victim = Victim::start("heap=1");
    let dir = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(dir.path(), &["--once", "--json"]);
    let address = receiver.address();
    let _ = Send::start(address, victim.pid(), &["--rounds", "2"])
        .finish()
        .expect_report();
    let finished = receiver.finish();
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    let report: serde_json::Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(report["rounds"], 2);
    assert_eq!(report["finished_frozen"], false);
}
