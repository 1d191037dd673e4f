//! A fixed pool of 4 MiB page buffers, all allocated and touched before the first freeze, in pieces of a chunk
//! each.
//!
//! A page goes through four copies and two checksums on its way into an image, and each costs a quarter when what
//! it reads is still in the processor's cache. So chunks are small, and the piece that is used next is the one
//! that came home last.
//!
//! Waiting for a free piece is the only back-pressure in the pipeline.

use crate::memory::addr::PAGE_SIZE;
use bytes::{Bytes, BytesMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;

/// Most pages with data in a chunk: what one `process_vm_readv` reads.
pub const CHUNK_PAGES: usize = 128;

/// Their size in bytes: 512 KiB.
pub const CHUNK_SIZE: usize = CHUNK_PAGES * PAGE_SIZE as usize;

/// Chunks for which there is room in a buffer.
const PIECES: usize = 8;

/// Size of a buffer in bytes: 4 MiB.
const BUFFER_SIZE: usize = PIECES * CHUNK_SIZE;

/// A fixed number of buffers, whose pieces come home when they are dropped.
#[derive(Debug, Clone)]
pub struct BufferPool {
    home: Home,
    /// One for each piece that is at home.
    free: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<()>>>,
}

#[derive(Debug, Clone)]
struct Home {
    /// What came last is taken first.
    pieces: Arc<Mutex<Vec<BytesMut>>>,
    free: mpsc::UnboundedSender<()>,
}

impl Home {
    fn give(&self, piece: BytesMut) {
        self.pieces().push(piece);
        // The pool may be gone already at the end of the program.
        let _ = self.free.send(());
    }

    fn pieces(&self) -> MutexGuard<'_, Vec<BytesMut>> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BufferPool {
    /// A pool of `buffers` buffers of 4 MiB, every page of them touched.
    #[must_use]
    pub fn new(buffers: usize) -> Self {
        let (sender, free) = mpsc::unbounded_channel();
        let home = Home {
            pieces: Arc::default(),
            free: sender,
        };
        for _ in 0..buffers {
            // One page longer than needed, so that pieces can start at a page boundary.
            let mut buffer = BytesMut::zeroed(BUFFER_SIZE + PAGE_SIZE as usize);
            // Zeroed memory is mapped, not touched, and would fault inside a freeze.
            buffer.fill(1);
            let unaligned = buffer.as_ptr().align_offset(PAGE_SIZE as usize);
            drop(buffer.split_to(unaligned));
            (0..PIECES).for_each(|_| home.give(buffer.split_to(CHUNK_SIZE)));
        }
        Self {
            home,
            free: Arc::new(tokio::sync::Mutex::new(free)),
        }
    }

    /// Room for how many chunks `buffers` buffers are.
    #[must_use]
    pub const fn chunks(buffers: usize) -> usize {
        buffers * PIECES
    }

    /// Waits for a free piece, blocking the thread. Not to be called from a runtime's thread.
    #[must_use]
    pub fn take_blocking(&self) -> PageBuf {
        let free = self.free.blocking_lock().blocking_recv();
        self.wrap(free)
    }

    /// Waits for a free piece.
    pub async fn take(&self) -> PageBuf {
        let free = self.free.lock().await.recv().await;
        self.wrap(free)
    }

    fn wrap(&self, free: Option<()>) -> PageBuf {
        free.expect("the pool itself holds a sender, so the channel is open");
        let piece = self.home.pieces().pop();
        PageBuf {
            piece: piece.expect("there is one for each that was told of"),
            home: self.home.clone(),
        }
    }
}

/// Room for a chunk, [`CHUNK_SIZE`] bytes, out of the pool; goes home when dropped.
#[derive(Debug)]
pub struct PageBuf {
    /// Empty only when it has gone home.
    piece: BytesMut,
    home: Home,
}

impl PageBuf {
    /// Hands the first `len` bytes on; the piece goes home when the last slice is dropped.
    #[must_use]
    pub fn freeze(self, len: usize) -> Bytes {
        Bytes::from_owner(self).slice(..len)
    }
}

impl std::ops::Deref for PageBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.piece
    }
}

impl std::ops::DerefMut for PageBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.piece
    }
}

impl AsRef<[u8]> for PageBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for PageBuf {
    fn drop(&mut self) {
        self.home.give(std::mem::take(&mut self.piece));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_goes_home_with_its_last_slice() {
        let pool = BufferPool::new(1);
        let others: Vec<_> = (1..BufferPool::chunks(1))
            .map(|_| pool.take_blocking())
            .collect();
        let mut piece = pool.take_blocking();
        assert_eq!(piece.as_ptr() as usize % PAGE_SIZE as usize, 0);
        piece[..3].copy_from_slice(b"abc");
        let whole = piece.freeze(3);
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
    fn what_was_used_last_is_used_next() {
        let pool = BufferPool::new(1);
        let pieces = [(); 3].map(|()| pool.take_blocking());
        let [first, last, _] = pieces.each_ref().map(|piece| piece.as_ptr());
        let [a, b, _c] = pieces;
        drop(a);
        drop(b);
        let again = [(); 2].map(|()| pool.take_blocking());
        assert_eq!(again.each_ref().map(|piece| piece.as_ptr()), [last, first]);
    }
}
