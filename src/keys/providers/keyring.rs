//! The keyring file: wrapping keys with ids, versions and states, as text.
//!
//! The body is TOML. Unsealed, it holds the keys themselves, in base64. Sealed, it holds none: a box with all of them
//! in the order of the body (`nonce | ciphertext | tag`, XAES-256-GCM) follows it, under a key that Argon2id makes of a
//! passphrase, and every byte of the body is the box's associated data.
//!
//! Invariants: what is parsed has at least one key, unique well-formed ids and rising version numbers; the costs of the
//! key derivation are within [`KdfSettings::CAPS`] before it runs; no error repeats text of the file.

use std::collections::BTreeSet;
use std::time::SystemTime;

use argon2::{Algorithm, Argon2, Block, Params, Version as Argon2Version};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zeroize::Zeroizing;

use super::super::{ProviderError, ProviderErrorKind};
use super::Passphrase;
use crate::crypto::{NONCE_LEN, Secret, Suite, SuiteKey, TAG_LEN, random_array};
use crate::format::hex;

/// The largest keyring that is read, in bytes.
pub(super) const MAX_LEN: usize = 262_144;
/// Bytes of a wrapping key.
const KEY_LEN: usize = 32;
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
}

/// A wrapping key.
pub(super) struct Key {
    /// `k-` and 16 hexadecimal digits.
    pub(super) id: String,
    /// Whether it may be used.
    pub(super) state: KeyState,
    /// Seconds since 1970.
    created: u64,
    /// From the oldest to the newest, which wraps; the others only unwrap.
    pub(super) versions: Vec<Version>,
}

/// A version of a wrapping key.
pub(super) struct Version {
    /// From 1, rising.
    pub(super) number: u32,
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
        let created = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs());
        let versions = vec![Version { number: 1, material: Secret::random() }];
        let id = format!("k-{}", hex::encode(&random_array::<8>()));
        Self { keys: vec![Key { id, state: KeyState::Enabled, created, versions }] }
    }

    /// The file of this keyring, sealed if there is a passphrase.
    ///
    /// # Errors
    /// `Credentials` if the passphrase is empty.
    pub(super) fn encode(&self, passphrase: Option<&Passphrase>) -> Result<Zeroizing<String>, ProviderError> {
        match passphrase {
            None => self.body(None, UNSEALED_PREFACE),
            Some(passphrase) => self.seal(passphrase, KdfSettings::new()),
        }
    }

    fn seal(&self, passphrase: &Passphrase, settings: KdfSettings) -> Result<Zeroizing<String>, ProviderError> {
        let key = settings.derive(passphrase)?;
        let body = self.body(Some(settings), SEALED_PREFACE)?;
        let sealed = seal_box(&key, body.as_bytes(), &self.materials());
        Ok(Zeroizing::new(format!("{}{SEAL}{}{SEAL_END}", *body, BASE64.encode(sealed))))
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

    /// The keyring in `file`.
    ///
    /// # Errors
    /// `Misconfigured` if it is not a keyring that this program knows; `Credentials` if it is sealed and the passphrase
    /// is missing or wrong.
    pub(super) fn decode(file: &[u8], passphrase: Option<&Passphrase>) -> Result<Self, ProviderError> {
        if file.len() > MAX_LEN {
            return Err(invalid(&format!("it is larger than {MAX_LEN} bytes")));
        }
        let text = std::str::from_utf8(file).map_err(|_| invalid("it is not text"))?;
        match text.split_once(SEAL) {
            None => Self::decode_unsealed(text),
            Some((body, seal)) => Self::decode_sealed(body, seal, passphrase),
        }
    }

    fn decode_unsealed(text: &str) -> Result<Self, ProviderError> {
        let body = Body::parse(text)?;
        if body.passphrase.is_some() {
            return Err(invalid("its seal is missing: it was cut or edited"));
        }
        Self::of(body, |entry| entry.material.ok_or_else(|| invalid("a version has no key material")).map(|m| m.0))
    }

    fn decode_sealed(body_text: &str, seal: &str, passphrase: Option<&Passphrase>) -> Result<Self, ProviderError> {
        let damaged = || invalid("its seal is damaged: it was cut or edited");
        let sealed = seal.strip_suffix(SEAL_END).and_then(|text| BASE64.decode(text).ok()).ok_or_else(damaged)?;
        let body = Body::parse(body_text)?;
        let settings = body.passphrase.as_ref().ok_or_else(damaged)?;
        let passphrase = passphrase.ok_or_else(missing_passphrase)?;
        let materials = open_box(&settings.derive(passphrase)?, body_text.as_bytes(), &sealed)?;
        Self::of_sealed(body, &materials)
    }

    fn of_sealed(body: Body, materials: &[u8]) -> Result<Self, ProviderError> {
        let versions: usize = body.key.iter().map(|key| key.version.len()).sum();
        if materials.len() != versions * KEY_LEN {
            return Err(invalid("its seal holds another number of keys than its body names"));
        }
        let mut materials = materials.as_chunks::<KEY_LEN>().0.iter();
        Self::of(body, |entry| match (entry.material, materials.next()) {
            (None, Some(bytes)) => Secret::fill_with(|secret| {
                secret.copy_from_slice(bytes);
                Ok(())
            }),
            _ => Err(invalid("it is sealed, and has key material outside its seal")),
        })
    }

    fn of(
        body: Body,
        mut material: impl FnMut(VersionEntry) -> Result<Secret<KEY_LEN>, ProviderError>,
    ) -> Result<Self, ProviderError> {
        let mut version =
            |entry: VersionEntry| Ok::<_, ProviderError>(Version { number: entry.number, material: material(entry)? });
        let mut keys = Vec::with_capacity(body.key.len());
        for KeyEntry { id, state, created, version: entries } in body.key {
            let versions = entries.into_iter().map(&mut version).collect::<Result<_, _>>()?;
            keys.push(Key { id, state, created, versions });
        }
        Ok(Self { keys })
    }
}

impl Key {
    fn entry(&self, sealed: bool) -> KeyEntry {
        let version = |version: &Version| VersionEntry {
            number: version.number,
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

/// How a passphrase becomes a key.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct KdfSettings {
    kdf: Kdf,
    memory_kib: u32,
    passes: u32,
    lanes: u32,
    #[serde(serialize_with = "salt_to_text", deserialize_with = "salt_of_text")]
    salt: [u8; 16],
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kdf {
    Argon2id,
}

impl KdfSettings {
    /// The most memory in KiB, passes and lanes that a keyring may ask for: a crafted one must not take the machine.
    const CAPS: (u32, u32, u32) = (1024 * 1024, 16, 16);

    fn new() -> Self {
        Self { kdf: Kdf::Argon2id, memory_kib: 64 * 1024, passes: 3, lanes: 4, salt: random_array() }
    }

    /// The settings for Argon2.
    ///
    /// # Errors
    /// `Misconfigured` if they are above the caps, or below what Argon2 takes.
    fn params(&self) -> Result<Params, ProviderError> {
        let (memory, passes, lanes) = Self::CAPS;
        if self.memory_kib > memory || self.passes > passes || self.lanes > lanes {
            return Err(invalid(&format!(
                "its passphrase settings ask for more than {memory} KiB, {passes} passes or {lanes} lanes"
            )));
        }
        Params::new(self.memory_kib, self.passes, self.lanes, Some(KEY_LEN))
            .map_err(|error| invalid(&format!("its passphrase settings cannot work: {error}")))
    }

    /// The key that the passphrase makes.
    fn derive(&self, passphrase: &Passphrase) -> Result<SuiteKey, ProviderError> {
        let (params, Kdf::Argon2id) = (self.params()?, &self.kdf);
        let mut memory = Zeroizing::new(Vec::new());
        let too_much = |_| invalid(&format!("its passphrase needs {} KiB of memory: too much here", self.memory_kib));
        memory.try_reserve_exact(params.block_count()).map_err(too_much)?;
        memory.resize(params.block_count(), Block::new());
        let argon2 = Argon2::new(Algorithm::Argon2id, Argon2Version::V0x13, params);
        let passphrase = passphrase.expose()?;
        let key = Secret::fill_with(|key| {
            argon2.hash_password_into_with_memory(passphrase, &self.salt, key, memory.as_mut_slice())
        });
        let key = key.map_err(|error| invalid(&format!("its passphrase cannot be used: {error}")))?;
        Ok(SuiteKey::new(Suite::Xaes256Gcm, &key))
    }
}

/// `nonce | ciphertext | tag` of `plain`.
fn seal_box(key: &SuiteKey, body: &[u8], plain: &[u8]) -> Vec<u8> {
    let nonce: [u8; NONCE_LEN] = random_array();
    let mut sealed = vec![0; NONCE_LEN + plain.len()];
    sealed[..NONCE_LEN].copy_from_slice(&nonce);
    let tag = key.session().seal(&nonce, body, plain, &mut sealed[NONCE_LEN..]);
    sealed.extend_from_slice(&tag);
    sealed
}

fn open_box(key: &SuiteKey, body: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, ProviderError> {
    let parts = sealed
        .split_first_chunk::<NONCE_LEN>()
        .and_then(|(nonce, rest)| rest.split_last_chunk::<TAG_LEN>().map(|(cipher, tag)| (nonce, cipher, tag)));
    let (nonce, cipher, tag) = parts.ok_or_else(|| invalid("its seal is too short: it was cut or edited"))?;
    let mut plain = Zeroizing::new(vec![0; cipher.len()]);
    key.session().open(nonce, body, cipher, tag, &mut plain).map_err(|_| wrong_passphrase())?;
    Ok(plain)
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

fn salt_to_text<S: Serializer>(salt: &[u8; 16], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&BASE64.encode(salt))
}

fn salt_of_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 16], D::Error> {
    let bytes = BASE64.decode(String::deserialize(deserializer)?).unwrap_or_default();
    bytes.try_into().map_err(|_| de::Error::custom("not 16 bytes in base64"))
}

fn invalid(what: &str) -> ProviderError {
    ProviderError::new(ProviderErrorKind::Misconfigured, format!("not a valid keyring: {what}"))
}

/// Says where, and not what is there: it may be a key.
fn syntax(text: &str, error: &toml::de::Error) -> ProviderError {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    invalid(&format!("line {} is malformed, unknown, or lacks a field", before.matches('\n').count() + 1))
}

fn missing_passphrase() -> ProviderError {
    let message = "sealed under a passphrase: give it with --passphrase-file or in KMSFS_PASSPHRASE";
    ProviderError::new(ProviderErrorKind::Credentials, message)
}

fn wrong_passphrase() -> ProviderError {
    ProviderError::new(ProviderErrorKind::Credentials, "wrong passphrase, or the keyring was changed")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Settings that cost little, where the cost is not the point.
    fn cheap() -> KdfSettings {
        KdfSettings { memory_kib: 64, passes: 1, ..KdfSettings::new() }
    }

    fn passphrase(text: &str) -> Passphrase {
        Passphrase::new(text.as_bytes().to_vec())
    }

    fn keyring() -> Keyring {
        let mut keyring = Keyring::generate(SystemTime::UNIX_EPOCH);
        let mut newer = Keyring::generate(SystemTime::now());
        newer.keys[0].state = KeyState::Disabled;
        newer.keys[0].versions.push(Version { number: 7, material: Secret::random() });
        keyring.keys.append(&mut newer.keys);
        keyring
    }

    type Facts = Vec<(String, KeyState, u64, Vec<(u32, [u8; 32])>)>;

    fn facts(keyring: &Keyring) -> Facts {
        let versions = |key: &Key| key.versions.iter().map(|v| (v.number, *v.material.expose())).collect();
        keyring.keys.iter().map(|key| (key.id.clone(), key.state, key.created, versions(key))).collect()
    }

    fn refusal(file: &str, passphrase: Option<&Passphrase>) -> ProviderError {
        Keyring::decode(file.as_bytes(), passphrase).err().unwrap()
    }

    #[test]
    fn an_unsealed_keyring_round_trips() {
        let keyring = keyring();
        let file = keyring.encode(None).unwrap();
        let again = Keyring::decode(file.as_bytes(), None).unwrap();
        assert_eq!(facts(&again), facts(&keyring));
        assert_eq!(*again.encode(None).unwrap(), *file);
    }

    #[test]
    fn a_sealed_keyring_round_trips_and_shows_no_key() {
        let keyring = keyring();
        let file = keyring.encode(Some(&passphrase("right"))).unwrap();
        assert_eq!(facts(&Keyring::decode(file.as_bytes(), Some(&passphrase("right"))).unwrap()), facts(&keyring));
        assert!(file.contains("memory-kib = 65536\npasses = 3\nlanes = 4\n"), "{}", *file);
        for (_, _, _, versions) in facts(&keyring) {
            assert!(versions.iter().all(|(_, material)| !file.contains(&BASE64.encode(material))));
        }
    }

    #[test]
    fn a_sealed_keyring_needs_its_passphrase() {
        let file = keyring().seal(&passphrase("right"), cheap()).unwrap();
        let wrong = refusal(&file, Some(&passphrase("wrong")));
        assert_eq!((wrong.kind, wrong.to_string()), (wrong_passphrase().kind, wrong_passphrase().to_string()));
        let missing = refusal(&file, None);
        assert_eq!(missing.kind, ProviderErrorKind::Credentials);
        assert!(missing.message.contains("--passphrase-file") && missing.message.contains("KMSFS_PASSPHRASE"));
        assert_eq!(refusal(&file, Some(&passphrase(""))).kind, ProviderErrorKind::Credentials);
        let empty = keyring().encode(Some(&passphrase(""))).err().unwrap();
        assert_eq!(empty.kind, ProviderErrorKind::Credentials);
    }

    #[test]
    fn no_byte_of_a_sealed_keyring_can_be_changed() {
        let file = keyring().seal(&passphrase("right"), cheap()).unwrap();
        let right = passphrase("right");
        for at in 0..file.len() {
            let mut changed = file.as_bytes().to_vec();
            changed[at] ^= 1;
            assert!(Keyring::decode(&changed, Some(&right)).is_err(), "byte {at} of {}", *file);
            assert!(Keyring::decode(&file.as_bytes()[..at], Some(&right)).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_sealed_key_cannot_be_enabled_by_hand() {
        let file = keyring().seal(&passphrase("right"), cheap()).unwrap();
        let changed = file.replace("disabled", "enabled");
        assert_eq!(refusal(&changed, Some(&passphrase("right"))), wrong_passphrase());
    }

    #[test]
    fn costs_are_capped_before_they_are_paid() {
        let file = keyring().seal(&passphrase("right"), cheap()).unwrap();
        for (from, to) in [
            ("memory-kib = 64", "memory-kib = 4294967295"),
            ("passes = 1", "passes = 4294967295"),
            ("passes = 1", "passes = 0"),
            ("lanes = 4", "lanes = 17"),
        ] {
            let error = refusal(&file.replace(from, to), Some(&passphrase("right")));
            assert_eq!(error.kind, ProviderErrorKind::Misconfigured, "{to}");
        }
    }

    #[test]
    fn every_defect_is_refused_and_no_key_is_repeated() {
        let keyring = keyring();
        let file = keyring.encode(None).unwrap();
        let material = BASE64.encode(keyring.keys[0].versions[0].material.expose());
        let cases = [
            ("format = 1", "format = 2", "newer kmsfs"),
            ("format = 1\n", "", "line 1 "),
            ("format = 1\n", "format = 1\nmore = 1\n", "line 3 "),
            ("state = \"enabled\"", "state = \"on\"", "line 6 "),
            ("k-", "K-", "key id"),
            (keyring.keys[1].id.as_str(), keyring.keys[0].id.as_str(), "key id"),
            ("number = 7", "number = 1", "rise"),
            ("number = 1", "number = 0", "rise"),
            (material.as_str(), "AAAA", "line 11 "),
            ("material", "number", "line"),
            ("\"\n\n[[key]]", "\n\n[[key]]", "line"),
        ];
        for (from, to, says) in cases {
            let changed = file.replacen(from, to, 1);
            assert_ne!(changed, *file, "{from}");
            let error = refusal(&changed, None);
            assert_eq!(error.kind, ProviderErrorKind::Misconfigured);
            assert!(error.message.contains(says) && !error.message.contains(&material), "{to}: {error}");
        }
        assert!(refusal("format = 1\nkey = []\n", None).message.contains("no key"));
        assert!(refusal(&" ".repeat(MAX_LEN + 1), None).message.contains("larger"));
        assert!(Keyring::decode(&[0xff], None).is_err());
    }

    #[test]
    fn key_material_must_be_where_the_seal_says() {
        let (keyring, right) = (keyring(), passphrase("right"));
        let unsealed = keyring.encode(None).unwrap();
        let sealed = keyring.seal(&right, cheap()).unwrap();
        let (body, seal) = sealed.split_once(SEAL).unwrap();
        assert!(refusal(body, Some(&right)).message.contains("seal is missing"));
        assert!(refusal(&format!("{}{SEAL}{seal}", *unsealed), Some(&right)).message.contains("seal is damaged"));
        let without: String =
            unsealed.lines().filter(|line| !line.starts_with("material")).map(|l| format!("{l}\n")).collect();
        assert!(refusal(&without, None).message.contains("no key material"));
        assert!(refusal(&format!("{body}{SEAL}AAAA\"\n"), Some(&right)).message.contains("too short"));
    }
}
