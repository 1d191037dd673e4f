//! The hold: the tree is frozen in cgroups of its own from before the commit until the outcome is known.
//!
//! A process in a frozen cgroup v2 executes no instruction of its own. Signals can kill it, but none resumes
//! it, and neither does the exit of its tracer or of the sender. A SIGSTOP, in contrast, is undone by every
//! SIGCONT, and the kernel sends one to an orphaned process group.

use crate::freeze::process_list;
use crate::sys::cgroup::mount_v2;
use pageferry_common::MigrationId;
use pageferry_common::proc::cgroup;
use pageferry_common::proc::process::ProcessId;
use pageferry_common::proc::read_lossy;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How often the sender looks whether cgroups are frozen or empty.
const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// How long processes that CRIU keeps stopped may take to be frozen.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long it may take until a cgroup is empty after its processes have left it or were killed.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(2);

/// Why the tree cannot be held or released.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} cgroup {cgroup}")]
pub struct HoldError {
    /// What was tried.
    pub action: &'static str,
    /// Path in the hierarchy, as in `/proc/PID/cgroup`.
    pub cgroup: String,
    /// Error from the kernel.
    pub source: io::Error,
}

/// The cgroup v2 hierarchy of this host.
#[derive(Debug)]
pub struct Hierarchy(OwnedFd);

impl Hierarchy {
    /// Opens it where it is mounted. If it is not, mounts it for this process only: hosts with cgroup v1 may not
    /// have it mounted. (Another mount would reset the options of the first, such as `nsdelegate`.)
    ///
    /// # Errors
    /// [`HoldError`], for example if the kernel has no cgroup v2.
    pub fn open() -> Result<Self, HoldError> {
        let open = || match cgroup::v2_mount(&read_lossy("/proc/self/mountinfo")?) {
            Some(path) => Ok(File::open(path)?.into()),
            None => mount_v2(),
        };
        open().map(Self).map_err(|source| HoldError {
            action: "mount the hierarchy of",
            cgroup: "v2".to_owned(),
            source,
        })
    }

    fn path(&self, cgroup: &str, file: &str) -> PathBuf {
        format!("/proc/self/fd/{}{cgroup}/{file}", self.0.as_raw_fd()).into()
    }

    fn read(&self, cgroup: &str, file: &str) -> io::Result<String> {
        fs::read_to_string(self.path(cgroup, file))
    }

    fn write(&self, cgroup: &str, file: &str, value: &str) -> io::Result<()> {
        // Not created if it is missing.
        let mut file = fs::OpenOptions::new()
            .write(true)
            .open(self.path(cgroup, file))?;
        io::Write::write_all(&mut file, value.as_bytes())
    }

    /// Makes a cgroup in `parent`.
    fn make(&self, parent: &str, cgroup: &str) -> io::Result<()> {
        let make = || fs::create_dir(self.path(cgroup, ""));
        match make() {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            // The root directory is read-only even for its owner, who needs no capability to change that.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                let parent = self.path(parent, "");
                let mode = fs::metadata(&parent)?.mode() | 0o200;
                match fs::set_permissions(&parent, Permissions::from_mode(mode)) {
                    Ok(()) => make(),
                    Err(_) => Err(error),
                }
            }
            made => made,
        }
    }

    /// Removes a cgroup that is empty or about to be.
    fn remove(&self, cgroup: &str) -> io::Result<()> {
        let began = Instant::now();
        loop {
            match fs::remove_dir(self.path(cgroup, "")) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error)
                    if error.kind() == ErrorKind::ResourceBusy
                        && began.elapsed() < EMPTY_TIMEOUT =>
                {
                    sleep(POLL_INTERVAL);
                }
                removed => return removed,
            }
        }
    }
}

/// Cgroups in which a tree is held, or is going to be: one in each cgroup that has processes of the tree, so
/// that its limits still apply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Name of the new cgroups.
    name: String,
    /// Processes of the tree in each cgroup of the host.
    cgroups: BTreeMap<String, Vec<ProcessId>>,
}

impl Hold {
    /// Returns what will hold these processes. Changes nothing yet.
    ///
    /// # Errors
    /// [`HoldError`] if the cgroup of a process cannot be read.
    pub fn plan(migration: MigrationId, tree: &[ProcessId]) -> Result<Self, HoldError> {
        let mut cgroups: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for process in tree {
            match cgroup_of(process.pid) {
                Ok(cgroup) => cgroups.entry(cgroup).or_default().push(*process),
                Err(_) if !process.is_alive() => {}
                Err(source) => {
                    return Err(HoldError {
                        action: "find the",
                        cgroup: format!("of process {}", process.pid),
                        source,
                    });
                }
            }
        }
        let name = format!("pageferry-{migration}");
        Ok(Self { name, cgroups })
    }

    /// Freezes the tree, which CRIU keeps stopped. Returns when it is frozen.
    ///
    /// # Errors
    /// [`HoldError`]; a part of the tree may be frozen then.
    pub fn freeze(&self, hierarchy: &Hierarchy) -> Result<(), HoldError> {
        for (cgroup, processes) in &self.cgroups {
            let child = self.child(cgroup);
            let freeze = || {
                hierarchy.make(cgroup, &child)?;
                for process in processes.iter().filter(|process| process.is_alive()) {
                    match hierarchy.write(&child, "cgroup.procs", &process.pid.to_string()) {
                        // The process has exited meanwhile.
                        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                        moved => moved?,
                    }
                }
                hierarchy.write(&child, "cgroup.freeze", "1")
            };
            freeze().map_err(|source| self.error("freeze", cgroup, source))?;
        }
        let deadline = Instant::now() + FREEZE_TIMEOUT;
        for cgroup in self.cgroups.keys() {
            self.await_frozen(hierarchy, cgroup, deadline)
                .map_err(|source| self.error("freeze", cgroup, source))?;
        }
        Ok(())
    }

    fn await_frozen(
        &self,
        hierarchy: &Hierarchy,
        cgroup: &str,
        deadline: Instant,
    ) -> io::Result<()> {
        let is_frozen = |events: &str| events.lines().any(|line| line == "frozen 1");
        while !is_frozen(&hierarchy.read(&self.child(cgroup), "cgroup.events")?) {
            if Instant::now() > deadline {
                return Err(ErrorKind::TimedOut.into());
            }
            sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Thaws the tree and moves it back to its cgroups. May be repeated after it was interrupted at any
    /// point.
    ///
    /// # Errors
    /// [`HoldError`] if the tree, or a part of it, is still frozen.
    pub fn release(&self, hierarchy: &Hierarchy) -> Result<(), HoldError> {
        for cgroup in self.cgroups.keys() {
            match hierarchy.write(&self.child(cgroup), "cgroup.freeze", "0") {
                // Never frozen, or released and removed already.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                thawed => thawed.map_err(|source| self.error("thaw", cgroup, source))?,
            }
            self.leave(hierarchy, cgroup);
        }
        Ok(())
    }

    /// Moves all processes of a thawed cgroup back, with what they have forked meanwhile, and removes it.
    fn leave(&self, hierarchy: &Hierarchy, cgroup: &str) {
        let child = self.child(cgroup);
        let leave = || {
            let began = Instant::now();
            loop {
                let members = hierarchy.read(&child, "cgroup.procs")?;
                // The kernel lists a process outside the reader's PID namespace as 0, which would mean the
                // writer.
                let mut members = members.lines().filter(|&pid| pid != "0").peekable();
                if members.peek().is_none() || began.elapsed() > EMPTY_TIMEOUT {
                    return hierarchy.remove(&child);
                }
                for pid in members {
                    match hierarchy.write(cgroup, "cgroup.procs", pid) {
                        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                        moved => moved?,
                    }
                }
            }
        };
        if let Err(why) = leave() {
            tracing::warn!(event = "cgroup_left", cgroup = child, %why, "cannot remove the cgroup");
        }
    }

    /// Removes the cgroups after the tree was killed.
    pub fn remove(&self, hierarchy: &Hierarchy) {
        for cgroup in self.cgroups.keys() {
            let child = self.child(cgroup);
            if let Err(why) = hierarchy.remove(&child) {
                tracing::warn!(event = "cgroup_left", cgroup = child, %why, "cannot remove the cgroup");
            }
        }
    }

    /// Returns the path of the new cgroup in one of the host's.
    fn child(&self, cgroup: &str) -> String {
        format!("{}/{}", cgroup.trim_end_matches('/'), self.name)
    }

    fn error(&self, action: &'static str, cgroup: &str, source: io::Error) -> HoldError {
        HoldError {
            action,
            cgroup: self.child(cgroup),
            source,
        }
    }
}

/// Checks, before the first round, that the tree under `root` can be held: that a cgroup with a freezer can
/// be made where its processes are.
///
/// # Errors
/// [`HoldError`].
pub fn probe(migration: MigrationId, root: i32) -> Result<Hierarchy, HoldError> {
    let hierarchy = Hierarchy::open()?;
    let tree = process_list(root).into_iter();
    let tree: Vec<_> = tree
        .filter_map(|process| ProcessId::find(process.pid))
        .collect();
    let hold = Hold::plan(migration, &tree)?;
    for cgroup in hold.cgroups.keys() {
        let child = hold.child(cgroup);
        let probe = || {
            hierarchy.make(cgroup, &child)?;
            let probed = hierarchy
                .write(&child, "cgroup.freeze", "0")
                .and_then(|()| {
                    // A child of a threaded cgroup takes no processes.
                    match hierarchy.read(&child, "cgroup.type")?.trim() {
                        "domain invalid" => {
                            Err(io::Error::other("its parent is a threaded cgroup"))
                        }
                        _ => Ok(()),
                    }
                });
            hierarchy.remove(&child)?;
            probed
        };
        probe().map_err(|source| hold.error("make", cgroup, source))?;
    }
    Ok(hierarchy)
}

/// Returns the path of a process in the cgroup v2 hierarchy.
fn cgroup_of(pid: i32) -> io::Result<String> {
    let cgroups = read_lossy(format!("/proc/{pid}/cgroup"))?;
    match cgroup::v2_path(&cgroups) {
        Some(path) if !path.starts_with("/..") => Ok(path.to_owned()),
        Some(_) => Err(io::Error::other(
            "it is outside this program's cgroup namespace",
        )),
        None => Err(io::Error::other("the kernel has no cgroup v2")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn start() -> (Child, ProcessId) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = ProcessId::find(child.id().cast_signed()).unwrap();
        (child, process)
    }

    #[test]
    fn held_process_is_frozen_until_it_is_released() {
        let Ok(hierarchy) = Hierarchy::open() else {
            eprintln!("skipped: cgroups cannot be mounted");
            return;
        };
        let (mut child, process) = start();
        let before = cgroup_of(process.pid).unwrap();
        let hold = Hold::plan(MigrationId([0x5e; 16]), &[process]).unwrap();
        // Never frozen: nothing to release.
        hold.release(&hierarchy).unwrap();
        for _ in 0..2 {
            hold.freeze(&hierarchy).unwrap();
        }
        let held = cgroup_of(process.pid).unwrap();
        assert_eq!(held, hold.child(&before));
        let events = hierarchy.read(&held, "cgroup.events").unwrap();
        assert!(events.contains("frozen 1"), "{events}");
        for _ in 0..2 {
            hold.release(&hierarchy).unwrap();
        }
        assert_eq!(cgroup_of(process.pid).unwrap(), before);
        assert!(!hierarchy.path(&held, "").exists());

        hold.freeze(&hierarchy).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        hold.remove(&hierarchy);
        assert!(!hierarchy.path(&held, "").exists());
    }

    #[test]
    fn probe_leaves_no_cgroup() {
        let (id, own) = (MigrationId([0x6e; 16]), std::process::id().cast_signed());
        let Ok(hierarchy) = probe(id, own) else {
            eprintln!("skipped: cgroups cannot be made");
            return;
        };
        let hold = Hold::plan(id, &[ProcessId::find(own).unwrap()]).unwrap();
        let child = hold.child(&cgroup_of(own).unwrap());
        assert!(!hierarchy.path(&child, "").exists());
    }
}
