//! Each dirty tracker with each kind of memory: the images equal the memory of the frozen victim, byte by byte.
//! These tests also run in the VM, whose kernel may have features that the host's lacks.

use pageferry_sender::target::smaps::VmFlags;
use pageferry_tests::criu::skip;
use pageferry_tests::huge::HugePages;
use pageferry_tests::images::{Entry, Pagemap};
use pageferry_tests::scenario::{assert_sent, has_tracker};
use pageferry_tests::{Pair, Victim};
use std::fs;
use std::path::Path;

const TRACKERS: [&str; 3] = ["uffd", "soft-dirty", "hash"];

/// Rounds that continue until they no longer leave fewer dirty pages: several.
const MANY_ROUNDS: [&str; 4] = ["--max-downtime", "0ms", "--max-rounds", "4"];

fn with_each_tracker(features: &str, options: &[&str]) {
    let mut tested = 0;
    for tracker in TRACKERS.into_iter().filter(|tracker| has_tracker(tracker)) {
        let mut victim = Victim::start(features);
        for skipped in victim.skipped() {
            eprintln!("SKIPPED: {skipped}");
        }
        let all = [&MANY_ROUNDS[..], &["--tracker", tracker], options].concat();
        let report = assert_sent(&mut victim, &all);
        assert_eq!(report.totals["tracker"], tracker);
        assert!(report.rounds.len() >= 2, "{:?}", report.rounds);
        // Twice: the first send must leave nothing behind.
        assert_sent(&mut victim, &all);
        tested += 1;
    }
    assert!(tested >= 1, "no tracker works here");
}

#[test]
fn private_memory_of_every_kind_arrives() {
    with_each_tracker(
        "heap=8 text=4 zero=2 sparse=64 protnone=2 readonly=1 code=1 guard=1 readzero=1 mlock=1 \
         wipeonfork=1 dontfork=1 dontdump=1 mergeable=1 brk=1 static fileprivate=2 fileshared=1 \
         dirty=20 dirty64=500",
        &[],
    );
}

#[test]
fn transparent_huge_pages_arrive() {
    with_each_tracker("thp=16 dirty=20", &[]);
}

#[test]
fn hugetlb_pages_arrive() {
    let _pages = HugePages::reserve(16);
    with_each_tracker("hugetlb=4 hugeshared=2 heap=2 dirty=20", &[]);
}

/// A restore reads huge pages (hugetlb) only from the newest directory.
#[test]
fn hugetlb_pages_are_complete_in_the_last_round() {
    let _pages = HugePages::reserve(16);
    let mut victim = Victim::start("hugetlb=4 heap=2 dirty=20");
    if !victim.skipped().is_empty() {
        eprintln!("SKIPPED: {:?}", victim.skipped());
        return;
    }
    let pair = Pair::start(&[]);
    let report = pair.send(victim.pid(), &MANY_ROUNDS).expect_report();
    let regions = victim.regions();
    let huge = regions.iter().find(|region| region.kind == "hugetlb");
    let huge = huge.expect("the victim has such a region");
    let last = report.last_round();
    let pagemap = fs::read(last.join(format!("pagemap-{}.img", victim.pid()))).unwrap();
    let pagemap = Pagemap::parse(&pagemap).unwrap();
    let inside =
        |entry: &&Entry| entry.address >= huge.start && entry.address < huge.start + huge.length;
    let entries: Vec<_> = pagemap.entries.iter().filter(inside).collect();
    assert!(!entries.is_empty());
    assert!(entries.iter().all(|entry| entry.flags == 4), "{entries:?}");
    // The other pages do come from earlier rounds.
    assert!(pagemap.entries.iter().any(|entry| entry.flags == 1));
}

#[test]
fn shared_memory_of_a_tree_arrives() {
    with_each_tracker(
        "heap=2 shared=4 memfd=4 memfd_unmapped=2 sysv=2 children=3 grandchildren=2 dirty=20 lock",
        &[],
    );
}

#[test]
fn unchanged_segments_are_not_sent_again() {
    let victim = Victim::start("heap=1 shared=8 memfd_unmapped=8");
    let pair = Pair::start(&[]);
    let report = pair.send(victim.pid(), &["--rounds", "3"]).expect_report();
    let sent: Vec<u64> = report.rounds.iter().map(|round| round.sent_pages).collect();
    assert!(sent[0] > 2000 && sent[1] < 200 && sent[2] < 200, "{sent:?}");
}

#[test]
fn threads_in_any_system_call_survive() {
    with_each_tracker("heap=4 threads=16 spin=2 signals dirty=20", &[]);
}

#[test]
fn processes_of_every_kind_arrive() {
    with_each_tracker(
        "heap=2 children=2 seccomp=strict seccomp=filter zombie dirty=20",
        &[],
    );
}

#[test]
fn compressed_memory_arrives() {
    with_each_tracker("heap=8 text=16 zero=4 dirty=20", &["--compress", "zstd:3"]);
}

#[test]
fn memory_arrives_with_content_comparison() {
    with_each_tracker("heap=8 zero=2 children=1 dirty=20", &["--skip-unchanged"]);
}

#[test]
fn mapping_flags_equal_those_of_smaps() {
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return skip(
            "flags of mappings",
            "this kernel does not describe its types",
        );
    }
    let victim = Victim::start(
        "heap=2 text=2 thp=4 protnone=1 readonly=1 code=1 guard=1 mlock=1 wipeonfork=1 dontfork=1 \
         dontdump=1 mergeable=1 brk=1 fileprivate=1 fileshared=1 shared=1 memfd=1 sysv=1",
    );
    victim.stop();
    let flags = VmFlags::probe().unwrap();
    let ours = flags.smaps(victim.pid()).unwrap();
    let ours = String::from_utf8(ours).unwrap();
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", victim.pid())).unwrap();
    let kept = |line: &&str| line.starts_with("VmFlags: ") || line.as_bytes()[8..].contains(&b'-');
    // CRIU does not read flags without a name, or flags that are newer.
    let named = |line: &str| {
        line.replace("dp ", "")
            .replace("gu ", "")
            .replace("?? ", "")
    };
    let mut compared = 0;
    for (ours, theirs) in ours.lines().zip(smaps.lines().filter(kept)) {
        assert_eq!(named(ours), named(theirs));
        compared += 1;
    }
    assert_eq!(compared, ours.lines().count());
    for flag in ["lo", "wf", "dc", "dd", "mg", "hg", "sh", "gd", "nr"] {
        assert!(ours.contains(&format!(" {flag} ")), "{flag}: {ours}");
    }
}
