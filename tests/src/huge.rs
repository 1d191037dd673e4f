//! Huge pages that are set aside.

use std::fs::{self, File};

/// Huge pages that are set aside are the whole machine's: one test at a time, and given back.
#[derive(Debug)]
pub struct HugePages {
    before: String,
    _alone: File,
}

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// Sets aside this many pages of 2 MiB.
    ///
    /// # Panics
    /// If the kernel has none of that kind.
    #[must_use]
    pub fn reserve(pages: usize) -> Self {
        // A file, for each test may be a process of its own.
        let lock = std::env::temp_dir().join("pageferry-tests-hugepages.lock");
        let alone = File::create(lock).expect("a lock can be made");
        alone.lock().expect("a file can be locked");
        let before = fs::read_to_string(NR_HUGEPAGES).expect("the kernel has huge pages");
        fs::write(NR_HUGEPAGES, pages.to_string()).expect("root may reserve huge pages");
        Self {
            before,
            _alone: alone,
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(NR_HUGEPAGES, &self.before);
    }
}
