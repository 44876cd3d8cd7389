//! The config of a volume that is checked: reading it, unlocking the volume, and putting its copy back.

use std::path::Path;

use crate::check::Finding;
use crate::cli::error::{CliError, Exit};
use crate::cli::pins::Pins;
use crate::cli::unlock::{self, Expected};
use crate::cli::writing;
use crate::format::config::{self, CONFIG_COPY_FILE, SealedConfig};
use crate::fs::{Filesystem, Options};
use crate::keys::providers::ProviderSettings;
use crate::keys::{KeyLimits, Volume};
use crate::lease::{Permit, Tenure};
use crate::storage::CipherDirectory;
use crate::storage::cipher_directory::{CipherDirectoryError, LockMode, VolumeLock};

/// How a volume is opened for a check.
pub(super) struct Opening<'a> {
    /// None for the structure alone.
    pub(super) providers: Option<&'a ProviderSettings>,
    pub(super) pins: Option<&'a Pins>,
    pub(super) limits: KeyLimits,
    /// Its exclusive lock is taken, and a config that is missing or broken is mended.
    pub(super) repair: bool,
}

/// What is checked.
pub(super) struct Subject {
    pub(super) directory: CipherDirectory,
    pub(super) sealed: SealedConfig,
    pub(super) volume: Option<Volume>,
    /// Given back before the lock is.
    tenure: Option<Tenure>,
    _lock: Option<VolumeLock>,
    /// Was not as it should be, and was mended before anything is looked at.
    pub(super) mended: Vec<Finding>,
}

impl Subject {
    /// Asked before each change.
    pub(super) fn permit(&self) -> Permit {
        self.tenure.as_ref().map(Tenure::permit).unwrap_or_default()
    }
}

impl Opening<'_> {
    /// Opens the volume at `path`.
    pub(super) fn open(&self, path: &Path) -> Result<Subject, CliError> {
        let directory = CipherDirectory::open_without_config(path)?;
        let lock = self.repair.then(|| directory.lock(LockMode::Exclusive)).transpose()?;
        match self.read(&directory) {
            Ok((sealed, volume)) => {
                let (tenure, mended) = self.finish(&directory, lock.as_ref(), volume.as_ref())?;
                Ok(Subject { directory, sealed, volume, tenure, _lock: lock, mended })
            }
            Err(error) if error.code() == Exit::Config as u8 => {
                let what = error.to_string();
                let (bytes, sealed, volume) = self.copy(&directory).map_err(|_| error)?;
                if !self.repair {
                    return Err(CliError::new(Exit::Config, what).hint(unlock::config_hint(&directory)));
                }
                let tenure = tenure(lock.as_ref(), volume.as_ref())?;
                let restored = directory.restore_config(&bytes);
                restored.map_err(|error| CliError::io(directory.path().join(".kmsfs").display(), &error))?;
                let what = format!("{what}; {CONFIG_COPY_FILE} was put back");
                let mended = Finding { repaired: true, ..Finding::config(what, true) };
                Ok(Subject { directory, sealed, volume, tenure, _lock: lock, mended: vec![mended] })
            }
            Err(error) => Err(error),
        }
    }

    /// The lease of a volume that is to be repaired, in which what was half way to a new data key has been finished: a filesystem
    /// does that when it begins.
    fn finish(
        &self,
        directory: &CipherDirectory,
        lock: Option<&VolumeLock>,
        volume: Option<&Volume>,
    ) -> Result<(Option<Tenure>, Vec<Finding>), CliError> {
        let failed = |error: std::io::Error| CliError::io(".kmsfs/rekey", &error);
        let held = tenure(lock, volume)?;
        let logs = directory.redo_logs().map_err(failed)?;
        let before = if lock.is_some() { logs.all().map_err(failed)? } else { Vec::new() };
        if before.is_empty() {
            return Ok((held, Vec::new()));
        }
        let (_, Some(another)) = self.unlock(directory, unlock::read_config(directory)?)? else {
            return Ok((held, Vec::new()));
        };
        let options = Options { prefetch: false, ..Options::default() };
        let begun = Filesystem::open_held(CipherDirectory::open(directory.path())?, another, options, held);
        if let Err(error) = begun.and_then(|filesystem| filesystem.shutdown()) {
            CliError::warn(format_args!("files that are half way to new data keys cannot be finished: {error}"));
        }
        let left = logs.all().map_err(failed)?;
        let done = before.iter().filter(|log| !left.contains(log));
        Ok((tenure(lock, volume)?, done.map(Finding::finished).collect()))
    }

    fn read(&self, directory: &CipherDirectory) -> Result<(SealedConfig, Option<Volume>), CliError> {
        if let Err(error) = CipherDirectory::open(directory.path()) {
            return Err(match error {
                CipherDirectoryError::ConfigMissing(_) => {
                    CliError::new(Exit::Config, error).hint(unlock::config_hint(directory))
                }
                error => error.into(),
            });
        }
        self.unlock(directory, unlock::read_config(directory)?)
    }

    /// The copy of the config, if it holds.
    fn copy(&self, directory: &CipherDirectory) -> Result<(Vec<u8>, SealedConfig, Option<Volume>), CliError> {
        let bytes = directory.read_config_copy().map_err(|error| CliError::io(CONFIG_COPY_FILE, &error))?;
        let (sealed, volume) = self.unlock(directory, config::parse(&bytes)?)?;
        Ok((bytes, sealed, volume))
    }

    fn unlock(
        &self,
        directory: &CipherDirectory,
        sealed: SealedConfig,
    ) -> Result<(SealedConfig, Option<Volume>), CliError> {
        let unlock = |providers| {
            unlock::unlock(directory.path(), &sealed, &Expected::default(), self.pins, providers, self.limits)
        };
        let volume = self.providers.map(unlock).transpose()?;
        Ok((sealed, volume))
    }
}

/// The lease of a volume that is to be repaired.
fn tenure(lock: Option<&VolumeLock>, volume: Option<&Volume>) -> Result<Option<Tenure>, CliError> {
    let both = lock.zip(volume);
    both.map_or(Ok(None), |(lock, volume)| writing::hold(lock, LockMode::Exclusive, writing::seal(volume)))
}
