//! Restoring a migrated process with CRIU.
//!
//! 1. While rounds arrive, [`cache`] keeps what a restore would otherwise read back: where every page is, and
//!    shared segments in memory ([`segments`]).
//! 2. After the final round, [`lazy`] makes the directory that CRIU restores from, with nearly no memory in
//!    it.
//! 3. [`process`] has CRIU restore the tree, gives it the segments (`segment_server`), and holds the tree
//!    back until the sender commits. The [`outcome`] is durable before the tree is resumed.
//! 4. The process runs, and a separate process ([`filler`]) fills in its memory.
//!
//! A committed migration runs here, after another restore if necessary ([`settle()`]). An aborted one never will.
//! What a dead receiver left of a restore that was not committed is ended ([`end_leftovers`]).

mod attempt;
pub mod cache;
mod copy;
pub mod filler;
pub mod lazy;
pub mod outcome;
pub mod process;
mod segment_server;
pub mod segments;
mod settle;

pub use attempt::{end_leftovers, forget};
pub use copy::RestoredCopy;
pub use outcome::{Committed, Outcome};
pub use process::{Failed, Images, Progress, Restorer, Restoring};
pub use settle::{Gone, NotSettled, settle};
