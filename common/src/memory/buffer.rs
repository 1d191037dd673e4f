//! Pool of page buffers of 4 MiB, allocated and touched before the first freeze, and handed out in slots of
//! one chunk.
//!
//! A page is copied four times and checksummed twice on its way into an image. Each of these takes a quarter
//! of the time when its input is still in the cache of the processor. Therefore chunks are small, and the
//! slot that was returned last is handed out first.
//!
//! Waiting for a free slot is the only back-pressure in the pipeline.

use crate::memory::addr::PAGE_SIZE;
use bytes::{Bytes, BytesMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;

/// Maximum number of data pages in a chunk, which one `process_vm_readv` reads.
pub const CHUNK_PAGES: usize = 128;

/// Maximum length of the data of a chunk, bytes: 512 KiB.
pub const CHUNK_SIZE: usize = CHUNK_PAGES * PAGE_SIZE as usize;

/// Number of slots in a buffer.
const SLOTS: usize = 8;

/// Size of a buffer, bytes: 4 MiB.
const BUFFER_SIZE: usize = SLOTS * CHUNK_SIZE;

/// Fixed number of buffers, whose slots return to the pool when they are dropped.
#[derive(Debug, Clone)]
pub struct BufferPool {
    free: FreeSlots,
    /// One message for each free slot.
    free_rx: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<()>>>,
}

/// The free slots of a pool.
#[derive(Debug, Clone)]
struct FreeSlots {
    /// Used as a stack.
    slots: Arc<Mutex<Vec<BytesMut>>>,
    free_tx: mpsc::UnboundedSender<()>,
}

impl FreeSlots {
    fn push(&self, slot: BytesMut) {
        self.slots().push(slot);
        // The pool itself may have been dropped already.
        let _ = self.free_tx.send(());
    }

    fn slots(&self) -> MutexGuard<'_, Vec<BytesMut>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BufferPool {
    /// Allocates a pool of `buffers` buffers of 4 MiB, and touches every page of them.
    #[must_use]
    pub fn new(buffers: usize) -> Self {
        let (free_tx, free_rx) = mpsc::unbounded_channel();
        let free = FreeSlots {
            slots: Arc::default(),
            free_tx,
        };
        for _ in 0..buffers {
            // One surplus page, so that slots can be aligned to pages.
            let mut buffer = BytesMut::zeroed(BUFFER_SIZE + PAGE_SIZE as usize);
            // Zeroed memory is mapped but not populated, and would fault during a freeze.
            buffer.fill(1);
            let unaligned = buffer.as_ptr().align_offset(PAGE_SIZE as usize);
            drop(buffer.split_to(unaligned));
            (0..SLOTS).for_each(|_| free.push(buffer.split_to(CHUNK_SIZE)));
        }
        Self {
            free,
            free_rx: Arc::new(tokio::sync::Mutex::new(free_rx)),
        }
    }

    /// Returns the number of chunks that `buffers` buffers hold.
    #[must_use]
    pub const fn chunks(buffers: usize) -> usize {
        buffers * SLOTS
    }

    /// Waits for a free slot and blocks the thread meanwhile. Must not be called on a thread of an
    /// asynchronous runtime.
    #[must_use]
    pub fn take_blocking(&self) -> PageBuf {
        let free = self.free_rx.blocking_lock().blocking_recv();
        self.pop(free)
    }

    /// Waits for a free slot.
    pub async fn take(&self) -> PageBuf {
        let free = self.free_rx.lock().await.recv().await;
        self.pop(free)
    }

    /// Takes a slot after a message from the channel.
    fn pop(&self, free: Option<()>) -> PageBuf {
        free.expect("the pool holds a sender, so the channel is open");
        let slot = self.free.slots().pop();
        PageBuf {
            slot: slot.expect("there is a slot for each message"),
            free: self.free.clone(),
        }
    }
}

/// Buffer for one chunk, [`CHUNK_SIZE`] bytes; returns to its pool when dropped.
#[derive(Debug)]
pub struct PageBuf {
    /// Empty only after it has returned to the pool.
    slot: BytesMut,
    free: FreeSlots,
}

impl PageBuf {
    /// Returns the first `len` bytes as shared, immutable memory. The slot returns to its pool with the last
    /// slice.
    #[must_use]
    pub fn freeze(self, len: usize) -> Bytes {
        Bytes::from_owner(self).slice(..len)
    }
}

impl std::ops::Deref for PageBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.slot
    }
}

impl std::ops::DerefMut for PageBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.slot
    }
}

impl AsRef<[u8]> for PageBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for PageBuf {
    fn drop(&mut self) {
        self.free.push(std::mem::take(&mut self.slot));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_returns_with_its_last_slice() {
        let pool = BufferPool::new(1);
        let others: Vec<_> = (1..BufferPool::chunks(1))
            .map(|_| pool.take_blocking())
            .collect();
        let mut slot = pool.take_blocking();
        assert_eq!(slot.as_ptr() as usize % PAGE_SIZE as usize, 0);
        slot[..3].copy_from_slice(b"abc");
        let whole = slot.freeze(3);
        let part = whole.slice(1..);
        drop(whole);
        let waiter = std::thread::spawn({
            let pool = pool.clone();
            move || pool.take_blocking().len()
        });
        assert_eq!(&part[..], b"bc");
        drop(part);
        assert_eq!(waiter.join().unwrap(), CHUNK_SIZE);
        drop(others);
    }

    #[test]
    fn the_slot_used_last_is_reused_first() {
        let pool = BufferPool::new(1);
        let slots = [(); 3].map(|()| pool.take_blocking());
        let [first, last, _] = slots.each_ref().map(|slot| slot.as_ptr());
        let [a, b, _c] = slots;
        drop(a);
        drop(b);
        let again = [(); 2].map(|()| pool.take_blocking());
        assert_eq!(again.each_ref().map(|slot| slot.as_ptr()), [last, first]);
    }
}
