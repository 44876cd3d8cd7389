//! The local provider: wrapping keys from a keyring file, so that everything works without a KMS.
//!
//! A wrapped key is `1 | key version u32 | nonce 24 | ciphertext 32 | tag 16`, little-endian, XAES-256-GCM under that
//! version of the wrapping key. Associated data: the first five bytes, the key id with a u16 length before it, and the
//! encryption context.
//!
//! Invariants: the keyring file is read when the provider opens, and again when it was changed, so that a key that is
//! disabled or rotated there is so here too; a state of it that does not authenticate under the passphrase of the first one
//! is not believed. Its directory is held, so that reading it again walks no path: that may lead into the mount that waits for
//! the key.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::super::{
    EncryptionContext, KeyDescription, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey, describe,
};
use super::Passphrase;
use super::keyring::{Key, KeyState, Keyring};
use super::keyring_file::{self, Stamp, at};
use super::passphrase_seal::Seal;
use crate::crypto::{DataKey, NONCE_LEN, Secret, Suite, SuiteKey, TAG_LEN, random_array};

const WRAPPED_VERSION: u8 = 1;
/// The format's version and the key's.
const HEAD_LEN: usize = 5;
const WRAPPED_LEN: usize = HEAD_LEN + NONCE_LEN + 32 + TAG_LEN;

const NOT_WRAPPED_HERE: &str = "not a wrapped key of this provider: the file was changed";
const NO_SUCH_VERSION: &str = "wrapped by a version of the key that is not here: use the newest copy of the keyring";
const NOT_AUTHENTIC: &str = "the wrapped key or its context was changed, or it belongs to another volume";

/// Wrapping keys from a keyring file.
pub(super) struct LocalProvider {
    /// The id of the key that wraps new data keys.
    current: String,
    directory: Option<OwnedFd>,
    loaded: Mutex<Loaded>,
}

/// What was read of the file.
struct Loaded {
    keys: Arc<Keys>,
    stamp: Option<Stamp>,
    seal: Option<Arc<Seal>>,
}

/// The keys of a keyring in one of its states.
struct Keys {
    path: PathBuf,
    keys: Vec<WrappingKey>,
}

struct WrappingKey {
    id: String,
    state: KeyState,
    /// From the oldest to the newest.
    versions: Vec<VersionKey>,
}

/// One version of a wrapping key, ready for use.
pub(super) struct VersionKey {
    number: u32,
    key: SuiteKey,
}

impl LocalProvider {
    /// Opens the keyring at `path` for its key `id`, or for its newest enabled one if `id` is empty.
    ///
    /// # Errors
    /// `KeyNotFound` if there is no such file or key, `KeyUnusable` if no key is enabled, `Denied` if the file may not
    /// be read, `Misconfigured` if others may read it or it is malformed, `Credentials` for its passphrase.
    pub(super) fn open(path: &Path, id: &str, passphrase: Option<&Passphrase>) -> Result<Self, ProviderError> {
        let (file, stamp) = keyring_file::read(path)?;
        let keyring = Keyring::decode(&file, passphrase).map_err(|error| at(path, &error))?;
        if passphrase.is_some() && keyring.seal.is_none() {
            tracing::warn!("keyring {}: the passphrase is not needed: the keyring has none", path.display());
        }
        let keys = Arc::new(Keys::new(path, &keyring));
        let current = if id.is_empty() { keys.newest_enabled()? } else { keys.key(id)? }.id.clone();
        let directory = keyring_file::hold_directory(path);
        Ok(Self { current, directory, loaded: Mutex::new(Loaded { keys, stamp: Some(stamp), seal: keyring.seal }) })
    }

    /// The keys as the file has them now. A file that is gone, or that this process cannot open any more, changes nothing.
    fn keys(&self) -> Arc<Keys> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let path = &loaded.keys.path;
        let place = self.directory.as_ref().and_then(|directory| keyring_file::within(directory, path));
        let found = place.as_deref().and_then(Stamp::of);
        if found.is_none() || found == loaded.stamp {
            return Arc::clone(&loaded.keys);
        }
        let again = keyring_file::read(place.as_deref().unwrap_or(path)).and_then(|(file, stamp)| {
            let keyring = Keyring::decode_again(&file, loaded.seal.as_ref()).map_err(|error| at(path, &error))?;
            Ok((Arc::new(Keys::new(path, &keyring)), stamp))
        });
        match again {
            Ok((keys, stamp)) => {
                tracing::info!("keyring {}: read again after a change", path.display());
                (loaded.keys, loaded.stamp) = (keys, Some(stamp));
            }
            Err(error) => {
                tracing::warn!("{error}; what was read of it before stays in use until the next start");
                loaded.stamp = found;
            }
        }
        Arc::clone(&loaded.keys)
    }
}

impl Keys {
    fn new(path: &Path, keyring: &Keyring) -> Self {
        Self { path: path.to_owned(), keys: keyring.keys.iter().map(WrappingKey::new).collect() }
    }

    fn newest_enabled(&self) -> Result<&WrappingKey, ProviderError> {
        let enabled = self.keys.iter().rfind(|key| key.state == KeyState::Enabled);
        enabled.ok_or_else(|| self.error(ProviderErrorKind::KeyUnusable, "every key is disabled: enable one"))
    }

    fn key(&self, id: &str) -> Result<&WrappingKey, ProviderError> {
        let missing = || {
            let ids: Vec<_> = self.keys.iter().map(|key| key.id.as_str()).collect();
            let message = format!("no key {id} here, only {}: is it the right keyring?", ids.join(", "));
            self.error(ProviderErrorKind::KeyNotFound, &message)
        };
        self.keys.iter().find(|key| key.id == id).ok_or_else(missing)
    }

    fn enabled(&self, id: &str) -> Result<&WrappingKey, ProviderError> {
        let key = self.key(id)?;
        match key.state {
            KeyState::Enabled => Ok(key),
            KeyState::Disabled => {
                let message = format!("the key {id} is disabled: enable it to use what it wraps");
                Err(self.error(ProviderErrorKind::KeyUnusable, &message))
            }
        }
    }

    fn error(&self, kind: ProviderErrorKind, message: &str) -> ProviderError {
        at(&self.path, &ProviderError::new(kind, message))
    }
}

impl Provider for LocalProvider {
    fn kind(&self) -> ProviderKind {
        ProviderKind::Local
    }

    fn is_remote(&self) -> bool {
        false
    }

    fn generate_data_key(&self, context: &EncryptionContext) -> Result<(DataKey, WrappedKey), ProviderError> {
        let data_key = DataKey::random();
        let wrapped = self.wrap(&self.current, &data_key, context)?;
        Ok((data_key, wrapped))
    }

    fn wrap(&self, key_id: &str, data_key: &DataKey, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        let keys = self.keys();
        let key = keys.enabled(key_id)?;
        let newest = key.versions.last();
        let newest = newest.ok_or_else(|| keys.error(ProviderErrorKind::KeyUnusable, "the key has no version"))?;
        Ok(WrappedKey { key_id: key.id.clone(), bytes: newest.wrap(&key.id, data_key, context) })
    }

    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        let keys = self.keys();
        let key = keys.enabled(key_id)?;
        let error = |kind, message: &str| keys.error(kind, &format!("{message} (key {key_id})"));
        let number = version_number(wrapped).ok_or_else(|| error(ProviderErrorKind::Tampered, NOT_WRAPPED_HERE))?;
        let version = key.versions.iter().find(|version| version.number == number);
        let version = version.ok_or_else(|| error(ProviderErrorKind::KeyNotFound, NO_SUCH_VERSION))?;
        version.unwrap(key_id, wrapped, context).ok_or_else(|| error(ProviderErrorKind::Tampered, NOT_AUTHENTIC))
    }

    fn describe(&self, key_id: &str) -> Result<KeyDescription, ProviderError> {
        let keys = self.keys();
        let key = keys.key(key_id)?;
        let versions = key.versions.len();
        Ok(KeyDescription {
            key_id: key.id.clone(),
            state: match key.state {
                KeyState::Enabled => describe::KeyState::Enabled,
                KeyState::Disabled => describe::KeyState::Disabled,
            },
            rotation: Some(format!("by hand ({versions} version{})", if versions == 1 { "" } else { "s" })),
            origin: Some(format!("keyring {}", keys.path.display())),
            multi_region: false,
            usage: "wrapping".to_owned(),
        })
    }
}

impl WrappingKey {
    fn new(key: &Key) -> Self {
        let versions = key.versions.iter().map(|version| VersionKey::new(version.number, &version.material));
        Self { id: key.id.clone(), state: key.state, versions: versions.collect() }
    }
}

impl VersionKey {
    /// Version `number` of a wrapping key.
    pub(super) fn new(number: u32, material: &Secret<32>) -> Self {
        Self { number, key: SuiteKey::new(Suite::Xaes256Gcm, material) }
    }

    /// `data_key` wrapped by the key `id`, bound to `context`.
    pub(super) fn wrap(&self, id: &str, data_key: &DataKey, context: &EncryptionContext) -> Vec<u8> {
        let nonce: [u8; NONCE_LEN] = random_array();
        let mut wrapped = Vec::with_capacity(WRAPPED_LEN);
        wrapped.push(WRAPPED_VERSION);
        wrapped.extend_from_slice(&self.number.to_le_bytes());
        let bound_to = associated_data(&wrapped, id, context);
        wrapped.extend_from_slice(&nonce);
        let start = wrapped.len();
        wrapped.resize(start + data_key.expose().len(), 0);
        let tag = self.key.session().seal(&nonce, &bound_to, data_key.expose(), &mut wrapped[start..]);
        wrapped.extend_from_slice(&tag);
        wrapped
    }

    /// The data key in `wrapped`, if this key, `id` and `context` made it.
    pub(super) fn unwrap(&self, id: &str, wrapped: &[u8], context: &EncryptionContext) -> Option<DataKey> {
        let (head, rest) = wrapped.split_first_chunk::<HEAD_LEN>()?;
        let (nonce, rest) = rest.split_first_chunk::<NONCE_LEN>()?;
        let (cipher, tag) = rest.split_last_chunk::<TAG_LEN>()?;
        if version_number(wrapped) != Some(self.number) {
            return None;
        }
        let bound_to = associated_data(head, id, context);
        Secret::fill_with(|key| self.key.session().open(nonce, &bound_to, cipher, tag, key)).ok()
    }
}

/// The version of a keyring's key in `wrapped`, if it has the shape of a wrapped key.
#[must_use]
pub fn version_number(wrapped: &[u8]) -> Option<u32> {
    let (version, rest) = wrapped.split_first()?;
    let (number, _) = rest.split_first_chunk()?;
    (*version == WRAPPED_VERSION && wrapped.len() == WRAPPED_LEN).then(|| u32::from_le_bytes(*number))
}

/// `head | u16 length of id | id | context`.
fn associated_data(head: &[u8], id: &str, context: &EncryptionContext) -> Vec<u8> {
    let length = u16::try_from(id.len()).unwrap_or(u16::MAX).to_le_bytes();
    [head, &length, id.as_bytes(), &context.associated_data()].concat()
}

#[cfg(test)]
#[path = "local_tests.rs"]
mod tests;
