//! A fixed pool of 4 MiB page buffers, all allocated and touched before the first freeze.
//!
//! Waiting for a free buffer is the only back-pressure in the pipeline.

use crate::addr::PAGE_SIZE;
use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::{Mutex, mpsc};

/// Pages in a buffer: the most one `process_vm_readv` takes as lone pages (`UIO_MAXIOV`).
pub const BUFFER_PAGES: usize = 1024;

/// Size of a buffer in bytes: 4 MiB.
pub const BUFFER_SIZE: usize = BUFFER_PAGES * PAGE_SIZE as usize;

/// A fixed number of buffers that come home when they are dropped.
#[derive(Debug, Clone)]
pub struct BufferPool {
    home: mpsc::UnboundedSender<Box<Storage>>,
    free: Arc<Mutex<mpsc::UnboundedReceiver<Box<Storage>>>>,
}

/// The memory behind a buffer: one page longer than needed, so that the part used can start at a
/// page boundary.
#[derive(Debug)]
struct Storage {
    bytes: Vec<u8>,
    offset: usize,
}

impl BufferPool {
    /// A pool of `buffers` buffers of [`BUFFER_SIZE`] bytes, every page of them touched.
    #[must_use]
    pub fn new(buffers: usize) -> Self {
        let (home, free) = mpsc::unbounded_channel();
        for _ in 0..buffers {
            // Not zeroed memory: that would be mapped, not touched, and fault inside a freeze.
            let bytes = vec![1u8; BUFFER_SIZE + PAGE_SIZE as usize];
            let offset = bytes.as_ptr().align_offset(PAGE_SIZE as usize);
            home.send(Box::new(Storage { bytes, offset }))
                .expect("the receiving half is held right here");
        }
        Self {
            home,
            free: Arc::new(Mutex::new(free)),
        }
    }

    /// Waits for a free buffer, blocking the thread. Not to be called from a runtime's thread.
    #[must_use]
    pub fn take_blocking(&self) -> PageBuf {
        let storage = self.free.blocking_lock().blocking_recv();
        self.wrap(storage)
    }

    /// Waits for a free buffer.
    pub async fn take(&self) -> PageBuf {
        let storage = self.free.lock().await.recv().await;
        self.wrap(storage)
    }

    fn wrap(&self, storage: Option<Box<Storage>>) -> PageBuf {
        PageBuf {
            storage: Some(storage.expect("the pool itself holds a sender, so the channel is open")),
            home: self.home.clone(),
        }
    }
}

/// One buffer of [`BUFFER_SIZE`] bytes out of the pool; goes home when dropped.
#[derive(Debug)]
pub struct PageBuf {
    /// `None` only while being dropped.
    storage: Option<Box<Storage>>,
    home: mpsc::UnboundedSender<Box<Storage>>,
}

impl PageBuf {
    /// Hands the first `len` bytes on; the buffer goes home when the last slice is dropped.
    #[must_use]
    pub fn freeze(self, len: usize) -> Bytes {
        Bytes::from_owner(self).slice(..len)
    }
}

const ALIVE: &str = "storage is only taken while being dropped";

impl std::ops::Deref for PageBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let storage = self.storage.as_ref().expect(ALIVE);
        &storage.bytes[storage.offset..storage.offset + BUFFER_SIZE]
    }
}

impl std::ops::DerefMut for PageBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let storage = self.storage.as_mut().expect(ALIVE);
        &mut storage.bytes[storage.offset..storage.offset + BUFFER_SIZE]
    }
}

impl AsRef<[u8]> for PageBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for PageBuf {
    fn drop(&mut self) {
        if let Some(storage) = self.storage.take() {
            // The pool may be gone already at the end of the program; then the memory is freed.
            let _ = self.home.send(storage);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_goes_home_with_its_last_slice() {
        let pool = BufferPool::new(1);
        let mut buffer = pool.take_blocking();
        assert_eq!(buffer.as_ptr() as usize % PAGE_SIZE as usize, 0);
        buffer[..3].copy_from_slice(b"abc");
        let whole = buffer.freeze(3);
        let part = whole.slice(1..);
        drop(whole);
        let waiter = std::thread::spawn({
            let pool = pool.clone();
            move || pool.take_blocking().len()
        });
        assert_eq!(&part[..], b"bc");
        drop(part);
        assert_eq!(waiter.join().unwrap(), BUFFER_SIZE);
    }
}
