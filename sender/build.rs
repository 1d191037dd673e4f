//! Builds the library that is loaded into CRIU (`shim/shim.rs`) and that `send` carries inside
//! itself: a shared library, which Cargo has no way to depend on.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=shim/shim.rs");
    let variable = |name| env::var(name).expect("Cargo sets it for build scripts");
    let out = PathBuf::from(variable("OUT_DIR")).join("shim.so");
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args([
        "--edition",
        "2024",
        "--crate-type",
        "cdylib",
        "--crate-name",
        "shim",
    ]);
    rustc.args([
        "-C",
        "opt-level=s",
        "-C",
        "panic=abort",
        "-C",
        "strip=symbols",
    ]);
    rustc
        .args(["--target", &variable("TARGET"), "-o"])
        .arg(&out)
        .arg("shim/shim.rs");
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    let status = rustc.status().expect("rustc is there: it builds this");
    assert!(status.success(), "the library for CRIU cannot be built");
}
