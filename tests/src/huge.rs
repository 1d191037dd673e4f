//! Reserves huge pages (hugetlb) of the kernel.

use std::fs::{self, File};

/// A reservation of huge pages. It is system-wide: a lock admits one test at a time, and dropping it restores
/// the previous number.
#[derive(Debug)]
pub struct HugePages {
    before: String,
    _alone: File,
}

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// Reserves this many pages of 2 MiB.
    ///
    /// # Panics
    /// If the kernel has no huge pages.
    #[must_use]
    pub fn reserve(pages: usize) -> Self {
        // A lock file, because each test may run in its own process.
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
