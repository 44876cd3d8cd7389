//! Changing a volume's list of wrapping keys, for `kmsfs rewrap` and `kmsfs recipients`.
//!
//! Invariants: no mount works with another list than the one on disk, up to the step that is being taken; each step is one
//! durable replacement of the config; a key gets onto the list only after it has wrapped the volume key.

use std::path::Path;

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::key_spec::KeySpec;
use crate::cli::listed_key;
pub(super) use crate::cli::listed_key::name_of;
use crate::cli::passphrase;
use crate::cli::pins::Pins;
use crate::cli::settings::Settings;
use crate::cli::unlock::{self, Expected};
use crate::cli::writing;
use crate::format::config::{VolumeConfig, WrappedVolumeKey, WrappingKey};
use crate::format::geometry::PAGE_LEN;
use crate::format::name::RedoLog;
use crate::keys::providers::{self, ProviderSettings};
use crate::keys::volume::{self, Unlocked};
use crate::keys::{KeyLimits, ProviderKind, Recipient, Volume, Wanted};
use crate::lease::Permit;
use crate::storage::RawFile as _;
use crate::storage::cipher_directory::{CipherDirectory, CipherDirectoryError, LockMode};

use super::init::{self, NewKeyring};
use super::key_hold::Hold;
use super::status;

/// A locked volume whose list of keys may be changed.
pub(super) struct KeyChange {
    pub(super) directory: CipherDirectory,
    unlocked: Unlocked,
    providers: ProviderSettings,
    hold: Hold,
}

impl KeyChange {
    /// Locks and unlocks the volume at `path`.
    pub(super) fn begin(
        path: &Path,
        settings: &Settings,
        environment: &Environment,
        pins: Option<&Pins>,
    ) -> Result<Self, CliError> {
        let directory = CipherDirectory::open(path).map_err(|error| explain(path, error))?;
        let mut hold = Hold::take(&directory, LockMode::Exclusive)?;
        let sealed = unlock::read_config(&directory)?;
        let secret = passphrase::for_volume(settings, environment, Some(&sealed.config))?;
        let providers = settings.for_providers(secret.map(passphrase::for_provider));
        let expected = Expected::default();
        let (unlocked, _) = unlock::unlock_to_change(directory.path(), &sealed, &expected, pins, &providers)?;
        hold.unlocked(writing::seal_of(&unlocked))?;
        let change = Self { directory, unlocked, providers, hold };
        change.check_no_redo_log()?;
        Ok(change)
    }

    /// What the config says now.
    pub(super) fn config(&self) -> &VolumeConfig {
        self.unlocked.config()
    }

    /// The volume as its config is now.
    pub(super) fn volume(&self, limits: KeyLimits) -> Volume {
        self.unlocked.volume(self.recipients(), limits)
    }

    fn recipients(&self) -> Vec<Recipient> {
        unlock::recipients(self.config(), &self.providers)
    }

    /// Puts the key `to` before the one that it is to replace, which is returned: `from`, or the only other one there is.
    /// None if that is gone already.
    pub(super) fn introduce(
        &mut self,
        to: &KeySpec,
        from: Option<&KeySpec>,
        write: bool,
    ) -> Result<Option<WrappingKey>, CliError> {
        let (key, wrapped, keyring) = self.wrap_for(to)?;
        let config = self.config();
        let others: Vec<_> = config.wrapping_keys.iter().filter(|other| !same(other, &key)).cloned().collect();
        let listed = others.len() < config.wrapping_keys.len();
        let named = from.map(|from| listed_key::find(from, &others, &self.providers)).transpose()?;
        let old = match (named, &others[..]) {
            (Some(Some(old)), _) | (None, [old]) => old,
            (Some(None) | None, []) | (Some(None), _) if listed => return Ok(None),
            (Some(None), _) | (_, []) => {
                let unknown = from.map(|from| listed_key::unknown(from, &others));
                return Err(unknown.unwrap_or_else(|| CliError::usage("the volume has no other key")));
            }
            (None, _) => {
                let all: Vec<_> = others.iter().map(listed_key::described).collect();
                let hint = format!("say which one with --from: {}", all.join(", "));
                return Err(CliError::usage("the volume has several wrapping keys").hint(hint));
            }
        };
        let old = old.clone();
        if !(self.lists(&key) && volume::wraps_new(config, &key)) {
            let mut config = config.clone();
            config.wrapping_keys.retain(|other| !same(other, &key));
            let at = config.wrapping_keys.iter().position(|other| same(other, &old)).unwrap_or(0);
            config.wrapping_keys.insert(at, key);
            config.volume_keys.insert(0, wrapped);
            self.change(config, write)?;
            keyring.filter(|_| write).into_iter().for_each(|keyring| keyring.keep_and_tell(&self.providers));
        }
        Ok(Some(old))
    }

    /// Adds a recipient after the others.
    pub(super) fn add(&mut self, spec: &KeySpec) -> Result<WrappingKey, CliError> {
        let (key, wrapped, keyring) = self.wrap_for(spec)?;
        if self.lists(&key) && volume::wraps_new(self.config(), &key) {
            return Err(CliError::usage(format_args!("{} is a recipient already", name_of(&key))));
        }
        let mut config = self.config().clone();
        config.wrapping_keys.retain(|other| !same(other, &key));
        config.wrapping_keys.push(key.clone());
        config.volume_keys.push(wrapped);
        self.change(config, true)?;
        keyring.into_iter().for_each(|keyring| keyring.keep_and_tell(&self.providers));
        Ok(key)
    }

    /// Lets go of the old key; or keeps it on the list for what it wrapped, without the volume key.
    pub(super) fn retire(&mut self, old: &WrappingKey, keep: bool) -> Result<(), CliError> {
        // A mount may have died meanwhile.
        self.check_no_redo_log()?;
        let mut config = self.config().clone();
        config.volume_keys.retain(|record| (&record.provider, &record.key) != (&old.provider, &old.key));
        let (kept, mut rest): (Vec<_>, Vec<_>) = config.wrapping_keys.into_iter().partition(|key| same(key, old));
        rest.extend(kept.into_iter().filter(|_| keep));
        config.wrapping_keys = rest;
        self.change(config, true)
    }

    /// The keys that every header is to have a record of, when `old` is gone.
    pub(super) fn wanted(&self, old: Option<&WrappingKey>) -> Vec<Wanted> {
        let keys = self.config().wrapping_keys.iter();
        let keys = keys.filter(|key| volume::wraps_new(self.config(), key) && old.is_none_or(|old| !same(key, old)));
        keys.filter_map(|key| Some(Wanted { kind: ProviderKind::from_name(&key.provider)?, key: key.key.clone() }))
            .collect()
    }

    /// The key on the list that `spec` names.
    pub(super) fn listed(&self, spec: &KeySpec) -> Result<WrappingKey, CliError> {
        let keys = &self.config().wrapping_keys;
        let found = listed_key::find(spec, keys, &self.providers)?;
        found.cloned().ok_or_else(|| listed_key::unknown(spec, keys))
    }

    fn lists(&self, key: &WrappingKey) -> bool {
        self.config().wrapping_keys.iter().any(|other| same(other, key))
    }

    /// The key that `spec` names, the volume key under it, and its keyring if that had to be made.
    fn wrap_for(&self, spec: &KeySpec) -> Result<(WrappingKey, WrappedVolumeKey, Option<NewKeyring>), CliError> {
        let mut spec = spec.clone();
        if spec.kind == ProviderKind::Local {
            spec.id = text_of(&init::absolute(Path::new(&spec.id))?)?;
        }
        let (location, made) = init::local_keyring(&spec, self.directory.path(), &self.providers)?;
        // Here the keyring is the one that was named, whatever the settings say of the volume's.
        let (provider, id) = match &location {
            Some(path) => {
                let asks = self.providers.passphrase.is_none() && providers::is_sealed(path)?;
                let asked = if asks { passphrase::ask(path)?.map(passphrase::for_provider) } else { None };
                (providers::open_keyring(path, self.providers.passphrase.as_ref().or(asked.as_ref()))?, "")
            }
            None => (providers::open_named(spec.kind, &spec.id, None, &self.providers)?, spec.key()),
        };
        let wrapped = self.unlocked.wrap(provider.as_ref(), id)?;
        let location = location.as_deref().map(text_of).transpose()?;
        Ok((WrappingKey { provider: wrapped.provider.clone(), key: wrapped.key.clone(), location }, wrapped, made))
    }

    fn change(&mut self, config: VolumeConfig, write: bool) -> Result<(), CliError> {
        let before = self.unlocked.config().clone();
        let file = self.unlocked.change(config)?;
        if !write {
            return Ok(());
        }
        self.replace(&file)?;
        self.hold.tell(&self.directory).inspect_err(|_| {
            // A mount that refuses works with the list as it was, and so must everybody else.
            if let Ok(file) = self.unlocked.change(before)
                && self.replace(&file).is_ok()
            {
                let _ = self.hold.tell(&self.directory);
            }
        })
    }

    fn replace(&self, file: &str) -> Result<(), CliError> {
        self.permit().check()?;
        let replaced = self.directory.replace_config(file);
        replaced.map_err(|error| CliError::io(self.directory.path().join(".kmsfs/volume.toml").display(), &error))
    }

    /// Whether no mount writes to the volume, nor will.
    pub(super) fn writes_alone(&self) -> bool {
        self.hold.writes_alone()
    }

    /// What says before each further change that this process may make it.
    pub(super) fn permit(&self) -> Permit {
        self.hold.permit()
    }

    /// Whether programs work on the volume meanwhile.
    pub(super) fn is_mounted(&self) -> bool {
        self.hold.is_mounted()
    }

    /// A redo log holds a header under the keys of its time: applied after the list has let go of them, its file would not open.
    /// One that does not count is none.
    fn check_no_redo_log(&self) -> Result<(), CliError> {
        let failed = |error: std::io::Error| CliError::io(".kmsfs/rekey", &error);
        let (logs, volume) = (self.directory.redo_logs().map_err(failed)?, self.volume(KeyLimits::default()));
        let counts = |log: &RedoLog| {
            let mut page = [0; PAGE_LEN];
            let read = logs.open(log).and_then(|open| open.file().read_at(&mut page, 0));
            let header = read.map(|_| volume.ring.authenticate(&page).ok().flatten());
            header.is_ok_and(|header| header.is_some_and(|header| header.header().file_id == log.file_id))
        };
        if !logs.all().map_err(failed)?.iter().any(counts) {
            return Ok(());
        }
        let what = "a file is half way to a new data key: the volume's keys cannot be changed now";
        Err(CliError::new(Exit::Other, what)
            .hint("mount the volume again, which finishes it, or says in its log why it cannot"))
    }

    /// Whether `walk`, which looks at every file, can have missed none; and what it found.
    pub(super) fn walk_all<T>(&self, walk: impl FnOnce() -> T) -> (bool, T) {
        let before = self.hold.moves(&self.directory);
        let found = walk();
        (before.is_some() && before == self.hold.moves(&self.directory), found)
    }
}

/// A mount point has no volume of its own in it: say so.
fn explain(path: &Path, error: CipherDirectoryError) -> CliError {
    let mounted = status::canonical(path).is_ok_and(|path| status::connect(&path).is_ok());
    if mounted {
        return CliError::new(Exit::Locked, format_args!("{} is a mount: name its cipher directory", path.display()))
            .hint("`kmsfs status` shows it; the volume may stay mounted");
    }
    error.into()
}

fn text_of(path: &Path) -> Result<String, CliError> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| CliError::usage(format_args!("the keyring's path is not UTF-8: {}", path.display())))
}

fn same(a: &WrappingKey, b: &WrappingKey) -> bool {
    (&a.provider, &a.key) == (&b.provider, &b.key)
}

/// All keys on a config's list.
pub(super) fn names(config: &VolumeConfig) -> Vec<String> {
    config.wrapping_keys.iter().map(name_of).collect()
}
