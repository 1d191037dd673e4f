//! Tells protocols apart by the first bytes a client sends.

use pageferry_common::wire::frame::MAGIC;

/// Bytes needed to tell.
pub const FIRST_BYTES: usize = 4;

/// What a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Our own protocol.
    Native,
    /// CRIU's page-server protocol.
    Criu,
    /// TLS, with something else inside.
    Tls,
    /// Nothing we know.
    Unknown,
}

/// Judges the first bytes.
#[must_use]
pub fn detect(first: [u8; FIRST_BYTES]) -> Dialect {
    if first == MAGIC {
        return Dialect::Native;
    }
    // A record of type handshake, of whatever version it says for old servers' sake.
    if first[..2] == [0x16, 3] {
        return Dialect::Tls;
    }
    // CRIU's header begins with a u32: the command in its lower half, flags of pages above.
    let word = u32::from_le_bytes(first);
    match (word & 0xffff, word >> 16) {
        (1..=7 | 0x1023 | 0x1024, 0..=7) => Dialect::Criu,
        _ => Dialect::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_tell() {
        for (first, dialect) in [
            (*b"PFRY", Dialect::Native),
            ([4, 0, 0, 0], Dialect::Criu),
            ([6, 0, 4, 0], Dialect::Criu),
            ([0x23, 0x10, 0, 0], Dialect::Criu),
            (*b"GET ", Dialect::Unknown),
            ([0x16, 3, 1, 0], Dialect::Tls),
            ([0; 4], Dialect::Unknown),
        ] {
            assert_eq!(detect(first), dialect, "{first:?}");
        }
    }
}
