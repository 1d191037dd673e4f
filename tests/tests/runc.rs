//! A container that runc checkpoints, with its memory sent through `receive`, continues where it was.

use pageferry_tests::Pair;
use pageferry_tests::criu::Criu;
use pageferry_tests::daemon::until;
use pageferry_tests::scenario::assert_verified;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Counts, and prints with each number a secret that exists only in its memory.
const PROGRAM: &str = "secret=$(od -An -N8 -tx8 /dev/urandom); n=0; \
    while :; do n=$((n + 1)); echo $n $secret >> /log; sleep 0.02; done";

/// A container with a small root file system. Dropping it deletes it.
struct Container {
    dir: tempfile::TempDir,
    path: std::ffi::OsString,
}

impl Container {
    fn new(criu: &Criu) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("rootfs");
        for name in ["bin", "proc", "dev", "sys"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        let busybox = root.join("bin/busybox");
        fs::copy("/bin/busybox", &busybox).expect("busybox-static is there: run scripts/setup");
        for name in ["sh", "od", "sleep"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        // runc uses the first CRIU in PATH.
        let mut path = criu.path().parent().unwrap().as_os_str().to_owned();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let container = Self { dir, path };
        container.runc(&["spec"]).unwrap();
        let config = container.dir.path().join("config.json");
        let spec = fs::read(&config).unwrap();
        let mut spec: serde_json::Value = serde_json::from_slice(&spec).unwrap();
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = serde_json::json!(["/bin/sh", "-c", PROGRAM]);
        spec["root"]["readonly"] = false.into();
        fs::write(&config, spec.to_string()).unwrap();
        container
    }

    /// Runs runc in the container's directory. Its children must inherit no open file.
    fn runc(&self, words: &[&str]) -> Result<(), String> {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.file("run"));
        command.arg("--log").arg(self.file("runc.log"));
        command.args(words).current_dir(&self.dir);
        command.env("PATH", &self.path);
        let null = Stdio::null;
        command.stdin(null()).stdout(null()).stderr(null());
        let status = command.status().expect("runc is there: run scripts/setup");
        let log = || fs::read_to_string(self.file("runc.log")).unwrap_or_default();
        match status.success() {
            true => Ok(()),
            false => Err(format!("{words:?}: {status}\n{}", log())),
        }
    }

    /// Returns its name, taken from the unique directory: cgroups are system-wide.
    fn id(&self) -> &str {
        let name = self.dir.path().file_name().and_then(|name| name.to_str());
        name.expect("our paths are text").trim_start_matches('.')
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns its last number, and its secret.
    fn last_line(&self) -> Result<(u64, String), String> {
        let log = fs::read_to_string(self.file("rootfs/log")).map_err(|e| e.to_string())?;
        let line = log.lines().last().ok_or("nothing")?;
        let (number, secret) = line.split_once(' ').ok_or("half a line")?;
        Ok((number.parse().map_err(|_| "no number")?, secret.to_owned()))
    }

    /// Waits until it has printed a greater number.
    fn await_greater(&self, number: u64) -> (u64, String) {
        until("the container counts", || match self.last_line()? {
            (now, secret) if now > number => Ok((now, secret)),
            (now, _) => Err(format!("it is at {now}")),
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.runc(&["delete", "--force", self.id()]);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("our paths are text")
}

#[test]
fn container_continues_where_it_was() {
    for criu in Criu::all("a container of runc") {
        let container = Container::new(&criu);
        let id = container.id();
        container.runc(&["run", "--detach", id]).unwrap();
        let (_, secret) = container.await_greater(5);
        let pair = Pair::start(&[]);
        let (images, server) = (container.file("images"), pair.address().to_string());
        let paths = ["--image-path", text(&images), "--work-path"];
        let work = container.file("work");
        let paths = [&paths[..], &[text(&work)]].concat();
        let checkpoint = ["checkpoint", "--page-server", &server];
        container
            .runc(&[&checkpoint[..], &paths, &[id]].concat())
            .unwrap();
        let (reached, _) = container.last_line().unwrap();

        let dump = pair.dir().join("criu-1");
        assert_verified(&dump);
        for image in fs::read_dir(&dump).unwrap().map(Result::unwrap) {
            let copy = images.join(image.file_name());
            assert!(
                !copy.exists(),
                "{copy:?}: not all memory went to the server"
            );
            fs::copy(image.path(), copy).unwrap();
        }
        container
            .runc(&[&["restore", "--detach"], &paths[..], &[id]].concat())
            .unwrap();
        assert_eq!(container.await_greater(reached + 5).1, secret);
        // Each number once, and always the same secret: it is the same execution.
        let log = fs::read_to_string(container.file("rootfs/log")).unwrap();
        let lines: Vec<_> = log.lines().collect();
        for (number, line) in (1..).zip(&lines[..lines.len() - 1]) {
            assert_eq!(*line, format!("{number} {secret}"));
        }
    }
}
