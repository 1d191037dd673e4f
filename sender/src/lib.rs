//! The sending side of Pageferry: freezes a process tree for moments, finds the pages that were written, reads
//! them from outside, and sends them.
//!
//! Read [`migrate`] from top to bottom; everything else is called from there. All `unsafe` code is in [`sys`].

#![deny(unsafe_code)]
// Faults of peers, /proc and files are errors; `expect` says why an invariant of our own holds.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod advice;
pub mod baseline;
pub mod cli;
pub mod converge;
pub mod copy;
pub mod dirty;
pub mod freeze;
pub mod handover;
pub mod migrate;
mod parts;
pub mod progress;
mod recorder;
pub mod report;
pub mod run;
pub mod sink;
#[allow(unsafe_code)]
pub mod sys;
pub mod target;
