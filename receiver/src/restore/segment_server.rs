//! Gives the shared segments that are in memory to CRIU.

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

/// Where the library in CRIU asks for segments (`common/preload/restore.rs`), in the directory that CRIU
/// restores from.
const SOCKET: &str = "segments.socket";

/// How long to wait before accepting again what could not be accepted.
const AGAIN: Duration = Duration::from_millis(20);

impl Prefilled {
    /// Gives them to whoever asks at the socket in `dir`, until dropped.
    ///
    /// # Errors
    /// The kernel's.
    pub fn serve(self: &Arc<Self>, dir: &Path) -> io::Result<Server> {
        let dir = File::open(dir)?;
        // The path of a socket must be short.
        let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
        let listener = Arc::new(fdpass::listen(Path::new(&path))?);
        let fetched = Arc::new(Mutex::new(BTreeSet::new()));
        let give = {
            let (all, listener, fetched) = (
                Arc::clone(self),
                Arc::clone(&listener),
                Arc::clone(&fetched),
            );
            move || {
                loop {
                    match fdpass::accept(listener.as_fd()) {
                        Ok(peer) => {
                            if let Err(error) = all.answer(&peer, &fetched) {
                                tracing::warn!(%error, "who asked for a shared segment did not get it");
                            }
                        }
                        // It is shut down.
                        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
                        // Out of descriptors, most likely. CRIU waits for an answer.
                        Err(error) => {
                            tracing::warn!(%error, "cannot give a shared segment yet");
                            std::thread::sleep(AGAIN);
                        }
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("segments".into());
        Ok(Server {
            all: Arc::clone(self),
            fetched,
            listener,
            thread: Some(thread.spawn(give)?),
        })
    }

    fn answer(&self, peer: &OwnedFd, fetched: &Mutex<BTreeSet<u64>>) -> io::Result<()> {
        let mut id = [0; 8];
        match fdpass::receive(peer.as_fd(), &mut id)? {
            Some((8, _)) => {}
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        let id = u64::from_le_bytes(id);
        let memfd = self.0.get(&id);
        // Before who has it can go on: that it was not sent all the same fails the restore anyway.
        if memfd.is_some() {
            let mut fetched = fetched.lock().unwrap_or_else(PoisonError::into_inner);
            fetched.insert(id);
        }
        fdpass::send(peer.as_fd(), &[0], memfd.map(AsFd::as_fd))?;
        Ok(())
    }
}

/// Gives segments away while it lives.
#[derive(Debug)]
pub struct Server {
    all: Arc<Prefilled>,
    fetched: Arc<Mutex<BTreeSet<u64>>>,
    listener: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Whether each was fetched. One that was not is empty in what CRIU restored.
    #[must_use]
    pub fn all_fetched(&self) -> bool {
        let fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        fetched.len() == self.all.0.len()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the thread, whose next accept fails.
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        let _ = self.thread.take().map(JoinHandle::join);
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
    fn who_asks_gets_it_and_that_is_known() {
        let home = tempfile::tempdir().unwrap();
        let mut segments = Segments::default();
        put_round(home.path(), &mut segments, 1, &[], &[5; 8]);
        let mut sealed = memfd(8);
        sealed.seals = 1;
        let ready = Arc::new(finish(home.path(), &mut segments, 1, &sealed));
        let server = ready.serve(home.path()).unwrap();
        let ask = |id: u64| {
            let flags = SockFlag::SOCK_CLOEXEC;
            let peer = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
            let address = UnixAddr::new(&home.path().join(SOCKET)).unwrap();
            connect(peer.as_raw_fd(), &address).unwrap();
            fdpass::send(peer.as_fd(), &id.to_le_bytes(), None).unwrap();
            fdpass::receive(peer.as_fd(), &mut [0]).unwrap().unwrap().1
        };
        assert!(ask(8).is_none());
        assert!(!server.all_fetched());
        let fetched = File::from(ask(ID).unwrap());
        assert!(server.all_fetched());
        assert_eq!(fetched.metadata().unwrap().len(), 8 * PAGE_SIZE);
        assert_eq!(fcntl(&fetched, FcntlArg::F_GET_SEALS).unwrap(), 1);
    }
}
