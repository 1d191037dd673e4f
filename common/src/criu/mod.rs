//! CRIU: its RPC, its images of state, its page-server protocol, and the libraries that it preloads.

pub mod images;
pub mod page_server;
pub mod preload;

mod log;
mod messages;
mod options;
mod session;

pub use log::last_errors;
pub use options::{BadOption, Options};
pub use session::{Criu, CriuError, CriuSession, Event, Reply};
