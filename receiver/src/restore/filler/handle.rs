//! The handle of the process that fills memory.

use crate::image::index::Catalog;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc as blocking;

/// The process that fills the memory of what runs ahead of it ([`crate::restore::filler`]). It outlives us.
#[derive(Debug)]
pub(crate) struct Filler {
    process: Child,
    /// Tells it to fill also what nobody waits for.
    go: blocking::Sender<()>,
}

impl Filler {
    /// Starts it; returns when CRIU may connect to it.
    pub(crate) fn start(round: &Path, catalog: &Arc<Catalog>, restored: &Path) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(super::ARG).arg(round).arg(restored);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn()?;
        let stdin = process.stdin.take().expect("it is a pipe");
        let stdout = process.stdout.take().expect("it is a pipe");
        let (go, may_go) = blocking::channel();
        let mut filler = Self { process, go };
        let start = || {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line)?;
            if line.is_empty() {
                return Err(io::Error::other("cannot prepare to fill memory"));
            }
            let mut out = BufWriter::new(stdin);
            let catalog = Arc::clone(catalog);
            // CRIU need not wait until it has all of it.
            let mut tell = move || {
                catalog.write(&mut out)?;
                out.flush()?;
                // The end of it follows at once, so that the byte shows wherever it is read.
                may_go.recv().map_or(Ok(()), |()| out.write_all(&[0]))
            };
            let thread = std::thread::Builder::new().name("index".into());
            // One that has failed says so itself.
            thread.spawn(move || drop::<io::Result<()>>(tell()))?;
            Ok(())
        };
        match start() {
            Ok(()) => Ok(filler),
            Err(error) => {
                filler.kill();
                Err(error)
            }
        }
    }

    /// Has it fill also what nobody waits for.
    pub(crate) fn go(&mut self) {
        // It goes by itself when CRIU is done.
        let _ = self.go.send(());
    }

    pub(crate) fn kill(&mut self) {
        // One that has ended needs none.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Waits until all memory is there. Returns whether it is.
    pub(crate) fn finish(&mut self) -> io::Result<bool> {
        Ok(self.process.wait()?.success())
    }
}
