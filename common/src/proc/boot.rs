//! Identity of the current boot.

use super::read_lossy;
use std::sync::OnceLock;

/// File with an id that the kernel chooses at each boot.
const PATH: &str = "/proc/sys/kernel/random/boot_id";

/// Returns the id of this boot. PIDs and start times that were recorded during another boot mean nothing.
///
/// # Panics
/// If `/proc` is not mounted.
#[must_use]
pub fn boot_id() -> &'static str {
    static ID: OnceLock<String> = OnceLock::new();
    ID.get_or_init(|| {
        let id = read_lossy(PATH).expect("/proc is mounted");
        id.trim_end().to_owned()
    })
}
