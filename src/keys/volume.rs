//! A volume's own key: making one, and unlocking a sealed config with it.

use std::path::Path;
use std::sync::Arc;

use crate::crypto::{AuditKey, DataKey, LeaseKey, LinkKey, NameKey, Suite, VolumeKeys, XattrKey, random_array};
use crate::format::config::{self, ConfigError, End, Holes, SealedConfig, VolumeConfig, WrappedVolumeKey, WrappingKey};
use crate::format::{hex, name};

use super::rewrap::check_capacity;
use super::ring::RingParts;
use super::{EncryptionContext, KeyError, KeyLimits, Provider, ProviderKind, Recipient, Ring};

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
    /// Authenticates audit logs.
    pub audit: Arc<AuditKey>,
    /// Authenticates leases.
    pub lease: Arc<LeaseKey>,
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

/// A config whose seal was checked, and the volume key that unlocks and seals it.
pub struct Unlocked {
    volume_key: DataKey,
    id: [u8; 16],
    suite: Suite,
    config: VolumeConfig,
}

impl Unlocked {
    /// Unwraps the volume key with `provider`, with the copy of its wrapping key `key` or, without one, with any of its kind; and
    /// checks the config's seal with it before anything in the config is used.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn open(sealed: &SealedConfig, provider: &dyn Provider, key: Option<&str>) -> Result<Self, KeyError> {
        let id = sealed.config.id()?;
        let volume_key = unwrap_volume_key(&sealed.config, &id, provider, key)?;
        Self::check(volume_key, id, sealed)
    }

    fn check(volume_key: DataKey, id: [u8; 16], sealed: &SealedConfig) -> Result<Self, KeyError> {
        let config = sealed.config.clone();
        let suite = Suite::from_name(&config.suite).ok_or_else(|| KeyError::UnknownSuite(config.suite.clone()))?;
        let unlocked = Self { volume_key, id, suite, config };
        if !unlocked.keys().config_is_authentic(sealed.body.as_bytes(), &sealed.mac) {
            return Err(KeyError::BrokenSeal);
        }
        Ok(unlocked)
    }

    fn keys(&self) -> VolumeKeys {
        VolumeKeys::derive(&self.volume_key, &self.id, self.suite)
    }

    /// What the config says.
    #[must_use]
    pub fn config(&self) -> &VolumeConfig {
        &self.config
    }

    /// Names the volume key; public.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 16] {
        self.keys().fingerprint()
    }

    /// The volume's id, and what authenticates its leases.
    #[must_use]
    pub fn lease(&self) -> ([u8; 16], Arc<LeaseKey>) {
        (self.id, Arc::new(self.keys().lease))
    }

    /// The volume key under a wrapping key of `provider`; an empty `key` is the one that it uses for new data keys.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn wrap(&self, provider: &dyn Provider, key: &str) -> Result<WrappedVolumeKey, KeyError> {
        let context = EncryptionContext::volume_key(&self.id);
        let current = if key.is_empty() { provider.generate_wrapped_key(&context)?.key_id } else { key.to_owned() };
        let wrapped = provider.wrap(&current, &self.volume_key, &context)?;
        Ok(WrappedVolumeKey {
            provider: provider.kind().name().to_owned(),
            key: wrapped.key_id,
            wrapped: name::encode(&wrapped.bytes),
        })
    }

    /// Takes `config` as the volume's from now on, and returns its file, to be written.
    ///
    /// # Errors
    /// [`KeyError::Config`] if it could not be read again, [`KeyError::Header`] if the records of so many recipients do not fit a header.
    pub fn change(&mut self, config: VolumeConfig) -> Result<String, KeyError> {
        let body = config.body()?;
        let file = config::seal(&body, &self.keys().config_mac(body.as_bytes()));
        config::parse(file.as_bytes())?;
        check_capacity(config.volume_keys.iter().map(|record| (record.key.len(), record.wrapped.len() * 3 / 4)))?;
        self.config = config;
        Ok(file)
    }

    /// The volume, with these providers for the keys on its list.
    #[must_use]
    pub fn volume(&self, recipients: Vec<Recipient>, limits: KeyLimits) -> Volume {
        let (keys, config) = (self.keys(), &self.config);
        let fingerprint = keys.fingerprint();
        let ring = Ring::new(RingParts {
            volume_id: self.id,
            suite: self.suite,
            header_key: keys.header,
            provision_key: keys.provision,
            allowed: allowed_keys(config),
            recipients,
            files_per_data_key: config.files_per_data_key,
            limits,
        });
        Volume {
            id: self.id,
            config: config.clone(),
            suite: self.suite,
            names: keys.name,
            links: keys.link,
            xattrs: keys.xattr,
            audit: Arc::new(keys.audit),
            lease: Arc::new(keys.lease),
            ring,
            fingerprint,
        }
    }
}

/// The keys whose records count, as headers name them: provider tags and key ids.
#[must_use]
pub fn allowed_keys(config: &VolumeConfig) -> Vec<(u8, Vec<u8>)> {
    let known = config.wrapping_keys.iter().filter_map(|key| Some((ProviderKind::from_name(&key.provider)?, key)));
    known.map(|(kind, key)| (kind.tag(), key.key.clone().into_bytes())).collect()
}

/// Whether new data keys get a record of this key on the list: a key without a copy of the volume key is kept for what it
/// wrapped before.
#[must_use]
pub fn wraps_new(config: &VolumeConfig, key: &WrappingKey) -> bool {
    config.volume_keys.iter().any(|record| record.provider == key.provider && record.key == key.key)
}

/// Unlocks a volume with one provider, which is that of all keys of its kind on the list.
///
/// # Errors
/// [`KeyError`].
pub fn unlock(sealed: &SealedConfig, provider: Arc<dyn Provider>, limits: KeyLimits) -> Result<Volume, KeyError> {
    let unlocked = Unlocked::open(sealed, provider.as_ref(), None)?;
    let kind = provider.kind();
    let ours = unlocked.config.wrapping_keys.iter().filter(|key| key.provider == kind.name());
    let recipients = ours.map(|key| Recipient {
        kind,
        key: key.key.clone(),
        wraps_new: wraps_new(&unlocked.config, key),
        provider: Arc::clone(&provider),
    });
    Ok(unlocked.volume(recipients.collect(), limits))
}

fn unwrap_volume_key(
    config: &VolumeConfig,
    id: &[u8; 16],
    provider: &dyn Provider,
    key: Option<&str>,
) -> Result<DataKey, KeyError> {
    let kind = provider.kind().name();
    let context = EncryptionContext::volume_key(id);
    let mut failure = KeyError::NoVolumeRecord(kind.to_owned());
    let records = config.volume_keys.iter().filter(|record| record.provider == kind);
    for record in records.filter(|record| key.is_none_or(|key| record.key == key)) {
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
