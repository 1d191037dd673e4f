//! Limits of the protocol, checked before memory is allocated.

/// Maximum number of entries in a chunk.
pub const CHUNK_ENTRIES_MAX: usize = 4096;

/// Length of an encoded entry, bytes.
const ENTRY_LEN: usize = 16;

/// Length of the metadata of a chunk before its entries, bytes.
const CHUNK_HEAD_LEN: usize = 16;

/// Maximum length of the metadata of any message, bytes: that of a chunk with [`CHUNK_ENTRIES_MAX`] entries.
pub const META_MAX: usize = CHUNK_HEAD_LEN + ENTRY_LEN * CHUNK_ENTRIES_MAX;

/// Maximum length of a piece of a state image, bytes.
pub const PIECE_MAX: usize = 1 << 15;

/// Maximum length of a string, bytes.
pub const STRING_MAX: usize = 1024;
