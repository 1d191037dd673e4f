//! Offline commands.

pub mod certs;
pub mod flatten;
pub mod verify;
