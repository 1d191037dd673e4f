//! The first phase: the sender's first message, and what it leads to.

use super::connection::{Connection, unexpected_message};
use super::resolve;
use crate::quota::Quota;
use crate::refusal::{Failure, Refusal};
use crate::restore::{Outcome, Restorer};
use crate::session::ServerContext;
use crate::session::admission::Pending;
use crate::storage::Durability;
use crate::storage::lease::{Disconnect, Lease};
use crate::storage::store::{Standing, Store};
use pageferry_common::wire::{self, Message, RefuseCode};
use pageferry_common::{Claim, PAGE_SIZE};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_blocking;

/// A connection whose first message has not arrived.
pub(super) struct Greeting<'c, 'a, R, W> {
    connection: &'c mut Connection<R, W>,
    context: &'a ServerContext,
    pending: Pending,
}

/// What the first message led to.
pub(super) enum Greeted<'a> {
    /// The sender asked about an earlier migration and got an answer. Nothing follows.
    Resolved,
    /// A migration begins, or continues after a lost connection.
    Agreed(Agreement<'a>),
}

/// What sender and receiver agreed on.
pub(super) struct Agreement<'a> {
    /// Directory of the migration.
    pub home: PathBuf,
    /// Restores the process at the end; `None` if the sender wants images only.
    pub restorer: Option<&'a Restorer>,
    /// Number of complete rounds.
    pub rounds: u32,
    pub quota: Arc<Quota>,
    pub lease: Lease,
    /// Number of buffers of 4 MiB.
    pub buffers: usize,
}

/// The fields of the sender's `Hello`.
struct Hello {
    version: u16,
    page_size: u32,
    features: u64,
    claim: Claim,
}

impl<'c, 'a, R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Greeting<'c, 'a, R, W> {
    pub(super) fn new(
        connection: &'c mut Connection<R, W>,
        context: &'a ServerContext,
        pending: Pending,
    ) -> Self {
        Self {
            connection,
            context,
            pending,
        }
    }

    /// Receives the first message within the deadline of a pending connection, and acts on it.
    ///
    /// # Errors
    /// [`Failure`] if this sender, or this migration, is not accepted.
    pub(super) async fn run(self) -> Result<Greeted<'a>, Failure> {
        match self.pending.within_deadline(self.connection.recv()).await? {
            // A question takes no sender slot: the connection stays pending.
            Message::Resolve(claim) => {
                let disconnect = self.pending.disconnect();
                resolve::answer(self.connection, self.context, &disconnect, &claim).await?;
                Ok(Greeted::Resolved)
            }
            Message::Hello {
                version,
                page_size,
                features,
                claim,
            } => {
                let hello = Hello {
                    version,
                    page_size,
                    features,
                    claim,
                };
                Ok(Greeted::Agreed(self.agree(&hello).await?))
            }
            other => Err(unexpected_message(&other).into()),
        }
    }

    async fn agree(self, hello: &Hello) -> Result<Agreement<'a>, Failure> {
        let features = hello.common_features(self.context)?;
        let restores = features & wire::FEATURE_RESTORE != 0;
        let restorer = self.context.restorer.as_ref().filter(|_| restores);
        let Self {
            connection,
            context,
            pending,
        } = self;
        let (store, limits) = (&context.store, &context.limits);
        let home = store.home(&hello.claim);
        let quota = Quota::new(limits.bounds, store.dir());
        let disconnect = pending.disconnect();
        let (lease, rounds) = if home.is_dir() {
            // The order matters: the slot of the lost connection is free only once its lease is.
            let durability = match restorer {
                Some(_) => Durability::AfterAck,
                None => Durability::BeforeAck,
            };
            let resumed = resume(connection, store, &hello.claim, &disconnect, durability).await?;
            connection.hold(pending.promote()?);
            // Counting reads the metadata of every image file.
            let (quota, home) = (Arc::clone(&quota), home.clone());
            let counted = spawn_blocking(move || quota.charge_existing(&home)).await;
            counted.expect("counting does not panic")?;
            resumed
        } else {
            connection.hold(pending.promote()?);
            // Checked first, so that no directory is left where no round fits.
            quota.check_round(1)?;
            let lease = connection.lease(store, &home, &disconnect).await?;
            store.create(&hello.claim)?;
            (lease, 0)
        };
        let welcome = Message::Welcome {
            version: wire::VERSION,
            features,
            rounds,
            receiver: store.id(),
            directory: home.display().to_string(),
        };
        connection.send(&welcome).await?;
        Ok(Agreement {
            home,
            restorer,
            rounds,
            quota,
            lease,
            buffers: limits.buffers,
        })
    }
}

impl Hello {
    /// Checks that sender and receiver speak the same protocol, and returns the features of both.
    fn common_features(&self, context: &ServerContext) -> Result<u64, Refusal> {
        let unsupported = |reason: String| Err(Refusal::new(RefuseCode::Unsupported, reason));
        if self.version != wire::VERSION {
            return unsupported(format!(
                "the sender speaks protocol version {}, this receiver version {}",
                self.version,
                wire::VERSION
            ));
        }
        if u64::from(self.page_size) != PAGE_SIZE {
            return unsupported(format!("unsupported page size: {} bytes", self.page_size));
        }
        let ours = match context.restorer {
            Some(_) => wire::FEATURES,
            None => wire::FEATURES & !wire::FEATURE_RESTORE,
        };
        Ok(self.features & ours)
    }
}

/// Resumes the migration of a sender whose connection was lost: takes over its lease, and returns the
/// number of complete rounds.
async fn resume<R, W>(
    connection: &mut Connection<R, W>,
    store: &Store,
    claim: &Claim,
    disconnect: &Disconnect,
    durability: Durability,
) -> Result<(Lease, u32), Failure>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    check_owner(store, claim)?;
    let home = store.home(claim);
    let lease = connection.lease(store, &home, disconnect).await?;
    match Outcome::read(&home)? {
        // After an aborted attempt to restore, the sender's copy runs: it may send more rounds.
        None | Some(Outcome::Aborted) => resolve::end_leftovers_of(&home).await?,
        Some(Outcome::Running | Outcome::Committed(_)) => {
            let reason = "this migration is committed: its process runs here, or will";
            return Err(Refusal::new(RefuseCode::Restore, reason).into());
        }
    }
    let rounds = store.rounds(&home, durability)?;
    tracing::info!(event = "sender_resumed", home = %home.display(), rounds, "sender reconnected");
    Ok((lease, rounds))
}

/// Refuses a sender that does not know the token of a migration, and a migration that this receiver does not
/// have: another one may have committed it.
pub(super) fn check_owner(store: &Store, claim: &Claim) -> Result<(), Failure> {
    let refusal = match store.standing(claim)? {
        Standing::Owner => return Ok(()),
        Standing::Stranger => Refusal::new(
            RefuseCode::Denied,
            "this migration belongs to another sender or another receiver",
        ),
        Standing::Unknown => Refusal::new(
            RefuseCode::Unknown,
            "this receiver has no such migration: another receiver, or another --dir, has it",
        ),
    };
    Err(refusal.into())
}
