//! CRIU's page-server protocol: its header, in both widths there are.
//!
//! One connection is one dump. Every message is a header, and behind it the pages it announces:
//!
//! | CRIU | bytes | |
//! |---|---|---|
//! | up to 4.1 | 24 | command u32, pages u32, address u64, object u64 |
//! | from 4.2 | 32 | command u32, padding u32, pages u64, address u64, object u64 |
//!
//! All little-endian; nothing on the wire says which of the two it is. The lower half of the
//! command is what to do, the upper half the flags of the pages. The object is an image's number
//! and, in the lowest byte, its kind. Learnt from CRIU's behaviour and its `page-xfer.c`.

use crate::ImageId;

/// Length of the longer header, bytes.
pub const HEADER_MAX: usize = 32;

/// Entry flag: the pages are as in the parent directory.
const PARENT: u32 = 1;
/// Entry flag: the pages may be restored after the process runs again.
const LAZY: u32 = 2;
/// Entry flag: the pages are here.
const PRESENT: u32 = 4;

/// Where the pages of a pagemap entry are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageLocation {
    /// In this directory; on the wire, they follow.
    Present {
        /// Whether a restored process may run before it has them.
        lazy: bool,
    },
    /// In the parent directory.
    Parent,
    /// Nowhere: to be fetched from where they were dumped.
    Elsewhere,
}

impl PageLocation {
    /// From an entry's flags; `None` if they contradict each other.
    #[must_use]
    pub fn from_flags(flags: u64) -> Option<Self> {
        match u32::try_from(flags).ok()? {
            PARENT => Some(Self::Parent),
            LAZY => Some(Self::Elsewhere),
            PRESENT => Some(Self::Present { lazy: false }),
            flags if flags == PRESENT | LAZY => Some(Self::Present { lazy: true }),
            _ => None,
        }
    }

    /// As an entry's flags.
    #[must_use]
    pub fn flags(self) -> u32 {
        match self {
            Self::Parent => PARENT,
            Self::Elsewhere => LAZY,
            Self::Present { lazy: false } => PRESENT,
            Self::Present { lazy: true } => PRESENT | LAZY,
        }
    }
}

/// Which of the two headers a peer speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// 24 bytes, CRIU up to 4.1.
    Narrow,
    /// 32 bytes, CRIU from 4.2.
    Wide,
}

impl Width {
    /// A header's length, bytes.
    #[must_use]
    pub const fn header_len(self) -> usize {
        match self {
            Self::Narrow => 24,
            Self::Wide => HEADER_MAX,
        }
    }

    /// Judges a client by the first 24 bytes of a dump. It begins by naming an object, whose number
    /// is never 0; in the wider header an address of 0 is in that place. (A dump that ends before
    /// it has begun could be either, and is answered alike.)
    #[must_use]
    pub fn of_dump(first: &[u8; 24]) -> Self {
        match first[16..] {
            [0, 0, 0, 0, 0, 0, 0, 0] => Self::Wide,
            _ => Self::Narrow,
        }
    }
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// What follows belongs to this object.
    Open {
        /// Whether the client wants one byte: 1 if the server has the object in its parent.
        answered: bool,
    },
    /// Does the server have this object in its parent? Answered by a u32, 0 or 1.
    HasParent,
    /// An entry of the open object.
    Add(PageLocation),
    /// Pages wanted, by the process's number alone; answered by an entry of that process.
    Get,
    /// The end; answered by an i32, 0 if everything is safe.
    Close,
}

const ADD: u32 = 1;
const HOLE: u32 = 2;
const OPEN: u32 = 3;
const OPEN2: u32 = 4;
const HAS_PARENT: u32 = 5;
const ADD_F: u32 = 6;
const GET: u32 = 7;
const CLOSE: u32 = 0x1023;
/// A close by a client that has not made the connection itself.
const FORCE_CLOSE: u32 = 0x1024;

/// One message without its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub command: Command,
    /// How many pages.
    pub pages: u64,
    /// Where; in a shared segment the offset, bytes.
    pub address: u64,
    /// Of which object, see [`fn@object`].
    pub object: u64,
}

/// What is no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0:#x} is no page-server command")]
pub struct UnknownCommand(pub u32);

impl Header {
    /// A message that is about no pages.
    #[must_use]
    pub fn bare(command: Command, object: u64) -> Self {
        Self {
            command,
            pages: 0,
            address: 0,
            object,
        }
    }

    /// Reads a header of `width.header_len()` bytes.
    ///
    /// # Errors
    /// [`UnknownCommand`].
    ///
    /// # Panics
    /// If there are fewer bytes.
    pub fn decode(bytes: &[u8], width: Width) -> Result<Self, UnknownCommand> {
        let word = u32_at(bytes, 0);
        let (pages, rest) = match width {
            Width::Narrow => (u64::from(u32_at(bytes, 4)), 8),
            Width::Wide => (u64_at(bytes, 8), 16),
        };
        let unknown = UnknownCommand(word);
        let command = match (word & 0xffff, word >> 16) {
            (ADD, _) => Command::Add(PageLocation::Present { lazy: false }),
            (HOLE, _) => Command::Add(PageLocation::Parent),
            (OPEN, _) => Command::Open { answered: false },
            (OPEN2, _) => Command::Open { answered: true },
            (HAS_PARENT, _) => Command::HasParent,
            (ADD_F, flags) => Command::Add(PageLocation::from_flags(flags.into()).ok_or(unknown)?),
            (GET, _) => Command::Get,
            (CLOSE | FORCE_CLOSE, _) => Command::Close,
            _ => return Err(unknown),
        };
        Ok(Self {
            command,
            pages,
            address: u64_at(bytes, rest),
            object: u64_at(bytes, rest + 8),
        })
    }

    /// Appends the header.
    ///
    /// # Panics
    /// If there are more pages than the narrow header can say: 32 bits.
    pub fn encode(&self, width: Width, out: &mut Vec<u8>) {
        let command = match self.command {
            Command::Open { answered: true } => OPEN2,
            Command::Open { answered: false } => OPEN,
            Command::HasParent => HAS_PARENT,
            Command::Add(place) => ADD_F | place.flags() << 16,
            Command::Get => GET,
            Command::Close => CLOSE,
        };
        out.extend_from_slice(&command.to_le_bytes());
        match width {
            Width::Narrow => {
                let pages = u32::try_from(self.pages).expect("entries are cut to what fits");
                out.extend_from_slice(&pages.to_le_bytes());
            }
            Width::Wide => {
                out.extend_from_slice(&[0; 4]);
                out.extend_from_slice(&self.pages.to_le_bytes());
            }
        }
        out.extend_from_slice(&self.address.to_le_bytes());
        out.extend_from_slice(&self.object.to_le_bytes());
    }
}

/// The number by which the protocol knows an image; `None` if it has too many bits for that.
#[must_use]
pub fn object(image: ImageId) -> Option<u64> {
    let (id, kind) = match image {
        ImageId::Process(pid) => (u64::from(pid), 1),
        ImageId::Shmem(id) => (id, 2),
    };
    (id >> 56 == 0).then_some(id << 8 | kind)
}

/// The image that such a number means, if it is one.
#[must_use]
pub fn image(object: u64) -> Option<ImageId> {
    let id = object >> 8;
    match object & 0xff {
        // Before 3.3 CRIU sent the numbers of its own file kinds, which changed.
        1 | 10 | 11 | 16 | 17 => u32::try_from(id)
            .ok()
            .filter(|&id| id > 0)
            .map(ImageId::Process),
        2 | 27..=29 | 32..=34 => Some(ImageId::Shmem(id)),
        _ => None,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
        let byte = |pair: &[u32]| (pair[0] * 16 + pair[1]) as u8;
        digits.chunks(2).map(byte).collect()
    }

    #[test]
    fn what_the_real_ones_sent() {
        let header = |command, pages, address, object| Header {
            command,
            pages,
            address,
            object,
        };
        let open = Command::Open { answered: true };
        let shmem = object(ImageId::Shmem(0x77)).unwrap();
        let task = object(ImageId::Process(14314)).unwrap();
        let present = |lazy| Command::Add(PageLocation::Present { lazy });
        for (text, width, expected) in [
            (
                "04000000 00000000 0000000000000000 0277000000000000",
                Width::Narrow,
                header(open, 0, 0, shmem),
            ),
            (
                "06000400 00010000 0000000000000000 0277000000000000",
                Width::Narrow,
                header(present(false), 256, 0, shmem),
            ),
            (
                "06000600 01000000 00a0b6f8ea550000 01ea370000000000",
                Width::Narrow,
                header(present(true), 1, 0x55ea_f8b6_a000, task),
            ),
            (
                "23100000 00000000 0000000000000000 0000000000000000",
                Width::Narrow,
                header(Command::Close, 0, 0, 0),
            ),
            (
                "04000000 00000000 0000000000000000 0000000000000000 01ea370000000000",
                Width::Wide,
                header(open, 0, 0, task),
            ),
        ] {
            let bytes = hex(text);
            assert_eq!(bytes.len(), width.header_len());
            assert_eq!(Header::decode(&bytes, width), Ok(expected), "{text}");
            let mut encoded = Vec::new();
            expected.encode(width, &mut encoded);
            assert_eq!(encoded, bytes);
            if expected.command == open {
                assert_eq!(Width::of_dump(bytes[..24].try_into().unwrap()), width);
            }
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for word in [0u32, 8, 0x1022, ADD_F, ADD_F | 5 << 16, ADD_F | 8 << 16] {
            let mut bytes = [0; HEADER_MAX];
            bytes[..4].copy_from_slice(&word.to_le_bytes());
            for width in [Width::Narrow, Width::Wide] {
                let decoded = Header::decode(&bytes, width);
                assert_eq!(decoded, Err(UnknownCommand(word)));
            }
        }
        for object in [0, 1, 3 << 8 | 3, 1 << 40 | 1, u64::MAX] {
            assert_eq!(image(object), None, "{object:#x}");
        }
        assert_eq!(object(ImageId::Shmem(1 << 56)), None);
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            kind in 0usize..8, pages: u32, address: u64, id in 1u32.., wide: bool, shared: bool,
        ) {
            let command = [
                Command::Open { answered: true },
                Command::Open { answered: false },
                Command::HasParent,
                Command::Add(PageLocation::Present { lazy: true }),
                Command::Add(PageLocation::Parent),
                Command::Add(PageLocation::Elsewhere),
                Command::Get,
                Command::Close,
            ][kind];
            let named = if shared { ImageId::Shmem(id.into()) } else { ImageId::Process(id) };
            let object = object(named).unwrap();
            prop_assert_eq!(image(object), Some(named));
            let header = Header { command, pages: pages.into(), address, object };
            let width = if wide { Width::Wide } else { Width::Narrow };
            let mut bytes = Vec::new();
            header.encode(width, &mut bytes);
            prop_assert_eq!(Header::decode(&bytes, width), Ok(header));
        }

        #[test]
        fn any_bytes_are_refused_or_read(bytes in prop::array::uniform32(any::<u8>())) {
            let _ = Header::decode(&bytes, Width::Narrow);
            let _ = Header::decode(&bytes, Width::Wide);
        }
    }
}
