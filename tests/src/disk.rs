//! What a disk holds of a directory if its host loses its power now: of each file what was last synced, of each
//! directory the names that it had when it was last synced. Whatever else is written is lost.

use crate::gate::{Action, Edge, Observer, Seen};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// A file or directory: its inode number, which may be used again, and when it was created.
type Inode = (u64, Option<SystemTime>);

#[derive(Debug, Clone)]
enum Node {
    File(Vec<u8>),
    Directory(BTreeMap<String, Inode>),
}

#[derive(Debug)]
struct Durable {
    dir: PathBuf,
    nodes: HashMap<Inode, Node>,
    modes: HashMap<Inode, u32>,
}

/// The durable content of a directory, kept by observing a program's syncs.
#[derive(Debug, Clone)]
pub struct Disk(Arc<Mutex<Durable>>);

impl Disk {
    /// Begins with all that is in the directory now.
    ///
    /// # Panics
    /// If it cannot be read.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        let mut durable = Durable {
            dir: dir.to_owned(),
            nodes: HashMap::new(),
            modes: HashMap::new(),
        };
        durable.sync_all(dir).expect("it can be read");
        Self(Arc::new(Mutex::new(durable)))
    }

    /// Returns an observer of the program that writes to the directory.
    #[must_use]
    pub fn observer(&self) -> Observer {
        let disk = self.clone();
        Box::new(move |seen: &Seen<'_>| {
            if seen.action == Action::Sync && seen.edge == Edge::Exit {
                disk.lock().sync(&seen.path);
            }
        })
    }

    /// Replaces the content of the directory, which stays the same directory, by what is durable of it.
    ///
    /// # Panics
    /// If it cannot be replaced.
    pub fn lose_power(&self) {
        let durable = self.lock();
        for entry in fs::read_dir(&durable.dir).expect("it is there").flatten() {
            let path = entry.path();
            let removed = match path.is_dir() {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            };
            removed.expect("it can be removed");
        }
        let root = inode(&fs::metadata(&durable.dir).expect("it is there"));
        durable
            .write(root, &durable.dir)
            .expect("it can be written");
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Durable> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Durable {
    fn sync_all(&mut self, path: &Path) -> io::Result<()> {
        self.sync(path);
        if path.is_dir() {
            for entry in fs::read_dir(path)? {
                self.sync_all(&entry?.path())?;
            }
        }
        Ok(())
    }

    /// Remembers what a sync of this file or directory makes durable.
    fn sync(&mut self, path: &Path) {
        let Ok(metadata) = fs::symlink_metadata(path) else {
            return;
        };
        if !path.starts_with(&self.dir) {
            return;
        }
        let node = match metadata.is_dir() {
            true => self.names(path),
            false => fs::read(path).map(Node::File),
        };
        if let Ok(node) = node {
            self.nodes.insert(inode(&metadata), node);
            self.modes.insert(inode(&metadata), metadata.mode());
        }
    }

    fn names(&mut self, dir: &Path) -> io::Result<Node> {
        let mut names = BTreeMap::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            self.modes.insert(inode(&metadata), metadata.mode());
            let empty = match metadata.is_dir() {
                true => Node::Directory(BTreeMap::new()),
                false => Node::File(Vec::new()),
            };
            self.nodes.entry(inode(&metadata)).or_insert(empty);
            let name = entry.file_name().to_string_lossy().into_owned();
            names.insert(name, inode(&metadata));
        }
        Ok(Node::Directory(names))
    }

    fn write(&self, inode: Inode, path: &Path) -> io::Result<()> {
        match self.nodes.get(&inode) {
            Some(Node::File(bytes)) => fs::write(path, bytes)?,
            Some(Node::Directory(names)) => {
                if !path.is_dir() {
                    fs::create_dir(path)?;
                }
                for (name, &inode) in names {
                    self.write(inode, &path.join(name))?;
                }
            }
            None => return Ok(()),
        }
        let mode = self.modes.get(&inode).copied().unwrap_or(0o600);
        fs::set_permissions(path, Permissions::from_mode(mode & 0o7777))
    }
}

fn inode(metadata: &Metadata) -> Inode {
    (metadata.ino(), metadata.created().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_synced_survives() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("dir");
        fs::create_dir(&dir).unwrap();
        let path = |name: &str| dir.join(name);
        fs::write(path("old"), "1").unwrap();
        let disk = Disk::new(&dir);
        let number = || fs::metadata(&dir).unwrap().ino();
        let before = number();
        fs::write(path("old"), "2").unwrap();
        fs::create_dir(path("sub")).unwrap();
        fs::write(path("sub/new"), "3").unwrap();
        fs::rename(path("old"), path("renamed")).unwrap();
        let sync = |name: &str| disk.lock().sync(&path(name));
        sync("sub/new");
        sync("sub");
        fs::write(path("sub/new"), "4").unwrap();
        disk.lose_power();
        assert_eq!(fs::read_to_string(path("old")).unwrap(), "1");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        assert_eq!(number(), before);

        let disk = Disk::new(&dir);
        let sync = |name: &str| disk.lock().sync(&path(name));
        fs::create_dir(path("sub")).unwrap();
        fs::write(path("sub/new"), "3").unwrap();
        sync("sub/new");
        fs::write(path("sub/new"), "4").unwrap();
        fs::write(path("sub/other"), "5").unwrap();
        sync("sub");
        fs::rename(path("old"), path("renamed")).unwrap();
        sync("");
        disk.lose_power();
        assert_eq!(fs::read_to_string(path("renamed")).unwrap(), "1");
        assert_eq!(fs::read_to_string(path("sub/new")).unwrap(), "3");
        assert_eq!(fs::read_to_string(path("sub/other")).unwrap(), "");
        assert!(!path("old").exists());
    }
}
