//! What `kmsfs cat`, `ls`, `export` and `import` share: a volume, unlocked and open without a mount.

use std::num::NonZeroU32;
use std::path::Path;

use clap::Args;

use crate::cli::environment::Environment;
use crate::cli::error::CliError;
use crate::cli::passphrase;
use crate::cli::pins::Pins;
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::unlock::{self, Expected};
use crate::daemon::log::Level;
use crate::keys::KeyLimits;
use crate::storage::cipher_directory::{CipherDirectory, LockMode};
use crate::transfer::Tree;

/// How the volume is unlocked.
#[derive(Debug, Args)]
pub(super) struct UnlockArgs {
    /// Make so many calls of the key's provider a second at most
    #[arg(long, value_name = "CALLS")]
    kms_rate: Option<NonZeroU32>,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// An open volume.
pub(super) struct Unmounted {
    pub(super) tree: Tree,
    /// Its keys come from far away.
    pub(super) is_remote: bool,
}

/// Unlocks and opens the volume; to be written, it is locked first.
pub(super) fn open(path: &Path, args: &UnlockArgs, to_write: bool) -> Result<Unmounted, CliError> {
    let environment = Environment::of_process();
    let settings = Settings::load(&args.settings, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    let directory = CipherDirectory::open(path)?;
    let lock = to_write.then(|| directory.lock(LockMode::Exclusive)).transpose()?;
    let sealed = unlock::read_config(&directory)?;
    let secret = passphrase::for_volume(&settings, &environment, Some(&sealed.config))?;
    let providers = settings.for_providers(secret.map(passphrase::for_provider));
    let limits = KeyLimits { calls_per_second: args.kms_rate, ..KeyLimits::default() };
    let (expected, pins) = (Expected::default(), Pins::of(&environment));
    let volume = unlock::unlock(directory.path(), &sealed, &expected, pins.as_ref(), &providers, limits)?;
    let is_remote = volume.ring.is_remote();
    Ok(Unmounted { tree: Tree::open(directory, volume, lock)?, is_remote })
}
