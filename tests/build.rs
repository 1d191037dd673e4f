//! Compiles the victim: a C program, because it must do what safe Rust cannot.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    let source = Path::new("victim/victim.c");
    println!("cargo:rerun-if-changed={}", source.display());
    println!("cargo:rerun-if-env-changed=CC");
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let victim = out_dir.join("victim");
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
    // A static program starts faster and is identical on every machine where it is restored.
    let built = [&["-static"][..], &[]].iter().any(|link| {
        // A running program cannot be overwritten; a new file gets a new inode.
        let fresh = out_dir.join("victim.new");
        Command::new(&compiler)
            .args(["-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-pthread"])
            .args(*link)
            .arg(source)
            .arg("-o")
            .arg(&fresh)
            .status()
            .unwrap_or_else(|e| panic!("cannot run the C compiler {compiler}: {e}; set CC"))
            .success()
            && fs::rename(&fresh, &victim).is_ok()
    });
    assert!(built, "{compiler} cannot compile {}", source.display());
    println!(
        "cargo:rustc-env=PAGEFERRY_VICTIM_BUILT={}",
        victim.display()
    );
}
