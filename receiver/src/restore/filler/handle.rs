//! Handle of the filler process, for the receiver that starts it.

use super::journal::{CANCEL, START};
use super::{DONE, READY, RECEIVER_MESSAGE_BYTES};
use crate::image::catalog::Catalog;
use crate::restore::copy::kill_copy;
use pageferry_common::proc::process::ProcessId;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// Longest wait until the filler process and its keepers hold all descriptors. CRIU connects to them before
/// it restores anything.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// The filler process of one lazy restore, and the processes that replace it. They outlive the receiver.
#[derive(Debug)]
pub(crate) struct FillerProcess {
    /// The first of them.
    child: Child,
    /// Connection to whichever fills.
    filler: UnixStream,
    /// Whether it has been reported ready.
    is_ready: bool,
    /// Root of the restored tree.
    root: Option<ProcessId>,
}

impl FillerProcess {
    /// Starts the filler process: `round` holds the pages that `catalog` lists, and CRIU restores from
    /// `restored`. Returns when CRIU can connect to it.
    ///
    /// # Errors
    /// Those of starting a process, and any that the filler process itself has reported on standard error.
    pub(crate) fn start(round: &Path, catalog: &Arc<Catalog>, restored: &Path) -> io::Result<Self> {
        let (filler, theirs) = UnixStream::pair()?;
        let mut child = Command::new("/proc/self/exe")
            .arg(super::ARG)
            .arg(round)
            .arg(restored)
            .stdin(Stdio::piped())
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .spawn()?;
        let stdin = child.stdin.take().expect("it is a pipe");
        let mut filler = Self {
            child,
            filler,
            is_ready: false,
            root: None,
        };
        let listening = filler.await_byte().and_then(|_| {
            let catalog = Arc::clone(catalog);
            // On a thread, so that CRIU need not wait until the filler process has read all of it.
            let thread = std::thread::Builder::new().name("index".into());
            // A filler process that cannot read its catalog reports that itself.
            thread.spawn(move || drop(write_catalog(&catalog, stdin)))
        });
        match listening {
            Ok(_) => Ok(filler),
            Err(error) => {
                filler.kill();
                Err(error)
            }
        }
    }

    /// Waits until the filler process and its keepers hold what the restored tree depends on, and lets it
    /// fill all pages; before, it fills only those that a process has faulted on. If filling becomes
    /// impossible, it kills the tree of `root`.
    ///
    /// # Errors
    /// If they hold nothing: then the tree must not run.
    pub(crate) fn fill_all(&mut self, root: Option<ProcessId>) -> io::Result<()> {
        self.filler.set_read_timeout(Some(READY_TIMEOUT))?;
        while self.await_byte()? != READY {}
        self.filler.set_read_timeout(None)?;
        (self.is_ready, self.root) = (true, root);
        let root = root.map(|root| [u64::from(root.pid.unsigned_abs()), root.start_time()]);
        let [pid, start_time] = root.unwrap_or_default();
        self.send([START, pid, start_time])
    }

    fn send(&mut self, words: [u64; RECEIVER_MESSAGE_BYTES / 8]) -> io::Result<()> {
        self.filler
            .write_all(words.map(u64::to_ne_bytes).as_flattened())
    }

    /// Waits for the next byte.
    fn await_byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        let read = self.filler.read_exact(&mut byte);
        read.map_err(|error| io::Error::other(format!("the filler process failed: {error}")))?;
        Ok(byte[0])
    }

    /// Ends it, and what is left of the restored tree.
    pub(crate) fn kill(mut self) {
        // This fails if it has exited.
        let _ = self.send([CANCEL, 0, 0]);
        if !self.is_ready {
            // It may be waiting for CRIU, alone. If it is not alone, its successor reads the message.
            let _ = self.child.kill();
        }
        // It exits once nothing of the tree is left.
        std::thread::spawn(move || self.child.wait());
    }

    /// Waits until all memory is filled, and returns `true`; `false` if that failed. Then nothing is left of the
    /// restored tree: the filler process has killed it, or, if all that could do so were killed at once, this
    /// does.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn wait(&mut self) -> io::Result<bool> {
        let mut byte = [0];
        let is_filled = loop {
            match self.filler.read(&mut byte) {
                Ok(0) => break false,
                Ok(_) if byte == [DONE] => break true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        if let Some(root) = self.root
            && !is_filled
        {
            kill_copy(root, &mut Vec::new());
        }
        self.child.wait()?;
        Ok(is_filled)
    }
}

/// Writes the catalog to the filler process.
fn write_catalog(catalog: &Catalog, stdin: ChildStdin) -> io::Result<()> {
    let mut out = BufWriter::new(stdin);
    catalog.write(&mut out)?;
    out.flush()
}
