//! The keyring file: wrapping keys with ids, versions and states, as text.
//!
//! The body is TOML. Unsealed, it holds the keys themselves, in base64. Sealed, it holds none: a box with all of them
//! in the order of the body (`nonce | ciphertext | tag`, XAES-256-GCM) follows it, under a key that Argon2id makes of a
//! passphrase, and every byte of the body is the box's associated data.
//!
//! Invariants: what is parsed has at least one key, unique well-formed ids and rising version numbers; no error repeats
//! text of the file.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zeroize::Zeroizing;

use super::super::{ProviderError, ProviderErrorKind};
use super::Passphrase;
use super::passphrase_seal::{KdfSettings, Seal, missing_passphrase, wrong_passphrase};
use crate::crypto::{Secret, random_array};
use crate::format::hex;

/// The largest keyring that is read, in bytes.
pub(super) const MAX_LEN: usize = 262_144;
/// Bytes of a wrapping key.
pub(super) const KEY_LEN: usize = 32;
const FORMAT_VERSION: u32 = 1;
const UNSEALED_PREFACE: &str =
    "# A kmsfs keyring. Whoever reads this file has its keys; without it what they wrap is lost.\n";
const SEALED_PREFACE: &str =
    "# A kmsfs keyring under a passphrase. The seal authenticates every byte above it: do not edit.\n";
const SEAL: &str = "\n[seal]\nbox = \"";
const SEAL_END: &str = "\"\n";

/// The keys of a keyring, open.
pub(super) struct Keyring {
    /// From the oldest to the newest.
    pub(super) keys: Vec<Key>,
    /// What it is under, if it is under a passphrase.
    pub(super) seal: Option<Arc<Seal>>,
}

/// A wrapping key.
pub(super) struct Key {
    /// `k-` and 16 hexadecimal digits.
    pub(super) id: String,
    /// Whether it may be used.
    pub(super) state: KeyState,
    /// Seconds since 1970.
    pub(super) created: u64,
    /// From the oldest to the newest, which wraps; the others only unwrap.
    pub(super) versions: Vec<Version>,
}

/// A version of a wrapping key.
pub(super) struct Version {
    /// From 1, rising.
    pub(super) number: u32,
    /// Seconds since 1970; of the first one, when the key was made.
    pub(super) created: Option<u64>,
    /// The key itself.
    pub(super) material: Secret<KEY_LEN>,
}

/// Whether a key may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum KeyState {
    /// For everything.
    Enabled,
    /// For nothing, until it is enabled again.
    Disabled,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    format: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    passphrase: Option<KdfSettings>,
    key: Vec<KeyEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyEntry {
    id: String,
    state: KeyState,
    created: u64,
    version: Vec<VersionEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VersionEntry {
    number: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    created: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    material: Option<Material>,
}

/// The one field that every version of the format has.
#[derive(Deserialize)]
struct FormatVersion {
    format: u32,
}

impl Keyring {
    /// A keyring with one new key.
    pub(super) fn generate(now: SystemTime) -> Self {
        Self { keys: vec![Key::generate(now)], seal: None }
    }

    /// Puts it under a passphrase, or under none. It gets another key than it may have had under the same one.
    ///
    /// # Errors
    /// `Credentials` if the passphrase is empty.
    pub(super) fn put_under(&mut self, passphrase: Option<&Passphrase>) -> Result<(), ProviderError> {
        let seal = passphrase.map(|passphrase| Seal::new(passphrase, KdfSettings::new())).transpose()?;
        self.seal = seal.map(Arc::new);
        Ok(())
    }

    /// The file of this keyring, under its passphrase if it has one.
    ///
    /// # Errors
    /// `Misconfigured` if it is too large.
    pub(super) fn encode(&self) -> Result<Zeroizing<String>, ProviderError> {
        let file = match &self.seal {
            None => self.body(None, UNSEALED_PREFACE)?,
            Some(seal) => {
                let body = self.body(Some(seal.settings.clone()), SEALED_PREFACE)?;
                let sealed = seal.seal(body.as_bytes(), &self.materials());
                Zeroizing::new(format!("{}{SEAL}{}{SEAL_END}", *body, BASE64.encode(sealed)))
            }
        };
        if file.len() > MAX_LEN { Err(invalid(&format!("it would be larger than {MAX_LEN} bytes"))) } else { Ok(file) }
    }

    fn body(&self, passphrase: Option<KdfSettings>, preface: &str) -> Result<Zeroizing<String>, ProviderError> {
        let sealed = passphrase.is_some();
        let key = self.keys.iter().map(|key| key.entry(sealed)).collect();
        let body = toml::to_string(&Body { format: FORMAT_VERSION, passphrase, key }).map(Zeroizing::new);
        let body = body.map_err(|_| invalid("it has no text form"))?;
        Ok(Zeroizing::new(format!("{preface}{}", *body)))
    }

    /// Every version's key, one after the other.
    fn materials(&self) -> Zeroizing<Vec<u8>> {
        let versions = || self.keys.iter().flat_map(|key| &key.versions);
        let mut all = Zeroizing::new(Vec::with_capacity(versions().count() * KEY_LEN));
        versions().for_each(|version| all.extend_from_slice(version.material.expose()));
        all
    }

    /// Whether the keyring in `file` is under a passphrase, by what the file says of itself.
    pub(super) fn is_sealed(file: &[u8]) -> bool {
        std::str::from_utf8(file).is_ok_and(|text| text.contains(SEAL))
    }

    /// The keyring in `file`.
    ///
    /// # Errors
    /// `Misconfigured` if it is not a keyring that this program knows; `Credentials` if it is sealed and the passphrase
    /// is missing or wrong.
    pub(super) fn decode(file: &[u8], passphrase: Option<&Passphrase>) -> Result<Self, ProviderError> {
        Self::decode_with(file, |settings| {
            let passphrase = passphrase.ok_or_else(missing_passphrase)?;
            Ok(Arc::new(Seal::new(passphrase, settings.clone())?))
        })
    }

    /// The keyring in `file`, which was under `seal` before and still is, if it was under one.
    ///
    /// # Errors
    /// As [`Self::decode`]; `Credentials` if it got another passphrase.
    pub(super) fn decode_again(file: &[u8], seal: Option<&Arc<Seal>>) -> Result<Self, ProviderError> {
        let keyring = Self::decode_with(file, |settings| {
            let same = seal.filter(|seal| seal.settings == *settings);
            same.cloned().ok_or_else(wrong_passphrase)
        })?;
        // Whoever can take a passphrase away can put his own keys in.
        if keyring.seal.is_some() == seal.is_some() { Ok(keyring) } else { Err(wrong_passphrase()) }
    }

    fn decode_with(
        file: &[u8],
        unseal: impl FnOnce(&KdfSettings) -> Result<Arc<Seal>, ProviderError>,
    ) -> Result<Self, ProviderError> {
        if file.len() > MAX_LEN {
            return Err(invalid(&format!("it is larger than {MAX_LEN} bytes")));
        }
        let text = std::str::from_utf8(file).map_err(|_| invalid("it is not text"))?;
        match text.split_once(SEAL) {
            None => Self::decode_unsealed(text),
            Some((body, seal)) => Self::decode_sealed(body, seal, unseal),
        }
    }

    fn decode_unsealed(text: &str) -> Result<Self, ProviderError> {
        let body = Body::parse(text)?;
        if body.passphrase.is_some() {
            return Err(invalid("its seal is missing: it was cut or edited"));
        }
        Self::of(body, None, |material| material.ok_or_else(|| invalid("a version has no key material")).map(|m| m.0))
    }

    fn decode_sealed(
        body_text: &str,
        seal: &str,
        unseal: impl FnOnce(&KdfSettings) -> Result<Arc<Seal>, ProviderError>,
    ) -> Result<Self, ProviderError> {
        let damaged = || invalid("its seal is damaged: it was cut or edited");
        let sealed = seal.strip_suffix(SEAL_END).and_then(|text| BASE64.decode(text).ok()).ok_or_else(damaged)?;
        let body = Body::parse(body_text)?;
        let seal = unseal(body.passphrase.as_ref().ok_or_else(damaged)?)?;
        let materials = seal.open(body_text.as_bytes(), &sealed)?;
        let versions: usize = body.key.iter().map(|key| key.version.len()).sum();
        if materials.len() != versions * KEY_LEN {
            return Err(invalid("its seal holds another number of keys than its body names"));
        }
        let mut materials = materials.as_chunks::<KEY_LEN>().0.iter();
        Self::of(body, Some(seal), |material| match (material, materials.next()) {
            (None, Some(bytes)) => Secret::fill_with(|secret| {
                secret.copy_from_slice(bytes);
                Ok(())
            }),
            _ => Err(invalid("it is sealed, and has key material outside its seal")),
        })
    }

    fn of(
        body: Body,
        seal: Option<Arc<Seal>>,
        mut material: impl FnMut(Option<Material>) -> Result<Secret<KEY_LEN>, ProviderError>,
    ) -> Result<Self, ProviderError> {
        let mut version = |VersionEntry { number, created, material: stored }| {
            Ok::<_, ProviderError>(Version { number, created, material: material(stored)? })
        };
        let mut keys = Vec::with_capacity(body.key.len());
        for KeyEntry { id, state, created, version: entries } in body.key {
            let versions = entries.into_iter().map(&mut version).collect::<Result<_, _>>()?;
            keys.push(Key { id, state, created, versions });
        }
        Ok(Self { keys, seal })
    }
}

impl Key {
    /// A new key with one version.
    pub(super) fn generate(now: SystemTime) -> Self {
        let versions = vec![Version { number: 1, created: None, material: Secret::random() }];
        let id = format!("k-{}", hex::encode(&random_array::<8>()));
        Self { id, state: KeyState::Enabled, created: seconds(now), versions }
    }

    fn entry(&self, sealed: bool) -> KeyEntry {
        let version = |version: &Version| VersionEntry {
            number: version.number,
            created: version.created,
            material: (!sealed).then(|| Material::copy_of(version.material.expose())),
        };
        KeyEntry {
            id: self.id.clone(),
            state: self.state,
            created: self.created,
            version: self.versions.iter().map(version).collect(),
        }
    }
}

impl Body {
    /// Parses and checks everything but the keys themselves.
    fn parse(text: &str) -> Result<Self, ProviderError> {
        let version = toml::from_str::<FormatVersion>(text).map_err(|error| syntax(text, &error))?.format;
        if version != FORMAT_VERSION {
            return Err(invalid(&format!(
                "it has format version {version}, and this program knows version {FORMAT_VERSION}: use a newer kmsfs"
            )));
        }
        let body: Self = toml::from_str(text).map_err(|error| syntax(text, &error))?;
        body.check()?;
        Ok(body)
    }

    fn check(&self) -> Result<(), ProviderError> {
        if self.key.is_empty() {
            return Err(invalid("it has no key"));
        }
        let mut ids = BTreeSet::new();
        for key in &self.key {
            if key.id.strip_prefix("k-").and_then(hex::decode::<8>).is_none() || !ids.insert(&key.id) {
                return Err(invalid("a key id is malformed or is there twice"));
            }
            let numbers: Vec<u32> = key.version.iter().map(|version| version.number).collect();
            if numbers.first().is_none_or(|first| *first == 0) || !numbers.is_sorted_by(|a, b| a < b) {
                return Err(invalid("a key has no versions, or their numbers do not rise from 1"));
            }
        }
        Ok(())
    }
}

/// A key in base64.
struct Material(Secret<KEY_LEN>);

impl Material {
    fn copy_of(bytes: &[u8; KEY_LEN]) -> Self {
        let copy = Secret::fill_with(|secret| {
            secret.copy_from_slice(bytes);
            Ok::<_, std::convert::Infallible>(())
        });
        let Ok(secret) = copy;
        Self(secret)
    }
}

impl Serialize for Material {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Zeroizing::new(BASE64.encode(self.0.expose())))
    }
}

impl<'de> Deserialize<'de> for Material {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Zeroizing::new(String::deserialize(deserializer)?);
        let bytes = Zeroizing::new(BASE64.decode(text.as_bytes()).unwrap_or_default());
        let bytes =
            <&[u8; KEY_LEN]>::try_from(bytes.as_slice()).map_err(|_| de::Error::custom("not 32 bytes in base64"))?;
        Ok(Self::copy_of(bytes))
    }
}

/// Seconds since 1970.
pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs())
}

pub(super) fn invalid(what: &str) -> ProviderError {
    ProviderError::new(ProviderErrorKind::Misconfigured, format!("not a valid keyring: {what}"))
}

/// Says where, and not what is there: it may be a key.
fn syntax(text: &str, error: &toml::de::Error) -> ProviderError {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    invalid(&format!("line {} is malformed, unknown, or lacks a field", before.matches('\n').count() + 1))
}

#[cfg(test)]
#[path = "keyring_tests.rs"]
mod tests;
