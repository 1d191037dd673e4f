//! Builds the libraries that are loaded into CRIU (`preload/`) and that the programs carry inside
//! themselves: shared libraries, which Cargo has no way to depend on.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=preload");
    ["dump", "restore"].into_iter().for_each(build);
}

fn build(name: &str) {
    let variable = |name| env::var(name).expect("Cargo sets it for build scripts");
    let out = PathBuf::from(variable("OUT_DIR")).join(format!("{name}.so"));
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args([
        "--edition",
        "2024",
        "--crate-type",
        "cdylib",
        "--crate-name",
        name,
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
        .arg(format!("preload/{name}.rs"));
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    let status = rustc.status().expect("rustc is there: it builds this");
    assert!(status.success(), "the library for CRIU cannot be built");
}
