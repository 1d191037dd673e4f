//! Memory that stays in use until images need it.

use crate::MIB;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statvfs::statvfs;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Amount released at a time, in bytes.
const PIECE: u64 = 64 * MIB;

/// Free memory to keep beyond what the images occupy, in bytes.
const AHEAD: u64 = 256 * MIB;

/// Interval between checks of the images' size.
const LOOK: Duration = Duration::from_millis(5);

/// Occupies as much memory as images of a given size need, and releases it just before they need it. The host of a
/// virtual machine reclaims memory that was free for a second; allocating it again costs twice what is measured
/// here.
pub(crate) struct Ballast {
    /// `None` once it is to stop.
    going_on: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Ballast {
    /// Starts a ballast for images of this many bytes in `dir`.
    pub(crate) fn new(dir: &Path, bytes: u64) -> Self {
        let mut pieces: Vec<_> = (0..bytes / PIECE).map(|_| piece()).collect();
        let (before, dir) = (free(dir), dir.to_owned());
        let (going_on, until) = channel();
        let thread = thread::spawn(move || {
            while until.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                let taken = before.saturating_sub(free(&dir));
                let wanted = bytes.saturating_sub(taken + AHEAD);
                pieces.truncate((wanted / PIECE) as usize);
            }
        });
        Self {
            going_on: Some(going_on),
            thread: Some(thread),
        }
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        self.going_on = None;
        if let Some(thread) = self.thread.take() {
            thread.join().expect("looking does not panic");
        }
    }
}

fn piece() -> File {
    let memory = memfd_create("ballast", MFdFlags::MFD_CLOEXEC).expect("there can be one");
    let mut file = File::from(memory);
    let bytes = [1; 64 << 10];
    for _ in 0..PIECE / bytes.len() as u64 {
        file.write_all(&bytes).expect("there is memory");
    }
    file
}

/// Returns the free bytes on the file system of a directory.
fn free(dir: &Path) -> u64 {
    let stat = statvfs(dir).expect("it is there");
    stat.blocks_free() * stat.fragment_size()
}
