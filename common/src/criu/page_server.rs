//! Header of CRIU's page-server protocol, in both of its widths.
//!
//! A connection is one dump. Each message is a header, followed by the pages that it announces:
//!
//! | CRIU | header, bytes | fields |
//! |---|---|---|
//! | up to 4.1 | 24 | command u32, pages u32, address u64, object u64 |
//! | from 4.2 | 32 | command u32, padding u32, pages u64, address u64, object u64 |
//!
//! All fields are little-endian. Nothing on the wire identifies the width, so the receiving side infers it
//! from the first header. The lower half of the command is the operation, the upper half the flags of the
//! pages. The object is the id of an image and, in the lowest byte, its kind. Derived from the behaviour of
//! CRIU and its `page-xfer.c`.

use crate::ImageId;
use std::io::{self, Read};

/// Length of the wide header, bytes.
pub const HEADER_MAX: usize = 32;

/// Length of the narrow header, bytes.
const NARROW: usize = 24;

/// Flag of an entry: the pages are those of the parent directory.
const PARENT: u32 = 1;
/// Flag of an entry: the pages may be restored after the process resumes.
const LAZY: u32 = 2;
/// Flag of an entry: the pages are present.
const PRESENT: u32 = 4;

/// Where the pages of a pagemap entry are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageLocation {
    /// In this directory; on the wire, they follow the header.
    Present {
        /// Whether a restored process may run before it has them.
        lazy: bool,
    },
    /// In the parent directory.
    Parent,
    /// In no directory: they must be fetched from where they were dumped.
    Elsewhere,
}

impl PageLocation {
    /// Returns the location that the flags of an entry mean; `None` if they contradict each other.
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

    /// Returns the flags of an entry with this location.
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

/// Width of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// 24 bytes, CRIU up to 4.1.
    Narrow,
    /// 32 bytes, CRIU from 4.2.
    Wide,
}

impl Width {
    /// Returns the length of a header, bytes.
    #[must_use]
    pub const fn header_len(self) -> usize {
        match self {
            Self::Narrow => NARROW,
            Self::Wide => HEADER_MAX,
        }
    }

    /// Infers the width from the first header of a dump, decoded as a narrow one. A dump begins with the
    /// number of an object, which is never 0. In a wide header, an address of 0 is in that place.
    #[must_use]
    pub fn of_dump(first: &Header) -> Self {
        match first.object {
            0 => Self::Wide,
            _ => Self::Narrow,
        }
    }
}

/// Operation of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Later entries belong to this object.
    Open {
        /// Whether the client expects a reply of one byte: 1 if the server has the object in its parent
        /// directory.
        answered: bool,
    },
    /// Asks whether the server has this object in its parent directory. The reply is a u32, 0 or 1.
    HasParent,
    /// Adds an entry to the open object.
    Add(PageLocation),
    /// Requests pages of a process. Its object is the PID alone. The reply is an entry of that process.
    Get,
    /// Ends the dump. The reply is an i32, 0 if everything is durable.
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
/// Close by a client that has inherited its connection.
const FORCE_CLOSE: u32 = 0x1024;

/// Header of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Operation.
    pub command: Command,
    /// Number of pages.
    pub pages: u64,
    /// Address of the first page; in a shared segment its offset, bytes.
    pub address: u64,
    /// Number of the object, see [`fn@object`].
    pub object: u64,
}

/// The command of a header is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unknown page-server command {0:#x}")]
pub struct UnknownCommand(pub u32);

impl Header {
    /// Returns the header of a message without pages.
    #[must_use]
    pub fn bare(command: Command, object: u64) -> Self {
        Self {
            command,
            pages: 0,
            address: 0,
            object,
        }
    }

    /// Decodes a header of `width.header_len()` bytes.
    ///
    /// # Errors
    /// [`UnknownCommand`].
    ///
    /// # Panics
    /// If `bytes` is shorter.
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

    /// Appends the encoded header to `out`.
    ///
    /// # Panics
    /// If the number of pages exceeds the 32 bits of the narrow header.
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
                let pages =
                    u32::try_from(self.pages).expect("the caller limits entries to 32 bits");
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

/// Incremental decoder of the headers of a connection. It performs no I/O, so that blocking and asynchronous
/// callers share it: fill [`HeaderReader::missing`], and report that with [`HeaderReader::advance`].
#[derive(Debug, Clone, Copy, Default)]
pub struct HeaderReader {
    /// `None` until the first header has arrived.
    width: Option<Width>,
    bytes: [u8; HEADER_MAX],
    filled: usize,
}

impl HeaderReader {
    /// Returns the width of the headers; narrow while it is unknown.
    #[must_use]
    pub fn width(&self) -> Width {
        self.width.unwrap_or(Width::Narrow)
    }

    /// Returns the part of the header that has not arrived yet. It is not empty.
    pub fn missing(&mut self) -> &mut [u8] {
        &mut self.bytes[self.filled..self.width.unwrap_or(Width::Narrow).header_len()]
    }

    /// Accepts the first `len` bytes of [`HeaderReader::missing`]. Returns the header if it is complete.
    /// `infer` infers the width from the first header, decoded as a narrow one.
    ///
    /// A first header with [`Command::Close`] is returned as a narrow one: a connection without a dump can
    /// have either width, and the 8 bytes that may follow do not matter.
    ///
    /// # Errors
    /// [`UnknownCommand`].
    ///
    /// # Panics
    /// If fewer bytes are missing.
    pub fn advance(
        &mut self,
        len: usize,
        infer: impl FnOnce(&Header) -> Width,
    ) -> Result<Option<Header>, UnknownCommand> {
        assert!(len <= self.missing().len(), "more bytes than requested");
        self.filled += len;
        if self.filled < self.width().header_len() {
            return Ok(None);
        }
        let header = Header::decode(&self.bytes, self.width())?;
        if self.width.is_none() && header.command != Command::Close {
            let width = infer(&header);
            self.width = Some(width);
            if width == Width::Wide {
                return Ok(None);
            }
        }
        self.filled = 0;
        Ok(Some(header))
    }

    /// Reads the next header from a blocking stream. Returns `None` if the stream ends before it.
    ///
    /// # Errors
    /// [`UnknownCommand`]; those of reading, `UnexpectedEof` if the stream ends within the header.
    pub fn read<E: From<io::Error> + From<UnknownCommand>>(
        &mut self,
        stream: &mut impl Read,
        infer: impl Fn(&Header) -> Width,
    ) -> Result<Option<Header>, E> {
        loop {
            match stream.read(self.missing()) {
                Ok(0) if self.filled == 0 => return Ok(None),
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(len) => {
                    if let Some(header) = self.advance(len, &infer)? {
                        return Ok(Some(header));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Returns the number of the object for an image; `None` if the id of the image has more than 56 bits.
#[must_use]
pub fn object(image: ImageId) -> Option<u64> {
    let (id, kind) = match image {
        ImageId::Process(pid) => (u64::from(pid), 1),
        ImageId::Shmem(id) => (id, 2),
    };
    (id >> 56 == 0).then_some(id << 8 | kind)
}

/// Returns the image with this object number, if the number is valid.
#[must_use]
pub fn image(object: u64) -> Option<ImageId> {
    let id = object >> 8;
    match object & 0xff {
        // Before 3.3 CRIU sent the numbers of its own file types, which have changed.
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
    fn headers_recorded_from_criu_are_decoded() {
        let header = |command, pages, address, object| Header {
            command,
            pages,
            address,
            object,
        };
        let open = Command::Open { answered: true };
        let shmem = object(ImageId::Shmem(0x77)).unwrap();
        let process = object(ImageId::Process(14314)).unwrap();
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
                header(present(true), 1, 0x55ea_f8b6_a000, process),
            ),
            (
                "23100000 00000000 0000000000000000 0000000000000000",
                Width::Narrow,
                header(Command::Close, 0, 0, 0),
            ),
            (
                "04000000 00000000 0000000000000000 0000000000000000 01ea370000000000",
                Width::Wide,
                header(open, 0, 0, process),
            ),
        ] {
            let bytes = hex(text);
            assert_eq!(bytes.len(), width.header_len());
            assert_eq!(Header::decode(&bytes, width), Ok(expected), "{text}");
            let mut encoded = Vec::new();
            expected.encode(width, &mut encoded);
            assert_eq!(encoded, bytes);
            if expected.command == open {
                let first = Header::decode(&bytes, Width::Narrow).unwrap();
                assert_eq!(Width::of_dump(&first), width);
            }
        }
    }

    #[test]
    fn invalid_commands_and_objects_are_rejected() {
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

    #[derive(Debug, thiserror::Error)]
    enum ReadError {
        #[error(transparent)]
        Io(#[from] io::Error),
        #[error(transparent)]
        Unknown(#[from] UnknownCommand),
    }

    /// A stream that returns at most three bytes at a time.
    struct Trickle<'a>(&'a [u8]);

    impl Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let len = buffer.len().min(3);
            self.0.read(&mut buffer[..len])
        }
    }

    fn read_all(bytes: &[u8]) -> Result<Vec<Header>, ReadError> {
        let (mut reader, mut stream) = (HeaderReader::default(), Trickle(bytes));
        let mut headers = Vec::new();
        while let Some(header) = reader.read::<ReadError>(&mut stream, Width::of_dump)? {
            headers.push(header);
        }
        Ok(headers)
    }

    #[test]
    fn a_reader_finds_headers_of_either_width() {
        let process = object(ImageId::Process(7)).unwrap();
        let add = Header {
            pages: 3,
            address: 0x1000,
            ..Header::bare(Command::Add(PageLocation::Parent), process)
        };
        let open = Header::bare(Command::Open { answered: true }, process);
        let headers = [open, add, Header::bare(Command::Close, 0)];
        for width in [Width::Narrow, Width::Wide] {
            let mut bytes = Vec::new();
            headers
                .iter()
                .for_each(|header| header.encode(width, &mut bytes));
            assert_eq!(read_all(&bytes).unwrap(), headers);
            for cut in [1, width.header_len() - 1, width.header_len() + 1] {
                let error = read_all(&bytes[..cut]).unwrap_err();
                assert!(matches!(error, ReadError::Io(_)), "{cut}: {error}");
            }
            bytes[width.header_len()] ^= 0xff;
            let error = read_all(&bytes).unwrap_err();
            assert!(matches!(error, ReadError::Unknown(_)), "{error}");
        }
    }

    #[test]
    fn a_connection_without_a_dump_ends_after_a_narrow_header() {
        for width in [Width::Narrow, Width::Wide] {
            let mut bytes = Vec::new();
            Header::bare(Command::Close, 0).encode(width, &mut bytes);
            let (mut reader, mut stream) = (HeaderReader::default(), &bytes[..]);
            let header = reader.read::<ReadError>(&mut stream, Width::of_dump);
            assert_eq!(header.unwrap().unwrap().command, Command::Close);
        }
    }

    proptest! {
        #[test]
        fn headers_round_trip(
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
        fn any_bytes_are_decoded_or_rejected(bytes in prop::array::uniform32(any::<u8>())) {
            let _ = Header::decode(&bytes, Width::Narrow);
            let _ = Header::decode(&bytes, Width::Wide);
        }
    }
}
