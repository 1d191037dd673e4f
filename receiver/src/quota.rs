//! What one migration may take of the disk, whoever sends it: asked for before it is taken.

use crate::file_error::{FileError, failed};
use nix::sys::statvfs::statvfs;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What an entry of a pagemap is counted as, bytes: none is longer.
const ENTRY_BYTES: u64 = 32;

/// What the two files of an image are counted as, bytes, besides what is in them: no file system takes
/// less.
const IMAGE_BYTES: u64 = 8192;

/// How many files can still be made where space is kept free, on file systems that count them.
const KEEP_FILES: u64 = 1024;

/// The most that one migration may take.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Rounds (`--max-rounds`).
    pub rounds: u32,
    /// Bytes written (`--max-bytes`).
    pub bytes: u64,
    /// Images of one round, and CRIU's images of state (`--max-images`).
    pub images: usize,
    /// Bytes to leave free, whoever took the rest (`--keep-free`).
    pub keep_free: u64,
}

impl Bounds {
    /// Everything, for who is trusted.
    pub const NONE: Self = Self {
        rounds: u32::MAX,
        bytes: u64::MAX,
        images: usize::MAX,
        keep_free: 0,
    };
}

/// What is too much. All name the option.
#[derive(Debug, thiserror::Error)]
pub enum QuotaError {
    /// A round.
    #[error("this receiver takes no more than {0} rounds of a migration (--max-rounds)")]
    Rounds(u32),
    /// Bytes.
    #[error("this receiver takes no more than {0} bytes of a migration (--max-bytes)")]
    Bytes(u64),
    /// An image.
    #[error("this receiver takes no more than {0} images of a round (--max-images)")]
    Images(usize),
    /// Others need what is left.
    #[error(
        "{}: {free} bytes and {files} files are free, and this receiver leaves {keep} bytes (--keep-free)",
        dir.display()
    )]
    Free {
        /// On whose file system.
        dir: PathBuf,
        /// Bytes that are free.
        free: u64,
        /// Files that can be made.
        files: u64,
        /// Bytes to leave.
        keep: u64,
    },
    /// It cannot be found out what is free.
    #[error(transparent)]
    File(#[from] FileError),
}

/// What one migration has taken, and may.
#[derive(Debug)]
pub struct Quota {
    bounds: Bounds,
    /// On the file system in question.
    dir: PathBuf,
    bytes: AtomicU64,
}

impl Quota {
    /// Of a migration that has taken nothing yet, to somewhere under `dir`.
    #[must_use]
    pub fn new(bounds: Bounds, dir: &Path) -> Arc<Self> {
        Arc::new(Self {
            bounds,
            dir: dir.to_owned(),
            bytes: AtomicU64::new(0),
        })
    }

    /// Counts what there is of a migration already, in `home`.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn count(&self, home: &Path) -> Result<(), FileError> {
        let mut bytes = 0;
        for round in fs::read_dir(home).map_err(failed("list", home))?.flatten() {
            // Only directories have files in them.
            for file in fs::read_dir(round.path()).into_iter().flatten().flatten() {
                bytes += file.metadata().map_or(0, |file| file.blocks() * 512);
            }
        }
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Whether the round of this number may be.
    ///
    /// # Errors
    /// [`QuotaError`].
    pub fn round(&self, number: u32) -> Result<(), QuotaError> {
        match number > self.bounds.rounds {
            true => Err(QuotaError::Rounds(self.bounds.rounds)),
            false => self.room_for(0),
        }
    }

    /// Takes an image, the directory having so many already.
    ///
    /// # Errors
    /// [`QuotaError`]; nothing is taken then.
    pub fn image(&self, before: usize) -> Result<(), QuotaError> {
        match before >= self.bounds.images {
            true => Err(QuotaError::Images(self.bounds.images)),
            false => self.bytes(IMAGE_BYTES),
        }
    }

    /// Takes so many entries of a pagemap, and bytes of pages with them.
    ///
    /// # Errors
    /// [`QuotaError`]; nothing is taken then.
    pub fn entries(&self, entries: usize, bytes: usize) -> Result<(), QuotaError> {
        self.bytes(entries as u64 * ENTRY_BYTES + bytes as u64)
    }

    /// Takes bytes.
    ///
    /// # Errors
    /// [`QuotaError`]; nothing is taken then.
    pub fn bytes(&self, bytes: u64) -> Result<(), QuotaError> {
        self.room_for(bytes)?;
        let add = |taken: u64| {
            let taken = taken.checked_add(bytes);
            taken.filter(|&taken| taken <= self.bounds.bytes)
        };
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        match self.bytes.fetch_update(set, fetch, add) {
            Ok(_) => Ok(()),
            Err(_) => Err(QuotaError::Bytes(self.bounds.bytes)),
        }
    }

    /// Whether that much may be taken of what is free. It is asked each time, which takes a microsecond:
    /// others write there, too.
    fn room_for(&self, bytes: u64) -> Result<(), QuotaError> {
        let keep = self.bounds.keep_free;
        if keep == 0 {
            return Ok(());
        }
        let stat = statvfs(&self.dir).map_err(|error| {
            failed("find out what is free in", &self.dir)(io::Error::from(error))
        })?;
        let free = stat.blocks_available().saturating_mul(stat.fragment_size());
        // Some make files as long as there is space, and count none.
        let files = match stat.files() {
            0 => u64::MAX,
            _ => stat.files_available(),
        };
        if free < keep.saturating_add(bytes) || files < KEEP_FILES {
            let dir = self.dir.clone();
            return Err(QuotaError::Free {
                dir,
                free,
                files,
                keep,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(bounds: Bounds) -> Arc<Quota> {
        Quota::new(bounds, &std::env::temp_dir())
    }

    #[test]
    fn what_there_is_already_counts() {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("1")).unwrap();
        fs::write(home.path().join("1/pages-1.img"), [1; 8192]).unwrap();
        let bytes = 12 << 10;
        let quota = Quota::new(
            Bounds {
                bytes,
                ..Bounds::NONE
            },
            home.path(),
        );
        quota.count(home.path()).unwrap();
        quota.bytes(4096).unwrap();
        assert!(matches!(quota.bytes(4096), Err(QuotaError::Bytes(_))));
    }

    #[test]
    fn what_is_taken_is_counted_and_what_is_refused_is_not() {
        let quota = quota(Bounds {
            bytes: IMAGE_BYTES + 10 * ENTRY_BYTES + 100,
            images: 7,
            rounds: 3,
            ..Bounds::NONE
        });
        quota.round(3).unwrap();
        assert!(matches!(quota.round(4), Err(QuotaError::Rounds(3))));
        quota.image(6).unwrap();
        assert!(matches!(quota.image(7), Err(QuotaError::Images(7))));
        assert!(matches!(quota.image(0), Err(QuotaError::Bytes(_))));
        quota.entries(10, 50).unwrap();
        for too_many in [51, u64::MAX] {
            assert!(matches!(quota.bytes(too_many), Err(QuotaError::Bytes(_))));
        }
        quota.bytes(50).unwrap();
        assert!(quota.bytes(1).is_err());
    }

    #[test]
    fn what_is_to_be_left_free_is_left() {
        let stat = statvfs(&std::env::temp_dir()).unwrap();
        let free = stat.blocks_available() * stat.fragment_size();
        // Half of it, for others work here, too.
        let keep_free = free / 2;
        let half = quota(Bounds {
            keep_free,
            ..Bounds::NONE
        });
        half.round(1).unwrap();
        half.bytes(keep_free / 4).unwrap();
        let refused = half.bytes(free).unwrap_err();
        assert!(matches!(refused, QuotaError::Free { keep, .. } if keep == keep_free));
        assert!(refused.to_string().contains("--keep-free"));
        let all = quota(Bounds {
            keep_free: u64::MAX,
            ..Bounds::NONE
        });
        assert!(matches!(all.round(1), Err(QuotaError::Free { .. })));
        let gone = Quota::new(half.bounds, Path::new("/nowhere"));
        assert!(matches!(gone.round(1), Err(QuotaError::File(_))));
    }
}
