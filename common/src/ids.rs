//! Ids and names that can be part of file names, as types that hold only valid ones.

use std::fmt;

/// Id of a memory image: the private memory of a process, or a shared segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ImageId {
    /// Private memory of the process with this PID, in the PID namespace of the tree.
    Process(u32),
    /// Shared segment with this inode number, which is the `shmid` of CRIU.
    Shmem(u64),
}

impl ImageId {
    /// Returns CRIU's name of the pagemap image.
    #[must_use]
    pub fn pagemap_name(self) -> String {
        match self {
            Self::Process(pid) => format!("pagemap-{pid}.img"),
            Self::Shmem(id) => format!("pagemap-shmem-{id}.img"),
        }
    }

    /// Returns the image whose pagemap image has exactly this name.
    #[must_use]
    pub fn from_pagemap_name(name: &str) -> Option<Self> {
        let id = name.strip_prefix("pagemap-")?.strip_suffix(".img")?;
        let image = match id.strip_prefix("shmem-") {
            Some(id) => Self::Shmem(id.parse().ok()?),
            None => Self::Process(id.parse().ok()?),
        };
        (image.pagemap_name() == name).then_some(image)
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid) => write!(f, "process {pid}"),
            Self::Shmem(id) => write!(f, "shared segment {id}"),
        }
    }
}

/// Name of an image of state, that is, of one of CRIU's images that are not memory. It cannot be a path, nor
/// the name of a file that Pageferry creates.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StateName(String);

impl StateName {
    /// Maximum length, bytes.
    pub const MAX: usize = 128;

    /// Returns the name if it is valid.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let is_valid = name.len() <= Self::MAX
            && name.ends_with(".img")
            && name.starts_with(|first: char| first.is_ascii_lowercase())
            && name.bytes().all(is_plain)
            && !name.starts_with("pages-")
            && !name.starts_with("pagemap-");
        is_valid.then(|| Self(name.to_owned()))
    }

    /// Returns the name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Name of a memfd that the kernel accepts and that is UTF-8.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemfdName(String);

impl MemfdName {
    /// Maximum length, bytes (`memfd_create(2)`).
    pub const MAX: usize = 249;

    /// Returns the name if it is valid.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let is_valid = name.len() <= Self::MAX && !name.contains('\0');
        is_valid.then(|| Self(name.to_owned()))
    }

    /// Returns the name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Declares a type for 128 random bits, printed as 32 hexadecimal digits.
macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// Parses a printed id.
            #[must_use]
            pub fn from_hex(text: &str) -> Option<Self> {
                from_hex(text).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&to_hex(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

random_id! {
    /// Id of a migration.
    MigrationId
}

random_id! {
    /// Id of a receiver, which it keeps in its directory. Only that receiver can know what became of a
    /// migration.
    ReceiverId
}

/// Secret of the two ends of a migration: 256 random bits. The id is not secret, because it is part of the
/// name of a directory.
#[derive(Clone, Copy)]
pub struct Token(pub [u8; 32]);

impl Token {
    /// Parses the result of [`Token::to_hex`].
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        from_hex(text).map(Self)
    }

    /// Returns 64 hexadecimal digits. They must be stored where only the owner can read them.
    #[must_use]
    pub fn to_hex(&self) -> String {
        to_hex(&self.0)
    }
}

impl PartialEq for Token {
    /// Takes the same time for all tokens.
    fn eq(&self, other: &Self) -> bool {
        let both = self.0.iter().zip(&other.0);
        let differing = both.fold(0, |bits, (ours, theirs)| bits | (ours ^ theirs));
        std::hint::black_box(differing) == 0
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Claim of a sender to a migration: its id, and the proof that it belongs to the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// Id of the migration.
    pub id: MigrationId,
    /// PID of the root, in the PID namespace of the tree.
    pub root_pid: u32,
    /// Secret that proves the claim.
    pub token: Token,
}

fn to_hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
        text
    })
}

fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let digits = text.as_bytes();
    if digits.len() != 2 * N || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_tokens_round_trip_as_hex() {
        let (id, token) = (MigrationId([0xa7; 16]), Token([0x0f; 32]));
        assert_eq!(MigrationId::from_hex(&id.to_string()), Some(id));
        assert_eq!(Token::from_hex(&token.to_hex()), Some(token));
        let mut other = token;
        other.0[31] ^= 1;
        assert_ne!(token, other);
        for bad in [
            "",
            "0f",
            &"+1".repeat(16),
            &"0f".repeat(33),
            &"é".repeat(16),
        ] {
            assert_eq!(MigrationId::from_hex(bad), None, "{bad}");
        }
        assert!(!format!("{token:?}").contains("0f"));
    }

    #[test]
    fn only_names_of_state_images_are_accepted() {
        for good in ["core-1.img", "inventory.img", "tmpfs-dev-41.tar.gz.img"] {
            assert_eq!(StateName::new(good).unwrap().as_str(), good);
        }
        let long = "a".repeat(StateName::MAX) + ".img";
        for bad in [
            "",
            ".img",
            "..img",
            "../core-1.img",
            "a/b.img",
            "core-1",
            "pages-1.img",
            "pages-131073.img",
            "\0.img",
            "a\0.img",
            "pagemap-1.img",
            "pagemap-shmem-1.img",
            "..",
            "a/../../x.img",
            "/x.img",
            // Files that Pageferry creates in the same directory.
            "parent",
            "token",
            "outcome.json",
            ".outcome.tmp",
            ".lock",
            "segments.socket",
            "restore.log",
            ".core.img",
            "-core.img",
            "core 1.img",
            "käse.img",
            &long,
        ] {
            assert_eq!(StateName::new(bad), None, "{bad}");
        }
    }

    #[test]
    fn memfd_names_are_those_that_the_kernel_accepts() {
        let longest = "a".repeat(MemfdName::MAX);
        for good in ["", "/dev/zero", "../x (deleted)", "käse", &longest] {
            assert_eq!(MemfdName::new(good).unwrap().as_str(), good);
        }
        for bad in ["a\0", &(longest + "a")] {
            assert_eq!(MemfdName::new(bad), None);
        }
    }

    #[test]
    fn only_exact_pagemap_names_are_accepted() {
        for id in [ImageId::Process(1), ImageId::Shmem(u64::MAX)] {
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
