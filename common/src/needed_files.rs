//! Files that a process needs on any host: its executables and libraries.

use object::Endianness;
use object::elf::{FileHeader64, NT_GNU_BUILD_ID};
use object::read::elf::{FileHeader, ProgramHeader};
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Length of the part of a file that is searched for its build id, bytes. Linkers put it right behind the
/// headers.
const HEAD_MAX: u64 = 64 << 10;

/// Maximum number of files that a receiver compares for one migration.
pub const FILES_MAX: u32 = 10_000;

/// Maximum length of a build id, bytes. 16 and 20 are common.
pub const BUILD_ID_MAX: usize = 64;

/// A file as it is at the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NeededFile {
    /// Absolute path.
    pub path: String,
    /// Size, bytes.
    pub size: u64,
    /// Build id, at most [`BUILD_ID_MAX`] bytes; empty if there is none.
    pub build_id: Vec<u8>,
}

impl NeededFile {
    /// Reads the size and the build id of the file at `path`.
    ///
    /// # Errors
    /// Those of reading it; `InvalidInput` if it is not a regular file.
    pub fn read(path: &str) -> io::Result<Self> {
        // Checked before it is opened: opening a device may have effects.
        if !fs::metadata(path)?.is_file() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut open = OpenOptions::new();
        let file = open
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(Path::new(path))?;
        let size = file.metadata()?.len();
        let mut head = Vec::new();
        file.take(HEAD_MAX).read_to_end(&mut head)?;
        Ok(Self {
            path: path.to_owned(),
            size,
            build_id: build_id(&head).unwrap_or_default(),
        })
    }

    /// Compares the file with the one at the same path on this host. Returns how they differ; `None` if they
    /// do not.
    #[must_use]
    pub fn local_problem(&self) -> Option<&'static str> {
        match Self::read(&self.path) {
            Ok(local) if local.size != self.size => Some("has a different size"),
            Ok(local) if local.build_id != self.build_id => Some("is a different build"),
            Ok(_) => None,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some("is missing"),
            Err(_) => Some("cannot be read"),
        }
    }
}

/// Returns the build id in the head of an ELF file, truncated to [`BUILD_ID_MAX`] bytes.
#[must_use]
pub fn build_id(head: &[u8]) -> Option<Vec<u8>> {
    let header = FileHeader64::<Endianness>::parse(head).ok()?;
    let endian = header.endian().ok()?;
    for segment in header.program_headers(endian, head).ok()? {
        let Ok(Some(mut notes)) = segment.notes(endian, head) else {
            continue;
        };
        while let Ok(Some(note)) = notes.next() {
            if note.name() == b"GNU" && note.n_type(endian) == NT_GNU_BUILD_ID {
                return Some(note.desc().iter().copied().take(BUILD_ID_MAX).collect());
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn files_differ_by_size_and_build() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        let path = path.to_str().unwrap();
        fs::copy("/bin/sh", path).unwrap();
        let program = NeededFile::read(path).unwrap();
        assert_eq!(program.build_id.len(), 20);
        assert_eq!(program.local_problem(), None);
        let mut other = program.clone();
        other.build_id[7] ^= 1;
        assert_eq!(other.local_problem(), Some("is a different build"));
        other.size += 1;
        assert_eq!(other.local_problem(), Some("has a different size"));
        fs::remove_file(path).unwrap();
        assert_eq!(program.local_problem(), Some("is missing"));
        fs::create_dir(path).unwrap();
        assert_eq!(program.local_problem(), Some("cannot be read"));
    }

    proptest! {
        #[test]
        fn any_file_is_accepted(
            mut head in prop::collection::vec(any::<u8>(), 64..400), at in 0usize..400, to: u8,
        ) {
            let _ = build_id(&head);
            // An ELF file with one byte changed.
            let real = fs::read("/bin/sh").unwrap();
            head = real[..2000].to_vec();
            head[at] = to;
            let _ = build_id(&head);
        }
    }
}
