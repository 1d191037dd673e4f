//! Writing to the disk ahead of a sync.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Asks the kernel to begin writing a range of a file to the disk, so that a later sync has little left to do.
/// Errors are ignored: this promises nothing, and the sync reports them.
pub fn begin(file: &File, offset: u64, bytes: u64) {
    let (offset, bytes) = (offset.cast_signed(), bytes.cast_signed());
    // SAFETY: the descriptor is open, and no memory is involved.
    unsafe { libc::sync_file_range(file.as_raw_fd(), offset, bytes, libc::SYNC_FILE_RANGE_WRITE) };
}
