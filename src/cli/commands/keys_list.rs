//! `kmsfs keys list`: the keys of a volume or of a local keyring, and what they are still needed for.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use crate::cli::environment::Environment;
use crate::cli::error::CliError;
use crate::cli::pins::Pins;
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::{passphrase, report, unlock};
use crate::daemon::log::Level;
use crate::format::config::{VolumeConfig, WrappingKey};
use crate::keys::providers::{self, KeyringKey, ProviderSettings};
use crate::keys::{ProviderKind, volume};
use crate::storage::CipherDirectory;

use super::key_change::name_of;
use super::keys_ring::Ring;
use super::keys_usage::{self, Usage, VersionReport};

/// Show the wrapping keys of a volume as their providers describe them, and how many provisioned data keys there are; or
/// without CIPHERDIR the keys of the local keyring
///
/// Under AWS KMS each key costs one call of DescribeKey and of GetKeyRotationStatus. The volume is not unlocked: the
/// config's seal is not checked. It may be mounted.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: Option<PathBuf>,
    /// Read the headers of all files too, and count the files that have a record of each key, and of each version of a local
    /// one; the oldest come first. The headers are not authenticated
    #[arg(long, requires = "cipher_directory")]
    files: bool,
    /// Say of local keys that rotating them is due when their newest version is older
    #[arg(long, value_name = "DAYS", default_value_t = keys_usage::DUE_AFTER_DAYS)]
    due_after: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// The keys of a volume.
#[derive(Serialize)]
struct Report {
    volume_id: String,
    provisioned_keys: usize,
    keys: Vec<KeyReport>,
}

/// The keys of a keyring.
#[derive(Serialize)]
struct RingReport {
    keyring: String,
    keys: Vec<RingKeyReport>,
}

#[derive(Serialize)]
struct RingKeyReport {
    key: String,
    state: &'static str,
    rotation: String,
    versions: Vec<VersionReport>,
}

#[derive(Serialize)]
struct KeyReport {
    key: String,
    /// New data keys are wrapped by it.
    wraps_new: bool,
    /// It unwraps the volume key.
    unlocks: bool,
    /// Where a local key was when it came onto the list.
    #[serde(skip_serializing_if = "Option::is_none")]
    keyring: Option<String>,
    /// Files with a record of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    files: Option<u64>,
    /// In words, or why that is not known.
    description: String,
    /// Of a local key: whether it is due.
    #[serde(skip_serializing_if = "Option::is_none")]
    rotation: Option<String>,
    /// Of a local key.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    versions: Vec<VersionReport>,
}

/// Asks and shows.
pub(super) fn run(args: &ListArgs) -> Result<(), CliError> {
    match &args.cipher_directory {
        Some(path) => list_volume(path, args.files, args.due_after, args.json, &args.settings),
        None => list_ring(args),
    }
}

fn list_ring(args: &ListArgs) -> Result<(), CliError> {
    let ring = Ring::of(&args.settings)?;
    let keys = ring.list()?.into_iter().map(|key| RingKeyReport {
        key: format!("local:{}", key.id),
        state: if key.enabled { "enabled" } else { "disabled" },
        rotation: keys_usage::rotation(&key, args.due_after),
        versions: keys_usage::versions(&key, None),
    });
    report::print(&RingReport { keyring: ring.path.display().to_string(), keys: keys.collect() }, args.json)
}

/// Shows the keys of the volume at `path`, and with `files` what they are needed for.
pub(super) fn list_volume(
    path: &Path,
    files: bool,
    due_after: u32,
    json: bool,
    settings: &SettingsArgs,
) -> Result<(), CliError> {
    let environment = Environment::of_process();
    let settings = Settings::load(settings, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    let directory = CipherDirectory::open(path)?;
    let config = unlock::read_config(&directory)?.config;
    if let Some(remembered) = Pins::of(&environment).map(|pins| pins.get(directory.path())).transpose()?.flatten() {
        remembered.check_volume(directory.path(), &config.volume_id)?;
    }
    let secret = passphrase::for_volume(&settings, &environment, Some(&config))?;
    let providers = settings.for_providers(secret.map(passphrase::for_provider));
    let stock = directory.key_stock().and_then(|stock| stock.names());
    let mut usage = files.then(|| Usage::of(&directory)).transpose()?;
    let keys = config.wrapping_keys.iter();
    let mut keys: Vec<_> = keys.map(|key| describe(key, &config, &providers, usage.as_mut(), due_after)).collect();
    if let Some(usage) = usage {
        // From the oldest to the newest: those that files name and the config does not, and then the config's from the last.
        let strangers = usage.rest().map(|(key, files)| KeyReport {
            key,
            wraps_new: false,
            unlocks: false,
            keyring: None,
            files: Some(files),
            description: "not a key of this volume: nothing opens with it".to_owned(),
            rotation: None,
            versions: Vec::new(),
        });
        keys = strangers.chain(keys.into_iter().rev()).collect();
    }
    let report = Report {
        provisioned_keys: stock.map_err(|error| CliError::io(directory.path().display(), &error))?.len(),
        keys,
        volume_id: config.volume_id,
    };
    report::print(&report, json)
}

fn describe(
    key: &WrappingKey,
    config: &VolumeConfig,
    settings: &ProviderSettings,
    usage: Option<&mut Usage>,
    due_after: u32,
) -> KeyReport {
    let location = key.location.as_deref().map(Path::new);
    let kind = ProviderKind::from_name(&key.provider);
    let description = kind.map(|kind| {
        let provider = providers::open(kind, &key.key, location, settings);
        let described = provider.and_then(|provider| provider.describe(&key.key));
        described.map_or_else(|error| format!("not known: {error}"), |description| description.to_string())
    });
    let (files, counts) = usage.map(|usage| usage.take(&name_of(key))).unzip();
    let local = kind.filter(|kind| *kind == ProviderKind::Local).and_then(|_| of_keyring(key, location, settings));
    let unlocking = volume::keys_that_can_unlock(config);
    KeyReport {
        key: name_of(key),
        wraps_new: volume::wraps_new(config, key),
        files,
        unlocks: unlocking.iter().any(|(_, other)| other == key),
        keyring: key.location.clone(),
        description: description.unwrap_or_else(|| "this program does not know the provider".to_owned()),
        rotation: local.as_ref().map(|local| keys_usage::rotation(local, due_after)),
        versions: local.map(|local| keys_usage::versions(&local, counts.as_ref())).unwrap_or_default(),
    }
}

/// The key in its keyring, if that can be read: why not, the description says.
fn of_keyring(key: &WrappingKey, location: Option<&Path>, settings: &ProviderSettings) -> Option<KeyringKey> {
    let path = settings.keyring.as_deref().or(location)?;
    let keys = providers::list_keyring(path, settings.passphrase.as_ref()).ok()?;
    keys.into_iter().find(|found| found.id == key.key)
}
