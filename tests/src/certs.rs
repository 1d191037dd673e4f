//! TLS certificates for sender and receiver, and the options that name them.

use crate::scenario::receive;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Directory of certificates that `receive certs` created.
#[derive(Debug)]
pub struct Certs(TempDir);

impl Certs {
    /// Creates certificates for a receiver on the loopback interface.
    ///
    /// # Panics
    /// If `receive` is not built or `receive certs` fails.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it makes files")]
    pub fn new() -> Self {
        let this = Self(tempfile::tempdir().expect("a temporary directory can be made"));
        let made = receive(&[&"certs", &this.dir(), &"--host", &"localhost", &"127.0.0.1"]);
        assert!(made.status.success(), "{}", made.stderr);
        this
    }

    /// Returns the directory that contains the certificates.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.0.path().join("certs")
    }

    /// Returns the options of the side with this certificate.
    #[must_use]
    pub fn options(&self, name: &str) -> Vec<String> {
        options(&self.dir().join("ca.pem"), &self.dir().join(name))
    }
}

/// Returns the options of a side that trusts `ca` and has `certificate` (certificate and key; the extension of
/// the path does not matter).
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

/// Borrows options as program arguments.
#[must_use]
pub fn strs(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}
