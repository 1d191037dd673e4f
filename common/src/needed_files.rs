//! Files that a process needs wherever it runs: its executables and libraries.

use object::Endianness;
use object::elf::{FileHeader64, NT_GNU_BUILD_ID};
use object::read::elf::{FileHeader, ProgramHeader};
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// How far into a file its build id is looked for, bytes. Linkers put it right behind the headers.
const HEAD_MAX: u64 = 64 << 10;

/// Most files that a receiver compares for one migration.
pub const FILES_MAX: u32 = 10_000;

/// Longest build id, bytes; usual are 16 and 20.
pub const BUILD_ID_MAX: usize = 64;

/// One file, as it is where the process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NeededFile {
    /// Its absolute path.
    pub path: String,
    /// Its size, bytes.
    pub size: u64,
    /// Its build id, at most [`BUILD_ID_MAX`] bytes; empty if it has none.
    pub build_id: Vec<u8>,
}

impl NeededFile {
    /// Looks at the file at `path`.
    ///
    /// # Errors
    /// Those of reading it; `InvalidInput` if it is no ordinary file.
    pub fn at(path: &str) -> io::Result<Self> {
        // Looked at before it is opened: opening a device may do something.
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

    /// What is wrong with the file of the same path here; `None` if it is the same.
    #[must_use]
    pub fn problem_here(&self) -> Option<&'static str> {
        match Self::at(&self.path) {
            Ok(here) if here.size != self.size => Some("has another size"),
            Ok(here) if here.build_id != self.build_id => Some("is another build"),
            Ok(_) => None,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some("is missing"),
            Err(_) => Some("cannot be read"),
        }
    }
}

/// The build id in the head of an ELF file, at most [`BUILD_ID_MAX`] bytes.
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
    fn files_are_told_apart_by_size_and_build() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        let path = path.to_str().unwrap();
        fs::copy("/bin/sh", path).unwrap();
        let program = NeededFile::at(path).unwrap();
        assert_eq!(program.build_id.len(), 20);
        assert_eq!(program.problem_here(), None);
        let mut other = program.clone();
        other.build_id[7] ^= 1;
        assert_eq!(other.problem_here(), Some("is another build"));
        other.size += 1;
        assert_eq!(other.problem_here(), Some("has another size"));
        fs::remove_file(path).unwrap();
        assert_eq!(program.problem_here(), Some("is missing"));
        fs::create_dir(path).unwrap();
        assert_eq!(program.problem_here(), Some("cannot be read"));
    }

    proptest! {
        #[test]
        fn no_file_is_too_strange(mut head in prop::collection::vec(any::<u8>(), 64..400), at in 0usize..400, to: u8) {
            let _ = build_id(&head);
            // Nearly an ELF file.
            let real = fs::read("/bin/sh").unwrap();
            head = real[..2000].to_vec();
            head[at] = to;
            let _ = build_id(&head);
        }
    }
}
