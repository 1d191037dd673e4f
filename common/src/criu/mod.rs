//! Working with CRIU: its RPC, its images of state, its page-server protocol, and the libraries that are
//! loaded into it.

pub mod images;
pub mod page_server;
pub mod preload;
pub mod session;
