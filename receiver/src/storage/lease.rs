//! Leases: at most one connection works on a migration at a time.

use nix::sys::socket::{Shutdown, shutdown};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The migrations that connections work on, by directory, with a handle to close each connection.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leases(Arc<Mutex<BTreeMap<PathBuf, Disconnect>>>);

impl Leases {
    /// Leases the migration in `home` to the connection of `disconnect`. If another connection holds it,
    /// closes that one, whose sender reports it lost by connecting again, and returns `None`.
    pub(crate) fn try_lease(&self, home: &Path, disconnect: &Disconnect) -> Option<Lease> {
        let mut holders = self.lock();
        if let Some(holder) = holders.get(home) {
            holder.shut_down();
            return None;
        }
        holders.insert(home.to_owned(), disconnect.clone());
        Some(Lease {
            home: home.to_owned(),
            leases: self.clone(),
        })
    }

    /// Returns whether a connection holds the migration in `home`.
    pub(crate) fn is_leased(&self, home: &Path) -> bool {
        self.lock().contains_key(home)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Disconnect>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The exclusive right to work on a migration, until dropped.
#[derive(Debug)]
pub struct Lease {
    home: PathBuf,
    leases: Leases,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.leases.lock().remove(&self.home);
    }
}

/// Closes a connection from outside, as if the network had failed: its conversation then ends.
/// The default value has no connection to close.
#[derive(Debug, Clone, Default)]
pub struct Disconnect(Option<Arc<OwnedFd>>);

impl Disconnect {
    /// Returns a handle that closes `stream`.
    ///
    /// # Errors
    /// The kernel's if there are too many descriptors.
    pub fn new(stream: &impl AsFd) -> io::Result<Self> {
        let socket = stream.as_fd().try_clone_to_owned()?;
        Ok(Self(Some(Arc::new(socket))))
    }

    fn shut_down(&self) {
        if let Some(socket) = &self.0 {
            // Fails only if the connection is closed already.
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn second_lease_closes_the_connection_of_the_first() {
        let (leases, home) = (Leases::default(), Path::new("/m"));
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let first = leases.try_lease(home, &Disconnect::new(&ours).unwrap());
        assert!(leases.is_leased(home) && !leases.is_leased(Path::new("/n")));
        assert!(leases.try_lease(home, &Disconnect::default()).is_none());
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
        drop(first);
        assert!(!leases.is_leased(home));
        assert!(leases.try_lease(home, &Disconnect::default()).is_some());
    }
}
