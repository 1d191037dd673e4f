//! The protocols spoken on the port, told apart by their first bytes.

pub mod detect;
pub mod native;
