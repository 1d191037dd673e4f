//! Detects the protocol of a connection from its first bytes.

use pageferry_common::wire::MAGIC;

/// Number of bytes that tell the protocols apart.
pub const FIRST_BYTES: usize = 4;

/// Protocol of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Pageferry's own protocol.
    Native,
    /// CRIU's page-server protocol.
    Criu,
    /// TLS, with one of the others inside.
    Tls,
    /// Not supported.
    Unknown,
}

/// Returns the protocol that begins with these bytes.
#[must_use]
pub fn detect(first: [u8; FIRST_BYTES]) -> Dialect {
    if first == MAGIC {
        return Dialect::Native;
    }
    // A handshake record. The version after the major number 3 differs, for compatibility with old servers.
    if first[..2] == [0x16, 3] {
        return Dialect::Tls;
    }
    // CRIU's header begins with a little-endian u32: the command in the lower half, page flags in the upper.
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
    fn protocol_is_detected_from_four_bytes() {
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
