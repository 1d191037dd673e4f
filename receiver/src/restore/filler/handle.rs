//! Handle of the filler process, for the receiver that starts it.

use crate::image::catalog::Catalog;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;

/// The filler process of one lazy restore. It outlives the receiver.
#[derive(Debug)]
pub(crate) struct FillerProcess {
    child: Child,
    start_tx: mpsc::Sender<()>,
}

impl FillerProcess {
    /// Starts the filler process: `round` holds the pages that `catalog` lists, and CRIU restores from
    /// `restored`. Returns when CRIU can connect to it.
    ///
    /// # Errors
    /// Those of starting a process, and any that the filler process itself has reported on standard error.
    pub(crate) fn start(round: &Path, catalog: &Arc<Catalog>, restored: &Path) -> io::Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg(super::ARG)
            .arg(round)
            .arg(restored)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().expect("it is a pipe");
        let stdout = child.stdout.take().expect("it is a pipe");
        let (start_tx, start_rx) = mpsc::channel();
        let mut filler = Self { child, start_tx };
        let ready = await_listening(stdout).and_then(|()| {
            let catalog = Arc::clone(catalog);
            // On a thread, so that CRIU need not wait until the filler process has read all of it.
            let thread = std::thread::Builder::new().name("index".into());
            // A filler process that cannot read its catalog reports that itself.
            thread.spawn(move || drop(write_catalog(&catalog, stdin, &start_rx)))
        });
        match ready {
            Ok(_) => Ok(filler),
            Err(error) => {
                filler.kill();
                Err(error)
            }
        }
    }

    /// Lets it fill all pages; before, it fills only those that a process has faulted on.
    pub(crate) fn fill_all(&self) {
        // This fails if the filler process has exited, which `wait` reports. If the message is lost, filling
        // begins when CRIU has finished.
        let _ = self.start_tx.send(());
    }

    /// Kills it.
    pub(crate) fn kill(&mut self) {
        // It may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it exits. Returns whether it has filled all memory.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn wait(&mut self) -> io::Result<bool> {
        Ok(self.child.wait()?.success())
    }
}

/// Waits for the line that the filler process writes when it listens for CRIU.
fn await_listening(stdout: impl io::Read) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    match line.is_empty() {
        true => Err(io::Error::other("the filler process did not start")),
        false => Ok(()),
    }
}

/// Writes the catalog to the filler process, and one more byte once it is to fill all pages.
fn write_catalog(
    catalog: &Catalog,
    stdin: ChildStdin,
    start_rx: &mpsc::Receiver<()>,
) -> io::Result<()> {
    let mut out = BufWriter::new(stdin);
    catalog.write(&mut out)?;
    out.flush()?;
    if start_rx.recv().is_ok() {
        // End-of-file follows at once. The reader polls the pipe but may have buffered the byte with the
        // catalog: the end makes the pipe readable in any case.
        out.write_all(&[0])?;
    }
    Ok(())
}
