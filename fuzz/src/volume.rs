//! A volume whose keys are known, and a provider that answers what a wrapped key's first byte says.

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};

use kmsfs::crypto::{DataKey, Secret, Suite, VolumeKeys};
use kmsfs::format::config::{self, End, Holes, VolumeConfig, WrappedVolumeKey, WrappingKey};
use kmsfs::keys::{
    EncryptionContext, KeyLimits, Provider, ProviderError, ProviderErrorKind, ProviderKind, Volume, WrappedKey, volume,
};

/// The volume's id.
pub const VOLUME_ID: [u8; 16] = [7; 16];
/// Keys on the volume's list, of the local provider.
pub const LISTED: [&str; 2] = ["k", "l"];
/// What wrapped keys begin with that hold [`data_key`], and another one. With anything else the provider refuses.
pub const GOOD: u8 = 1;
/// See [`GOOD`].
pub const OTHER: u8 = 2;

fn secret(byte: u8) -> DataKey {
    let filled = Secret::fill_with(|bytes| {
        bytes.fill(byte);
        Ok::<_, Infallible>(())
    });
    let Ok(secret) = filled;
    secret
}

/// The key behind `GOOD`.
pub fn data_key() -> DataKey {
    secret(11)
}

/// The key behind `OTHER`.
pub fn other_key() -> DataKey {
    secret(12)
}

/// The keys of the volume.
pub fn keys(suite: Suite) -> &'static VolumeKeys {
    static KEYS: [OnceLock<VolumeKeys>; 2] = [OnceLock::new(), OnceLock::new()];
    KEYS[usize::from(suite.id() - 1)].get_or_init(|| VolumeKeys::derive(&secret(10), &VOLUME_ID, suite))
}

/// Keys under which nothing is ever sealed. A fuzzer keeps what it has seen compared, so what was sealed under other keys may
/// come back as an input; what opens under these is a forgery.
pub fn unused_keys(suite: Suite) -> &'static VolumeKeys {
    static KEYS: [OnceLock<VolumeKeys>; 2] = [OnceLock::new(), OnceLock::new()];
    KEYS[usize::from(suite.id() - 1)].get_or_init(|| VolumeKeys::derive(&secret(13), &VOLUME_ID, suite))
}

/// One of the suites.
pub fn suite(choice: bool) -> Suite {
    if choice { Suite::XChaCha20Poly1305 } else { Suite::Xaes256Gcm }
}

/// The config of the volume, without a seal.
pub fn config(suite: Suite) -> VolumeConfig {
    let mut config = VolumeConfig::new(VOLUME_ID, suite.name(), Holes::Allow, End::Lenient, 1);
    for key in LISTED {
        let provider = ProviderKind::Local.name().to_owned();
        config.wrapping_keys.push(WrappingKey { provider: provider.clone(), key: key.to_owned(), location: None });
        config.volume_keys.push(WrappedVolumeKey { provider, key: key.to_owned(), wrapped: String::new() });
    }
    config
}

/// A volume that has not been asked for anything.
pub fn fresh(suite: Suite) -> Volume {
    let body = config(suite).body().expect("a config has a body");
    let seal = keys(suite).config_mac(body.as_bytes());
    let sealed = config::parse(config::seal(&body, &seal).as_bytes()).expect("a config that parses");
    volume::unlock(&sealed, Arc::new(Scripted), KeyLimits::default()).expect("a config that authenticates")
}

/// A volume that stays.
pub fn standing(suite: Suite) -> &'static Volume {
    static VOLUMES: [OnceLock<Volume>; 2] = [OnceLock::new(), OnceLock::new()];
    VOLUMES[usize::from(suite.id() - 1)].get_or_init(|| fresh(suite))
}

/// See the module.
pub struct Scripted;

impl Provider for Scripted {
    fn kind(&self) -> ProviderKind {
        ProviderKind::Local
    }

    fn is_remote(&self) -> bool {
        false
    }

    fn generate_data_key(&self, _: &EncryptionContext) -> Result<(DataKey, WrappedKey), ProviderError> {
        Ok((data_key(), WrappedKey { key_id: LISTED[0].to_owned(), bytes: vec![GOOD; 60] }))
    }

    fn wrap(&self, key: &str, _: &DataKey, _: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        Ok(WrappedKey { key_id: key.to_owned(), bytes: vec![GOOD; 60] })
    }

    fn unwrap(&self, key: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        // Which key has the volume key, the config says, before its seal can be checked.
        if context.pairs().any(|pair| pair == ("kmsfs:purpose", "volume")) {
            return Ok(secret(10));
        }
        assert!(LISTED.contains(&key), "the provider is asked for a key that is not on the list");
        match wrapped.first() {
            Some(&GOOD) => Ok(data_key()),
            Some(&OTHER) => Ok(other_key()),
            _ => Err(ProviderError::new(ProviderErrorKind::Denied, "refused")),
        }
    }
}
