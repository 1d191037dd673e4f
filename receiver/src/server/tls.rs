//! TLS: authenticates peers by certificate, and checks their names.

use crate::server::detect::FIRST_BYTES;
use pageferry_common::tls::{TlsError, TlsFiles, describe, dns_names};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Accepts peers that have a certificate of the configured authority.
#[derive(Clone)]
pub struct Secure {
    acceptor: TlsAcceptor,
    /// Names that are allowed; all if empty.
    allowed: Arc<BTreeSet<String>>,
}

/// A peer that has a certificate of the configured authority.
pub struct Authenticated {
    /// The connection.
    pub stream: TlsStream<TcpStream>,
    /// First bytes, which were read from the connection.
    pub first: [u8; FIRST_BYTES],
    /// The allowed name in its certificate, or why none of its names is allowed.
    pub name: Result<String, String>,
}

impl fmt::Debug for Secure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secure")
            .field("allowed", &self.allowed)
            .finish_non_exhaustive()
    }
}

impl Secure {
    /// Reads the certificates; returns `None` if none are configured. `allowed` are the names of peers that
    /// may connect; all if empty.
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

    /// Authenticates the peer, and reads its first bytes.
    ///
    /// # Errors
    /// A description if the handshake fails.
    pub async fn accept(&self, stream: TcpStream) -> Result<Authenticated, String> {
        let describe = |error| describe(&error);
        let mut stream = self.acceptor.accept(stream).await.map_err(describe)?;
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let names = certificates.first().map(dns_names).unwrap_or_default();
        let is_allowed = |name: &&String| self.allowed.is_empty() || self.allowed.contains(*name);
        let name = names.iter().find(is_allowed).cloned();
        let name = name.ok_or_else(|| format!("{:?} is not among those allowed", names.join(", ")));
        let mut first = [0; FIRST_BYTES];
        stream.read_exact(&mut first).await.map_err(describe)?;
        Ok(Authenticated {
            stream,
            first,
            name,
        })
    }
}
