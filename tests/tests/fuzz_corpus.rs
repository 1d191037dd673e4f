//! Every input that the fuzzer has kept, and every one that ever broke something, is asked about again.

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

/// One test, for memory is the whole program's.
#[test]
fn the_corpus_breaks_nothing_and_takes_little_memory() {
    ask(&OF_PEERS);
    // A receiver's buffer, another to decompress into, and all that is small.
    let most = MEMORY.max_allocated();
    assert!(most < 24 << 20, "{most} bytes");
    ask(&OF_FILES);
    // Room for an index of all the runs that there may be.
    let most = MEMORY.max_allocated();
    assert!(most < 256 << 20, "{most} bytes");
}
