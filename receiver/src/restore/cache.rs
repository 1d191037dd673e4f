//! What is kept in memory of arriving rounds, so that a restore need not read it back from the images.

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

/// Contents of shared segments, and where the newest copy of each page is: filled by the thread that
/// writes rounds, used up by the restore. If a part of it cannot be kept, the restore reads that part from
/// the images instead.
#[derive(Debug)]
pub struct RestoreCache {
    segments: Segments,
    /// `None` once it could not be kept.
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

    /// Notes that the pages that follow belong to `image`. `has_parent`: the round before has that image,
    /// too.
    pub fn open_image(&mut self, image: ImageId, has_parent: bool) {
        self.segments.open(image, has_parent);
    }

    /// Notes that the open image is that of a memfd with this name. If the segment arrived before a
    /// reconnect, its pages are read back from the rounds in `home`.
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
                "a shared segment will be read when restoring"
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

    /// Keeps the pages of one chunk of the open image if it is a segment's.
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
                "all memory will be read when restoring"
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
