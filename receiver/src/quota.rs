//! Quota of one migration: disk space is charged before it is used.

use crate::file_error::{FileError, failed};
use nix::sys::statvfs::statvfs;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Charge for an entry of a pagemap, bytes: the longest there is.
const ENTRY_BYTES: u64 = 32;

/// Charge for the two files of an image besides their contents, bytes: a block each.
const IMAGE_BYTES: u64 = 8192;

/// Number of inodes to leave free where space is kept free, on file systems that limit them.
const KEEP_FILES: u64 = 1024;

/// Limits of one migration.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Most rounds (`--max-rounds`).
    pub rounds: u32,
    /// Most bytes written (`--max-bytes`).
    pub bytes: u64,
    /// Most images of one round, and most of CRIU's images of state (`--max-images`).
    pub images: usize,
    /// Bytes to leave free on the file system, whatever else uses it (`--keep-free`).
    pub keep_free: u64,
}

impl Bounds {
    /// No limits, for trusted senders.
    pub const NONE: Self = Self {
        rounds: u32::MAX,
        bytes: u64::MAX,
        images: usize::MAX,
        keep_free: 0,
    };
}

/// A limit is exceeded. Each message names the option.
#[derive(Debug, thiserror::Error)]
pub enum QuotaError {
    /// Too many rounds.
    #[error("this receiver accepts at most {0} rounds of a migration (--max-rounds)")]
    Rounds(u32),
    /// Too many bytes.
    #[error("this receiver accepts at most {0} bytes of a migration (--max-bytes)")]
    Bytes(u64),
    /// Too many images.
    #[error("this receiver accepts at most {0} images of a round (--max-images)")]
    Images(usize),
    /// Too little space or too few inodes would be left.
    #[error(
        "{}: {free} bytes and {files} inodes are free, and {keep} bytes must stay free (--keep-free)",
        dir.display()
    )]
    Free {
        /// A directory on the file system.
        dir: PathBuf,
        /// Free bytes.
        free: u64,
        /// Free inodes.
        files: u64,
        /// Bytes to leave free.
        keep: u64,
    },
    /// The free space cannot be determined.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Quota of one migration.
#[derive(Debug)]
pub struct Quota {
    bounds: Bounds,
    /// A directory on the file system that is written to.
    dir: PathBuf,
    /// Bytes charged so far.
    bytes: AtomicU64,
}

impl Quota {
    /// Quota of a migration that has used nothing yet, and writes under `dir`.
    #[must_use]
    pub fn new(bounds: Bounds, dir: &Path) -> Arc<Self> {
        Arc::new(Self {
            bounds,
            dir: dir.to_owned(),
            bytes: AtomicU64::new(0),
        })
    }

    /// Charges what a migration has in `home` already.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn charge_existing(&self, home: &Path) -> Result<(), FileError> {
        let mut bytes = 0;
        for round in fs::read_dir(home).map_err(failed("list", home))?.flatten() {
            // All else but directories is small.
            for file in fs::read_dir(round.path()).into_iter().flatten().flatten() {
                bytes += file.metadata().map_or(0, |file| file.blocks() * 512);
            }
        }
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Checks that a round of this number may begin.
    ///
    /// # Errors
    /// [`QuotaError`].
    pub fn check_round(&self, number: u32) -> Result<(), QuotaError> {
        match number > self.bounds.rounds {
            true => Err(QuotaError::Rounds(self.bounds.rounds)),
            false => self.check_free(0),
        }
    }

    /// Charges an image in a directory that has `before` images already.
    ///
    /// # Errors
    /// [`QuotaError`]; nothing is charged then.
    pub fn charge_image(&self, before: usize) -> Result<(), QuotaError> {
        match before >= self.bounds.images {
            true => Err(QuotaError::Images(self.bounds.images)),
            false => self.charge_bytes(IMAGE_BYTES),
        }
    }

    /// Charges entries of a pagemap, and bytes of their pages.
    ///
    /// # Errors
    /// [`QuotaError`]; nothing is charged then.
    pub fn charge_entries(&self, entries: usize, bytes: usize) -> Result<(), QuotaError> {
        self.charge_bytes(entries as u64 * ENTRY_BYTES + bytes as u64)
    }

    /// Charges bytes.
    ///
    /// # Errors
    /// [`QuotaError`]; nothing is charged then.
    pub fn charge_bytes(&self, bytes: u64) -> Result<(), QuotaError> {
        self.check_free(bytes)?;
        let add = |charged: u64| {
            let charged = charged.checked_add(bytes);
            charged.filter(|&charged| charged <= self.bounds.bytes)
        };
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        match self.bytes.fetch_update(set, fetch, add) {
            Ok(_) => Ok(()),
            Err(_) => Err(QuotaError::Bytes(self.bounds.bytes)),
        }
    }

    /// Checks that enough is free for that many bytes more. Asks the file system each time, which takes a
    /// microsecond: others write there, too.
    fn check_free(&self, bytes: u64) -> Result<(), QuotaError> {
        let keep = self.bounds.keep_free;
        if keep == 0 {
            return Ok(());
        }
        let stat = statvfs(&self.dir).map_err(|error| {
            failed("determine the free space of", &self.dir)(io::Error::from(error))
        })?;
        let free = stat.blocks_available().saturating_mul(stat.fragment_size());
        // Some file systems do not limit inodes, and report none.
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
    fn existing_files_are_charged() {
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
        quota.charge_existing(home.path()).unwrap();
        quota.charge_bytes(4096).unwrap();
        assert!(matches!(
            quota.charge_bytes(4096),
            Err(QuotaError::Bytes(_))
        ));
    }

    #[test]
    fn accepted_bytes_are_charged_and_refused_ones_are_not() {
        let quota = quota(Bounds {
            bytes: IMAGE_BYTES + 10 * ENTRY_BYTES + 100,
            images: 7,
            rounds: 3,
            ..Bounds::NONE
        });
        quota.check_round(3).unwrap();
        assert!(matches!(quota.check_round(4), Err(QuotaError::Rounds(3))));
        quota.charge_image(6).unwrap();
        assert!(matches!(quota.charge_image(7), Err(QuotaError::Images(7))));
        assert!(matches!(quota.charge_image(0), Err(QuotaError::Bytes(_))));
        quota.charge_entries(10, 50).unwrap();
        for too_many in [51, u64::MAX] {
            assert!(matches!(
                quota.charge_bytes(too_many),
                Err(QuotaError::Bytes(_))
            ));
        }
        quota.charge_bytes(50).unwrap();
        assert!(quota.charge_bytes(1).is_err());
    }

    #[test]
    fn space_to_keep_free_is_kept_free() {
        let stat = statvfs(&std::env::temp_dir()).unwrap();
        let free = stat.blocks_available() * stat.fragment_size();
        // Half of it, for other programs write here, too.
        let keep_free = free / 2;
        let half = quota(Bounds {
            keep_free,
            ..Bounds::NONE
        });
        half.check_round(1).unwrap();
        half.charge_bytes(keep_free / 4).unwrap();
        let refused = half.charge_bytes(free).unwrap_err();
        assert!(matches!(refused, QuotaError::Free { keep, .. } if keep == keep_free));
        assert!(refused.to_string().contains("--keep-free"));
        let all = quota(Bounds {
            keep_free: u64::MAX,
            ..Bounds::NONE
        });
        assert!(matches!(all.check_round(1), Err(QuotaError::Free { .. })));
        let missing = Quota::new(half.bounds, Path::new("/nowhere"));
        assert!(matches!(missing.check_round(1), Err(QuotaError::File(_))));
    }
}
