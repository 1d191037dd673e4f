//! CRIU's images of state, as far as they matter to us: protobuf messages, one record after the other.

use prost::Message;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// Longest image that is looked into, bytes: that of a process with a million mappings is shorter.
const IMAGE_MAX: u64 = 64 << 20;

/// All records of an image; none if there is no such image.
///
/// # Errors
/// Those of reading it, and of understanding what it holds.
pub fn records<M: Message + Default>(path: &Path) -> io::Result<Vec<M>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    let len = file.take(IMAGE_MAX + 1).read_to_end(&mut bytes)?;
    match len as u64 > IMAGE_MAX {
        true => Err(io::Error::other("it is too long")),
        false => parse(&bytes),
    }
}

/// CRIU's image of a thread: how its process handles signals.
#[derive(Clone, PartialEq, Message)]
struct Core {
    #[prost(message, optional, tag = "3")]
    process: Option<ProcessCore>,
}

#[derive(Clone, PartialEq, Message)]
struct ProcessCore {
    #[prost(uint32, required, tag = "1")]
    state: u32,
    #[prost(message, repeated, tag = "15")]
    handlers: Vec<Handler>,
}

#[derive(Clone, PartialEq, Message)]
struct Handler {
    #[prost(uint64, required, tag = "2")]
    flags: u64,
}

/// Whether every process in a directory of images wants to be told of its children's ends: none has set
/// `SA_NOCLDWAIT`, which no file in `/proc` tells.
///
/// # Errors
/// As [`records`].
pub fn children_are_waited_for(dir: &Path) -> io::Result<bool> {
    const SA_NOCLDWAIT: u64 = 2;
    let waited_for = |process: &ProcessCore| {
        let mut handlers = process.handlers.iter();
        handlers.all(|handler| handler.flags & SA_NOCLDWAIT == 0)
    };
    Ok(processes(dir)?
        .iter()
        .all(|(_, process)| waited_for(process)))
}

/// The processes in a directory of images that were stopped by a signal, by their PIDs where they see themselves.
///
/// # Errors
/// As [`records`].
pub fn stopped(dir: &Path) -> io::Result<Vec<u32>> {
    const STOPPED: u32 = 3;
    let processes = processes(dir)?.into_iter();
    let stopped = processes.filter(|(_, process)| process.state == STOPPED);
    let pid = |image: String| image.strip_prefix(CORE)?.strip_suffix(".img")?.parse().ok();
    Ok(stopped.filter_map(|(image, _)| pid(image)).collect())
}

/// What CRIU's images of threads begin with.
const CORE: &str = "core-";

/// All processes in a directory of images, with the name of the image that tells of each.
fn processes(dir: &Path) -> io::Result<Vec<(String, ProcessCore)>> {
    let mut processes = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.starts_with(CORE) {
            continue;
        }
        let cores = records::<Core>(&dir.join(&name))?.into_iter();
        processes.extend(cores.filter_map(|core| Some((name.clone(), core.process?))));
    }
    Ok(processes)
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

    #[test]
    fn one_process_that_does_not_wait_is_enough_and_those_that_stand_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, state, flags: &[u64]| {
            let handlers = flags.iter().map(|&flags| Handler { flags }).collect();
            let process = Some(ProcessCore { state, handlers });
            let core = Core { process }.encode_to_vec();
            let mut image = b"magicTWO".to_vec();
            image.extend((core.len() as u32).to_le_bytes());
            image.extend(core);
            fs::write(dir.path().join(name), image).unwrap();
        };
        put("core-1.img", 1, &[0, 4]);
        put("mm-1.img", 3, &[2]);
        assert!(children_are_waited_for(dir.path()).unwrap());
        put("core-2.img", 3, &[0x1000_0002, 0]);
        assert!(!children_are_waited_for(dir.path()).unwrap());
        assert_eq!(stopped(dir.path()).unwrap(), [2]);
        put("core-2.img", 1, &[]);
        assert!(stopped(dir.path()).unwrap().is_empty());
        assert!(children_are_waited_for(dir.path()).unwrap());
        fs::write(dir.path().join("core-3.img"), "short").unwrap();
        assert!(children_are_waited_for(dir.path()).is_err());
    }
}
