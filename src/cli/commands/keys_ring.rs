//! `kmsfs keys rotate`, `disable`, `enable` and `passphrase`: changes of a local keyring.

use std::path::PathBuf;

use clap::Args;

use crate::cli::environment::Environment;
use crate::cli::error::CliError;
use crate::cli::passphrase::{self, PassphraseSource};
use crate::cli::report;
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::daemon::log::Level;
use crate::keys::providers::{self, KeyringChange, KeyringKey, Passphrase};

use super::init;

/// Give a key of a local keyring a new version, which wraps from now on; the old ones still open what they wrapped
///
/// Volumes need not be changed, and mounts use the new version at once. With --new-key the keyring gets a key of its own
/// instead: `kmsfs rewrap CIPHERDIR --to local:KEYRING` brings volumes to it.
#[derive(Debug, Args)]
pub(crate) struct RotateArgs {
    /// The key [default: the newest that is enabled]
    #[arg(value_name = "KEY")]
    key: Option<String>,
    /// Make a new key instead of a new version of one
    #[arg(long, conflicts_with = "key")]
    new_key: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// Let a key of a local keyring be used for nothing until it is enabled again
///
/// Mounts stop using it within their --key-max-age, for open files too, as with a key of a KMS.
#[derive(Debug, Args)]
pub(crate) struct DisableArgs {
    /// The key, as `kmsfs keys list` shows it
    #[arg(value_name = "KEY")]
    key: String,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// Let a key of a local keyring be used again
#[derive(Debug, Args)]
pub(crate) struct EnableArgs {
    /// The key, as `kmsfs keys list` shows it
    #[arg(value_name = "KEY")]
    key: String,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// Put a local keyring under another passphrase, or under none
///
/// The old one is given as to every command. Old copies of the keyring stay under the old one. Mounts that are running keep
/// the keys that they have, and do not see later changes of the keyring.
#[derive(Debug, Args)]
pub(crate) struct PassphraseArgs {
    /// Read the new passphrase from this file (- is standard input) [default: ask on the terminal, twice]
    #[arg(long, value_name = "FILE")]
    new_passphrase_file: Option<PathBuf>,
    /// Leave the keyring without a passphrase: whoever reads the file has its keys
    #[arg(long, conflicts_with = "new_passphrase_file")]
    remove: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// A keyring, and what opens it.
pub(super) struct Ring {
    pub(super) path: PathBuf,
    passphrase: Option<Passphrase>,
    environment: Environment,
}

impl Ring {
    /// The keyring of the settings, or the one that `kmsfs init` makes.
    pub(super) fn of(args: &SettingsArgs) -> Result<Self, CliError> {
        let environment = Environment::of_process();
        let settings = Settings::load(args, &environment)?;
        settings::log_to_stderr(&settings, Level::WARN)?;
        let path = match &settings.keyring {
            Some(path) => path.clone(),
            None => init::default_keyring(&environment)?,
        };
        let secret = passphrase::for_keyring(&settings, &environment, &path, false)?;
        Ok(Self { path, passphrase: secret.map(passphrase::for_provider), environment })
    }

    /// Its keys.
    pub(super) fn list(&self) -> Result<Vec<KeyringKey>, CliError> {
        Ok(providers::list_keyring(&self.path, self.passphrase.as_ref())?)
    }

    fn change(&self, change: &KeyringChange<'_>) -> Result<Option<KeyringKey>, CliError> {
        Ok(providers::change_keyring(&self.path, self.passphrase.as_ref(), change)?)
    }
}

/// Rotates, and says what wraps now.
pub(super) fn rotate(args: &RotateArgs) -> Result<(), CliError> {
    let change =
        if args.new_key { KeyringChange::NewKey } else { KeyringChange::NewVersion(args.key.as_deref().map(bare)) };
    let ring = Ring::of(&args.settings)?;
    let Some(key) = ring.change(&change)? else { return Ok(()) };
    let version = key.versions.last().map_or(0, |(number, _)| *number);
    report::say(&format!("local:{} version {version}\n", key.id))?;
    report::tell(&format!("copies of {} lack it: replace them", ring.path.display()));
    Ok(())
}

/// Disables.
pub(super) fn disable(args: &DisableArgs) -> Result<(), CliError> {
    Ring::of(&args.settings)?.change(&KeyringChange::Disable(bare(&args.key))).map(drop)
}

/// Enables.
pub(super) fn enable(args: &EnableArgs) -> Result<(), CliError> {
    Ring::of(&args.settings)?.change(&KeyringChange::Enable(bare(&args.key))).map(drop)
}

/// Changes the passphrase.
pub(super) fn change_passphrase(args: &PassphraseArgs) -> Result<(), CliError> {
    let ring = Ring::of(&args.settings)?;
    // A wrong one is told before a new one is asked for.
    ring.list()?;
    if args.remove {
        return ring.change(&KeyringChange::Passphrase(None)).map(drop);
    }
    let source = args.new_passphrase_file.clone().map_or(PassphraseSource::Terminal, PassphraseSource::File);
    let new = passphrase::for_provider(source.read(&ring.environment, Some(&ring.path), true)?);
    ring.change(&KeyringChange::Passphrase(Some(&new))).map(drop)
}

/// A key may be named as a volume's config does.
fn bare(key: &str) -> &str {
    key.strip_prefix("local:").unwrap_or(key)
}
