//! TLS 1.3 on both ends: each proves with a certificate who it is, and checks that of the other.

use clap::Args;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Certificates, as files in PEM. Either all are given, or none.
#[derive(Debug, Clone, Args)]
pub struct TlsFiles {
    /// Encrypt, and trust who has a certificate of the authority in this file
    #[arg(long, value_name = "FILE", env = "PAGEFERRY_TLS_CA", requires_all = ["tls_cert", "tls_key"])]
    pub tls_ca: Option<PathBuf>,

    /// The certificate to show, by the same authority
    #[arg(long, value_name = "FILE", env = "PAGEFERRY_TLS_CERT", requires_all = ["tls_ca", "tls_key"])]
    pub tls_cert: Option<PathBuf>,

    /// Its private key
    #[arg(long, value_name = "FILE", env = "PAGEFERRY_TLS_KEY", requires_all = ["tls_ca", "tls_cert"])]
    pub tls_key: Option<PathBuf>,
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error("cannot use {} for TLS: {why}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Certificate and key, or certificate and authority, do not belong together.
    #[error("the certificates make no TLS")]
    Config(#[from] rustls::Error),
    /// The receiver's name can be in no certificate.
    #[error("{0:?} is not the name of a host")]
    Name(String, #[source] InvalidDnsNameError),
}

/// One side's certificates, read and found to fit.
struct Identity {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl TlsFiles {
    /// What a client needs; `None` if no files are given.
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

    /// What a server needs, who asks every client for a certificate; `None` if no files are given.
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
        // Nobody comes back to a session.
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
            roots.add(authority).map_err(|error| bad(ca, &error))?;
        }
        Ok(Some(Identity {
            roots: Arc::new(roots),
            chain: certificates(cert)?,
            key: PrivateKeyDer::from_pem_file(key).map_err(|error| bad(key, &error))?,
        }))
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all = CertificateDer::pem_file_iter(path).map_err(|error| bad(path, &error))?;
    let all: Vec<_> = all
        .collect::<Result<_, _>>()
        .map_err(|error| bad(path, &error))?;
    match all.is_empty() {
        true => Err(bad(path, &"there is no certificate in it")),
        false => Ok(all),
    }
}

fn bad(path: &Path, why: &impl ToString) -> TlsError {
    TlsError::File {
        path: path.to_owned(),
        why: why.to_string(),
    }
}

/// The name that a receiver's certificate must have, of `HOST:PORT`.
///
/// # Errors
/// [`TlsError::Name`].
pub fn server_name(to: &str) -> Result<ServerName<'static>, TlsError> {
    let host = to.rsplit_once(':').map_or(to, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned()).map_err(|error| TlsError::Name(host.to_owned(), error))
}

/// The names in a certificate.
#[must_use]
pub fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let certificate = webpki::EndEntityCert::try_from(certificate);
    let names = certificate
        .iter()
        .flat_map(|certificate| certificate.valid_dns_names());
    names.map(str::to_owned).collect()
}

/// What went wrong between two sides, in words for who can do something about it; `None` if it is not TLS.
#[must_use]
pub fn explain(error: &io::Error) -> Option<String> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match error {
        rustls::Error::InvalidCertificate(why) => {
            format!("the other side's certificate {}", fault(why))
        }
        rustls::Error::NoCertificatesPresented => "the other side shows no certificate".to_owned(),
        rustls::Error::AlertReceived(alert) => {
            format!(
                "the other side does not accept our certificate: {}",
                refusal(*alert)
            )
        }
        rustls::Error::InvalidMessage(_) => "the other side does not speak TLS".to_owned(),
        other => other.to_string(),
    })
}

/// [`explain`], or what the kernel says if it is not TLS.
#[must_use]
pub fn words(error: &io::Error) -> String {
    explain(error).unwrap_or_else(|| error.to_string())
}

fn fault(why: &CertificateError) -> String {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "has expired".into(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "is not valid yet: is the clock right?".into()
        }
        // Authorities made by the same program have the same name, and other keys.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "is of another authority".into()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "is for another host".into()
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is not for that end".into()
        }
        other => format!("is not valid: {other:?}"),
    }
}

fn refusal(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateExpired => "it has expired".into(),
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "it is of another authority".into()
        }
        AlertDescription::CertificateRequired => "there is none".into(),
        AlertDescription::AccessDenied => "its name is not among those allowed".into(),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_has_the_name_it_is_called_by() {
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
