//! Cache of arriving rounds, so that a restore need not read them back from the images.

use crate::file_error::FileError;
use crate::image::DirName;
use crate::image::catalog::Catalog;
use crate::image::chain::levels;
use crate::image::index::Pages;
use crate::image::writer::WriteError;
use crate::restore::lazy::{self, Prepared};
use crate::restore::segments::Segments;
use crate::with_causes;
use pageferry_common::wire::Entry;
use pageferry_common::{ImageId, MemfdName};
use std::collections::BTreeSet;
use std::path::Path;

/// Contents of the shared segments, and the location of the newest copy of each page. The thread that writes
/// rounds fills it, and the restore takes it. What cannot be kept is read from the images instead.
#[derive(Debug)]
pub struct RestoreCache {
    segments: Segments,
    /// `None` once a round could not be taken in.
    catalog: Option<Catalog>,
    /// Segments that arrived in rounds of an earlier connection.
    earlier: BTreeSet<u64>,
}

impl Default for RestoreCache {
    fn default() -> Self {
        Self {
            segments: Segments::default(),
            catalog: Some(Catalog::default()),
            earlier: BTreeSet::new(),
        }
    }
}

impl RestoreCache {
    /// Returns the cache of the migration in `home`, of which `rounds` rounds are complete. Reads their
    /// pagemaps, so it blocks.
    #[must_use]
    pub fn load(home: &Path, rounds: u32) -> Self {
        let mut cache = Self::default();
        (0..rounds).for_each(|_| cache.advance(home));
        let images = cache.catalog.iter().flat_map(Catalog::images);
        let segments = images.filter_map(|(image, _)| match image {
            ImageId::Shmem(id) => Some(id),
            ImageId::Process(_) => None,
        });
        cache.earlier = segments.collect();
        cache
    }

    /// Opens an image: chunks put from now on belong to it. `has_parent` is whether the round before has the
    /// image, too.
    pub fn open_image(&mut self, image: ImageId, has_parent: bool) {
        self.segments.open(image, has_parent);
    }

    /// Sets the name of the segment of the open image. If its earlier rounds arrived before a reconnect, reads
    /// their pages back from the rounds in `home`.
    pub fn set_memfd_name(&mut self, home: &Path, name: &MemfdName, has_parent: bool) {
        // Only a segment that is unknown and has a parent has an id here.
        let Some(id) = self.segments.set_name(name, has_parent) else {
            return;
        };
        if !self.earlier.remove(&id) {
            return;
        }
        if let Err(error) = self.recover(home, id, name) {
            let why = with_causes(&error);
            tracing::warn!(
                event = "segment_not_cached",
                id,
                why,
                "shared segment not kept in memory: it is read from its image when restoring"
            );
        }
    }

    fn recover(&mut self, home: &Path, id: u64, name: &MemfdName) -> Result<(), FileError> {
        let image = ImageId::Shmem(id);
        let Some(catalog) = &self.catalog else {
            return Ok(());
        };
        let Some(index) = catalog.get(image) else {
            return Ok(());
        };
        let round = home.join(DirName::Round(catalog.rounds()).to_string());
        let pages = Pages::open(&levels(&round)?, image, index.clone())?;
        self.segments.recover(id, name, index, &pages)
    }

    /// Puts a chunk of the open image; it is kept if the image is a segment's.
    pub fn put(&mut self, entries: &[Entry], pages: &[u8]) {
        self.segments.put(entries, pages);
    }

    /// Adds the round that was just completed in `home` to the catalog.
    pub fn advance(&mut self, home: &Path) {
        let advanced = self.catalog.as_mut().map(|catalog| catalog.advance(home));
        if let Some(Err(error)) = advanced {
            let why = with_causes(&error);
            tracing::warn!(
                event = "catalog_not_cached",
                why,
                "catalog not kept in memory: all memory is read from the images when restoring"
            );
            self.catalog = None;
        }
    }

    /// Creates the directory for a lazy restore, and empties the cache. Returns `None` if this migration
    /// can only be restored eagerly.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn prepare(&mut self, home: &Path) -> Result<Option<(Prepared, Catalog)>, WriteError> {
        let mut segments = std::mem::take(&mut self.segments);
        let Some(catalog) = self.catalog.take() else {
            return Ok(None);
        };
        let prepared = lazy::prepare(home, &catalog, &mut segments)?;
        Ok(prepared.map(|prepared| (prepared, catalog)))
    }
}
