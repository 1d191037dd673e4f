//! Pages as types: address ranges, sets of pages, pooled buffers.

pub(crate) mod addr;

mod buffer;
mod page_set;

pub use addr::{BadRange, PAGE_SIZE, PageRange};
pub use buffer::{BufferPool, CHUNK_PAGES, CHUNK_SIZE, PageBuf};
pub use page_set::PageSet;
