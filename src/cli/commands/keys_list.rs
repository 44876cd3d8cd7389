//! `kmsfs keys list`.

use std::collections::BTreeMap;
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
use crate::format::header;
use crate::keys::providers::{self, ProviderSettings};
use crate::keys::{ProviderKind, volume};
use crate::storage::CipherDirectory;

use super::header_files::HeaderFiles;
use super::key_change::name_of;

/// Show a volume's wrapping keys as their providers describe them, and how many provisioned data keys there are
///
/// Under AWS KMS each key costs one call of DescribeKey and of GetKeyRotationStatus. The volume is not unlocked: the
/// config's seal is not checked.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// Read the headers of all files too, and count the files that have a record of each key; the keys that were listed first
    /// come first. The headers are not authenticated
    #[arg(long)]
    files: bool,
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
    /// Files with a record of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    files: Option<u64>,
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
    let mut keys: Vec<_> = config.wrapping_keys.iter().map(|key| describe(key, &config, &providers)).collect();
    if args.files {
        keys = with_files(keys, count_files(&directory)?);
    }
    let report = Report {
        provisioned_keys: stock.map_err(|error| CliError::io(directory.path().display(), &error))?.len(),
        keys,
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
        key: name_of(key),
        wraps_new: volume::wraps_new(config, key),
        files: None,
        unlocks: unlocking.iter().any(|(_, other)| other == key),
        description: description.unwrap_or_else(|| "this program does not know the provider".to_owned()),
    }
}

/// The keys with their numbers of files, from the oldest to the newest: those that files name and the config does not, and then
/// the config's from the last to the first.
fn with_files(listed: Vec<KeyReport>, mut counts: BTreeMap<String, u64>) -> Vec<KeyReport> {
    let counted = |key: KeyReport| KeyReport { files: Some(counts.remove(&key.key).unwrap_or(0)), ..key };
    let listed: Vec<_> = listed.into_iter().rev().map(counted).collect();
    let strangers = counts.into_iter().map(|(key, files)| KeyReport {
        key,
        wraps_new: false,
        unlocks: false,
        files: Some(files),
        description: "not a key of this volume: nothing opens with it".to_owned(),
    });
    strangers.chain(listed).collect()
}

/// How many files have a record of each key in their newest header.
fn count_files(directory: &CipherDirectory) -> Result<BTreeMap<String, u64>, CliError> {
    let mut counts = BTreeMap::new();
    let mut unread = None;
    HeaderFiles::of(directory)?.walk("", |path, page| match page {
        Err(error) => unread = Some(CliError::io(path, &error)),
        Ok(None) => {}
        Ok(Some(page)) => {
            let headers = header::parse_page(&page).into_iter().flatten().map(|slot| slot.header);
            let newest = headers.max_by_key(|header| header.generation);
            for record in newest.iter().flat_map(|header| &header.records) {
                let kind = ProviderKind::from_tag(record.provider).map_or("unknown", ProviderKind::name);
                *counts.entry(format!("{kind}:{}", String::from_utf8_lossy(&record.key_id))).or_default() += 1;
            }
        }
    });
    unread.map_or(Ok(counts), Err)
}
