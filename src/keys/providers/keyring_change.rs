//! Changing a keyring: new versions and keys, disabling and enabling, another passphrase.
//!
//! Invariants: nothing that unwraps goes: a new version is added, and old ones stay; a version is durable before anything is
//! wrapped by it; a keyring is changed whole or not at all.

use std::path::Path;
use std::time::SystemTime;

use super::super::{ProviderError, ProviderErrorKind};
use super::Passphrase;
use super::keyring::{Key, KeyState, Keyring, Version, seconds};
use super::keyring_file::{self, at};
use crate::crypto::Secret;

/// A wrapping key of a keyring, without what is secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyringKey {
    /// `k-` and 16 hexadecimal digits.
    pub id: String,
    /// Whether it may be used.
    pub enabled: bool,
    /// Seconds since 1970.
    pub created: u64,
    /// Numbers of its versions and when they were made (seconds since 1970), from the oldest to the newest, which wraps.
    pub versions: Vec<(u32, u64)>,
}

/// What is to be changed.
pub enum KeyringChange<'a> {
    /// A new version of a key, or with none named of the newest enabled one.
    NewVersion(Option<&'a str>),
    /// A new key.
    NewKey,
    /// A key is used for nothing until it is enabled again.
    Disable(&'a str),
    /// A key may be used again.
    Enable(&'a str),
    /// Another passphrase, or none.
    Passphrase(Option<&'a Passphrase>),
}

/// The keys in the keyring at `path`, from the oldest to the newest.
///
/// # Errors
/// As [`super::open`] for a keyring.
pub fn list_keyring(path: &Path, passphrase: Option<&Passphrase>) -> Result<Vec<KeyringKey>, ProviderError> {
    let keyring = Keyring::decode(&keyring_file::read(path)?.0, passphrase).map_err(|error| at(path, &error))?;
    Ok(keyring.keys.iter().map(describe).collect())
}

/// Changes the keyring at `path`, which is under `passphrase` if it is under one; returns the key that was changed, if it was
/// one. It is durable when this returns.
///
/// # Errors
/// As [`super::open`] for a keyring, which then is as it was: `KeyNotFound` if it has no such key, `KeyUnusable` if a
/// disabled one is to get a version, `Unavailable` if another process is changing it.
pub fn change_keyring(
    path: &Path,
    passphrase: Option<&Passphrase>,
    change: &KeyringChange<'_>,
) -> Result<Option<KeyringKey>, ProviderError> {
    keyring_file::replace(path, |file| {
        let named = |error| at(path, &error);
        let mut keyring = Keyring::decode(file, passphrase).map_err(named)?;
        let changed = keyring.change(change, SystemTime::now()).map_err(named)?;
        let file = keyring.encode().map_err(named)?;
        // What cannot be read again must not take the place of what can.
        Keyring::decode_again(file.as_bytes(), keyring.seal.as_ref()).map_err(named)?;
        Ok((file, changed))
    })
}

impl Keyring {
    fn change(&mut self, change: &KeyringChange<'_>, now: SystemTime) -> Result<Option<KeyringKey>, ProviderError> {
        let key = match *change {
            KeyringChange::NewVersion(id) => {
                let key = self.rotatable(id)?;
                let newest = key.versions.last().map_or(0, |version| version.number);
                let number = newest.checked_add(1).ok_or_else(|| unusable("it has all versions that there can be"))?;
                key.versions.push(Version { number, created: Some(seconds(now)), material: Secret::random() });
                key
            }
            KeyringChange::NewKey => {
                self.keys.push(Key::generate(now));
                return Ok(self.keys.last().map(describe));
            }
            KeyringChange::Disable(id) => self.with_state(id, KeyState::Disabled)?,
            KeyringChange::Enable(id) => self.with_state(id, KeyState::Enabled)?,
            KeyringChange::Passphrase(passphrase) => {
                self.put_under(passphrase)?;
                return Ok(None);
            }
        };
        Ok(Some(describe(key)))
    }

    fn rotatable(&mut self, id: Option<&str>) -> Result<&mut Key, ProviderError> {
        let key = match id {
            Some(id) => self.find(id)?,
            None => {
                let newest = self.keys.iter_mut().rfind(|key| key.state == KeyState::Enabled);
                newest.ok_or_else(|| unusable("every key is disabled: enable one"))?
            }
        };
        match key.state {
            KeyState::Enabled => Ok(key),
            KeyState::Disabled => Err(unusable("the key is disabled: enable it first")),
        }
    }

    fn with_state(&mut self, id: &str, state: KeyState) -> Result<&mut Key, ProviderError> {
        let key = self.find(id)?;
        key.state = state;
        Ok(key)
    }

    fn find(&mut self, id: &str) -> Result<&mut Key, ProviderError> {
        let ids: Vec<_> = self.keys.iter().map(|key| key.id.clone()).collect();
        let missing = || {
            let message = format!("no key {id:?} here, only {}", ids.join(", "));
            ProviderError::new(ProviderErrorKind::KeyNotFound, message)
        };
        self.keys.iter_mut().find(|key| key.id == id).ok_or_else(missing)
    }
}

fn unusable(why: &str) -> ProviderError {
    ProviderError::new(ProviderErrorKind::KeyUnusable, why)
}

fn describe(key: &Key) -> KeyringKey {
    KeyringKey {
        id: key.id.clone(),
        enabled: key.state == KeyState::Enabled,
        created: key.created,
        versions: key.versions.iter().map(|version| (version.number, version.created.unwrap_or(key.created))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tempfile::TempDir;

    use super::super::create_local;
    use super::*;

    fn new_keyring(passphrase: Option<&Passphrase>) -> (TempDir, PathBuf, String) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyring");
        create_local(&path, passphrase).unwrap();
        let id = list_keyring(&path, passphrase).unwrap()[0].id.clone();
        (directory, path, id)
    }

    fn kind_of<T>(result: Result<T, ProviderError>) -> ProviderErrorKind {
        result.err().unwrap().kind
    }

    #[test]
    fn versions_and_keys_are_added_and_nothing_goes() {
        let (_directory, path, id) = new_keyring(None);
        let before = std::fs::read_to_string(&path).unwrap();
        let rotated = change_keyring(&path, None, &KeyringChange::NewVersion(None)).unwrap().unwrap();
        assert_eq!((rotated.id.as_str(), rotated.versions.len(), rotated.versions[1].0), (id.as_str(), 2, 2));
        assert!(rotated.versions[0].1 <= rotated.versions[1].1);
        let made = change_keyring(&path, None, &KeyringChange::NewKey).unwrap().unwrap();
        assert_eq!(list_keyring(&path, None).unwrap(), [rotated, made]);
        let after = std::fs::read_to_string(&path).unwrap();
        let material = before.lines().find(|line| line.starts_with("material")).unwrap();
        assert!(after.contains(material));
    }

    #[test]
    fn keys_are_disabled_and_enabled() {
        let (_directory, path, id) = new_keyring(None);
        let disabled = change_keyring(&path, None, &KeyringChange::Disable(&id)).unwrap().unwrap();
        assert!(!disabled.enabled && !list_keyring(&path, None).unwrap()[0].enabled);
        for rotate in [KeyringChange::NewVersion(None), KeyringChange::NewVersion(Some(&id))] {
            assert_eq!(kind_of(change_keyring(&path, None, &rotate)), ProviderErrorKind::KeyUnusable);
        }
        assert_eq!(
            kind_of(change_keyring(&path, None, &KeyringChange::Disable("k-0"))),
            ProviderErrorKind::KeyNotFound
        );
        assert!(change_keyring(&path, None, &KeyringChange::Enable(&id)).unwrap().unwrap().enabled);
    }

    #[test]
    fn another_passphrase_is_the_only_one() {
        let [old, new] = ["old", "new"].map(|text| Passphrase::new(text.into()));
        let (_directory, path, _) = new_keyring(Some(&old));
        let keys = list_keyring(&path, Some(&old)).unwrap();
        let to_new = KeyringChange::Passphrase(Some(&new));
        assert_eq!(kind_of(change_keyring(&path, Some(&new), &to_new)), ProviderErrorKind::Credentials);
        assert_eq!(kind_of(change_keyring(&path, None, &to_new)), ProviderErrorKind::Credentials);
        let empty = Passphrase::new(Vec::new());
        let to_empty = KeyringChange::Passphrase(Some(&empty));
        assert_eq!(kind_of(change_keyring(&path, Some(&old), &to_empty)), ProviderErrorKind::Credentials);
        change_keyring(&path, Some(&old), &to_new).unwrap();
        assert_eq!(kind_of(list_keyring(&path, Some(&old))), ProviderErrorKind::Credentials);
        assert_eq!(list_keyring(&path, Some(&new)).unwrap(), keys);
        change_keyring(&path, Some(&new), &KeyringChange::Passphrase(None)).unwrap();
        assert_eq!(list_keyring(&path, None).unwrap(), keys);
    }

    /// What a killed process left has keys in it.
    #[test]
    fn nothing_is_left_beside_a_keyring() {
        let (directory, path, _) = new_keyring(None);
        let left = directory.path().join(".keyring.0123456789abcdef");
        let other = directory.path().join(".keyring.notours");
        std::fs::write(&left, "half").unwrap();
        std::fs::write(&other, "whole").unwrap();
        change_keyring(&path, None, &KeyringChange::NewKey).unwrap();
        assert!(!left.exists() && other.exists());
        assert_eq!(directory.path().read_dir().unwrap().count(), 2);
    }

    #[test]
    fn changes_by_many_are_all_there() {
        let (_directory, path, _) = new_keyring(None);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| change_keyring(&path, None, &KeyringChange::NewVersion(None)).unwrap());
            }
        });
        assert_eq!(list_keyring(&path, None).unwrap()[0].versions.len(), 9);
    }
}
