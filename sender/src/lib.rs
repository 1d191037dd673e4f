//! The sending side of Pageferry: freezes a process tree for moments, finds out which pages were
//! written, reads them from outside, and streams them.
//!
//! Read [`migrate`] from top to bottom; everything else is called from there. `unsafe` stands only
//! in [`sys`].

#![deny(unsafe_code)]

pub mod advice;
pub mod baseline;
pub mod cli;
pub mod converge;
pub mod copy;
pub mod dirty;
pub mod freeze;
pub mod handover;
pub mod migrate;
pub mod progress;
pub mod report;
pub mod run;
pub mod sink;
#[allow(unsafe_code)]
pub mod sys;
pub mod target;
