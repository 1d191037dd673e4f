//! The harness of Pageferry's tests: a [`Victim`] with known memory, the [`Pair`] of programs under
//! test, the truth about a frozen tree ([`memory`]), and a reader of CRIU images that shares no code
//! with the receiver ([`images`]).
//!
//! ```no_run
//! use pageferry_tests::{Frozen, Pair, Snapshot, Victim, images};
//!
//! let victim = Victim::start("heap=64 children=2 dirty=10");
//! let pair = Pair::start(&[]);
//! let report = pair.send(victim.pid(), &["--then", "stop"]).expect_report();
//! let truth = Snapshot::take(&Frozen::from_stopped(victim.pid()).unwrap()).unwrap();
//! images::compare(&truth, &report.last_round()).unwrap();
//! ```
#![forbid(unsafe_code)]

pub mod actors;
pub mod certs;
pub mod copies;
pub mod criu;
pub mod daemon;
pub mod disk;
pub mod fuzz;
pub mod gate;
pub mod history;
pub mod host;
pub mod huge;
pub mod images;
pub mod kills;
pub mod ksm;
pub mod link;
pub mod log;
pub mod memory;
pub mod mover;
pub mod net;
pub mod pair;
pub mod paused;
pub mod privileges;
pub mod program;
pub mod random;
pub mod scenario;
pub mod servers;
pub mod service;
pub mod trial;
pub mod usage;
pub mod victim;

pub use images::{Mismatch, Stats, compare};
pub use memory::{Frozen, Snapshot};
pub use pair::{Pair, Receiver, Report, Round, Send};
pub use program::{Finished, Program};
pub use victim::{ReportFile, Victim};
