//! `kmsfs init`: makes a volume, and a local keyring for it if there is none.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::key_spec::KeySpec;
use crate::cli::passphrase::{self, Secret};
use crate::cli::pins::{Pin, Pins};
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::{mount_point, report};
use crate::crypto::Suite;
use crate::daemon::log::Level;
use crate::format::config::{self, End, Holes, MAX_FILES_PER_DATA_KEY, VolumeConfig};
use crate::format::hex;
use crate::keys::providers::{self, ProviderSettings};
use crate::keys::volume::{self, Created, NewVolume};
use crate::keys::{ProviderError, ProviderKind};
use crate::storage::cipher_directory::{CipherDirectory, CipherDirectoryError};

/// Make a volume in a new or empty directory
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// The directory that will hold the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    #[command(flatten)]
    volume: NewVolumeArgs,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// What a new volume is to be.
#[derive(Debug, Args)]
#[command(next_help_heading = "New volume")]
pub(crate) struct NewVolumeArgs {
    /// The key that protects the volume: local:PATH (a keyring, made if missing), aws-kms:KEY (ARN, id or alias),
    /// vault:KEY (a key of the transit engine), pkcs11:URI or age:RECIPIENT
    /// [default: a local keyring in the user's data directory]
    #[arg(long, value_name = "PROVIDER:ID")]
    key: Option<KeySpec>,
    /// The cipher suite; auto is the one that is faster on this CPU [default: auto]
    #[arg(long, value_enum)]
    suite: Option<SuiteChoice>,
    /// Whether holes in files read as zeros; deny makes them an error, and sparse files full [default: allow]
    #[arg(long, value_enum)]
    holes: Option<HolesChoice>,
    /// Whether a file that was cut off at a page boundary is readable or an error [default: lenient]
    #[arg(long, value_enum)]
    end: Option<EndChoice>,
    /// How many new files may share one data key [default: 1]
    #[arg(long, value_name = "N", value_parser = files_per_data_key())]
    files_per_data_key: Option<u32>,
}

fn files_per_data_key() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(MAX_FILES_PER_DATA_KEY))
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum SuiteChoice {
    #[default]
    Auto,
    #[value(name = "xaes-256-gcm")]
    Xaes256Gcm,
    #[value(name = "xchacha20-poly1305")]
    XChaCha20Poly1305,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum HolesChoice {
    #[default]
    Allow,
    Deny,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum EndChoice {
    #[default]
    Lenient,
    Strict,
}

impl NewVolumeArgs {
    fn new_volume(&self) -> NewVolume {
        NewVolume {
            suite: match self.suite.unwrap_or_default() {
                SuiteChoice::Auto => Suite::fastest_here(),
                SuiteChoice::Xaes256Gcm => Suite::Xaes256Gcm,
                SuiteChoice::XChaCha20Poly1305 => Suite::XChaCha20Poly1305,
            },
            holes: match self.holes.unwrap_or_default() {
                HolesChoice::Allow => Holes::Allow,
                HolesChoice::Deny => Holes::Deny,
            },
            end: match self.end.unwrap_or_default() {
                EndChoice::Lenient => End::Lenient,
                EndChoice::Strict => End::Strict,
            },
            files_per_data_key: self.files_per_data_key.unwrap_or(1),
        }
    }

    /// Whether any of them was given.
    pub(super) fn given(&self) -> bool {
        let Self { key, suite, holes, end, files_per_data_key } = self;
        key.is_some() || suite.is_some() || holes.is_some() || end.is_some() || files_per_data_key.is_some()
    }

    /// Whether the volume's keyring is one that has to be made.
    pub(super) fn needs_keyring(&self, settings: &Settings, environment: &Environment) -> Result<bool, CliError> {
        let key = self.wrapping_key(settings, environment)?;
        Ok(key.kind == ProviderKind::Local && !Path::new(&key.id).exists())
    }

    /// The key that protects the new volume; for a local one with its absolute path.
    fn wrapping_key(&self, settings: &Settings, environment: &Environment) -> Result<KeySpec, CliError> {
        let path = match &self.key {
            Some(key) if key.kind != ProviderKind::Local => return Ok(key.clone()),
            Some(key) => PathBuf::from(&key.id),
            None => match &settings.keyring {
                Some(path) => path.clone(),
                None => default_keyring(environment)?,
            },
        };
        let path = absolute(&path)?;
        if let Some(keyring) = &settings.keyring
            && absolute(keyring)? != path
        {
            return Err(CliError::usage("--key local:PATH and the setting keyring name two different keyrings"));
        }
        let id = path.into_os_string().into_string();
        let id =
            id.map_err(|path| CliError::usage(format_args!("the keyring's path is not UTF-8: {}", path.display())))?;
        Ok(KeySpec { kind: ProviderKind::Local, id })
    }
}

/// The passphrase of the keyring of a new volume, if it is to have one.
pub(super) fn read_passphrase(
    args: &NewVolumeArgs,
    settings: &Settings,
    environment: &Environment,
) -> Result<Option<Secret>, CliError> {
    let key = args.wrapping_key(settings, environment)?;
    match key.kind {
        ProviderKind::Local => {
            let path = Path::new(&key.id);
            passphrase::for_keyring(settings, environment, path, !path.exists())
        }
        _ => passphrase::for_volume(settings, environment, None),
    }
}

/// The keyring of whoever names none.
pub(super) fn default_keyring(environment: &Environment) -> Result<PathBuf, CliError> {
    let data = environment.data_directory().map(|directory| directory.join("keyring.toml"));
    data.ok_or_else(|| {
        CliError::usage("without HOME or XDG_DATA_HOME there is no place for a keyring").hint("use --key local:PATH")
    })
}

pub(super) fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path).map_err(|error| CliError::io(path.display(), &error))
}

/// Makes the volume and says which.
pub(crate) fn run(args: &InitArgs) -> Result<(), CliError> {
    let environment = Environment::of_process();
    let settings = Settings::load(&args.settings, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    CipherDirectory::check_vacant(&args.cipher_directory).map_err(|error| no_place(&args.cipher_directory, error))?;
    let new = args.volume.needs_keyring(&settings, &environment)?;
    let key = args.volume.wrapping_key(&settings, &environment)?;
    let secret = read_passphrase(&args.volume, &settings, &environment)?;
    let providers = settings.for_providers(secret.map(passphrase::for_provider));
    let directory = new.then(|| missing_above(Path::new(&key.id)).pop()).flatten();
    let new_volume = args.volume.new_volume();
    let made = create(&args.cipher_directory, &new_volume, &key, (&providers, &environment), |_| Ok(()))?;
    let volume = hex::encode_uuid(&made.volume_id);
    report::say(&format!("volume {volume} under {}:{}\n", key.kind, made.wrapping_key))?;
    // Programs read standard output; this is for people.
    if key.kind == ProviderKind::Local {
        let keyring = keyring_in_words(Path::new(&key.id), new, directory.as_deref(), &providers);
        report::tell(&format!("{keyring}; without it the volume cannot be read: keep a copy elsewhere"));
    }
    report::tell(&format!("mount it: kmsfs mount {} MOUNTPOINT", args.cipher_directory.display()));
    Ok(())
}

/// Says where a keyring is, and the topmost directory that was made for it: a disk that is not mounted looks like that.
fn keyring_in_words(path: &Path, new: bool, directory: Option<&Path>, providers: &ProviderSettings) -> String {
    let made = if new { "new, " } else { "" };
    let directory = directory.map(|path| format!("in the new directory {}, ", path.display())).unwrap_or_default();
    let sealed = if providers.passphrase.is_some() { "under the passphrase" } else { "without a passphrase" };
    format!("keyring: {} ({made}{directory}{sealed})", path.display())
}

/// The directories above `path` that are missing, the topmost last.
fn missing_above(path: &Path) -> Vec<PathBuf> {
    path.ancestors().skip(1).take_while(|directory| !directory.exists()).map(Path::to_owned).collect()
}

/// A passphrase that the keyring does not have is a mistake: the caller believes that it protects the volume.
fn check_passphrase(path: &Path, providers: &ProviderSettings) -> Result<(), CliError> {
    if providers.passphrase.is_none() || providers::is_sealed(path)? {
        return Ok(());
    }
    let hint =
        format!("`kmsfs keys passphrase --keyring {}` gives it one; or leave the passphrase out", path.display());
    Err(CliError::new(Exit::Credentials, format_args!("the keyring {} has no passphrase", path.display())).hint(hint))
}

/// Whether `kmsfs mount --init` is to make a volume at `path`: there is none.
pub(super) fn is_vacant(path: &Path) -> Result<bool, CliError> {
    match CipherDirectory::check_vacant(path) {
        Err(CipherDirectoryError::AlreadyAVolume(_)) => Ok(false),
        vacant => vacant.map(|()| true).map_err(|error| no_place(path, error)),
    }
}

/// A volume is made in a directory that is there.
pub(super) fn no_place(path: &Path, error: CipherDirectoryError) -> CliError {
    match error {
        CipherDirectoryError::NotFound(above) if above != path => {
            let hint = format!("make it: `mkdir -p {}`", above.display());
            CliError::new(Exit::CipherDirectory, format_args!("{} does not exist", above.display())).hint(hint)
        }
        error => error.into(),
    }
}

/// Makes the volume at `path`, for `kmsfs mount --init`, if it `is_expected`. Where another one is remembered, none is made.
pub(super) fn create_expected(
    path: &Path,
    args: &NewVolumeArgs,
    settings: &Settings,
    (providers, environment): (&ProviderSettings, &Environment),
    is_expected: impl FnOnce(&VolumeConfig) -> Result<(), CliError>,
) -> Result<(), CliError> {
    if let Some(remembered) = Pins::of(environment).map(|pins| pins.get(path)).transpose()?.flatten() {
        remembered.check_volume(path, "nothing")?;
    }
    let key = args.wrapping_key(settings, environment)?;
    create(path, &args.new_volume(), &key, (providers, environment), is_expected).map(drop)
}

/// Makes a volume at `path` if it `is_expected`, and remembers it. A failure leaves neither a volume nor a new keyring.
fn create(
    path: &Path,
    new: &NewVolume,
    key: &KeySpec,
    (providers, environment): (&ProviderSettings, &Environment),
    is_expected: impl FnOnce(&VolumeConfig) -> Result<(), CliError>,
) -> Result<Created, CliError> {
    let path = mount_point::canonical_or_new(path)
        .map_err(|error| CliError::of(Exit::CipherDirectory, path.display(), &error))?;
    CipherDirectory::check_vacant(&path)?;
    if key.kind == ProviderKind::Local && Path::new(&key.id).exists() {
        check_passphrase(Path::new(&key.id), providers)?;
    }
    let (location, new_keyring) = local_keyring(key, &path, providers)?;
    let id = if location.is_some() { "" } else { key.id.as_str() };
    let provider = providers::open_named(key.kind, id, location.as_deref(), providers)?;
    let created = volume::create(new, provider.as_ref(), location.as_deref())?;
    is_expected(&config::parse(created.config_file.as_bytes())?.config)?;
    CipherDirectory::create(&path, &created.config_file, &created.root_directory_id)?;
    if let Some(keyring) = new_keyring {
        keyring.keep();
    }
    let pin = Pin::new(&hex::encode_uuid(&created.volume_id), &created.fingerprint);
    remember(&path, &pin, Ok(Pins::of(environment).as_ref()));
    Ok(created)
}

/// Remembers the volume. It exists already, so a failure is only a warning: the first mount tries again.
pub(super) fn remember(path: &Path, pin: &Pin, pins: Result<Option<&Pins>, &CliError>) {
    match pins.map(|pins| pins.map(|pins| pins.set(path, pin.clone()))) {
        Ok(None) => tracing::warn!("the volume is not remembered: there is neither HOME nor XDG_DATA_HOME"),
        Err(error) => tracing::warn!("the volume is not remembered: {error}"),
        Ok(Some(Err(error))) => tracing::warn!("the volume is not remembered: {error}"),
        Ok(Some(Ok(()))) => {}
    }
}

/// The path of the keyring if the key is a local one, and the keyring if it had to be made.
pub(super) fn local_keyring(
    key: &KeySpec,
    cipher_directory: &Path,
    settings: &ProviderSettings,
) -> Result<(Option<PathBuf>, Option<NewKeyring>), CliError> {
    if key.kind != ProviderKind::Local {
        return Ok((None, None));
    }
    let path = PathBuf::from(&key.id);
    if path.starts_with(cipher_directory) {
        return Err(CliError::usage("a keyring inside the cipher directory would be a key beside its lock"));
    }
    let made = if path.exists() { None } else { Some(NewKeyring::create(&path, settings)?) };
    Ok((Some(path), made))
}

/// A keyring that was made, with the directories that were missing above it. Dropping it removes them again.
pub(super) struct NewKeyring {
    path: PathBuf,
    directories: Vec<PathBuf>,
    keep: bool,
}

impl NewKeyring {
    fn create(path: &Path, settings: &ProviderSettings) -> Result<Self, ProviderError> {
        let mut made = Self { path: path.to_owned(), directories: missing_above(path), keep: false };
        if let Err(error) = providers::create_local(path, settings.passphrase.as_ref()) {
            // A keyring that appeared in the meantime is not ours.
            made.path = PathBuf::new();
            return Err(error);
        }
        Ok(made)
    }

    pub(super) fn keep(mut self) {
        self.keep = true;
    }

    /// Keeps it, and says where it is.
    pub(super) fn keep_and_tell(self, providers: &ProviderSettings) {
        let directory = self.directories.last().map(PathBuf::as_path);
        report::tell(&keyring_in_words(&self.path, true, directory, providers));
        self.keep();
    }
}

impl Drop for NewKeyring {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // The failure that led here is the one to tell.
        let _ = fs::remove_file(&self.path);
        for directory in &self.directories {
            let _ = fs::remove_dir(directory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keyring_of_a_failed_init_is_removed_with_its_directories() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a/b/keyring.toml");
        let made = NewKeyring::create(&path, &ProviderSettings::default()).unwrap();
        assert!(path.exists());
        drop(made);
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
        NewKeyring::create(&path, &ProviderSettings::default()).unwrap().keep();
        assert!(path.exists());
    }

    #[test]
    fn a_keyring_beside_its_lock_is_refused() {
        let key = KeySpec { kind: ProviderKind::Local, id: "/c/keyring.toml".into() };
        let refused = local_keyring(&key, Path::new("/c"), &ProviderSettings::default());
        assert_eq!(refused.err().unwrap().code(), Exit::Usage as u8);
    }
}
