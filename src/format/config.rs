//! The volume config `.kmsfs/volume.toml`: a TOML body and a seal, the MAC over every byte of the body.
//! `docs/FORMAT.md` section 8.

use serde::{Deserialize, Serialize};

use super::hex;

/// The config's name in the volume's own directory.
pub const CONFIG_FILE: &str = "volume.toml";
/// The name of the config before the last change.
pub const CONFIG_COPY_FILE: &str = "volume.toml.1";
/// What the name of a config begins with that repairing put aside.
pub const BROKEN_CONFIG_FILE: &str = "volume.toml.broken";
/// The largest config that is read, in bytes.
pub const MAX_CONFIG_LEN: usize = 65536;
/// The most files that may share a data key.
pub const MAX_FILES_PER_DATA_KEY: u32 = 1_000_000;
const FORMAT_VERSION: u32 = 1;
const PREFACE: &str = "# A kmsfs volume. The seal at the end authenticates every byte above it: do not edit.\n";
const SEAL: &str = "\n[seal]\nmac = \"";

/// What a page of 4096 zero bytes means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Holes {
    /// It reads as zeros: sparse files stay sparse.
    #[default]
    Allow,
    /// It is corruption: growing a file writes sealed pages of zeros.
    Deny,
}

/// What a last page without an end mark means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// The file is readable, and the loss is logged and counted.
    #[default]
    Lenient,
    /// Reading it is an error, and so is a file without a header.
    Strict,
}

/// A key that may wrap data keys of this volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct WrappingKey {
    /// The provider's name.
    pub provider: String,
    /// The key as that provider names it.
    pub key: String,
    /// Where the provider finds it, if the key's name does not say so (the path of a local keyring).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<String>,
}

/// The volume key under one wrapping key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct WrappedVolumeKey {
    /// The provider's name.
    pub provider: String,
    /// The wrapping key as that provider names it.
    pub key: String,
    /// The wrapped volume key in base64url.
    pub wrapped: String,
}

/// The body of a volume config. Parsed is not verified: the seal can be checked only with the volume key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VolumeConfig {
    format: u32,
    /// A UUID.
    pub volume_id: String,
    /// The suite's name.
    pub suite: String,
    /// What holes mean.
    pub holes: Holes,
    /// What a missing end mark means.
    pub end: End,
    /// How many new files may share one data key.
    pub files_per_data_key: u32,
    /// The keys that may wrap data keys; the first one wraps new ones.
    #[serde(rename = "wrapping-key")]
    pub wrapping_keys: Vec<WrappingKey>,
    /// The volume key, once for each key that can unwrap it.
    #[serde(rename = "volume-key")]
    pub volume_keys: Vec<WrappedVolumeKey>,
}

/// A parsed config file: the body, the bytes its seal covers, and the seal.
#[derive(Clone, Debug)]
pub struct SealedConfig {
    /// What it says.
    pub config: VolumeConfig,
    /// What the seal covers.
    pub body: String,
    /// The seal.
    pub mac: [u8; 32],
}

/// Why a volume config is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file is larger than any config.
    #[error("the volume config is larger than {MAX_CONFIG_LEN} bytes")]
    TooLarge,
    /// The seal is missing or is not the end of the file.
    #[error("the volume config does not end in a seal: it was cut or edited")]
    NoSeal,
    /// A later format.
    #[error("the volume has format version {0}, and this program knows version 1: use a newer kmsfs")]
    UnknownVersion(u32),
    /// The TOML is broken, or a field is missing, unknown or of the wrong type.
    #[error("the volume config does not parse: {0}")]
    Syntax(String),
    /// A field has an impossible value.
    #[error("the volume config's {field} is not valid: {value}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: String,
    },
}

impl VolumeConfig {
    /// The config of a new volume, without keys.
    #[must_use]
    pub fn new(volume_id: [u8; 16], suite: &str, holes: Holes, end: End, files_per_data_key: u32) -> Self {
        Self {
            format: FORMAT_VERSION,
            volume_id: hex::encode_uuid(&volume_id),
            suite: suite.to_owned(),
            holes,
            end,
            files_per_data_key,
            wrapping_keys: Vec::new(),
            volume_keys: Vec::new(),
        }
    }

    /// The volume's id.
    ///
    /// # Errors
    /// [`ConfigError::Field`] if it is not a UUID.
    pub fn id(&self) -> Result<[u8; 16], ConfigError> {
        hex::decode_uuid(&self.volume_id)
            .ok_or_else(|| ConfigError::Field { field: "volume-id", value: self.volume_id.clone() })
    }

    /// The bytes that the seal covers.
    ///
    /// # Errors
    /// [`ConfigError::Syntax`] if the config has no TOML form.
    pub fn body(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map(|body| format!("{PREFACE}{body}")).map_err(|e| ConfigError::Syntax(e.to_string()))
    }

    fn check(&self) -> Result<(), ConfigError> {
        let bad = |field, value: &dyn ToString| Err(ConfigError::Field { field, value: value.to_string() });
        self.id()?;
        if !(1..=MAX_FILES_PER_DATA_KEY).contains(&self.files_per_data_key) {
            return bad("files-per-data-key", &self.files_per_data_key);
        }
        if self.wrapping_keys.is_empty() {
            return bad("wrapping-key", &"none");
        }
        if self.volume_keys.is_empty() {
            return bad("volume-key", &"none");
        }
        Ok(())
    }
}

/// The file of `body` with its seal.
#[must_use]
pub fn seal(body: &str, mac: &[u8; 32]) -> String {
    format!("{body}{SEAL}{}\"\n", hex::encode(mac))
}

/// Parses a config file.
///
/// # Errors
/// [`ConfigError`].
pub fn parse(file: &[u8]) -> Result<SealedConfig, ConfigError> {
    if file.len() > MAX_CONFIG_LEN {
        return Err(ConfigError::TooLarge);
    }
    let text = std::str::from_utf8(file).map_err(|_| ConfigError::Syntax("not UTF-8".to_owned()))?;
    let (body, seal) = text.rsplit_once(SEAL).ok_or(ConfigError::NoSeal)?;
    let mac = seal.strip_suffix("\"\n").and_then(hex::decode).ok_or(ConfigError::NoSeal)?;
    let version = toml::from_str::<Version>(body).map_err(syntax)?.format;
    if version != FORMAT_VERSION {
        return Err(ConfigError::UnknownVersion(version));
    }
    let config: VolumeConfig = toml::from_str(body).map_err(syntax)?;
    config.check()?;
    Ok(SealedConfig { config, body: body.to_owned(), mac })
}

/// The one field that every version has.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

fn syntax(error: toml::de::Error) -> ConfigError {
    ConfigError::Syntax(error.to_string().trim_end().replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VolumeConfig {
        let mut config = VolumeConfig::new([7; 16], "xaes-256-gcm", Holes::Allow, End::Strict, 10);
        config.wrapping_keys.push(WrappingKey {
            provider: "local".into(),
            key: "k\"1".into(),
            location: Some("/a \\ path\n".into()),
        });
        config.volume_keys.push(WrappedVolumeKey {
            provider: "local".into(),
            key: "k\"1".into(),
            wrapped: "AAAA".into(),
        });
        config
    }

    #[test]
    fn round_trips_with_the_bytes_its_seal_covers() {
        let body = config().body().unwrap();
        let parsed = parse(seal(&body, &[9; 32]).as_bytes()).unwrap();
        assert_eq!((parsed.config, parsed.body, parsed.mac), (config(), body, [9; 32]));
    }

    #[test]
    fn every_defect_has_its_own_error() {
        let file = seal(&config().body().unwrap(), &[9; 32]);
        let with = |from: &str, to: &str| parse(file.replacen(from, to, 1).as_bytes()).unwrap_err();
        assert_eq!(parse(&[b' '; MAX_CONFIG_LEN + 1]).unwrap_err(), ConfigError::TooLarge);
        assert_eq!(parse(b"").unwrap_err(), ConfigError::NoSeal);
        assert_eq!(parse(format!("{file} ").as_bytes()).unwrap_err(), ConfigError::NoSeal);
        assert_eq!(with("format = 1", "format = 2"), ConfigError::UnknownVersion(2));
        assert!(matches!(with("suite", "sweet"), ConfigError::Syntax(_)));
        assert!(matches!(with("strict", "lax"), ConfigError::Syntax(_)));
        assert!(matches!(with("= 10", "= 0"), ConfigError::Field { field: "files-per-data-key", .. }));
        assert!(matches!(with("07070707-", "07070707"), ConfigError::Field { field: "volume-id", .. }));
    }
}
