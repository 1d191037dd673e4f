//! Pages as types: address ranges, sets of pages, pooled buffers.

pub mod addr;
pub mod buffer;
pub mod page_set;

pub use addr::{PAGE_SIZE, PageRange};
pub use buffer::{BufferPool, CHUNK_PAGES, CHUNK_SIZE, PageBuf};
pub use page_set::PageSet;
