//! The providers, one file per kind, and the one place that chooses among them.
//!
//! Invariants: nothing outside knows which provider it talks to; opening never crosses a network; a secret that a
//! provider holds has no `Debug` and is wiped on drop.

mod absent;
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
mod keyring;
mod keyring_change;
mod keyring_file;
mod local;
mod passphrase_seal;
pub mod scripted;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use zeroize::Zeroizing;

pub use self::keyring_change::{KeyringChange, KeyringKey, change_keyring, list_keyring};
pub use self::local::version_number as local_version_number;

use self::absent::AbsentProvider;
use self::keyring::Keyring;
use self::local::LocalProvider;
use super::recorded::Recorded;
use super::{Provider, ProviderError, ProviderErrorKind, ProviderKind, Trail};

/// The longest wrapped key that any provider makes or takes, in bytes: the limit of KMS.
pub const MAX_WRAPPED_LEN: usize = 6144;

/// What providers need to know beyond the key's name.
#[derive(Debug, Default)]
pub struct ProviderSettings {
    /// The keyring file of the local provider, if not where the volume's config says.
    pub keyring: Option<PathBuf>,
    /// Opens a keyring that is sealed under a passphrase; a keyring that is not does not need it.
    pub passphrase: Option<Passphrase>,
    /// Settings of AWS KMS.
    pub aws: AwsSettings,
    /// Where every call of a provider is recorded.
    pub trail: Option<Trail>,
}

/// Settings of AWS KMS. What is not set here comes from where every AWS program takes it: environment, profile,
/// instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AwsSettings {
    /// The Region of keys that are not named by ARN; an ARN names its own.
    pub region: Option<String>,
    /// The URL to send requests to instead of the Region's own.
    pub endpoint: Option<String>,
    /// Whether to use the FIPS 140 endpoints.
    pub fips: bool,
    /// The longest wait for one attempt.
    pub attempt_timeout: Duration,
    /// The longest wait for one operation, with all its attempts.
    pub operation_timeout: Duration,
}

impl Default for AwsSettings {
    fn default() -> Self {
        Self {
            region: None,
            endpoint: None,
            fips: false,
            attempt_timeout: Duration::from_secs(2),
            operation_timeout: Duration::from_secs(6),
        }
    }
}

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

/// Opens the provider of `kind` for the wrapping key `key`: an id in a keyring (empty: its newest enabled key), or a
/// KMS key's id, alias or ARN. `location` is the keyring file, unless the settings name another.
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

/// The provider of the newest enabled key of the keyring at `path`, whatever the settings say.
///
/// # Errors
/// As [`open`].
pub fn open_keyring(path: &Path, passphrase: Option<&Passphrase>) -> Result<Arc<dyn Provider>, ProviderError> {
    Ok(Arc::new(LocalProvider::open(path, "", passphrase)?))
}

/// As [`open`]; a provider that cannot be opened comes as one whose calls all fail, so that others can take its place.
/// `several` says that the volume has several local keys: one that is not in the settings' keyring is looked for at its `location`.
#[must_use]
pub fn open_or_absent(
    kind: ProviderKind,
    key: &str,
    location: Option<&Path>,
    settings: &ProviderSettings,
    several: bool,
) -> Arc<dyn Provider> {
    let opened = match (open(kind, key, location, settings), location) {
        (Err(error), Some(path)) if several && error.kind == ProviderErrorKind::KeyNotFound => {
            let here = LocalProvider::open(path, key, settings.passphrase.as_ref());
            here.map(|provider| recorded(Arc::new(provider), key, settings)).map_err(|_| error)
        }
        (opened, _) => opened,
    };
    opened.unwrap_or_else(|why| Arc::new(AbsentProvider { kind, why }))
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
    let message = format!("AWS KMS key {key}: this program was built without the feature \"aws-kms\"; use one with it");
    Err(ProviderError::new(ProviderErrorKind::Misconfigured, message))
}

/// Creates a keyring file with one new key: mode 0600, in directories of mode 0700 that are made as needed, all at once
/// or not at all. With a passphrase its keys are sealed under it.
///
/// # Errors
/// `Misconfigured` if `path` exists or cannot be written, `Denied` if that is not permitted, `Credentials` if the
/// passphrase is empty.
pub fn create_local(path: &Path, passphrase: Option<&Passphrase>) -> Result<(), ProviderError> {
    let mut keyring = Keyring::generate(SystemTime::now());
    keyring.put_under(passphrase)?;
    keyring_file::write_new(path, &keyring.encode()?)
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
