//! CRIU image directories: writing rounds, and reading chains of them.

pub mod catalog;
pub mod chain;
pub mod durable;
pub mod format;
pub(crate) mod image_writer;
pub mod index;
pub mod writer;

use std::fmt;

/// Name of a directory of images that the receiver writes. Nothing in it but the number comes from the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirName {
    /// Round of a migration.
    Round(u32),
    /// Dump by CRIU itself.
    Dump(u32),
    /// Directory for a lazy restore from this round.
    Restore(u32),
}

impl DirName {
    /// Returns the name of the directory while it is incomplete.
    #[must_use]
    pub fn temporary(self) -> String {
        format!(".{self}.tmp")
    }

    /// Parses the name of a directory, complete or incomplete. Other spellings of the number are rejected.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let bare = name
            .strip_prefix('.')
            .and_then(|name| name.strip_suffix(".tmp"));
        let bare = bare.unwrap_or(name);
        let parsed = match bare.split_once('-') {
            Some(("criu", number)) => Self::Dump(number.parse().ok()?),
            Some(("restore", number)) => Self::Restore(number.parse().ok()?),
            Some(_) => return None,
            None => Self::Round(bare.parse().ok()?),
        };
        (parsed.to_string() == name || parsed.temporary() == name).then_some(parsed)
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

/// Returns the name of a pages file.
#[must_use]
pub fn pages_name(pages_id: u32) -> String {
    format!("pages-{pages_id}.img")
}

/// Number of the first pages file in a directory, so high that CRIU's own (from 1 or 65537) can lie beside
/// it.
pub const FIRST_PAGES_ID: u32 = 0x20001;

/// Name of the symlink to the directory of the round before.
pub const PARENT: &str = "parent";

/// Name of CRIU's inventory.
pub const INVENTORY: &str = "inventory.img";
