//! Certificates for both ends, and the options that name them.

use crate::scenario::receive;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A directory as `receive certs` makes it.
#[derive(Debug)]
pub struct Certs(TempDir);

impl Certs {
    /// For a receiver on loopback.
    ///
    /// # Panics
    /// If `receive` is not built, or makes none.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it makes files")]
    pub fn new() -> Self {
        let this = Self(tempfile::tempdir().expect("a temporary directory can be made"));
        let made = receive(&[&"certs", &this.dir(), &"--host", &"localhost", &"127.0.0.1"]);
        assert!(made.status.success(), "{}", made.stderr);
        this
    }

    /// Where they are.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.0.path().join("certs")
    }

    /// The options of the side that has this certificate.
    #[must_use]
    pub fn options(&self, name: &str) -> Vec<String> {
        options(&self.dir().join("ca.pem"), &self.dir().join(name))
    }
}

/// The options of a side that trusts `ca` and has `certificate` (both its files, whatever the extension).
#[must_use]
pub fn options(ca: &Path, certificate: &Path) -> Vec<String> {
    let (cert, key) = (
        certificate.with_extension("pem"),
        certificate.with_extension("key"),
    );
    [("--tls-ca", ca), ("--tls-cert", &cert), ("--tls-key", &key)]
        .iter()
        .flat_map(|(option, path)| [(*option).to_owned(), path.display().to_string()])
        .collect()
}

/// Options as a program takes them.
#[must_use]
pub fn strs(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}
