//! Pageferry's own protocol, receiving.
//!
//! A conversation passes through phases. Each is a value that owns what only it may use, and its `run`
//! consumes it and returns the next one:
//!
//! ```text
//! Greeting ──Hello──► Agreement ──► Receiving ──Restore──► Restoring ──Running──► Finish
//!    └─Resolve─► answered               └─────────────────────Finish────────────────┘
//! ```
//!
//! One task reads the socket, and one thread writes the images (`storage::jobs`). Memory for one
//! sender: `--buffers` of 4 MiB, two chunks for decompressing and copying, and what `docs/security.md`
//! lists. Before the greeting: one message.

mod connection;
mod greeting;
mod resolve;
mod restore;
mod round;

pub use resolve::{end_undecided, finish_all};

use crate::quota::Quota;
use crate::refusal::{Failure, Refusal};
use crate::restore::Outcome;
use crate::restore::cache::RestoreCache;
use crate::session::admission::Pending;
use crate::session::{Limits, Migration, ServerContext, SessionEnd};
use crate::storage::jobs::{Job, RoundWriter};
use crate::storage::lease::Lease;
use crate::storage::writer_thread::WriterThread;
use connection::{Connection, unexpected_message};
use greeting::{Agreement, Greeted, Greeting};
use pageferry_common::BufferPool;
use pageferry_common::criu::preload;
use pageferry_common::sys::perf::TaskEvents;
use pageferry_common::wire::{Message, RefuseCode};
use restore::RestorePlan;
use round::{Received, Receiving};
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_blocking;

/// Receives one migration, or the rest of one whose connection was lost, or answers a question about one.
/// A sender takes a slot with its Hello. Errors are sent to it, if possible.
pub async fn receive<R, W>(
    read: R,
    write: W,
    pending: Pending,
    context: &ServerContext,
) -> SessionEnd
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut connection = Connection::new(read, write, context.limits.stall);
    let mut migration = Migration::default();
    let result = converse(&mut connection, pending, context, &mut migration).await;
    migration.bytes_wire = connection.reader.bytes();
    if let Err(failure) = &result {
        connection.send_refusal(failure).await;
    }
    SessionEnd { migration, result }
}

/// Sends a refusal to a sender that may not connect.
pub async fn refuse<R, W>(read: R, write: W, limits: &Limits, reason: String)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut connection = Connection::new(read, write, limits.handshake);
    // A sender expects a refusal only after its first message.
    if connection.recv().await.is_ok() {
        let refusal = Refusal::new(RefuseCode::Unsupported, reason);
        connection.send_refusal(&refusal.into()).await;
    }
}

async fn converse<R, W>(
    connection: &mut Connection<R, W>,
    pending: Pending,
    context: &ServerContext,
    migration: &mut Migration,
) -> Result<(), Failure>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let greeting = Greeting::new(connection, context, pending);
    let agreement = match greeting.run().await? {
        Greeted::Resolved => return Ok(()),
        Greeted::Agreed(agreement) => agreement,
    };
    migration.directory.clone_from(&agreement.home);
    migration.rounds = agreement.rounds;
    let mut workspace = Workspace::open(agreement).await?;
    let result = receive_and_restore(connection, context, &mut workspace, migration).await;
    workspace.close(migration.rounds).await;
    result
}

/// Receives rounds, and restores the process if the sender asks for it.
async fn receive_and_restore<R, W>(
    connection: &mut Connection<R, W>,
    context: &ServerContext,
    workspace: &mut Workspace<'_>,
    migration: &mut Migration,
) -> Result<(), Failure>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    match Receiving::new(connection, context, workspace, migration)
        .run()
        .await?
    {
        Received::All => {}
        Received::Restore(restoring) => {
            restoring.run().await?;
            migration.restored = true;
            match connection.recv().await? {
                Message::Finish => {}
                other => return Err(unexpected_message(&other).into()),
            }
        }
    }
    connection.send(&Message::FinishAck).await?;
    Ok(())
}

/// What a migration uses from the greeting until its connection ends.
struct Workspace<'a> {
    /// Directory of the migration.
    home: PathBuf,
    quota: Arc<Quota>,
    writer: WriterThread<Job>,
    /// `None` if the sender wants images only, or once the restore has begun.
    restore: Option<RestorePlan<'a>>,
    _lease: Lease,
    _events: Option<TaskEvents>,
}

impl<'a> Workspace<'a> {
    /// Starts the thread that writes rounds and, if the process is to be restored, CRIU.
    async fn open(agreement: Agreement<'a>) -> Result<Self, Failure> {
        let Agreement {
            home,
            restorer,
            rounds,
            quota,
            lease,
            buffers,
        } = agreement;
        let cache = match restorer.filter(|restorer| restorer.lazy) {
            Some(_) => {
                let home = home.clone();
                let load = spawn_blocking(move || RestoreCache::load(&home, rounds));
                let cache = load.await.expect("reading pagemaps does not panic");
                Some(Arc::new(Mutex::new(cache)))
            }
            None => None,
        };
        // The first hardware breakpoint on a host is slow to set. CRIU sets some while the process waits.
        let events = restorer.map(|_| TaskEvents::keep());
        let restore = match restorer {
            Some(restorer) => {
                Outcome::preallocate(&home)?;
                Some(RestorePlan {
                    criu: restorer.start_criu(&home)?,
                    restorer,
                    cache: cache.clone(),
                })
            }
            None => None,
        };
        let rounds = RoundWriter::new(home.clone(), Arc::clone(&quota), cache);
        let depth = BufferPool::chunks(buffers);
        Ok(Self {
            writer: WriterThread::start(depth, move |jobs| rounds.run(jobs))?,
            home,
            quota,
            restore,
            _lease: lease,
            _events: events,
        })
    }

    /// Removes what was needed only while the connection lasted. An incomplete round is removed, too,
    /// before the sender receives the reason.
    async fn close(mut self, rounds: u32) {
        self.writer.join().await;
        // CRIU has loaded the library if it ever does; without a restore there is none.
        let _ = fs::remove_file(self.home.join(preload::NAME));
        if rounds == 0 {
            Outcome::discard_blank(&self.home);
        }
    }
}
