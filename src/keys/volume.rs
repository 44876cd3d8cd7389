//! A volume's own key: making one, and unlocking a sealed config with it.

use std::path::Path;
use std::sync::Arc;

use crate::crypto::{DataKey, LinkKey, NameKey, Suite, VolumeKeys, XattrKey, random_array};
use crate::format::config::{self, ConfigError, End, Holes, SealedConfig, VolumeConfig, WrappedVolumeKey, WrappingKey};
use crate::format::{hex, name};

use super::ring::RingParts;
use super::{EncryptionContext, KeyError, KeyLimits, Provider, ProviderKind, Ring};

/// What the owner of a new volume decides.
#[derive(Clone, Copy, Debug)]
pub struct NewVolume {
    /// Seals files and link targets.
    pub suite: Suite,
    /// What holes mean.
    pub holes: Holes,
    /// What a missing end mark means.
    pub end: End,
    /// How many new files may share one data key.
    pub files_per_data_key: u32,
}

/// A new volume, to be written.
#[derive(Clone, Debug)]
pub struct Created {
    /// The volume's id.
    pub volume_id: [u8; 16],
    /// The content of its config file.
    pub config_file: String,
    /// The target of the root's directory-id symlink.
    pub root_directory_id: String,
    /// Names the volume key; public.
    pub fingerprint: [u8; 16],
    /// The wrapping key as the provider names it.
    pub wrapping_key: String,
}

/// An unlocked volume: everything a filesystem needs of the key path.
pub struct Volume {
    /// The volume's id.
    pub id: [u8; 16],
    /// The verified config.
    pub config: VolumeConfig,
    /// Seals files and link targets.
    pub suite: Suite,
    /// Encrypts names.
    pub names: NameKey,
    /// Seals link targets.
    pub links: LinkKey,
    /// Encrypts extended attributes.
    pub xattrs: XattrKey,
    /// Opens and makes file headers.
    pub ring: Ring,
    /// Names the volume key; public.
    pub fingerprint: [u8; 16],
}

/// Makes a volume whose keys `provider` wraps. Nothing is written. `location` tells later mounts where the provider finds
/// the wrapping key.
///
/// # Errors
/// [`KeyError`].
pub fn create(settings: &NewVolume, provider: &dyn Provider, location: Option<&Path>) -> Result<Created, KeyError> {
    let volume_id: [u8; 16] = uuid_v4();
    let (volume_key, wrapped) = provider.generate_data_key(&EncryptionContext::volume_key(&volume_id))?;
    let keys = VolumeKeys::derive(&volume_key, &volume_id, settings.suite);
    let NewVolume { suite, holes, end, files_per_data_key } = *settings;
    let mut config = VolumeConfig::new(volume_id, suite.name(), holes, end, files_per_data_key);
    let provider = provider.kind().name().to_owned();
    config.wrapping_keys.push(WrappingKey {
        provider: provider.clone(),
        key: wrapped.key_id.clone(),
        location: location.map(location_text).transpose()?,
    });
    config.volume_keys.push(WrappedVolumeKey {
        provider,
        key: wrapped.key_id.clone(),
        wrapped: name::encode(&wrapped.bytes),
    });
    let body = config.body()?;
    Ok(Created {
        volume_id,
        config_file: config::seal(&body, &keys.config_mac(body.as_bytes())),
        root_directory_id: name::encode(&keys.name.new_directory_id().1),
        fingerprint: keys.fingerprint(),
        wrapping_key: wrapped.key_id,
    })
}

/// A path that TOML can hold.
fn location_text(path: &Path) -> Result<String, ConfigError> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| ConfigError::Field { field: "location", value: format!("{} is not UTF-8", path.display()) })
}

/// The wrapping keys that can unlock a volume and whose providers this program knows, in the config's order.
#[must_use]
pub fn keys_that_can_unlock(config: &VolumeConfig) -> Vec<(ProviderKind, WrappingKey)> {
    let listed = config
        .wrapping_keys
        .iter()
        .filter(|key| config.volume_keys.iter().any(|record| record.provider == key.provider && record.key == key.key));
    listed.filter_map(|key| Some((ProviderKind::from_name(&key.provider)?, key.clone()))).collect()
}

/// Unwraps the volume key with `provider`, and checks the config's seal with it before anything in the config is used.
///
/// # Errors
/// [`KeyError`].
pub fn unlock(sealed: &SealedConfig, provider: Arc<dyn Provider>, limits: KeyLimits) -> Result<Volume, KeyError> {
    let config = &sealed.config;
    let id = config.id()?;
    let suite = Suite::from_name(&config.suite).ok_or_else(|| KeyError::UnknownSuite(config.suite.clone()))?;
    let volume_key = unwrap_volume_key(config, &id, provider.as_ref())?;
    let keys = VolumeKeys::derive(&volume_key, &id, suite);
    if !keys.config_is_authentic(sealed.body.as_bytes(), &sealed.mac) {
        return Err(KeyError::BrokenSeal);
    }
    let fingerprint = keys.fingerprint();
    let allowed = config
        .wrapping_keys
        .iter()
        .filter_map(|key| Some((ProviderKind::from_name(&key.provider)?.tag(), key.key.clone().into_bytes())));
    let ring = Ring::new(RingParts {
        volume_id: id,
        suite,
        header_key: keys.header,
        provision_key: keys.provision,
        allowed: allowed.collect(),
        provider,
        others: Vec::new(),
        files_per_data_key: config.files_per_data_key,
        limits,
    });
    Ok(Volume {
        id,
        config: config.clone(),
        suite,
        names: keys.name,
        links: keys.link,
        xattrs: keys.xattr,
        ring,
        fingerprint,
    })
}

fn unwrap_volume_key(config: &VolumeConfig, id: &[u8; 16], provider: &dyn Provider) -> Result<DataKey, KeyError> {
    let kind = provider.kind().name();
    let context = EncryptionContext::volume_key(id);
    let mut failure = KeyError::NoVolumeRecord(kind.to_owned());
    for record in config.volume_keys.iter().filter(|record| record.provider == kind) {
        let wrapped = name::decode(record.wrapped.as_bytes())
            .ok_or_else(|| ConfigError::Field { field: "wrapped", value: record.wrapped.clone() })?;
        match provider.unwrap(&record.key, &wrapped, &context) {
            Ok(volume_key) => return Ok(volume_key),
            Err(error) => failure = error.into(),
        }
    }
    Err(failure)
}

/// A random UUID, RFC 9562 version 4.
fn uuid_v4() -> [u8; 16] {
    let mut id: [u8; 16] = random_array();
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

impl Volume {
    /// The volume's id as people read it.
    #[must_use]
    pub fn id_text(&self) -> String {
        hex::encode_uuid(&self.id)
    }
}
