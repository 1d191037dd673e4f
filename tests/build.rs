//! Compiles the programs that tests send, and a library that is preloaded into `send`: in C, because they must do
//! what safe Rust cannot.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-env-changed=CC");
    let flags = ["-O2", "-g", "-Wall", "-Wextra"];
    let program = ["-std=c11", "-pthread"];
    // A static program starts faster and is identical on every machine where it is restored.
    for name in ["victim", "hostile"] {
        let built = compile(name, &[&flags[..], &program, &["-static"]].concat())
            || compile(name, &[&flags[..], &program].concat());
        assert!(built, "the C compiler cannot compile {name}.c");
    }
    let library = compile(
        "force_ptrace",
        &[&flags[..], &["-shared", "-fPIC"]].concat(),
    );
    assert!(library, "the C compiler cannot compile force_ptrace.c");
}

/// Compiles `victim/NAME.c`, and passes the path of the result to the crate as `PAGEFERRY_NAME_BUILT`. Returns
/// whether that worked.
fn compile(name: &str, flags: &[&str]) -> bool {
    let source = Path::new("victim").join(name).with_extension("c");
    println!("cargo:rerun-if-changed={}", source.display());
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let out = out_dir.join(name);
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
    // A running program cannot be overwritten; a new file gets a new inode.
    let fresh = out_dir.join(format!("{name}.new"));
    let built = Command::new(&compiler)
        .args(flags)
        .arg(&source)
        .arg("-o")
        .arg(&fresh)
        .status()
        .unwrap_or_else(|e| panic!("cannot run the C compiler {compiler}: {e}; set CC"))
        .success()
        && fs::rename(&fresh, &out).is_ok();
    let variable = format!("PAGEFERRY_{}_BUILT", name.to_uppercase());
    println!("cargo:rustc-env={variable}={}", out.display());
    built
}
