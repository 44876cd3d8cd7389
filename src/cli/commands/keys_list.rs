//! `kmsfs keys list`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use crate::cli::environment::Environment;
use crate::cli::error::CliError;
use crate::cli::pins::{self, Pins};
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::{passphrase, report, unlock};
use crate::daemon::log::Level;
use crate::format::config::{VolumeConfig, WrappingKey};
use crate::keys::providers::{self, ProviderSettings};
use crate::keys::{ProviderKind, volume};
use crate::storage::CipherDirectory;

/// Show a volume's wrapping keys as their providers describe them, and how many provisioned data keys there are
///
/// Under AWS KMS each key costs one call of DescribeKey and of GetKeyRotationStatus. The volume is not unlocked: the
/// config's seal is not checked.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

#[derive(Serialize)]
struct Report {
    volume_id: String,
    provisioned_keys: usize,
    keys: Vec<KeyReport>,
}

#[derive(Serialize)]
struct KeyReport {
    key: String,
    /// New data keys are wrapped by it.
    wraps_new: bool,
    /// It unwraps the volume key.
    unlocks: bool,
    /// In words, or why that is not known.
    description: String,
}

/// Asks and shows.
pub(super) fn run(args: &ListArgs) -> Result<(), CliError> {
    let environment = Environment::of_process();
    let settings = Settings::load(&args.settings, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    let directory = CipherDirectory::open(&args.cipher_directory)?;
    let config = unlock::read_config(&directory)?.config;
    if let Some(pin) = Pins::of(&environment).map(|pins| pins.get(directory.path())).transpose()?.flatten() {
        pins::check_remembered("volume", directory.path(), &pin.volume_id, &config.volume_id)?;
    }
    let secret = settings.passphrase.as_ref().map(|source| source.read(&environment, false)).transpose()?;
    let providers = settings.for_providers(secret.map(passphrase::for_provider));
    let stock = directory.key_stock().and_then(|stock| stock.names());
    let report = Report {
        provisioned_keys: stock.map_err(|error| CliError::io(directory.path().display(), &error))?.len(),
        keys: config.wrapping_keys.iter().map(|key| describe(key, &config, &providers)).collect(),
        volume_id: config.volume_id,
    };
    report::print(&report, args.json)
}

fn describe(key: &WrappingKey, config: &VolumeConfig, settings: &ProviderSettings) -> KeyReport {
    let location = key.location.as_deref().map(Path::new);
    let description = ProviderKind::from_name(&key.provider).map(|kind| {
        let provider = providers::open(kind, &key.key, location, settings);
        let described = provider.and_then(|provider| provider.describe(&key.key));
        described.map_or_else(|error| format!("not known: {error}"), |description| description.to_string())
    });
    let unlocking = volume::keys_that_can_unlock(config);
    KeyReport {
        key: format!("{}:{}", key.provider, key.key),
        wraps_new: config.wrapping_keys.first() == Some(key),
        unlocks: unlocking.iter().any(|(_, other)| other == key),
        description: description.unwrap_or_else(|| "this program does not know the provider".to_owned()),
    }
}
