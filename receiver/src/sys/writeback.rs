//! Writing to the disk ahead of an fsync.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Has the kernel begin to write a range of a file's bytes to the disk, so that an fsync later finds little
/// left. It promises nothing, so nothing is said of errors: an fsync will.
pub fn begin(file: &File, offset: u64, bytes: u64) {
    let (offset, bytes) = (offset.cast_signed(), bytes.cast_signed());
    // SAFETY: the descriptor is open, and no memory is involved.
    unsafe { libc::sync_file_range(file.as_raw_fd(), offset, bytes, libc::SYNC_FILE_RANGE_WRITE) };
}
