//! The seal of a keyring under a passphrase: Argon2id makes a key of it, and one box under that key holds all wrapping keys.
//! `docs/FORMAT.md` section 5.5.
//!
//! Invariant: the costs of the key derivation are within [`KdfSettings::CAPS`] before it runs.

use argon2::{Algorithm, Argon2, Block, Params, Version as Argon2Version};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zeroize::Zeroizing;

use super::super::{ProviderError, ProviderErrorKind};
use super::Passphrase;
use super::keyring::{KEY_LEN, invalid};
use crate::crypto::{NONCE_LEN, Secret, Suite, SuiteKey, TAG_LEN, random_array};

/// The key that a passphrase made, and of what else.
pub(super) struct Seal {
    pub(super) settings: KdfSettings,
    key: SuiteKey,
}

impl Seal {
    /// The seal that `passphrase` makes.
    ///
    /// # Errors
    /// `Credentials` if the passphrase is empty, `Misconfigured` if the settings cannot work.
    pub(super) fn new(passphrase: &Passphrase, settings: KdfSettings) -> Result<Self, ProviderError> {
        Ok(Self { key: settings.derive(passphrase)?, settings })
    }

    /// `nonce | ciphertext | tag` of `plain`, bound to `body`.
    pub(super) fn seal(&self, body: &[u8], plain: &[u8]) -> Vec<u8> {
        let nonce: [u8; NONCE_LEN] = random_array();
        let mut sealed = vec![0; NONCE_LEN + plain.len()];
        sealed[..NONCE_LEN].copy_from_slice(&nonce);
        let tag = self.key.session().seal(&nonce, body, plain, &mut sealed[NONCE_LEN..]);
        sealed.extend_from_slice(&tag);
        sealed
    }

    /// What [`Self::seal`] sealed.
    ///
    /// # Errors
    /// `Credentials` if the passphrase was another one or something was changed; `Misconfigured` if `sealed` was cut.
    pub(super) fn open(&self, body: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, ProviderError> {
        let parts = sealed
            .split_first_chunk::<NONCE_LEN>()
            .and_then(|(nonce, rest)| rest.split_last_chunk::<TAG_LEN>().map(|(cipher, tag)| (nonce, cipher, tag)));
        let (nonce, cipher, tag) = parts.ok_or_else(|| invalid("its seal is too short: it was cut or edited"))?;
        let mut plain = Zeroizing::new(vec![0; cipher.len()]);
        self.key.session().open(nonce, body, cipher, tag, &mut plain).map_err(|_| wrong_passphrase())?;
        Ok(plain)
    }
}

/// How a passphrase becomes a key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct KdfSettings {
    kdf: Kdf,
    memory_kib: u32,
    passes: u32,
    lanes: u32,
    #[serde(serialize_with = "salt_to_text", deserialize_with = "salt_of_text")]
    salt: [u8; 16],
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kdf {
    Argon2id,
}

impl KdfSettings {
    /// The most memory in KiB, passes and lanes that a keyring may ask for: a crafted one must not take the machine.
    const CAPS: (u32, u32, u32) = (1024 * 1024, 16, 16);

    pub(super) fn new() -> Self {
        Self { kdf: Kdf::Argon2id, memory_kib: 64 * 1024, passes: 3, lanes: 4, salt: random_array() }
    }

    /// Settings that cost little, where the cost is not the point.
    #[cfg(test)]
    pub(super) fn cheap() -> Self {
        Self { memory_kib: 64, passes: 1, ..Self::new() }
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

fn salt_to_text<S: Serializer>(salt: &[u8; 16], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&BASE64.encode(salt))
}

fn salt_of_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 16], D::Error> {
    let bytes = BASE64.decode(String::deserialize(deserializer)?).unwrap_or_default();
    bytes.try_into().map_err(|_| de::Error::custom("not 16 bytes in base64"))
}

pub(super) fn missing_passphrase() -> ProviderError {
    let message = "sealed under a passphrase: give it with --passphrase, --passphrase-file or in KMSFS_PASSPHRASE";
    ProviderError::new(ProviderErrorKind::Credentials, message)
}

pub(super) fn wrong_passphrase() -> ProviderError {
    ProviderError::new(ProviderErrorKind::Credentials, "wrong passphrase, or the keyring was changed")
}
