//! The providers, one file per kind, and the one place that chooses among them.
//!
//! Invariants: nothing outside knows which provider it talks to; opening never crosses a network; a secret that a
//! provider holds has no `Debug` and is wiped on drop.

mod absent;
#[cfg(feature = "age")]
mod age;
#[cfg(feature = "age")]
mod age_file;
#[cfg(feature = "age")]
mod age_keys;
#[cfg(feature = "aws-kms")]
mod aws_client;
#[cfg(feature = "aws-kms")]
mod aws_describe;
#[cfg(feature = "aws-kms")]
mod aws_kms;
#[cfg(feature = "aws-kms")]
mod aws_operations;
#[cfg(feature = "aws-kms")]
mod aws_pace;
#[cfg(feature = "aws-kms")]
mod aws_transport;
#[cfg(any(feature = "aws-kms", feature = "vault"))]
mod endpoint;
mod keyring;
mod keyring_change;
mod keyring_file;
mod local;
mod passphrase_seal;
#[cfg(feature = "pkcs11")]
mod pkcs11;
#[cfg(feature = "pkcs11")]
mod pkcs11_module;
#[cfg(feature = "pkcs11")]
mod pkcs11_uri;
pub mod scripted;
#[cfg(any(feature = "age", feature = "pkcs11", feature = "vault"))]
mod secret_file;
mod settings;
#[cfg(feature = "vault")]
mod vault;
#[cfg(feature = "vault")]
mod vault_client;
#[cfg(feature = "vault")]
mod vault_describe;
#[cfg(feature = "vault")]
mod vault_login;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use zeroize::Zeroizing;

pub use self::keyring_change::{KeyringChange, KeyringKey, change_keyring, list_keyring};
pub use self::local::version_number as local_version_number;

use self::absent::AbsentProvider;
use self::keyring::Keyring;
use self::local::LocalProvider;
pub use self::settings::{AgeSettings, AwsSettings, Pkcs11Settings, ProviderSettings, VaultSettings};
use super::recorded::Recorded;
use super::{Provider, ProviderError, ProviderErrorKind, ProviderKind};

/// The longest wrapped key that any provider makes or takes, in bytes: the limit of KMS.
pub const MAX_WRAPPED_LEN: usize = 6144;

/// A passphrase. Wiped on drop and never shown.
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// The passphrase of exactly these bytes; they are wiped on drop. An empty one is refused where it is used.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes.
    ///
    /// # Errors
    /// `Credentials` if there are none.
    fn expose(&self) -> Result<&[u8], ProviderError> {
        match self.0.as_slice() {
            [] => {
                Err(ProviderError::new(ProviderErrorKind::Credentials, "the passphrase is empty: give one that is not"))
            }
            bytes => Ok(bytes),
        }
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase")
    }
}

/// Opens the provider of `kind` for the wrapping key `key`: an id in a keyring (empty: its newest enabled key), a KMS key's id,
/// alias or ARN, a transit key with or without its mount, the path of a PKCS #11 URI, an age recipient. `location` is the keyring file, unless the settings name another.
///
/// # Errors
/// `Misconfigured` if the settings cannot work or this program was built without the provider; for a keyring also what
/// reading it can say: `KeyNotFound`, `KeyUnusable`, `Denied`, and `Credentials` for its passphrase.
pub fn open(
    kind: ProviderKind,
    key: &str,
    location: Option<&Path>,
    settings: &ProviderSettings,
) -> Result<Arc<dyn Provider>, ProviderError> {
    let provider = match kind {
        ProviderKind::Local => open_local(key, location, settings),
        ProviderKind::AwsKms => open_aws_kms(key, &settings.aws),
        ProviderKind::Vault => open_vault(key, &settings.vault),
        ProviderKind::Pkcs11 => open_pkcs11(key, &settings.pkcs11),
        ProviderKind::Age => open_age(key, &settings.age),
    };
    Ok(recorded(provider?, key, settings))
}

/// The provider, with every call recorded if the settings say where.
fn recorded(provider: Arc<dyn Provider>, key: &str, settings: &ProviderSettings) -> Arc<dyn Provider> {
    match &settings.trail {
        Some(trail) => Arc::new(Recorded::new(provider, key, trail.clone())),
        None => provider,
    }
}

/// As [`open`], for a key in the words of a user: a URI of PKCS #11 may have a query, which names the module and the PIN's file.
/// The words of a volume must not.
///
/// # Errors
/// As [`open`].
pub fn open_named(
    kind: ProviderKind,
    key: &str,
    location: Option<&Path>,
    settings: &ProviderSettings,
) -> Result<Arc<dyn Provider>, ProviderError> {
    #[cfg(feature = "pkcs11")]
    if kind == ProviderKind::Pkcs11 {
        return Ok(Arc::new(pkcs11::Pkcs11Provider::open_uri(key, &settings.pkcs11)?));
    }
    open(kind, key, location, settings)
}

/// The name that a volume's list has for the key that a person calls `key`, if that is known without asking anybody.
#[must_use]
#[allow(unused_variables)] // in a program without some of the providers
pub fn canonical(kind: ProviderKind, key: &str) -> Option<String> {
    match kind {
        #[cfg(feature = "vault")]
        ProviderKind::Vault => vault::canonical(key).ok(),
        #[cfg(feature = "pkcs11")]
        ProviderKind::Pkcs11 => pkcs11::canonical(key).ok(),
        _ => None,
    }
}

/// The provider of the newest enabled key of the keyring at `path`, whatever the settings say.
///
/// # Errors
/// As [`open`].
pub fn open_keyring(path: &Path, passphrase: Option<&Passphrase>) -> Result<Arc<dyn Provider>, ProviderError> {
    Ok(Arc::new(LocalProvider::open(path, "", passphrase)?))
}

/// As [`open_listed`]; a provider that cannot be opened comes as one whose calls all fail, so that others can take its place.
#[must_use]
pub fn open_or_absent(
    kind: ProviderKind,
    key: &str,
    location: Option<&Path>,
    settings: &ProviderSettings,
    several: bool,
) -> Arc<dyn Provider> {
    let opened = open_listed(kind, key, location, settings, several);
    opened.unwrap_or_else(|why| Arc::new(AbsentProvider { kind, why }))
}

/// As [`open`], for a key on a volume's list. `several` says that there are several local ones: one that is not in the settings'
/// keyring is looked for at its `location`.
///
/// # Errors
/// As [`open`].
pub fn open_listed(
    kind: ProviderKind,
    key: &str,
    location: Option<&Path>,
    settings: &ProviderSettings,
    several: bool,
) -> Result<Arc<dyn Provider>, ProviderError> {
    match (open(kind, key, location, settings), location) {
        (Err(error), Some(path)) if several && error.kind == ProviderErrorKind::KeyNotFound => {
            let here = LocalProvider::open(path, key, settings.passphrase.as_ref());
            here.map(|provider| recorded(Arc::new(provider), key, settings)).map_err(|_| error)
        }
        (opened, _) => opened,
    }
}

fn open_local(
    key: &str,
    location: Option<&Path>,
    settings: &ProviderSettings,
) -> Result<Arc<dyn Provider>, ProviderError> {
    let Some(path) = settings.keyring.as_deref().or(location) else {
        let message = "a local key needs its keyring: say where the file is with --keyring";
        return Err(ProviderError::new(ProviderErrorKind::Misconfigured, message));
    };
    Ok(Arc::new(LocalProvider::open(path, key, settings.passphrase.as_ref())?))
}

#[cfg(feature = "aws-kms")]
fn open_aws_kms(key: &str, settings: &AwsSettings) -> Result<Arc<dyn Provider>, ProviderError> {
    Ok(Arc::new(aws_kms::AwsKmsProvider::open(key, settings)?))
}

#[cfg(not(feature = "aws-kms"))]
fn open_aws_kms(key: &str, _: &AwsSettings) -> Result<Arc<dyn Provider>, ProviderError> {
    Err(not_built_in(ProviderKind::AwsKms, key))
}

#[cfg(feature = "vault")]
fn open_vault(key: &str, settings: &VaultSettings) -> Result<Arc<dyn Provider>, ProviderError> {
    Ok(Arc::new(vault::VaultProvider::open(key, settings)?))
}

#[cfg(not(feature = "vault"))]
fn open_vault(key: &str, _: &VaultSettings) -> Result<Arc<dyn Provider>, ProviderError> {
    Err(not_built_in(ProviderKind::Vault, key))
}

/// Whether code of a security module is in this process.
#[must_use]
pub fn have_loaded_a_module() -> bool {
    #[cfg(feature = "pkcs11")]
    return pkcs11_module::have_loaded_a_module();
    #[cfg(not(feature = "pkcs11"))]
    false
}

#[cfg(feature = "pkcs11")]
fn open_pkcs11(key: &str, settings: &Pkcs11Settings) -> Result<Arc<dyn Provider>, ProviderError> {
    Ok(Arc::new(pkcs11::Pkcs11Provider::open(key, settings)?))
}

#[cfg(not(feature = "pkcs11"))]
fn open_pkcs11(key: &str, _: &Pkcs11Settings) -> Result<Arc<dyn Provider>, ProviderError> {
    Err(not_built_in(ProviderKind::Pkcs11, key))
}

#[cfg(feature = "age")]
fn open_age(key: &str, settings: &AgeSettings) -> Result<Arc<dyn Provider>, ProviderError> {
    Ok(Arc::new(age::AgeProvider::open(key, settings)?))
}

#[cfg(not(feature = "age"))]
fn open_age(key: &str, _: &AgeSettings) -> Result<Arc<dyn Provider>, ProviderError> {
    Err(not_built_in(ProviderKind::Age, key))
}

/// The features are called as the kinds are.
#[allow(dead_code)] // in a program with all of them
fn not_built_in(kind: ProviderKind, key: &str) -> ProviderError {
    let message = format!("{kind}:{key}: this program was built without the feature \"{kind}\"; use one with it");
    ProviderError::new(ProviderErrorKind::Misconfigured, message)
}

/// Creates a keyring file with one new key: mode 0600, in directories of mode 0700 that are made as needed, all at once
/// or not at all. With a passphrase its keys are sealed under it.
///
/// # Errors
/// `Misconfigured` if `path` exists or cannot be a keyring's, `Denied` if writing is not permitted, `Storage` if it fails,
/// `Credentials` if the passphrase is empty.
pub fn create_local(path: &Path, passphrase: Option<&Passphrase>) -> Result<(), ProviderError> {
    let mut keyring = Keyring::generate(SystemTime::now());
    keyring.put_under(passphrase)?;
    keyring_file::write_new(path, &keyring.encode()?)
}

/// Whether the keyring at `path` is under a passphrase, by what the file says of itself.
///
/// # Errors
/// `KeyNotFound` if there is none; `Denied` or `Misconfigured` if it cannot be read safely.
pub fn is_sealed(path: &Path) -> Result<bool, ProviderError> {
    Ok(Keyring::is_sealed(&keyring_file::read(path)?.0))
}

/// Whether a keyring with the key `id` lies at `path`, by its text alone: nothing of it is interpreted.
#[must_use]
pub fn is_keyring_with(path: &Path, id: &str) -> bool {
    let has = |file: &[u8]| {
        let text = std::str::from_utf8(file).unwrap_or_default();
        text.contains("[[key]]") && text.contains(&format!("\"{id}\""))
    };
    keyring_file::read(path).is_ok_and(|(file, _)| has(&file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_key_needs_a_keyring() {
        let error = open(ProviderKind::Local, "", None, &ProviderSettings::default()).err().unwrap();
        assert_eq!(error.kind, ProviderErrorKind::Misconfigured);
        assert!(error.message.contains("--keyring"), "{error}");
    }

    #[test]
    fn the_settings_name_the_keyring_before_the_volume_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyring");
        create_local(&path, None).unwrap();
        let settings = ProviderSettings { keyring: Some(path), ..ProviderSettings::default() };
        let provider = open(ProviderKind::Local, "", Some(Path::new("/nonexistent")), &settings).unwrap();
        assert_eq!((provider.kind(), provider.is_remote()), (ProviderKind::Local, false));
    }

    #[test]
    fn a_passphrase_is_not_shown() {
        let settings =
            ProviderSettings { passphrase: Some(Passphrase::new(b"hunter2".to_vec())), ..Default::default() };
        assert!(!format!("{settings:?}").contains("hunter2") && !format!("{settings:?}").contains("104"));
    }

    #[cfg(not(feature = "aws-kms"))]
    #[test]
    fn a_missing_feature_is_named() {
        let error = open(ProviderKind::AwsKms, "alias/a", None, &ProviderSettings::default()).err().unwrap();
        assert_eq!(error.kind, ProviderErrorKind::Misconfigured);
        assert!(error.message.contains("aws-kms"), "{error}");
    }
}
