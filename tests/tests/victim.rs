//! Tests of the victim and of the comparison themselves, without Pageferry.

use pageferry_tests::memory::{self, Need, PAGE};
use pageferry_tests::{Frozen, Mismatch, Snapshot, Victim, compare, images};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Starts a victim with these features, checks it, changes its memory, and checks it again.
fn assert_survives_changes(features: &str) {
    let mut victim = Victim::start(features);
    victim.check().expect(features);
    assert!(victim.mutate(20) > 0, "{features}");
    victim.check().expect(features);
    victim.count("mutate-all");
    victim.assert_unharmed();
}

#[test]
fn private_memory_of_every_kind_is_checked() {
    for features in [
        "heap=2",
        "text=2",
        "zero=2",
        "sparse=64",
        "thp=4",
        "protnone=1",
        "readonly=1",
        "code=1",
        "guard=1",
        "readzero=1",
        "mlock=1",
        "wipeonfork=1 children=1",
        "dontfork=1 children=1",
        "dontdump=1",
        "mergeable=1",
        "brk=1",
        "static",
        "fileprivate=1",
        "hugetlb=1 heap=1",
    ] {
        assert_survives_changes(features);
    }
}

#[test]
fn shared_memory_of_every_kind_is_checked() {
    for features in [
        "shared=1",
        "memfd=1",
        "memfd_unmapped=1",
        "sysv=1",
        "fileshared=1",
        "hugeshared=1 heap=1",
        "shared=1 memfd=1 sysv=1 children=2 grandchildren=1",
    ] {
        assert_survives_changes(features);
    }
}

#[test]
fn processes_of_every_kind_check_their_memory() {
    let mut victim = Victim::start(
        "heap=1 children=2 grandchildren=2 seccomp=strict seccomp=filter execloop=10 zombie stopped lock",
    );
    // The root, 2 + 1 + 2 of its children, 2 under seccomp, exec loop, zombie, stopped.
    assert_eq!(victim.tree().len(), 1 + 2 + 1 + 2 + 2 + 3);
    let before = victim.check().unwrap();
    let child = victim.count("fork");
    assert!(memory::lives(i32::try_from(child).unwrap()));
    assert!(victim.check().unwrap() > before);
    victim.mutate(50);
    victim.count("reap");
    assert!(!memory::lives(i32::try_from(child).unwrap()));
    victim.assert_unharmed();
}

#[test]
fn mappings_may_change() {
    let mut victim = Victim::start("heap=4 dirty=50 dirty64=500");
    for command in [
        "remap",
        "discard 100",
        "move",
        "grow",
        "remap",
        "shrink",
        "move",
        "mutate-all",
    ] {
        victim.count(command);
        victim.check().expect(command);
    }
    let pid = victim.pid();
    victim.exec();
    assert_eq!(victim.pid(), pid);
    victim.assert_unharmed();
}

#[test]
fn memory_is_unchanged_while_writing_is_stopped() {
    let mut victim = Victim::start("heap=1 dirty=500 children=1");
    let child = victim.tree()[1];
    let heap = |victim: &mut Victim| {
        let mut regions = victim.regions().into_iter();
        let heap = regions
            .find(|r| r.pid == child && r.kind == "heap")
            .unwrap();
        let truth = Snapshot::take(&Frozen::stop(victim.pid()).unwrap()).unwrap();
        let space = &truth.processes[&child.cast_unsigned()];
        let pages = (heap.start..heap.start + heap.length).step_by(PAGE);
        pages
            .flat_map(|page| space.page(page).unwrap().to_vec())
            .collect::<Vec<u8>>()
    };
    assert_eq!(victim.ask("stop-writing"), "ok");
    let quiet = heap(&mut victim);
    for _ in 0..5 {
        assert!(heap(&mut victim) == quiet);
    }
    assert_eq!(victim.ask("start-writing"), "ok");
    let deadline = Instant::now() + Duration::from_secs(10);
    while heap(&mut victim) == quiet {
        assert!(Instant::now() < deadline, "nothing is written");
    }
    victim.check().unwrap();
}

#[test]
fn threads_registers_and_signals_survive_stops() {
    let mut victim = Victim::start("heap=2 threads=12 spin=2 signals stack dirty=20");
    for _ in 0..40 {
        let frozen = Frozen::stop(victim.pid()).unwrap();
        assert!(memory::is_stopped(victim.pid()));
        drop(frozen);
        victim.check().unwrap();
    }
    victim.assert_unharmed();
}

#[test]
fn chaos_survives_stops() {
    let mut victim = Victim::start("heap=2 shared=1 children=1 chaos");
    for _ in 0..10 {
        drop(Frozen::stop(victim.pid()).unwrap());
        victim.check().unwrap();
    }
    victim.assert_unharmed();
}

#[test]
fn detached_victim_answers_signals() {
    let mut victim = Victim::detached("heap=2 children=1 threads=12 dirty=20");
    for _ in 0..3 {
        assert!(victim.check().unwrap() >= 512);
    }
    let tree = victim.tree();
    drop(victim);
    assert!(memory::await_end(&tree));
}

#[test]
fn victim_exits_after_its_time_limit() {
    let mut victim = Victim::start("--max-seconds 1 heap=1 children=1 stopped");
    let tree = victim.tree();
    victim.await_end();
    assert!(memory::await_end(&tree));
}

/// Returns images of a frozen victim, written by the tests themselves.
fn images_of(features: &str) -> (Snapshot, TempDir) {
    let mut victim = Victim::start(features);
    victim.mutate(10);
    let truth = Snapshot::take(&Frozen::stop(victim.pid()).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    images::write(&truth, dir.path()).unwrap();
    (truth, dir)
}

#[test]
fn images_of_every_feature_are_accepted() {
    let (truth, dir) = images_of(
        "heap=2 text=1 zero=1 sparse=32 thp=2 shared=1 memfd=1 memfd_unmapped=1 sysv=1 fileprivate=1 \
         fileshared=1 protnone=1 guard=1 readzero=1 static brk=1 children=2 zombie threads=12",
    );
    let stats = compare(&truth, dir.path()).unwrap();
    assert_eq!(stats.processes, 3);
    // Segments of the features; the board and the models are shared memory too.
    assert!(stats.segments > 4);
    assert_eq!(stats.optional, 0);
    // At least the pages that the features fill in the root; a third of the file's pages are private.
    assert!(stats.required > 256 * 7 + 256 / 3, "{stats:?}");
}

#[test]
fn snapshot_equals_the_regions_of_the_victim() {
    let mut victim = Victim::start(
        "heap=1 zero=1 sparse=1 protnone=1 guard=1 fileprivate=1 readzero=1 shared=1",
    );
    let regions = victim.regions();
    let truth = Snapshot::take(&Frozen::stop(victim.pid()).unwrap()).unwrap();
    let space = &truth.processes[&victim.pid().cast_unsigned()];
    let required = |kind: &str| {
        let region = regions.iter().find(|region| region.kind == kind).unwrap();
        let range = region.start..region.start + region.length;
        let runs = space.runs.iter().filter(|run| run.need == Need::Required);
        runs.flat_map(|run| (run.start..).step_by(PAGE).take(run.bytes.len() / PAGE))
            .filter(|page| range.contains(page))
            .count()
    };
    let guarded = if victim.skipped().is_empty() { 32 } else { 0 };
    assert_eq!(required("heap"), 256);
    // A page of written zeros counts; the kernel's zero page does not.
    assert_eq!(required("zero"), 256);
    assert_eq!(required("readzero"), 0);
    assert_eq!(required("sparse"), 256_usize.div_ceil(7));
    assert_eq!(required("protnone"), 256);
    assert_eq!(required("guard"), 256 - guarded);
    assert_eq!(required("fileprivate"), 256_usize.div_ceil(3));
    assert_eq!(required("shared"), 0);
    let shared = regions
        .iter()
        .find(|region| region.kind == "shared")
        .unwrap();
    assert_eq!(
        truth.segments[&shared.inode].runs[0].bytes.len(),
        256 * PAGE
    );
}

/// Damages the images, and returns the error of the comparison.
fn damaged(original: &(Snapshot, TempDir), damage: impl Fn(&Path)) -> Mismatch {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(original.1.path()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    compare(&original.0, copy.path()).unwrap();
    damage(copy.path());
    compare(&original.0, copy.path()).unwrap_err()
}

#[test]
fn every_kind_of_damage_is_detected() {
    let original = images_of("heap=1 shared=1 children=1");
    let pagemaps = images::pagemaps(original.1.path()).unwrap();
    let files: Vec<_> = fs::read_dir(original.1.path())
        .unwrap()
        .map(|f| f.unwrap().file_name())
        .collect();

    for (name, pagemap) in &pagemaps {
        let pages = format!("pages-{}.img", pagemap.pages_id);
        let edit_pages = |edit: &dyn Fn(&mut Vec<u8>)| {
            damaged(&original, |dir| {
                let mut bytes = fs::read(dir.join(&pages)).unwrap();
                edit(&mut bytes);
                fs::write(dir.join(&pages), bytes).unwrap();
            })
        };
        let edit_entries = |edit: &dyn Fn(&mut Vec<images::Entry>)| {
            damaged(&original, |dir| {
                let mut changed = pagemap.clone();
                edit(&mut changed.entries);
                fs::write(dir.join(name), changed.encode()).unwrap();
            })
        };
        // One bit of the first, a middle, and the last byte.
        let length = pagemap.entries.iter().map(|e| e.pages).sum::<u64>() as usize * PAGE;
        for at in [0, length / 2 + 77, length - 1] {
            let found = edit_pages(&|bytes| bytes[at] ^= 1);
            let is_here =
                matches!(found, Mismatch::WrongBytes { offset, .. } if offset == at % PAGE);
            assert!(is_here, "{name}: {found}");
        }
        // Pages missing, surplus, or exchanged.
        assert!(matches!(
            edit_pages(&|b| b.truncate(length - PAGE)),
            Mismatch::Malformed { .. }
        ));
        assert!(matches!(
            edit_pages(&|b| b.extend([0; PAGE])),
            Mismatch::Malformed { .. }
        ));
        // In a CRIU image, leaving out a page shifts those behind it.
        assert!(matches!(
            edit_entries(&|e| {
                e.remove(0);
            }),
            Mismatch::Malformed { .. }
        ));
        // The same, done consistently: only then is the page itself missing.
        let lost = damaged(&original, |dir| {
            let mut changed = pagemap.clone();
            let bytes = fs::read(dir.join(&pages)).unwrap();
            let first = changed.entries.first_mut().unwrap();
            first.address += PAGE as u64;
            first.pages -= 1;
            if first.pages == 0 {
                changed.entries.remove(0);
            }
            fs::write(dir.join(name), changed.encode()).unwrap();
            fs::write(dir.join(&pages), &bytes[PAGE..]).unwrap();
        });
        assert!(
            matches!(lost, Mismatch::MissingPage { .. }),
            "{name}: {lost}"
        );
        assert!(matches!(
            edit_entries(&|e| e[0].flags = 1),
            Mismatch::MissingImage(_)
        ));
        assert!(matches!(
            edit_entries(&|e| e[0].flags = 5),
            Mismatch::Malformed { .. }
        ));
        assert!(matches!(
            edit_entries(&|e| e[0].address += 1),
            Mismatch::Malformed { .. }
        ));
        if pagemap.entries.len() > 1 {
            let swapped = edit_entries(&|e| e.swap(0, 1));
            assert!(
                matches!(swapped, Mismatch::Malformed { .. }),
                "{name}: {swapped}"
            );
        }
        let outside = damaged(&original, |dir| {
            let mut changed = pagemap.clone();
            changed.entries.push(images::Entry {
                address: 1 << 50,
                pages: 1,
                flags: 4,
            });
            let mut bytes = fs::read(dir.join(&pages)).unwrap();
            bytes.extend([0; PAGE]);
            fs::write(dir.join(name), changed.encode()).unwrap();
            fs::write(dir.join(&pages), bytes).unwrap();
        });
        assert!(
            matches!(outside, Mismatch::OutsidePage { .. }),
            "{name}: {outside}"
        );
    }

    for file in &files {
        let gone = damaged(&original, |dir| fs::remove_file(dir.join(file)).unwrap());
        assert!(
            matches!(gone, Mismatch::MissingImage(_)),
            "{file:?}: {gone}"
        );
    }
    for name in [
        "pagemap-99999.img",
        "pages-99.img",
        "pagemap-shmem-9.img",
        ".pages-1.img.tmp",
    ] {
        let extra = damaged(&original, |dir| fs::write(dir.join(name), []).unwrap());
        assert!(matches!(extra, Mismatch::ExtraFile(_)), "{name}: {extra}");
    }
}
