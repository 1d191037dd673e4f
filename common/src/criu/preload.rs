//! The libraries that CRIU preloads (`common/preload/`), embedded in the programs.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Library that keeps `criu dump` from reading memory.
pub static DUMP: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dump.so"));

/// Library that keeps `criu restore` from reading shared segments.
pub static RESTORE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/restore.so"));

/// File name of a library in a directory of images.
pub const NAME: &str = "preload.so";

/// Writes a library into a directory, for CRIU to load. Returns its path.
///
/// # Errors
/// Those of creating and writing the file.
pub fn write(library: &[u8], dir: &Path) -> io::Result<PathBuf> {
    let path = dir.join(NAME);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o700)
        .open(&path)?;
    file.write_all(library)?;
    Ok(path)
}
