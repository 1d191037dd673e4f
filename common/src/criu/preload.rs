//! The libraries that are loaded into CRIU (`common/preload/`), carried inside the programs.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Keeps a dump from reading memory.
pub static DUMP: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dump.so"));

/// Keeps a restore from reading shared segments.
pub static RESTORE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/restore.so"));

/// The name under which CRIU finds one.
pub const NAME: &str = "shim.so";

/// Writes a library into a directory, where CRIU can load it. Returns its path.
///
/// # Errors
/// The file system's.
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
