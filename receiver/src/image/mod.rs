//! CRIU image directories: writing rounds, reading chains of them.

pub mod catalog;
pub mod chain;
pub mod durable;
pub mod format;
pub(crate) mod image_writer;
pub mod index;
pub mod writer;

pub use crate::file_error::FileError;
pub(crate) use crate::file_error::failed;

use std::fmt;

/// The name of a directory of images that we write: nothing but a number in it is the peer's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirName {
    /// A round of a migration.
    Round(u32),
    /// A dump by CRIU itself.
    Dump(u32),
    /// What the process of this round is restored from, ahead of its memory.
    Restore(u32),
}

impl DirName {
    /// What it is called while it is not complete.
    #[must_use]
    pub fn temporary(self) -> String {
        format!(".{self}.tmp")
    }

    /// The directory that has exactly this name, or this name while it is not complete.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        let bare = name
            .strip_prefix('.')
            .and_then(|name| name.strip_suffix(".tmp"));
        let bare = bare.unwrap_or(name);
        let found = match bare.split_once('-') {
            Some(("criu", number)) => Self::Dump(number.parse().ok()?),
            Some(("restore", number)) => Self::Restore(number.parse().ok()?),
            Some(_) => return None,
            None => Self::Round(bare.parse().ok()?),
        };
        (found.to_string() == name || found.temporary() == name).then_some(found)
    }
}

impl fmt::Display for DirName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Round(number) => write!(f, "{number}"),
            Self::Dump(number) => write!(f, "criu-{number}"),
            Self::Restore(number) => write!(f, "restore-{number}"),
        }
    }
}

/// The name of a pages file.
#[must_use]
pub fn pages_name(pages_id: u32) -> String {
    format!("pages-{pages_id}.img")
}

/// Pages files are numbered from here, so that CRIU's own (from 1, or 65537) can lie beside them.
pub const FIRST_PAGES_ID: u32 = 0x20001;

/// Name of the symlink to the round before.
pub const PARENT: &str = "parent";

/// Name of the inventory.
pub const INVENTORY: &str = "inventory.img";
