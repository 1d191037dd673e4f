//! The sending side of Pageferry: freezes a process tree for moments, finds out which pages were
//! written, reads them from outside, and streams them.
//!
//! Read [`migrate`] from top to bottom; everything else is called from there. `unsafe` stands only
//! in [`sys`].

#![deny(unsafe_code)]

pub mod cli;
pub mod converge;
pub mod dirty;
pub mod files;
pub mod freeze;
pub mod handover;
pub mod held;
pub mod maps;
pub mod migrate;
pub mod progress;
pub mod report;
pub mod run;
pub mod segment;
pub mod sink;
pub mod source;
pub mod stream;
#[allow(unsafe_code)]
pub mod sys;
pub mod task;
pub mod tree;
pub mod vm_flags;
