//! Runs every input that the fuzzer has kept, including every one that ever caused a failure.

use cap::Cap;
use pageferry_tests::fuzz::{OF_FILES, OF_PEERS, Target};
use std::alloc::System;
use std::fs;
use std::path::Path;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

fn ask(targets: &[Target]) {
    for (name, target) in targets {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(name);
        let mut inputs = 0;
        for entry in fs::read_dir(&corpus).unwrap() {
            let path = entry.unwrap().path();
            eprintln!("{}", path.display());
            target(&fs::read(&path).unwrap());
            inputs += 1;
        }
        assert!(inputs > 10, "{} has lost its inputs", corpus.display());
    }
}

/// A single test, because memory is measured for the whole program.
#[test]
fn corpus_causes_no_failure_and_little_memory_use() {
    ask(&OF_PEERS);
    // One buffer of a receiver, another to decompress into, and small allocations.
    let most = MEMORY.max_allocated();
    assert!(most < 24 << 20, "{most} bytes");
    ask(&OF_FILES);
    // Enough for an index of the maximum number of runs.
    let most = MEMORY.max_allocated();
    assert!(most < 256 << 20, "{most} bytes");
}
