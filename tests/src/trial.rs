//! A move that is halted at a point, hit by a fault, and brought to its end.

use crate::actors::Actor;
use crate::copies::{copies, has_record, the_only_copy};
use crate::criu::Criu;
use crate::disk::Disk;
use crate::gate::{Action, Call, Gate, Object};
use crate::history::{assert_one_history, host_of};
use crate::host::Host;
use crate::link::{Link, Step};
use crate::pair::{Sent, send_command};
use crate::program::{Finished, Program};
use crate::{Receiver, Send, Victim, memory};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// Where a move is halted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Halt {
    /// The connection pauses before this frame is forwarded, or after it.
    Frame(Step, bool),
    /// `send` is at the last of these calls.
    Send(Vec<Call>),
    /// `receive` is.
    Receive(Vec<Call>),
}

/// What happens there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Nothing.
    Nothing,
    /// A process is killed. `receive` is started again.
    Kill(Actor),
    /// The connection is lost; a new one can be made.
    Cut,
    /// The frame arrives after `send` has given up. Only at a frame.
    Delay,
    /// The frame arrives twice. Only at a frame.
    Repeat,
    /// The destination's host loses its power, and is started again with what is on its disk.
    Power,
    /// The target gets SIGCONT.
    Continue,
    /// A `send --resolve` is run beside.
    Resolve,
}

/// Where the target runs in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// On the host where it was started.
    Source,
    /// On the other.
    Destination,
    /// Nowhere: it was lost with its host.
    Nowhere,
}

/// A kind of move.
#[derive(Debug, Clone, Copy)]
pub struct Kind<'a> {
    /// The CRIU of both hosts.
    pub criu: &'a Criu,
    /// Features of the victim.
    pub features: &'a str,
    /// How `receive` restores: `--restore`, and maybe how.
    pub restore: &'a str,
    /// Options of `send`.
    pub send: &'a [&'a str],
}

/// A move under way.
#[derive(Debug)]
pub struct Trial<'a> {
    kind: Kind<'a>,
    victim: Victim,
    tree: Vec<i32>,
    /// PID namespaces that stand for the hosts.
    source: u32,
    /// Where the cgroups of the hold are made.
    cgroup: PathBuf,
    halt: Option<Halt>,
    gate: Option<Gate>,
    /// What the destination's disk holds, and the gate that observes its program.
    disk: Option<(Disk, Option<Gate>)>,
    sent: Option<Sent>,
    send: Option<Send>,
    link: Link,
    receiver: Receiver,
    /// PID of `receive`, which is a child of the program that enters its host.
    receive: i32,
    host: Host,
    dir: TempDir,
}

/// Number of the receiver's log lines that a failure shows.
const LOG_LINES: usize = 20;

/// A call that no program does.
const NEVER: Call = Call::entry(Action::Rename, Object::Path("//"));

impl<'a> Trial<'a> {
    /// Starts a move. It will be halted, and then lose the destination's power if `loses_power`.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(kind: Kind<'a>, halt: Option<Halt>, fault: Fault) -> Self {
        let (host, dir) = (Host::start(), tempfile::tempdir().expect("it can be made"));
        let images = dir.path().join("images");
        fs::create_dir(&images).expect("it is new");
        let mut receiver = receive(&kind, &host, "0", &images);
        let receive = receive_pid(&mut receiver);
        let victim = Victim::detached(kind.features);
        let (pid, tree) = (victim.pid(), victim.tree());
        let link = match &halt {
            Some(Halt::Frame(step, after)) => Link::start(receiver.address(), *step, *after),
            _ => Link::plain(receiver.address()),
        };
        let mut disk = (fault == Fault::Power).then(|| (Disk::new(&images), None));
        let observer = disk.as_ref().map(|(disk, _)| disk.observer());
        let mut gate = match (&halt, observer) {
            (Some(Halt::Receive(calls)), observer) => Some(Gate::observe(receive, calls, observer)),
            (_, Some(observer)) => {
                let observing = Gate::observe(receive, &[NEVER], Some(observer));
                disk = disk.map(|(disk, _)| (disk, Some(observing)));
                None
            }
            (_, None) => None,
        };
        let path = kind.criu.path().to_str().expect("it has a plain name");
        let options = [&["--migrate", "--criu", path], kind.send].concat();
        let mut send = Send::start(link.address, pid, &options);
        if let Some(Halt::Send(calls)) = &halt {
            gate = Some(Gate::attach(send.program().pid(), calls));
        }
        Self {
            kind,
            source: host_of(pid),
            cgroup: memory::cgroup(pid),
            victim,
            tree,
            halt,
            gate,
            disk,
            sent: None,
            send: Some(send),
            link,
            receiver,
            receive,
            host,
            dir,
        }
    }

    /// Waits until the move is halted. Returns `false` if it is over before.
    #[must_use]
    pub fn is_halted(&self) -> bool {
        match (&self.halt, &self.gate) {
            (Some(Halt::Frame(..)), _) => self.link.reaches_step(),
            (_, Some(gate)) => gate.is_reached(),
            (_, None) => true,
        }
    }

    /// Halts the move once more, at a call of `send` or `receive` that it does within this time. Returns whether
    /// it was halted; otherwise it goes on.
    pub fn halt_again(&mut self, halt: Halt, time: Duration) -> bool {
        let gate = match (&halt, &mut self.send) {
            (Halt::Send(calls), Some(send)) => Gate::try_attach(send.program().pid(), calls),
            (Halt::Receive(calls), _) => Gate::try_attach(self.receive, calls),
            (Halt::Send(_), None) | (Halt::Frame(..), _) => None,
        };
        self.gate = gate.filter(|gate| gate.is_reached_within(time));
        self.halt = self.gate.is_some().then_some(halt);
        self.gate.is_some()
    }

    /// Does something to the halted move. Returns whether it could be done: a process may not exist.
    ///
    /// # Panics
    /// If a program cannot be started again.
    pub fn hit(&mut self, fault: Fault) -> bool {
        match fault {
            Fault::Nothing | Fault::Repeat => true,
            Fault::Kill(Actor::Receive) => {
                let killed = self.kill(Actor::Receive);
                if let Some(Halt::Receive(_)) = self.halt {
                    self.release();
                }
                self.receive_again();
                killed
            }
            Fault::Kill(actor) => self.kill(actor),
            Fault::Cut => {
                self.link.sever();
                true
            }
            Fault::Delay => {
                self.sent = self.send.take().map(Send::finish);
                true
            }
            Fault::Power => {
                self.lose_power();
                true
            }
            Fault::Continue => {
                for &pid in &self.tree {
                    // It may have been killed already.
                    let pid = nix::unistd::Pid::from_raw(pid);
                    let _ = nix::sys::signal::kill(pid, nix::sys::signal::SIGCONT);
                }
                true
            }
            Fault::Resolve => {
                // It may find no record, another program that handles it, or no answer.
                let _ = self.resolve(&["--timeout", "1s"]);
                true
            }
        }
    }

    /// Runs a `send --resolve` to this call, and hits it there: it is killed, or the move is hit by another fault and
    /// it goes on.
    ///
    /// # Panics
    /// If it does not get there.
    pub fn hit_resolve(&mut self, call: Call, fault: Fault) {
        // It gets no answer before it is traced.
        self.link.close();
        let mut command = self.resolve_command(&["--timeout", "30s"]);
        let mut resolve = Program::start(&mut command);
        let gate = Gate::attach(resolve.pid(), &[call]);
        self.link.reopen();
        gate.await_reached();
        match fault {
            Fault::Kill(Actor::Send) => resolve.kill(),
            other => {
                self.hit(other);
            }
        }
        gate.release();
        let _ = resolve.finish();
    }

    fn kill(&mut self, actor: Actor) -> bool {
        let send = self.send.as_mut().map_or(0, |send| send.program().pid());
        actor.kill(send, self.receive)
    }

    fn receive_again(&mut self) {
        let port = self.receiver.address().port().to_string();
        self.receiver = receive(&self.kind, &self.host, &port, &self.images());
        self.receive = receive_pid(&mut self.receiver);
    }

    fn images(&self) -> PathBuf {
        self.dir.path().join("images")
    }

    fn lose_power(&mut self) {
        let programs = memory::tree(self.receive);
        self.host = Host::start();
        // All processes of the old host are killed, and those at a gate exit now: none writes any more.
        self.release();
        assert!(memory::await_end(&programs), "they do not exit");
        let boot_id = self.dir.path().join("boot_id");
        fs::write(&boot_id, "00000000-0000-4000-8000-000000000001\n").expect("it can be written");
        self.host.set_boot_id(&boot_id);
        let (disk, gate) = self.disk.take().expect("the disk is observed");
        drop(gate);
        disk.lose_power();
        self.receive_again();
    }

    fn release(&mut self) {
        drop(self.gate.take());
    }

    /// Lets a halted move that was hit by this go on.
    pub fn go_on(&mut self, fault: Fault) {
        self.release();
        if let Some(Halt::Frame(..)) = self.halt.take() {
            match fault {
                // A killed program receives no more frames.
                Fault::Cut | Fault::Power | Fault::Kill(Actor::Send | Actor::Receive) => {
                    self.link.cut();
                }
                Fault::Repeat => self.link.repeat(),
                _ => self.link.forward(),
            }
        }
    }

    /// Resolves the move until nothing is in doubt, and asserts that exactly one copy runs, which checks itself
    /// and has one history. A copy that may be lost is given up if no receiver answers for it.
    ///
    /// # Panics
    /// If not.
    pub fn settle(mut self, may_be_lost: bool) -> Place {
        let mut said = String::new();
        let settled = catch_unwind(AssertUnwindSafe(|| {
            let send = self.send.take().map(Send::finish);
            let sent = self.sent.take().or(send).expect("it was started");
            said = format!("send: {}\n{}", sent.status, sent.stderr);
            // It exits if the CRIU is killed by which it finds out what CRIU can do.
            if !memory::lives(self.receive) {
                self.receive_again();
            }
            if let Some(resolved) = self.resolve_record(&sent, may_be_lost) {
                said += &format!("resolve: {}\n{}", resolved.status, resolved.stderr);
            }
            self.assert_settled(may_be_lost)
        }));
        settled.unwrap_or_else(|why| {
            let log = last_lines(self.receiver.program().log());
            panic!("{}\n{said}receive: {log}", panic_text(&*why))
        })
    }

    fn resolve_record(&mut self, sent: &Sent, may_be_lost: bool) -> Option<Finished> {
        if sent.status.success() || !has_record(self.victim.pid()) {
            return None;
        }
        let patience = if may_be_lost { "3s" } else { "30s" };
        let resolved = self.resolve(&["--timeout", patience]);
        if resolved.status.success() || !may_be_lost {
            return Some(resolved);
        }
        Some(self.resolve(&["--timeout", "1s", "--give-up"]))
    }

    fn resolve(&self, options: &[&str]) -> Finished {
        Program::start(&mut self.resolve_command(options)).finish()
    }

    fn resolve_command(&self, options: &[&str]) -> Command {
        let mut send = send_command();
        send.args(["--resolve", &self.victim.pid().to_string()]);
        send.args(options);
        send
    }

    fn assert_settled(&mut self, may_be_lost: bool) -> Place {
        let pid = self.victim.pid();
        assert!(!has_record(pid), "the record is left");
        let left = fs::read_dir(&self.cgroup).expect("it is there").flatten();
        let ids: Vec<_> = fs::read_dir(self.images())
            .expect("it is there")
            .filter_map(|home| home.ok()?.file_name().into_string().ok())
            .filter_map(|name| Some(format!("pageferry-{}", name.split_once('-')?.1)))
            .collect();
        for cgroup in left {
            let name = cgroup.file_name().to_string_lossy().into_owned();
            assert!(!ids.contains(&name), "the cgroup {name} is left");
        }
        if may_be_lost && copies(&self.tree).is_empty() {
            self.victim.await_end();
            return Place::Nowhere;
        }
        let copy = the_only_copy(&self.tree);
        let place = match copy == pid {
            true => Place::Source,
            false => Place::Destination,
        };
        let mut hosts = vec![self.source];
        if place == Place::Destination {
            self.victim.await_end();
            hosts.push(host_of(copy));
        }
        let verdict = self.victim.report().verdict(copy);
        verdict.unwrap_or_else(|error| panic!("{place:?}: {error}"));
        if self.kind.features.contains("history") {
            assert_one_history(self.victim.dir(), &hosts);
        }
        place
    }
}

/// Returns what a panic said.
#[must_use]
pub fn panic_text(why: &(dyn std::any::Any + std::marker::Send)) -> String {
    let text = why.downcast_ref::<String>().cloned();
    let literal = || why.downcast_ref::<&str>().map(|&text| text.to_owned());
    text.or_else(literal).unwrap_or_default()
}

/// A receiver that cannot answer says so for each question.
fn last_lines(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

fn receive(kind: &Kind<'_>, host: &Host, port: &str, dir: &std::path::Path) -> Receiver {
    let criu = kind.criu.path().to_str().expect("it has a plain name");
    host.receiver(port, dir, &[kind.restore, "--criu", criu])
}

/// The program under test is a child of the one that enters its host.
fn receive_pid(receiver: &mut Receiver) -> i32 {
    memory::tree(receiver.program().pid())[1]
}
