//! Restoring what has arrived, with CRIU: everything up to the moment before it would run, and the
//! rest only when the sender has said so.
//!
//! What was decided is on the disk before it is done ([`Outcome`]), so that it is known whatever
//! dies. A migration that is committed will run here, if need be restored once more; one that is
//! aborted never will.

pub mod cache;
pub mod filler;
pub mod lazy;
pub mod outcome;
pub mod process;
pub mod segment_server;
pub mod segments;

pub use outcome::Outcome;
pub use process::{Images, Progress, Restorer, Restoring, complete};
