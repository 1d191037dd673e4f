//! `receive certs`: creates an authority, and a certificate for the sender and the receiver each.

use crate::file_error::{FileError, failed};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use time::OffsetDateTime;

/// Name of the sender's files, and the name in its certificate.
pub const SENDER: &str = "send";

/// Name of the receiver's files.
pub const RECEIVER: &str = "receive";

/// Reason why certificates cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// The files cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A name is invalid, or the library failed.
    #[error("cannot create a certificate")]
    Make(#[from] rcgen::Error),
}

/// Creates the directory `dir` with an authority (`ca.pem`, `ca.key`) and two certificates that it has
/// signed, with their keys: `receive.pem` for the names or addresses `hosts`, and `send.pem` for the name
/// `send`.
///
/// # Errors
/// [`CertsError`].
pub fn make(dir: &Path, hosts: &[String], valid: Range<OffsetDateTime>) -> Result<(), CertsError> {
    DirBuilder::new()
        .mode(0o700)
        .create(dir)
        .map_err(failed("create", dir))?;
    let params = |names: &[String], common_name: &str| -> Result<_, rcgen::Error> {
        let mut params = CertificateParams::new(names.to_vec())?;
        (params.not_before, params.not_after) = (valid.start, valid.end);
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        Ok(params)
    };
    let key = KeyPair::generate()?;
    let mut authority = params(&[], "Pageferry authority")?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = authority.self_signed(&key)?;
    write(dir, "ca", &certificate.pem(), &key.serialize_pem())?;
    let authority = Issuer::new(authority, key);
    let sender = [SENDER.to_owned()];
    for (file, names, purpose) in [
        (RECEIVER, hosts, ExtendedKeyUsagePurpose::ServerAuth),
        (SENDER, &sender, ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let key = KeyPair::generate()?;
        let mut params = params(names, &names[0])?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &authority)?;
        write(dir, file, &certificate.pem(), &key.serialize_pem())?;
    }
    Ok(())
}

/// Writes a certificate that everyone can read, and a key that only its owner can.
fn write(dir: &Path, name: &str, certificate: &str, key: &str) -> Result<(), FileError> {
    for (extension, text, mode) in [("pem", certificate, 0o644), ("key", key, 0o600)] {
        let path = dir.join(name).with_extension(extension);
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(mode).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(failed("write", &path))?;
    }
    Ok(())
}
