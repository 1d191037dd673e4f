//! Identity of a receiver: which directory, on which host, it is that answers for the migrations in it.
//!
//! A copy of the directory holds the same migrations, and must neither answer for them nor restore them: their
//! processes would run twice. So the identity is bound to the directory itself and to the host.

use crate::file_error::{FileError, failed};
use crate::image::durable::{create_image, sync};
use pageferry_common::ReceiverId;
use serde::{Deserialize, Serialize};
use std::fs::{self, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::UNIX_EPOCH;

/// Name of the file. It can be removed to make a copied directory a receiver of its own.
pub(super) const FILE_NAME: &str = "identity.json";

/// Name under which the file is written before it is complete.
const TEMPORARY: &str = ".identity.tmp";

/// File with the id of the installed system; containers may lack it.
const MACHINE_ID: &str = "/etc/machine-id";

/// Content of the file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    /// 32 hex digits.
    id: String,
    #[serde(flatten)]
    place: Place,
}

/// Where a directory is. Neither survives being copied, and both survive a reboot, which the number of the
/// device would not.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    inode: u64,
    /// When the directory was created, in nanoseconds since 1970; `None` if the file system does not record
    /// it.
    created_ns: Option<u64>,
    /// Id of the installed system.
    machine: Option<String>,
}

impl Place {
    fn of(directory: &Metadata) -> Self {
        let created = directory.created().ok();
        let created = created.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let machine = fs::read_to_string(MACHINE_ID).ok();
        Self {
            inode: directory.ino(),
            created_ns: created.and_then(|time| u64::try_from(time.as_nanos()).ok()),
            machine: machine.map(|id| id.trim_end().to_owned()),
        }
    }
}

/// Returns the id of the receiver whose directory this is, and makes it, durably, if there is none yet.
/// Returns `None` if the directory is a copy of that of another receiver.
///
/// # Errors
/// [`FileError`].
pub(super) fn load(dir: &Path) -> Result<Option<ReceiverId>, FileError> {
    let path = dir.join(FILE_NAME);
    let place = Place::of(&fs::metadata(dir).map_err(failed("read", dir))?);
    match fs::read(&path) {
        Ok(text) => {
            let damaged = |error: io::Error| failed("parse", &path)(error);
            let found: Identity =
                serde_json::from_slice(&text).map_err(|error| damaged(error.into()))?;
            let id = ReceiverId::from_hex(&found.id);
            let id = id.ok_or_else(|| damaged(io::ErrorKind::InvalidData.into()))?;
            Ok((found.place == place).then_some(id))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut id = ReceiverId([0; 16]);
            getrandom::fill(&mut id.0).map_err(|error| failed("create", &path)(error.into()))?;
            let identity = Identity {
                id: id.to_string(),
                place,
            };
            write(dir, &identity)?;
            Ok(Some(id))
        }
        Err(error) => Err(failed("read", &path)(error)),
    }
}

/// Writes the file durably. The directory becomes durable, too: what is promised about the migrations in it
/// must not be lost with it.
fn write(dir: &Path, identity: &Identity) -> Result<(), FileError> {
    let (temporary, path) = (dir.join(TEMPORARY), dir.join(FILE_NAME));
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("remove", &temporary)(error));
        }
        Ok(()) | Err(_) => {}
    }
    let mut file = create_image(&temporary)?;
    let text = serde_json::to_vec(identity).expect("an identity is plain data");
    file.write_all(&text)
        .and_then(|()| file.sync_all())
        .map_err(failed("write", &temporary))?;
    fs::rename(&temporary, &path).map_err(failed("create", &path))?;
    sync(dir)?;
    for parent in dir.ancestors().skip(1) {
        match sync(parent) {
            // The directory was there before: this user cannot have created it.
            Err(error) if error.source.kind() == io::ErrorKind::PermissionDenied => return Ok(()),
            result => result?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_stays_with_its_directory() {
        let root = tempfile::tempdir().unwrap();
        let (one, moved, copy) = (
            root.path().join("one"),
            root.path().join("moved"),
            root.path().join("copy"),
        );
        fs::create_dir(&one).unwrap();
        let id = load(&one).unwrap().unwrap();
        assert_eq!(load(&one).unwrap(), Some(id));
        fs::rename(&one, &moved).unwrap();
        assert_eq!(load(&moved).unwrap(), Some(id));
        fs::create_dir(&copy).unwrap();
        fs::copy(moved.join(FILE_NAME), copy.join(FILE_NAME)).unwrap();
        assert_eq!(load(&copy).unwrap(), None);
        fs::remove_file(copy.join(FILE_NAME)).unwrap();
        let other = load(&copy).unwrap().unwrap();
        assert_ne!(other, id);
    }

    #[test]
    fn directory_that_comes_from_another_host_is_a_copy() {
        let dir = tempfile::tempdir().unwrap();
        load(dir.path()).unwrap().unwrap();
        let path = dir.path().join(FILE_NAME);
        let mut identity: Identity = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        identity.place.machine = Some("another".to_owned());
        fs::write(&path, serde_json::to_vec(&identity).unwrap()).unwrap();
        assert_eq!(load(dir.path()).unwrap(), None);
        fs::write(&path, "{}").unwrap();
        load(dir.path()).unwrap_err();
    }
}
