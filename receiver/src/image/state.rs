//! CRIU's images of state, as far as they matter to us: protobuf messages, one record after the other.

use super::{FileError, failed};
use prost::Message;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Longest image that is looked into, bytes: that of a process with a million mappings is shorter.
const IMAGE_MAX: u64 = 64 << 20;

/// The one record of an image; `None` if there is no such image.
pub(crate) fn record<M: Message + Default>(path: &Path) -> Result<Option<M>, FileError> {
    Ok(records(path)?.into_iter().next())
}

/// All records of an image; none if there is no such image.
pub(crate) fn records<M: Message + Default>(path: &Path) -> Result<Vec<M>, FileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let read = || {
        let mut bytes = Vec::new();
        let len = file.take(IMAGE_MAX + 1).read_to_end(&mut bytes)?;
        if len as u64 > IMAGE_MAX {
            return Err(io::Error::other("it is too long"));
        }
        parse(&bytes)
    };
    read().map_err(failed("understand", path))
}

fn parse<M: Message + Default>(bytes: &[u8]) -> io::Result<Vec<M>> {
    let short = || io::Error::from(io::ErrorKind::UnexpectedEof);
    // Two magic words come first, then each record's length before it.
    let mut rest = bytes.get(8..).ok_or_else(short)?;
    let mut records = Vec::new();
    while let Some((len, after)) = rest.split_first_chunk() {
        let len = u32::from_le_bytes(*len) as usize;
        let (record, later) = after.split_at_checked(len).ok_or_else(short)?;
        records.push(M::decode(record).map_err(io::Error::other)?);
        rest = later;
    }
    match rest.is_empty() {
        true => Ok(records),
        false => Err(short()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, PartialEq, Message)]
    struct Number {
        #[prost(uint32, required, tag = "1")]
        number: u32,
    }

    #[test]
    fn records_follow_each_other() {
        let image = b"magicTWO\x02\0\0\0\x08\x05\x02\0\0\0\x08\x07";
        let numbers: Vec<Number> = parse(image).unwrap();
        assert_eq!(numbers.iter().map(|n| n.number).collect::<Vec<_>>(), [5, 7]);
        for cut in [0, 7, 9, 13, 15, image.len() - 1] {
            assert!(parse::<Number>(&image[..cut]).is_err(), "{cut}");
        }
        assert_eq!(parse::<Number>(&image[..8]).unwrap(), []);
    }
}
