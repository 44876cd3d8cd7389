//! Settings: flags over environment over the user's file over the system's file, checked and made one value.
//!
//! A [`Layer`] is what one of the sources says; [`Settings`] is what they come to. Unknown keys in a file are errors.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Deserialize;

use crate::daemon::log::{Format, Level};
use crate::keys::providers::{AgeSettings, AwsSettings, Passphrase, Pkcs11Settings, ProviderSettings, VaultSettings};

use super::environment::Environment;
use super::error::{CliError, Exit};
use super::passphrase::PassphraseSource;
use super::provider_settings::{self, AgeLayer, Pkcs11Layer, VaultLayer};
use super::span::Span;

pub(super) const SETTINGS: &str = "Settings";
const KEYRING: &str = "Local keyring";
const AWS: &str = "AWS KMS";
/// The headings of the help below which settings stand, which every command that uses keys has.
pub(crate) const HEADINGS: [&str; 6] =
    [SETTINGS, KEYRING, AWS, provider_settings::VAULT, provider_settings::PKCS11, provider_settings::AGE];
/// The variable that holds a passphrase; the background process does not inherit it.
pub(crate) const PASSPHRASE_VARIABLE: &str = "KMSFS_PASSPHRASE";
const MAX_FILE_LEN: u64 = 65536;
/// No wait for a provider may be longer: a mount would hang.
const MAX_TIMEOUT: Duration = Duration::from_secs(600);

/// The flags that all commands share that use keys.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = SETTINGS)]
pub(crate) struct SettingsArgs {
    /// Read settings from this file instead of the usual ones
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Ask for the passphrase of the local keyring on the terminal
    #[arg(long, conflicts_with = "passphrase_file", help_heading = KEYRING)]
    passphrase: bool,
    #[command(flatten)]
    layer: Layer,
}

/// What one source says.
#[derive(Clone, Debug, Default, PartialEq, Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[command(next_help_heading = SETTINGS)]
struct Layer {
    /// Read the passphrase of the local keyring from this file (- is standard input)
    #[arg(long, value_name = "FILE", help_heading = KEYRING)]
    passphrase_file: Option<PathBuf>,
    /// The local keyring, if it is not where the volume config says
    #[arg(long, value_name = "PATH", help_heading = KEYRING)]
    keyring: Option<PathBuf>,
    /// The AWS Region of the KMS
    #[arg(long, help_heading = AWS)]
    region: Option<String>,
    /// The URL of the KMS, if it is not AWS's own
    #[arg(long, value_name = "URL", help_heading = AWS)]
    endpoint_url: Option<String>,
    /// Use the FIPS endpoints of AWS
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = AWS
    )]
    fips: Option<bool>,
    /// The longest wait for one attempt of a call of the KMS: seconds, or with a unit as in 90s or 1m [default: 2s]
    #[arg(long, value_name = "DURATION")]
    kms_attempt_timeout: Option<Span>,
    /// The longest wait for a call of the KMS with all its attempts [default: 6s]
    #[arg(long, value_name = "DURATION")]
    kms_operation_timeout: Option<Span>,
    /// What is logged: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// How the log looks: text, json, or journald, which sends entries with fields to the journal of systemd [default:
    /// journald where standard error is the journal, else text]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    #[arg(skip)]
    log_file: Option<PathBuf>,
    #[command(flatten)]
    #[serde(default)]
    vault: VaultLayer,
    #[command(flatten)]
    #[serde(default)]
    pkcs11: Pkcs11Layer,
    #[command(flatten)]
    #[serde(default)]
    age: AgeLayer,
}

/// What all sources come to.
#[derive(Debug)]
pub(crate) struct Settings {
    /// A keyring that wins over the one that a volume config names.
    pub(crate) keyring: Option<PathBuf>,
    /// Where a passphrase comes from, if one is given.
    pub(crate) passphrase: Option<PassphraseSource>,
    /// How AWS KMS is reached.
    pub(crate) aws: AwsSettings,
    /// How OpenBao or Vault is reached.
    pub(crate) vault: VaultSettings,
    /// The module of PKCS #11.
    pub(crate) pkcs11: Pkcs11Settings,
    /// Identities of age.
    pub(crate) age: AgeSettings,
    /// How much is logged, if anything says so.
    pub(crate) log_level: Option<Level>,
    /// How the log looks, if anything says so.
    pub(crate) log_format: Option<Format>,
    /// Where a mount logs to, if anything says so.
    pub(crate) log_file: Option<PathBuf>,
}

impl Settings {
    /// The settings for these flags.
    pub(crate) fn load(args: &SettingsArgs, environment: &Environment) -> Result<Self, CliError> {
        let mut file = Layer::default();
        for path in config_files(args, environment) {
            file = file.or(Layer::of_file(&path, args.config.is_some() || environment.get("KMSFS_CONFIG").is_some())?);
        }
        let passphrase = passphrase_source(args, environment, &file);
        args.layer.clone().or(Layer::of_environment(environment)?).or(file).validate(passphrase)
    }

    /// The same for the providers, with the passphrase that was read.
    pub(crate) fn for_providers(&self, passphrase: Option<Passphrase>) -> ProviderSettings {
        ProviderSettings {
            keyring: self.keyring.clone(),
            passphrase,
            aws: self.aws.clone(),
            vault: self.vault.clone(),
            pkcs11: self.pkcs11.clone(),
            age: self.age.clone(),
            trail: None,
        }
    }
}

fn config_files(args: &SettingsArgs, environment: &Environment) -> Vec<PathBuf> {
    let named = args.config.clone().or_else(|| environment.get("KMSFS_CONFIG").map(PathBuf::from));
    named.map_or_else(|| environment.config_files(), |path| vec![path])
}

/// The passphrase of the most important source that gives one. A variable that is set and empty gives an empty one, which is
/// refused where it is read: a script whose secret is missing must not make a keyring without one.
fn passphrase_source(args: &SettingsArgs, environment: &Environment, file: &Layer) -> Option<PassphraseSource> {
    if args.passphrase {
        return Some(PassphraseSource::Terminal);
    }
    let from_file = |path: &PathBuf| PassphraseSource::File(path.clone());
    let flag = args.layer.passphrase_file.as_ref().map(from_file);
    flag.or_else(|| environment.get_even_empty(PASSPHRASE_VARIABLE).map(|_| PassphraseSource::Environment))
        .or_else(|| environment.get_even_empty("KMSFS_PASSPHRASE_FILE").map(|path| PassphraseSource::File(path.into())))
        .or_else(|| file.passphrase_file.as_ref().map(from_file))
}

impl Layer {
    /// Fills the gaps from a less important source.
    fn or(self, lower: Self) -> Self {
        Self {
            passphrase_file: self.passphrase_file.or(lower.passphrase_file),
            keyring: self.keyring.or(lower.keyring),
            region: self.region.or(lower.region),
            endpoint_url: self.endpoint_url.or(lower.endpoint_url),
            fips: self.fips.or(lower.fips),
            kms_attempt_timeout: self.kms_attempt_timeout.or(lower.kms_attempt_timeout),
            kms_operation_timeout: self.kms_operation_timeout.or(lower.kms_operation_timeout),
            log_level: self.log_level.or(lower.log_level),
            log_format: self.log_format.or(lower.log_format),
            log_file: self.log_file.or(lower.log_file),
            vault: self.vault.or(lower.vault),
            pkcs11: self.pkcs11.or(lower.pkcs11),
            age: self.age.or(lower.age),
        }
    }

    fn of_file(path: &Path, required: bool) -> Result<Self, CliError> {
        let text = match read_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !required => return Ok(Self::default()),
            other => other.map_err(|error| {
                CliError::of(Exit::Usage, format_args!("the settings file {}", path.display()), &error)
            })?,
        };
        let refused = |error: toml::de::Error| {
            CliError::usage(format_args!("the settings file {}:\n{}", path.display(), error.to_string().trim_end()))
        };
        toml::from_str(&text).map_err(refused)
    }

    fn of_environment(environment: &Environment) -> Result<Self, CliError> {
        let path = |name| environment.get(name).map(PathBuf::from);
        Ok(Self {
            passphrase_file: path("KMSFS_PASSPHRASE_FILE"),
            keyring: path("KMSFS_KEYRING"),
            region: variable(environment, "KMSFS_REGION")?,
            endpoint_url: variable(environment, "KMSFS_ENDPOINT_URL")?,
            fips: variable(environment, "KMSFS_FIPS")?.map(|value| truth("KMSFS_FIPS", &value)).transpose()?,
            kms_attempt_timeout: span(environment, "KMSFS_KMS_ATTEMPT_TIMEOUT")?,
            kms_operation_timeout: span(environment, "KMSFS_KMS_OPERATION_TIMEOUT")?,
            log_level: variable(environment, "KMSFS_LOG")?,
            log_format: variable(environment, "KMSFS_LOG_FORMAT")?,
            log_file: path("KMSFS_LOG_FILE"),
            vault: VaultLayer::of_environment(environment)?,
            pkcs11: Pkcs11Layer::of_environment(environment),
            age: AgeLayer::of_environment(environment),
        })
    }

    fn validate(self, passphrase: Option<PassphraseSource>) -> Result<Settings, CliError> {
        let defaults = AwsSettings::default();
        let aws = AwsSettings {
            fips: self.fips.unwrap_or(defaults.fips),
            attempt_timeout: timeout("kms-attempt-timeout", self.kms_attempt_timeout, defaults.attempt_timeout)?,
            operation_timeout: timeout(
                "kms-operation-timeout",
                self.kms_operation_timeout,
                defaults.operation_timeout,
            )?,
            region: self.region,
            endpoint: self.endpoint_url,
        };
        if aws.fips && aws.endpoint.is_some() {
            return Err(CliError::usage("fips and endpoint-url exclude each other: the FIPS endpoints are AWS's own"));
        }
        if aws.attempt_timeout > aws.operation_timeout {
            return Err(CliError::usage("kms-attempt-timeout must not be longer than kms-operation-timeout"));
        }
        let log_level = self.log_level.map(|name| level(&name)).transpose()?;
        Ok(Settings {
            keyring: self.keyring,
            passphrase,
            vault: self.vault.settings(&aws)?,
            pkcs11: self.pkcs11.settings(&aws)?,
            age: self.age.settings()?,
            aws,
            log_level,
            log_format: self.log_format.map(|name| format(&name)).transpose()?,
            log_file: self.log_file,
        })
    }
}

fn read_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE_LEN + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_LEN {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {MAX_FILE_LEN} bytes")));
    }
    Ok(text)
}

pub(super) fn variable(environment: &Environment, name: &str) -> Result<Option<String>, CliError> {
    let value = environment.get(name).map(|value| value.into_string());
    value.transpose().map_err(|_| CliError::usage(format_args!("{name} is not UTF-8")))
}

fn span(environment: &Environment, name: &str) -> Result<Option<Span>, CliError> {
    let parsed = variable(environment, name)?.map(|value| value.parse());
    parsed.transpose().map_err(|why: String| CliError::usage(format_args!("{name}: {why}")))
}

fn truth(name: &str, value: &str) -> Result<bool, CliError> {
    match value {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(CliError::usage(format_args!("{name} is neither true nor false"))),
    }
}

fn timeout(name: &str, span: Option<Span>, default: Duration) -> Result<Duration, CliError> {
    let Some(Span(span)) = span else { return Ok(default) };
    if span.is_zero() || span > MAX_TIMEOUT {
        return Err(CliError::usage(format_args!("{name} must be more than 0 and at most {MAX_TIMEOUT:?}")));
    }
    Ok(span)
}

fn level(name: &str) -> Result<Level, CliError> {
    name.parse().map_err(|()| {
        CliError::usage(format_args!("{name:?} is no log level")).hint(format_args!("use {}", Level::NAMES.join(", ")))
    })
}

fn format(name: &str) -> Result<Format, CliError> {
    let unknown = || CliError::usage(format_args!("{name:?} is no log format"));
    name.parse().map_err(|()| unknown().hint(format_args!("use {}", Format::NAMES.join(", "))))
}

/// Starts logging to standard error for a command that ends by itself.
pub(crate) fn log_to_stderr(settings: &Settings, default: Level) -> Result<(), CliError> {
    let level = settings.log_level.unwrap_or(default);
    crate::daemon::log::init(level, settings.log_format, &crate::daemon::log::Target::Stderr)
        .map_err(|error| CliError::new(Exit::Other, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn args(layer: Layer) -> SettingsArgs {
        SettingsArgs { layer, ..SettingsArgs::default() }
    }

    /// What documentation says of keys and variables is what is read.
    #[test]
    fn each_setting_of_the_reference_is_read_from_files_and_the_environment() {
        let settings = crate::cli::settings_reference::reference();
        assert!(settings.len() > 20, "{}", settings.len());
        for setting in settings {
            let is_number = setting.flag.contains("DURATION");
            let value = if is_number { "2" } else { "true" };
            if let Some(key) = &setting.key {
                let value = if is_number || key == "fips" { value.to_owned() } else { format!("'{value}'") };
                let layer: Layer = toml::from_str(&format!("{key} = {value}")).unwrap();
                assert_ne!(layer, Layer::default(), "{key}");
            }
            let variable = setting.variable.filter(|name| name != "KMSFS_CONFIG");
            if let Some(variable) = variable {
                let layer = Layer::of_environment(&Environment::of(false, &[(&variable, value)])).unwrap();
                assert_ne!(layer, Layer::default(), "{variable}");
            }
        }
    }

    #[test]
    fn flags_win_over_the_environment_over_files() {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("kmsfs")).unwrap();
        let file = "region = 'file'\nkeyring = '/file'\nlog-level = 'debug'\nkms-attempt-timeout = '1s'\n";
        fs::write(home.path().join("kmsfs/config.toml"), file).unwrap();
        let config_home = home.path().to_str().unwrap();
        let environment = Environment::of(
            false,
            &[
                ("XDG_CONFIG_HOME", config_home),
                ("KMSFS_REGION", "env"),
                ("KMSFS_KEYRING", "/env"),
                ("KMSFS_FIPS", "1"),
            ],
        );
        let flags = args(Layer { region: Some("flag".into()), ..Layer::default() });
        let settings = Settings::load(&flags, &environment).unwrap();
        assert_eq!(settings.aws.region.as_deref(), Some("flag"));
        assert_eq!(settings.keyring.as_deref(), Some(Path::new("/env")));
        assert_eq!(settings.log_level, "debug".parse().ok());
        assert!(settings.aws.fips);
        assert_eq!(
            (settings.aws.attempt_timeout, settings.aws.operation_timeout),
            (Duration::from_secs(1), Duration::from_secs(6))
        );
    }

    #[test]
    fn passphrases_come_from_the_most_important_source() {
        let environment = |variables: &[(&str, &str)]| Environment::of(false, variables);
        let file = Layer { passphrase_file: Some("/in-config".into()), ..Layer::default() };
        let source = |args: &SettingsArgs, variables| passphrase_source(args, &environment(variables), &file).unwrap();
        let both = [("KMSFS_PASSPHRASE", "x"), ("KMSFS_PASSPHRASE_FILE", "/in-env")];
        let none = SettingsArgs::default();
        assert_eq!(
            source(&SettingsArgs { passphrase: true, ..SettingsArgs::default() }, &both),
            PassphraseSource::Terminal
        );
        let flag = args(Layer { passphrase_file: Some("-".into()), ..Layer::default() });
        assert_eq!(source(&flag, &both), PassphraseSource::File("-".into()));
        assert_eq!(source(&none, &both), PassphraseSource::Environment);
        assert_eq!(source(&none, &both[1..]), PassphraseSource::File("/in-env".into()));
        assert_eq!(source(&none, &[]), PassphraseSource::File("/in-config".into()));
        assert_eq!(source(&none, &[("KMSFS_PASSPHRASE", "")]), PassphraseSource::Environment);
        assert_eq!(source(&none, &[("KMSFS_PASSPHRASE_FILE", "")]), PassphraseSource::File("".into()));
    }

    #[test]
    fn a_named_file_must_exist_and_parse() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("settings.toml");
        let load = || {
            let args = SettingsArgs { config: Some(path.clone()), ..SettingsArgs::default() };
            Settings::load(&args, &Environment::of(false, &[])).map_err(|error| error.code())
        };
        assert_eq!(load().unwrap_err(), Exit::Usage as u8);
        for bad in ["regoin = 'x'", "region = 1", "kms-attempt-timeout = 'fast'", "= 1"] {
            fs::write(&path, bad).unwrap();
            assert_eq!(load().unwrap_err(), Exit::Usage as u8, "{bad}");
        }
        fs::write(&path, "# nothing\n").unwrap();
        load().unwrap();
    }

    #[test]
    fn impossible_values_are_usage_errors() {
        let layer = Layer::default;
        for bad in [
            Layer { kms_attempt_timeout: "0".parse().ok(), ..layer() },
            Layer { kms_operation_timeout: "601".parse().ok(), ..layer() },
            Layer { kms_operation_timeout: "11m".parse().ok(), ..layer() },
            Layer { kms_attempt_timeout: "7".parse().ok(), ..layer() },
            Layer { log_level: Some("loud".into()), ..layer() },
            Layer { log_format: Some("xml".into()), ..layer() },
            Layer { fips: Some(true), endpoint_url: Some("http://localhost".into()), ..layer() },
        ] {
            assert_eq!(bad.clone().validate(None).unwrap_err().code(), Exit::Usage as u8, "{bad:?}");
        }
        for bad in [("KMSFS_FIPS", "maybe"), ("KMSFS_KMS_ATTEMPT_TIMEOUT", "2 fast")] {
            assert!(Layer::of_environment(&Environment::of(false, &[bad])).is_err(), "{bad:?}");
        }
    }
}
