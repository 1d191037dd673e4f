//! TLS 1.3 with certificates at both ends.

use clap::Args;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// TLS identity and trust: PEM files, either all or none.
#[derive(Debug, Clone, Args)]
pub struct TlsFiles {
    /// Use TLS, and trust peers with a certificate of the authority in this file
    #[arg(long, value_name = "FILE", env = "PAGEFERRY_TLS_CA", requires_all = ["tls_cert", "tls_key"])]
    pub tls_ca: Option<PathBuf>,

    /// Certificate to present, issued by the same authority
    #[arg(long, value_name = "FILE", env = "PAGEFERRY_TLS_CERT", requires_all = ["tls_ca", "tls_key"])]
    pub tls_cert: Option<PathBuf>,

    /// Private key of the certificate
    #[arg(long, value_name = "FILE", env = "PAGEFERRY_TLS_KEY", requires_all = ["tls_ca", "tls_cert"])]
    pub tls_key: Option<PathBuf>,
}

/// TLS cannot be configured.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is unusable.
    #[error("cannot use {} for TLS: {reason}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Why it is unusable.
        reason: String,
    },
    /// Certificate and key, or certificate and authority, do not belong together.
    #[error("certificate, key and CA do not match")]
    Config(#[from] rustls::Error),
    /// The name of the receiver cannot be in a certificate.
    #[error("invalid host name: {0:?}")]
    Name(String, #[source] InvalidDnsNameError),
}

/// Content of the files.
struct Identity {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl TlsFiles {
    /// Returns the configuration of a client; `None` if no files are given.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn client(&self) -> Result<Option<Arc<ClientConfig>>, TlsError> {
        let Some(Identity { roots, chain, key }) = self.identity()? else {
            return Ok(None);
        };
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)?;
        Ok(Some(Arc::new(config)))
    }

    /// Returns the configuration of a server, which requires a certificate of every client; `None` if no
    /// files are given.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn server(&self) -> Result<Option<Arc<ServerConfig>>, TlsError> {
        let Some(Identity { roots, chain, key }) = self.identity()? else {
            return Ok(None);
        };
        let clients: Arc<dyn ClientCertVerifier> =
            WebPkiClientVerifier::builder_with_provider(roots, provider())
                .build()
                .map_err(|error| rustls::Error::General(error.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)?;
        // Sessions are not resumed.
        config.send_tls13_tickets = 0;
        Ok(Some(Arc::new(config)))
    }

    fn identity(&self) -> Result<Option<Identity>, TlsError> {
        let (Some(ca), Some(cert), Some(key)) = (&self.tls_ca, &self.tls_cert, &self.tls_key)
        else {
            return Ok(None);
        };
        let mut roots = RootCertStore::empty();
        for authority in certificates(ca)? {
            roots.add(authority).map_err(|error| unusable(ca, &error))?;
        }
        Ok(Some(Identity {
            roots: Arc::new(roots),
            chain: certificates(cert)?,
            key: PrivateKeyDer::from_pem_file(key).map_err(|error| unusable(key, &error))?,
        }))
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all = CertificateDer::pem_file_iter(path).map_err(|error| unusable(path, &error))?;
    let all: Vec<_> = all
        .collect::<Result<_, _>>()
        .map_err(|error| unusable(path, &error))?;
    match all.is_empty() {
        true => Err(unusable(path, &"it contains no certificate")),
        false => Ok(all),
    }
}

fn unusable(path: &Path, reason: &impl ToString) -> TlsError {
    TlsError::File {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

/// Returns the name that the certificate of a receiver at `HOST:PORT` must have.
///
/// # Errors
/// [`TlsError::Name`].
pub fn server_name(to: &str) -> Result<ServerName<'static>, TlsError> {
    let host = to.rsplit_once(':').map_or(to, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned()).map_err(|error| TlsError::Name(host.to_owned(), error))
}

/// Returns the DNS names in a certificate.
#[must_use]
pub fn dns_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let certificate = webpki::EndEntityCert::try_from(certificate);
    let names = certificate
        .iter()
        .flat_map(|certificate| certificate.valid_dns_names());
    names.map(str::to_owned).collect()
}

/// Describes a failure of TLS for the user; `None` if the error is not one of TLS.
#[must_use]
pub fn describe_tls(error: &io::Error) -> Option<String> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match error {
        rustls::Error::InvalidCertificate(why) => {
            format!("the certificate of the peer {}", fault(why))
        }
        rustls::Error::NoCertificatesPresented => "the peer presents no certificate".to_owned(),
        rustls::Error::AlertReceived(alert) => {
            format!("the peer rejects our certificate: {}", rejection(*alert))
        }
        rustls::Error::InvalidMessage(_) => "the peer does not use TLS".to_owned(),
        other => other.to_string(),
    })
}

/// Describes a failure of a connection, with [`describe_tls`] or as the kernel reports it.
#[must_use]
pub fn describe(error: &io::Error) -> String {
    describe_tls(error).unwrap_or_else(|| error.to_string())
}

fn fault(why: &CertificateError) -> String {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "has expired".into(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "is not valid yet: check the clock".into()
        }
        // Authorities that `receive certs` creates have the same name and different keys.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "was issued by another authority".into()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "is for another host".into()
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is for the other program".into()
        }
        other => format!("is not valid: {other:?}"),
    }
}

fn rejection(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateExpired => "it has expired".into(),
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "it was issued by another authority".into()
        }
        AlertDescription::CertificateRequired => "none was presented".into(),
        AlertDescription::AccessDenied => "its name is not allowed".into(),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_name_is_the_host_without_the_port() {
        for (to, name) in [
            ("host.example:7700", "host.example"),
            ("192.0.2.1:1", "192.0.2.1"),
            ("[::1]:7700", "::1"),
        ] {
            let expected = ServerName::try_from(name.to_owned()).unwrap();
            assert_eq!(server_name(to).unwrap(), expected, "{to}");
        }
        assert!(server_name("a b:1").is_err());
    }
}
