//! Builds the libraries that CRIU preloads (`preload/`) and that the programs embed. Cargo cannot depend on
//! shared libraries.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=preload");
    ["dump", "restore"].into_iter().for_each(build);
}

fn build(name: &str) {
    let variable = |name| env::var(name).expect("Cargo sets this variable for build scripts");
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
    let status = rustc.status().expect("rustc has built this script");
    assert!(status.success(), "cannot build the library {name} for CRIU");
}
