//! `kmsfs inspect`: what a ciphertext file or a volume says of itself, and whether it is true, if the key can be had.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::pins::Pins;
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::unlock::{self, Expected};
use crate::cli::{passphrase, report};
use crate::daemon::log::Level;
use crate::format::config::{self, End, Holes, SealedConfig};
use crate::format::name::VOLUME_DIR;
use crate::keys::KeyLimits;
use crate::keys::Volume;
use crate::keys::providers::ProviderSettings;
use crate::storage::{CipherDirectory, Node};

use super::inspect_paths::{self, Entry, Subject};
use super::plain_names::PlainNames;
use super::{inspect_file, inspect_html};

/// Show the header of ciphertext files, or the config of a volume
///
/// A file is named by its ciphertext file, by its path on a mount, or by its plain path after the cipher directory:
/// `kmsfs inspect CIPHERDIR PATH`. If the key can be had, the plain path of a ciphertext file is shown.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Files of a volume, cipher directories, mount points or volume configs
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,
    /// Print JSON, one line for each path
    #[arg(long)]
    json: bool,
    /// Draw the envelope of one ciphertext file into this HTML page, which needs no network
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    html: Option<PathBuf>,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// Inspects each path; the first failure decides the exit code.
pub(crate) fn run(args: &InspectArgs) -> Result<(), CliError> {
    let environment = Environment::of_process();
    let settings = Settings::load(&args.settings, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    let secret = passphrase::for_volume(&settings, &environment, None)?;
    let providers = settings.for_providers(secret.map(passphrase::for_provider));
    let mut volumes = Volumes { providers, pins: Pins::of(&environment), known: HashMap::new() };
    let subjects = inspect_paths::subjects(&args.paths, &mut volumes);
    if let Some(page) = &args.html {
        let Ok([subject]) = <[_; 1]>::try_from(subjects) else {
            return Err(CliError::usage("--html draws one ciphertext file"));
        };
        return match subject? {
            Subject::Entry(entry) => inspect_html::draw(&entry, page, &mut volumes),
            Subject::Volume(path) | Subject::Config(path) => Err(inspect_html::no_file(&path)),
        };
    }
    let mut first_failure = None;
    for (number, subject) in subjects.into_iter().enumerate() {
        if number > 0 && !args.json {
            report::say("\n")?;
        }
        if let Err(error) = subject.and_then(|subject| inspect(&subject, args.json, &mut volumes)) {
            match first_failure {
                None => first_failure = Some(error),
                Some(_) => error.print(),
            }
        }
    }
    first_failure.map_or(Ok(()), Err)
}

fn inspect(subject: &Subject, json: bool, volumes: &mut Volumes) -> Result<(), CliError> {
    match subject {
        Subject::Volume(path) => {
            let directory = CipherDirectory::open(path)?;
            let sealed = unlock::read_config(&directory)?;
            inspect_config(path, &sealed, Some(directory.path()), json, volumes)
        }
        Subject::Config(path) => {
            let sealed = read_config_file(path)?;
            let canonical = fs::canonicalize(path).map_err(|error| CliError::io(path.display(), &error))?;
            let parent = canonical.parent().filter(|parent| parent.ends_with(VOLUME_DIR)).and_then(Path::parent);
            inspect_config(path, &sealed, parent, json, volumes)
        }
        Subject::Entry(entry) => inspect_file::inspect(entry, json, volumes),
    }
}

fn read_config_file(path: &Path) -> Result<SealedConfig, CliError> {
    let bytes = inspect_file::read_start(path, config::MAX_CONFIG_LEN as u64 + 1)?;
    config::parse(&bytes).map_err(|error| CliError::new(Exit::Config, format_args!("{}: {error}", path.display())))
}

/// The volumes of the inspected files, each unlocked at most once.
pub(super) struct Volumes {
    providers: ProviderSettings,
    pins: Option<Pins>,
    /// Or the exit code and the message of why there is none.
    known: HashMap<PathBuf, Result<Volume, (u8, String)>>,
}

impl Volumes {
    /// The unlocked volume with the cipher directory `root`, or why there is none.
    pub(super) fn at(&mut self, root: Option<&Path>) -> Result<&Volume, &str> {
        let Some(root) = root else { return Err("no volume config above the file") };
        self.known(root).as_ref().map_err(|(_, why)| why.as_str())
    }

    /// The path from `root` of what has the plain path `plain` in that volume.
    pub(super) fn cipher_path(&mut self, root: &Path, plain: &[u8]) -> Result<String, CliError> {
        match self.known(root) {
            Ok(volume) => names(root, volume)?.cipher_path(plain),
            Err((code, why)) => Err(CliError::with_code(*code, why)),
        }
    }

    /// The plain path of the entry, if its names can be read.
    pub(super) fn plain_path(&mut self, entry: &Entry) -> Option<String> {
        let (root, below) = (entry.root.as_ref()?, entry.below.as_ref()?);
        let volume = self.known(root).as_ref().ok()?;
        let plain = names(root, volume).ok()?.plain_path(below)?;
        Some(String::from_utf8_lossy(&plain).into_owned())
    }

    fn known(&mut self, root: &Path) -> &Result<Volume, (u8, String)> {
        if !self.known.contains_key(root) {
            let opened = CipherDirectory::open(root).map_err(CliError::from);
            let unlocked = opened.and_then(|directory| self.unlock(Some(root), &unlock::read_config(&directory)?));
            self.known.insert(root.to_owned(), unlocked.map_err(|error| (error.code(), error.to_string())));
        }
        &self.known[root]
    }

    fn unlock(&self, directory: Option<&Path>, sealed: &SealedConfig) -> Result<Volume, CliError> {
        let pins = self.pins.as_ref().filter(|_| directory.is_some());
        let directory = directory.unwrap_or(Path::new("the volume"));
        unlock::unlock(directory, sealed, &Expected::default(), pins, &self.providers, KeyLimits::default())
    }
}

fn names<'v>(root: &Path, volume: &'v Volume) -> Result<PlainNames<'v>, CliError> {
    let node = Node::open_root(root).map_err(|error| CliError::io(root.display(), &error))?;
    Ok(PlainNames::new(node, &volume.names))
}

#[derive(Serialize)]
struct ConfigReport<'a> {
    path: String,
    kind: &'static str,
    volume_id: &'a str,
    suite: &'a str,
    holes: Holes,
    end: End,
    files_per_data_key: u32,
    wrapping_keys: Vec<KeyReport<'a>>,
    volume_key_for: Vec<String>,
    seal: String,
}

#[derive(Serialize)]
struct KeyReport<'a> {
    provider: &'a str,
    key: &'a str,
    location: Option<&'a str>,
}

fn inspect_config(
    path: &Path,
    sealed: &SealedConfig,
    directory: Option<&Path>,
    json: bool,
    volumes: &Volumes,
) -> Result<(), CliError> {
    let checked = volumes.unlock(directory, sealed);
    let seal = match &checked {
        Ok(_) => "authentic".to_owned(),
        Err(error) if error.code() == Exit::Config as u8 => error.to_string(),
        Err(error) => format!("not checked: {error}"),
    };
    let config = &sealed.config;
    report::print(
        &ConfigReport {
            path: path.display().to_string(),
            kind: "volume",
            volume_id: &config.volume_id,
            suite: &config.suite,
            holes: config.holes,
            end: config.end,
            files_per_data_key: config.files_per_data_key,
            wrapping_keys: config.wrapping_keys.iter().map(key_report).collect(),
            volume_key_for: config.volume_keys.iter().map(|key| format!("{}:{}", key.provider, key.key)).collect(),
            seal,
        },
        json,
    )?;
    // That the key cannot be had is no failure of the volume.
    checked.map(drop).or_else(|error| if error.code() == Exit::Config as u8 { Err(error) } else { Ok(()) })
}

fn key_report(key: &config::WrappingKey) -> KeyReport<'_> {
    KeyReport { provider: &key.provider, key: &key.key, location: key.location.as_deref() }
}
