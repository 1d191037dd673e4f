//! Finds the written pages of a shared segment through the page tables of the processes that map it.

use super::DirtyTracker;
use crate::target::process::Process;
use crate::target::segment::Segment;
use pageferry_common::PageSet;
use std::collections::BTreeMap;

/// Returns the pages of a segment that were written through its mappings since the tracker's last rearm, or
/// that were removed from it, of those that the receiver has (`held`). Returns `None` if that is unknown. In
/// any case the scan begins the next epoch of the mappings.
pub fn written_to_segment(
    segment: &Segment,
    processes: &BTreeMap<i32, Process>,
    held: &PageSet,
    tracker: &mut dyn DirtyTracker,
) -> Option<PageSet> {
    let (mut scanned, mut complete) = (Vec::new(), true);
    for mapping in &segment.mappings {
        let process = processes.get(&mapping.pid);
        let is_tracked = |process: &&Process| {
            !process.direct_io && process.shared.binary_search(&mapping.range).is_ok()
        };
        complete &= process.as_ref().is_some_and(is_tracked);
        scanned.extend(process.map(|process| (process, mapping.range)));
    }
    let found = tracker.scan_shared(&scanned).ok().filter(|_| complete)?;
    let mut ranges = Vec::new();
    for (mapping, found) in segment.mappings.iter().zip(found) {
        for range in found {
            ranges.push(mapping.offsets(range)?);
        }
    }
    ranges.extend(segment.removed(held));
    ranges.sort_unstable();
    let mut written = PageSet::new();
    ranges.into_iter().for_each(|range| written.insert(range));
    Some(written)
}
