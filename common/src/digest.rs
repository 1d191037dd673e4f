//! Checksums (XXH3, which is as fast as memory). They protect against faults; TLS protects against attackers.

use crate::ids::ImageId;
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

/// Returns the XXH3-64 of `bytes`.
#[must_use]
pub fn digest(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// Returns the XXH3-64 of the concatenation of two slices.
#[must_use]
pub fn digest_concat(a: &[u8], b: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(a);
    hasher.update(b);
    hasher.digest()
}

/// Digest of a round, which both ends compute and compare. It covers, in order, each image opened and each
/// chunk: its entries and the digest of its *uncompressed* pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoundDigest(u64);

impl RoundDigest {
    /// Adds the opening of an image.
    pub fn open(&mut self, image: ImageId) {
        let (kind, id) = match image {
            ImageId::Process(pid) => (1u64, u64::from(pid)),
            ImageId::Shmem(id) => (2, id),
        };
        self.fold(&[kind.to_le_bytes(), id.to_le_bytes()].concat());
    }

    /// Adds a chunk: its encoded metadata, which contains its entries and the digest of its pages.
    pub fn chunk(&mut self, meta: &[u8]) {
        self.fold(meta);
    }

    /// Returns the digest.
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
    fn the_digest_depends_on_order_and_boundaries() {
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
