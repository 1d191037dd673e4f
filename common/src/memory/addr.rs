//! Page-aligned address ranges, checked once on construction.

use std::fmt;

/// Page size, bytes. It is part of the Hello message, so that a peer with another page size is refused before
/// any page is sent.
pub const PAGE_SIZE: u64 = 4096;

/// Maximum end of a range, bytes. User space ends far below it on every architecture. The limit keeps sums
/// from overflowing.
const ADDRESS_LIMIT: u64 = 1 << 62;

/// Non-empty, page-aligned, half-open range of addresses. For a process they are virtual addresses; for a
/// shared segment they are byte offsets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    start: u64,
    end: u64,
}

/// Two numbers that are not a [`PageRange`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("invalid page range: {pages} pages at {start:#x}")]
pub struct BadRange {
    /// First address, bytes.
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
}

impl PageRange {
    /// Returns the range of `pages` pages from `start` (bytes).
    ///
    /// # Errors
    /// [`BadRange`] if `start` is not page-aligned, `pages` is zero, or the end exceeds the limit of 2^62.
    pub fn new(start: u64, pages: u64) -> Result<Self, BadRange> {
        let end = pages
            .checked_mul(PAGE_SIZE)
            .and_then(|bytes| start.checked_add(bytes))
            .filter(|&end| start.is_multiple_of(PAGE_SIZE) && pages > 0 && end <= ADDRESS_LIMIT)
            .ok_or(BadRange { start, pages })?;
        Ok(Self { start, end })
    }

    /// Returns the range from `start` to `end`, both in bytes; `None` if it is empty, not aligned or exceeds
    /// the limit.
    #[must_use]
    pub fn from_bounds(start: u64, end: u64) -> Option<Self> {
        let aligned = start.is_multiple_of(PAGE_SIZE) && end.is_multiple_of(PAGE_SIZE);
        (aligned && start < end && end <= ADDRESS_LIMIT).then_some(Self { start, end })
    }

    /// Returns the first address, bytes.
    #[must_use]
    pub fn start(self) -> u64 {
        self.start
    }

    /// Returns one past the last address, bytes.
    #[must_use]
    pub fn end(self) -> u64 {
        self.end
    }

    /// Returns the length, bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.end - self.start
    }

    /// Returns the length in pages.
    #[must_use]
    pub fn pages(self) -> u64 {
        self.bytes() / PAGE_SIZE
    }

    /// Returns the intersection of both ranges, if it is not empty.
    #[must_use]
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::from_bounds(self.start.max(other.start), self.end.min(other.end))
    }

    /// Returns both ranges as one, if `next` begins where this one ends.
    #[must_use]
    pub fn joined(self, next: Self) -> Option<Self> {
        (self.end == next.start).then_some(Self {
            start: self.start,
            end: next.end,
        })
    }

    /// Splits the range after `pages` pages; a part without pages is `None`.
    #[must_use]
    pub fn split_at(self, pages: u64) -> (Option<Self>, Option<Self>) {
        let cut = self.start + pages.min(self.pages()) * PAGE_SIZE;
        (
            Self::from_bounds(self.start, cut),
            Self::from_bounds(cut, self.end),
        )
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end)
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_ranges_are_rejected() {
        assert_eq!(PageRange::new(0x1000, 2).unwrap().end(), 0x3000);
        for (start, pages) in [
            (1, 1),
            (0x1000, 0),
            (u64::MAX - 4095, 1),
            (0x1000, u64::MAX),
            (ADDRESS_LIMIT, 1),
        ] {
            assert_eq!(PageRange::new(start, pages), Err(BadRange { start, pages }));
        }
        assert!(PageRange::from_bounds(0x2000, 0x2000).is_none());
    }

    #[test]
    fn only_adjacent_ranges_join() {
        let range = |start, pages| PageRange::new(start, pages).unwrap();
        assert_eq!(
            range(0x1000, 2).joined(range(0x3000, 1)),
            Some(range(0x1000, 3))
        );
        assert_eq!(range(0x1000, 2).joined(range(0x4000, 1)), None);
        assert_eq!(range(0x3000, 1).joined(range(0x1000, 2)), None);
    }

    #[test]
    fn split_parts_cover_the_range() {
        let range = PageRange::new(0x1000, 3).unwrap();
        assert_eq!(
            range.split_at(1),
            (
                PageRange::new(0x1000, 1).ok(),
                PageRange::new(0x2000, 2).ok()
            )
        );
        assert_eq!(range.split_at(9), (Some(range), None));
        assert_eq!(range.split_at(0), (None, Some(range)));
    }
}
