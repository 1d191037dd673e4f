//! Guard regions of the target (`MADV_GUARD_INSTALL`): pages on which every access is a fault.

use crate::sys::pagemap::{self, GUARD, Query, Region};
use crate::target::is_gone;
use pageferry_common::PageRange;
use pageferry_common::proc::maps::{self, Mapping};
use std::fs::{self, File};
use std::io;

/// Returns the first of these processes that has a guard region; `None` if none has, or if the kernel does not
/// report them (before Linux 6.15). A process that has exited has none.
///
/// # Errors
/// Errors of `/proc`.
pub fn first_with_guards(pids: impl Iterator<Item = i32>) -> io::Result<Option<i32>> {
    for pid in pids {
        match has_guards(pid) {
            Ok(true) => return Ok(Some(pid)),
            Ok(false) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => match error.raw_os_error() {
                // The kernel has no such scan, or not for this category.
                Some(libc::ENOTTY | libc::EINVAL) => return Ok(None),
                _ => return Err(error),
            },
        }
    }
    Ok(None)
}

fn has_guards(pid: i32) -> io::Result<bool> {
    let text = fs::read(format!("/proc/{pid}/maps"))?;
    let mut ranges = maps::lines(&text).filter_map(|line| Mapping::parse(line)?.range());
    let Some(first) = ranges.next() else {
        return Ok(false);
    };
    let last = ranges.last().unwrap_or(first);
    let Some(all) = PageRange::from_bounds(first.start(), last.end()) else {
        return Ok(false);
    };
    let query = Query {
        all: GUARD,
        report: GUARD,
        ..Query::default()
    };
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut found = false;
    pagemap::scan(&pagemap, all, query, &mut [Region::default(); 16], |_| {
        found = true;
    })?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::Mapping;

    #[test]
    fn guard_region_is_found() {
        let own = || std::iter::once(std::process::id().cast_signed());
        let page = Mapping::private_page().unwrap();
        let before = first_with_guards(own()).unwrap();
        if page.make_guard().is_err() || before.is_some() {
            eprintln!("skipped: the kernel has no guard regions, or the C library uses some");
            return;
        }
        let reported = pagemap::reports_guards().unwrap();
        assert_eq!(first_with_guards(own()).unwrap().is_some(), reported);
    }
}
