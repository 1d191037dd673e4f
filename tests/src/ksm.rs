//! Lets the kernel merge equal pages (KSM).

use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// KSM, running. It is system-wide: a lock admits one test at a time, and dropping it stops it and separates no
/// pages, unless it ran before.
#[derive(Debug)]
pub struct Ksm {
    before: Vec<(PathBuf, String)>,
    _alone: File,
}

impl Ksm {
    /// Starts merging pages as fast as possible; `None` if the kernel cannot.
    ///
    /// # Panics
    /// If this process may not start it.
    #[must_use]
    pub fn start() -> Option<Self> {
        let lock = std::env::temp_dir().join("pageferry-tests-ksm.lock");
        let alone = File::create(lock).expect("a lock can be made");
        alone.lock().expect("a file can be locked");
        let settings = [
            ("sleep_millisecs", "0"),
            ("pages_to_scan", "10000"),
            ("run", "1"),
        ];
        let mut before = Vec::new();
        for (name, value) in settings {
            let path = Path::new("/sys/kernel/mm/ksm").join(name);
            before.push((path.clone(), fs::read_to_string(&path).ok()?));
            fs::write(path, value).expect("root may configure KSM");
        }
        Some(Self {
            before,
            _alone: alone,
        })
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        for (path, value) in &self.before {
            let _ = fs::write(path, value);
        }
    }
}

/// Returns the number of pages of a process that KSM has merged.
///
/// # Panics
/// If the process has exited.
#[must_use]
pub fn merged_pages(pid: i32) -> u64 {
    let pages = fs::read_to_string(format!("/proc/{pid}/ksm_merging_pages"));
    let pages = pages.expect("the process is alive, and the kernel has KSM");
    pages.trim().parse().expect("it is a number")
}
