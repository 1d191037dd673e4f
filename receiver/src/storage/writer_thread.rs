//! The thread that writes: everything of one connection, in the order it came.

use crate::refusal::{Failure, Refusal};
use pageferry_common::wire::RefuseCode;
use tokio::sync::mpsc;

/// A thread that takes jobs until there are no more or one fails.
#[derive(Debug)]
pub struct Disk<J> {
    /// `None` once it is to end.
    jobs: Option<mpsc::Sender<J>>,
    failed: mpsc::UnboundedReceiver<Refusal>,
}

impl<J: Send + 'static> Disk<J> {
    /// Starts the thread, whose whole life is `work`; up to `depth` jobs wait for it.
    ///
    /// # Errors
    /// [`Refusal`] if there are too many threads.
    pub fn start(
        depth: usize,
        work: impl FnOnce(mpsc::Receiver<J>) -> Result<(), Refusal> + Send + 'static,
    ) -> Result<Self, Refusal> {
        let (jobs, todo) = mpsc::channel(depth);
        let (fail, failed) = mpsc::unbounded_channel();
        std::thread::Builder::new()
            .name("disk".into())
            .spawn(move || {
                // Dropping `fail` says that the thread is over, so it is kept to the end.
                if let Err(error) = work(todo) {
                    // The task is gone only if the connection is over anyway.
                    let _ = fail.send(error);
                }
                drop(fail);
            })
            .map_err(|error| {
                Refusal::new(
                    RefuseCode::Limit,
                    format!("no thread to write with: {error}"),
                )
            })?;
        Ok(Self {
            jobs: Some(jobs),
            failed,
        })
    }

    /// Queues a job; waits if too many are.
    ///
    /// # Errors
    /// Why the thread has ended.
    pub async fn give(&mut self, job: J) -> Result<(), Failure> {
        let sent = match &self.jobs {
            Some(jobs) => jobs.send(job).await.is_ok(),
            None => false,
        };
        if sent {
            Ok(())
        } else {
            Err(self.why_it_ended().await.into())
        }
    }

    /// Returns only when a job has failed.
    pub async fn failure(&mut self) -> Refusal {
        match self.failed.recv().await {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }

    /// Why the thread, which is over or about to be, ended.
    pub async fn why_it_ended(&mut self) -> Refusal {
        self.failed
            .recv()
            .await
            .unwrap_or_else(|| Refusal::new(RefuseCode::Storage, "the writing thread panicked"))
    }

    /// Ends the thread, and waits until it has.
    pub async fn end(&mut self) {
        self.jobs = None;
        while self.failed.recv().await.is_some() {}
    }
}
