//! The directory of `--dir`: its migrations and dumps, who holds which, and the thread that writes them.

mod identity;
pub(crate) mod jobs;
pub mod lease;
pub mod store;
pub(crate) mod writer_thread;

/// When a round is made durable, relative to its acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Before: an acknowledged round survives a crash of the host.
    BeforeAck,
    /// After, while the process is being restored from it: an acknowledged round may be lost with the host.
    AfterAck,
}
