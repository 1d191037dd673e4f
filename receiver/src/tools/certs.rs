//! `receive certs`: an authority, and a certificate for each end.

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

/// What the sender's certificate is called.
pub const SENDER: &str = "send";

/// What the receiver's files are called.
pub const RECEIVER: &str = "receive";

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// The directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// A name, or the library.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
}

/// Writes into `dir`, which is new, an authority (`ca.pem`, `ca.key`) and what it has signed: `receive.pem`
/// with the names (or addresses) `hosts`, `send.pem` with the name `send`, and their keys.
///
/// # Errors
/// [`CertsError`].
pub fn make(dir: &Path, hosts: &[String], valid: Range<OffsetDateTime>) -> Result<(), CertsError> {
    DirBuilder::new()
        .mode(0o700)
        .create(dir)
        .map_err(failed("create", dir))?;
    let params = |names: &[String], called: &str| -> Result<_, rcgen::Error> {
        let mut params = CertificateParams::new(names.to_vec())?;
        (params.not_before, params.not_after) = (valid.start, valid.end);
        params.distinguished_name.push(DnType::CommonName, called);
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

/// Writes a certificate that anybody may read, and a key that only its owner can.
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
