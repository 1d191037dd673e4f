//! Checksums against faults (not against attackers: that is TLS's work): XXH3, which runs at
//! memory speed.

use crate::ids::ImageId;
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

/// XXH3-64 of one piece of memory.
#[must_use]
pub fn digest(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// XXH3-64 of two pieces as if they were one.
#[must_use]
pub fn digest_concat(a: &[u8], b: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(a);
    hasher.update(b);
    hasher.digest()
}

/// What both ends compute over a round to see that they mean the same: folds in, in order, every
/// image opened and, of every chunk, its entries and the digest of its *uncompressed* pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoundDigest(u64);

impl RoundDigest {
    /// An image begins.
    pub fn open(&mut self, image: ImageId) {
        let (kind, id) = match image {
            ImageId::Process(pid) => (1u64, u64::from(pid)),
            ImageId::Shmem(id) => (2, id),
        };
        self.fold(&[kind.to_le_bytes(), id.to_le_bytes()].concat());
    }

    /// A chunk of the open image: its encoded metadata, which holds entries and content digest.
    pub fn chunk(&mut self, meta: &[u8]) {
        self.fold(meta);
    }

    /// The digest so far.
    #[must_use]
    pub fn value(self) -> u64 {
        self.0
    }

    fn fold(&mut self, bytes: &[u8]) {
        self.0 = xxh3_64_with_seed(bytes, self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_every_byte_count() {
        let run = |steps: &[&[u8]]| {
            let mut d = RoundDigest::default();
            d.open(ImageId::Process(1));
            steps.iter().for_each(|s| d.chunk(s));
            d.value()
        };
        assert_ne!(run(&[b"a", b"b"]), run(&[b"b", b"a"]));
        assert_ne!(run(&[b"ab"]), run(&[b"a", b"b"]));
        assert_eq!(digest_concat(b"he", b"llo"), digest(b"hello"));
    }
}
