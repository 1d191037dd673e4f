//! The thread that writes the images of one connection, in the order in which they arrive.

use crate::refusal::{Failure, Refusal};
use pageferry_common::wire::RefuseCode;
use tokio::sync::mpsc;

/// A thread that performs jobs of type `J` until there are no more or one fails.
#[derive(Debug)]
pub(crate) struct WriterThread<J> {
    /// `None` once the thread is to exit.
    jobs_tx: Option<mpsc::Sender<J>>,
    /// Receives the error of the job that failed; closed when the thread has exited.
    failed_rx: mpsc::UnboundedReceiver<Refusal>,
}

impl<J: Send + 'static> WriterThread<J> {
    /// Starts the thread, which runs `work` to its end. Up to `depth` jobs are queued for it.
    ///
    /// # Errors
    /// [`Refusal`] if there are too many threads.
    pub(crate) fn start(
        depth: usize,
        work: impl FnOnce(mpsc::Receiver<J>) -> Result<(), Refusal> + Send + 'static,
    ) -> Result<Self, Refusal> {
        let (jobs_tx, jobs_rx) = mpsc::channel(depth);
        let (failed_tx, failed_rx) = mpsc::unbounded_channel();
        std::thread::Builder::new()
            .name("writer".into())
            .spawn(move || {
                if let Err(error) = work(jobs_rx) {
                    // The receiver is gone only if the connection has ended.
                    let _ = failed_tx.send(error);
                }
                // `failed_tx` is dropped last: that reports the exit.
            })
            .map_err(|error| {
                let reason = format!("cannot start a thread for writing: {error}");
                Refusal::new(RefuseCode::Limit, reason)
            })?;
        Ok(Self {
            jobs_tx: Some(jobs_tx),
            failed_rx,
        })
    }

    /// Queues a job; waits while the queue is full.
    ///
    /// # Errors
    /// Why the thread has exited.
    pub(crate) async fn send(&mut self, job: J) -> Result<(), Failure> {
        let sent = match &self.jobs_tx {
            Some(jobs_tx) => jobs_tx.send(job).await.is_ok(),
            None => false,
        };
        match sent {
            true => Ok(()),
            false => Err(self.exit_reason().await.into()),
        }
    }

    /// Waits until a job has failed; never returns if none does.
    pub(crate) async fn failure(&mut self) -> Refusal {
        match self.failed_rx.recv().await {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }

    /// Returns why the thread has exited, or is about to.
    pub(crate) async fn exit_reason(&mut self) -> Refusal {
        let panicked = || Refusal::new(RefuseCode::Storage, "the writer thread panicked");
        self.failed_rx.recv().await.unwrap_or_else(panicked)
    }

    /// Stops the thread after the jobs that are queued, and waits until it has exited.
    pub(crate) async fn join(&mut self) {
        self.jobs_tx = None;
        while self.failed_rx.recv().await.is_some() {}
    }
}
