//! Serves shared segments to CRIU.
//!
//! The library preloaded into CRIU (`common/preload/restore.rs`) connects for each segment, sends its id as
//! eight bytes, and receives one byte with the segment's memfd, or one byte alone.

use super::segments::Prefilled;
use nix::sys::socket::{Shutdown, shutdown};
use pageferry_common::sys::fdpass;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Name of the socket, in the directory that CRIU restores from.
const SOCKET: &str = "segments.socket";

/// Delay before accepting again after an error.
const RETRY_DELAY: Duration = Duration::from_millis(20);

/// Serves segments until dropped.
#[derive(Debug)]
pub(crate) struct SegmentServer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    segments: Arc<Prefilled>,
    /// Ids of the segments that were sent.
    fetched: Mutex<BTreeSet<u64>>,
    listener: OwnedFd,
}

impl SegmentServer {
    /// Serves `segments` at the socket in `dir`.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn start(segments: &Arc<Prefilled>, dir: &Path) -> io::Result<Self> {
        let dir = File::open(dir)?;
        // By descriptor: the path of a socket has at most 107 bytes.
        let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
        let shared = Arc::new(Shared {
            segments: Arc::clone(segments),
            fetched: Mutex::default(),
            listener: fdpass::listen(Path::new(&path))?,
        });
        let serving = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("segments".into())
            .spawn(move || serving.serve())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Returns whether each segment was fetched. One that was not is empty in what CRIU has restored.
    #[must_use]
    pub(crate) fn all_fetched(&self) -> bool {
        let fetched = &self.shared.fetched;
        let fetched = fetched.lock().unwrap_or_else(PoisonError::into_inner);
        fetched.len() == self.shared.segments.len()
    }
}

impl Drop for SegmentServer {
    fn drop(&mut self) {
        // Wakes the thread: its accept fails.
        let _ = shutdown(self.shared.listener.as_raw_fd(), Shutdown::Both);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Shared {
    /// Answers requests until the listener is shut down.
    fn serve(&self) {
        loop {
            match fdpass::accept(self.listener.as_fd()) {
                Ok(peer) => {
                    if let Err(error) = self.answer(&peer) {
                        tracing::warn!(event = "segment_not_sent", %error, "cannot send a shared segment");
                    }
                }
                // The listener is shut down.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
                // Out of descriptors, most likely. CRIU waits for the answer.
                Err(error) => {
                    tracing::warn!(event = "segment_delayed", %error, "cannot send a shared segment yet");
                    std::thread::sleep(RETRY_DELAY);
                }
            }
        }
    }

    fn answer(&self, peer: &OwnedFd) -> io::Result<()> {
        let mut id = [0; 8];
        match fdpass::recv(peer.as_fd(), &mut id)? {
            Some((8, _)) => {}
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        let id = u64::from_le_bytes(id);
        let memfd = self.segments.get(id);
        // Counted before it is sent, for CRIU goes on as soon as it has it. If sending fails, so does the
        // restore.
        if memfd.is_some() {
            let mut fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
            fetched.insert(id);
        }
        fdpass::send(peer.as_fd(), &[0], memfd.map(AsFd::as_fd))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::segments::Segments;
    use crate::restore::segments::tests::{ID, finish, memfd, put_round};
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    use pageferry_common::PAGE_SIZE;

    #[test]
    fn requested_segments_are_sent_and_counted_as_fetched() {
        let home = tempfile::tempdir().unwrap();
        let mut segments = Segments::default();
        put_round(home.path(), &mut segments, 1, &[], &[5; 8]);
        let mut sealed = memfd(8);
        sealed.seals = 1;
        let ready = Arc::new(finish(home.path(), &mut segments, 1, &sealed));
        let server = SegmentServer::start(&ready, home.path()).unwrap();
        let fetch = |id: u64| {
            let flags = SockFlag::SOCK_CLOEXEC;
            let peer = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
            let address = UnixAddr::new(&home.path().join(SOCKET)).unwrap();
            connect(peer.as_raw_fd(), &address).unwrap();
            fdpass::send(peer.as_fd(), &id.to_le_bytes(), None).unwrap();
            fdpass::recv(peer.as_fd(), &mut [0]).unwrap().unwrap().1
        };
        assert!(fetch(8).is_none());
        assert!(!server.all_fetched());
        let fetched = File::from(fetch(ID).unwrap());
        assert!(server.all_fetched());
        assert_eq!(fetched.metadata().unwrap().len(), 8 * PAGE_SIZE);
        assert_eq!(fcntl(&fetched, FcntlArg::F_GET_SEALS).unwrap(), 1);
    }
}
