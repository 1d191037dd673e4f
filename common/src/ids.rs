//! Ids that may become file names: types that can hold nothing but numbers.

use std::fmt;

/// One memory image of a round: a process's private memory, or a shared segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ImageId {
    /// Private memory of the process with this PID, as the tree's own PID namespace counts.
    Task(u32),
    /// A shared segment, by the inode number of its object: CRIU's `shmid`.
    Shmem(u64),
}

impl ImageId {
    /// The name CRIU gives the pagemap image of this object.
    #[must_use]
    pub fn pagemap_name(self) -> String {
        match self {
            Self::Task(pid) => format!("pagemap-{pid}.img"),
            Self::Shmem(id) => format!("pagemap-shmem-{id}.img"),
        }
    }

    /// The object a pagemap image belongs to, if `name` is exactly such a name.
    #[must_use]
    pub fn from_pagemap_name(name: &str) -> Option<Self> {
        let id = name.strip_prefix("pagemap-")?.strip_suffix(".img")?;
        let image = match id.strip_prefix("shmem-") {
            Some(id) => Self::Shmem(id.parse().ok()?),
            None => Self::Task(id.parse().ok()?),
        };
        (image.pagemap_name() == name).then_some(image)
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Task(pid) => write!(f, "process {pid}"),
            Self::Shmem(id) => write!(f, "shared segment {id}"),
        }
    }
}

/// Names one migration among all that a receiver holds: 128 random bits, printed as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MigrationId(pub [u8; 16]);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_names_are_pagemap_names() {
        for id in [ImageId::Task(1), ImageId::Shmem(u64::MAX)] {
            assert_eq!(ImageId::from_pagemap_name(&id.pagemap_name()), Some(id));
        }
        for bad in [
            "pagemap-.img",
            "pagemap-01.img",
            "pagemap-+1.img",
            "pagemap-1.img.tmp",
            "pagemap-../../x.img",
            "pagemap-shmem-.img",
            "pages-1.img",
        ] {
            assert_eq!(ImageId::from_pagemap_name(bad), None, "{bad}");
        }
    }
}
