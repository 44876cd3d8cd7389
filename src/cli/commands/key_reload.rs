//! The mount's side of a change of keys: reads the volume's list anew when `kmsfs rewrap` or `kmsfs recipients` says so.
//!
//! Invariant: a new list is taken only if it is this volume's, names no key that this mount was told not to expect, and this
//! mount can use every new key on it.

use crate::cli::error::{CliError, Exit};
use crate::cli::key_spec::KeySpec;
use crate::cli::unlock::{self, Expected};
use crate::format::config::VolumeConfig;
use crate::fs::Filesystem;
use crate::keys::providers::ProviderSettings;
use crate::storage::CipherDirectory;

/// What a mount must remember to read the list again.
pub(super) struct KeyReload {
    pub(super) directory: CipherDirectory,
    /// Without a passphrase: none is kept.
    pub(super) providers: ProviderSettings,
    pub(super) expected_volume: Option<String>,
    pub(super) expected_keys: Vec<KeySpec>,
}

impl KeyReload {
    /// Reads the list and hands it to the filesystem.
    pub(super) fn run(&self, filesystem: &Filesystem) -> Result<(), CliError> {
        let sealed = unlock::read_config(&self.directory)?;
        let expected = Expected { volume_id: self.expected_volume.as_deref(), keys: &self.expected_keys };
        let known = filesystem.recipients();
        let (unlocked, recipients) =
            unlock::unlock_again(self.directory.path(), &sealed, &expected, &known, &self.providers)?;
        if unlocked.fingerprint() != filesystem.fingerprint() {
            return Err(CliError::new(Exit::WrongVolume, "the config is that of another volume"));
        }
        if !differ_in_keys_only(unlocked.config(), filesystem.config()) {
            return Err(CliError::new(
                Exit::Config,
                "the config differs in more than its keys: unmount the volume first",
            ));
        }
        filesystem.change_keys(unlocked.config(), recipients);
        Ok(())
    }
}

fn differ_in_keys_only(new: &VolumeConfig, old: &VolumeConfig) -> bool {
    let mut same = new.clone();
    (same.wrapping_keys, same.volume_keys) = (old.wrapping_keys.clone(), old.volume_keys.clone());
    same == *old
}
