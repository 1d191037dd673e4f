//! Who may come in: TLS, and the names in certificates.

use crate::server::detect::FIRST_BYTES;
use pageferry_common::tls::{TlsError, TlsFiles, names, words};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Lets in who has a certificate of our authority.
#[derive(Clone)]
pub struct Secure {
    acceptor: TlsAcceptor,
    /// Only these, if there are any.
    allowed: Arc<BTreeSet<String>>,
}

/// Who has a certificate of our authority.
pub struct Accepted {
    /// The connection.
    pub stream: TlsStream<TcpStream>,
    /// What has been read of it.
    pub first: [u8; FIRST_BYTES],
    /// The name that it is allowed by; or in words, why it is not.
    pub name: Result<String, String>,
}

impl fmt::Debug for Secure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secure")
            .field("allowed", &self.allowed)
            .finish()
    }
}

impl Secure {
    /// With these certificates; `None` if there are none. `allowed` are the names to let in, all if empty.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn new(files: &TlsFiles, allowed: &[String]) -> Result<Option<Self>, TlsError> {
        let config = files.server()?;
        Ok(config.map(|config| Self {
            acceptor: config.into(),
            allowed: Arc::new(allowed.iter().cloned().collect()),
        }))
    }

    /// Finds out who it is.
    ///
    /// # Errors
    /// In words, why it is no one known.
    pub async fn accept(&self, stream: TcpStream) -> Result<Accepted, String> {
        let words = |error| words(&error);
        let mut stream = self.acceptor.accept(stream).await.map_err(words)?;
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let names = certificates.first().map(names).unwrap_or_default();
        let allowed = |name: &&String| self.allowed.is_empty() || self.allowed.contains(*name);
        let name = names.iter().find(allowed).cloned();
        let name = name.ok_or_else(|| format!("{:?} is not among those allowed", names.join(", ")));
        let mut first = [0; FIRST_BYTES];
        stream.read_exact(&mut first).await.map_err(words)?;
        Ok(Accepted {
            stream,
            first,
            name,
        })
    }
}
