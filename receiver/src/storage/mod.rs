//! `--dir`: its migrations, who works on which, and the thread that writes.

pub mod lease;
pub mod store;
pub mod writer_thread;
