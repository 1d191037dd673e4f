//! Reproducible pseudo-random numbers.

/// A xorshift64 generator.
#[derive(Debug)]
pub struct XorShift64(u64);

impl XorShift64 {
    /// Creates a generator; `seed` must not be 0.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
