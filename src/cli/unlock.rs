//! From a cipher directory to an unlocked volume, for every command that needs one: the config, the pins, the providers.
//!
//! Invariant: everything that can be checked without a key is checked before a provider is asked.

use std::path::Path;

use crate::format::config::{self, SealedConfig, VolumeConfig};
use crate::keys::providers::{self, ProviderSettings};
use crate::keys::volume::{self, Unlocked};
use crate::keys::{KeyError, KeyLimits, ProviderKind, Recipient, Volume};
use crate::storage::CipherDirectory;

use super::error::{CliError, Exit};
use super::key_spec::KeySpec;
use super::listed_key::name_of;
use super::pins::{self, Pins, Remembered};

/// What the caller says the volume must be.
#[derive(Debug, Default)]
pub(crate) struct Expected<'a> {
    pub(crate) volume_id: Option<&'a str>,
    /// The only keys that may wrap anything of the volume; none if any may.
    pub(crate) keys: &'a [KeySpec],
}

/// The parsed config of a cipher directory.
pub(crate) fn read_config(directory: &CipherDirectory) -> Result<SealedConfig, CliError> {
    let file = directory.read_config().map_err(|error| CliError::io(directory.path().display(), &error))?;
    config::parse(&file).map_err(|error| {
        CliError::new(Exit::Config, format_args!("{}: {error}", directory.path().display()))
            .hint(config_hint(directory))
    })
}

/// How to get a config back that is damaged.
pub(crate) fn config_hint(directory: &CipherDirectory) -> String {
    if directory.read_config_copy().is_ok_and(|copy| config::parse(&copy).is_ok()) {
        format!("`kmsfs check --repair {}` puts its copy .kmsfs/volume.toml.1 back", directory.path().display())
    } else {
        "restore .kmsfs/volume.toml from a backup: its copy .kmsfs/volume.toml.1 does not hold either".to_owned()
    }
}

/// Unlocks the volume of `sealed`, which was read from the canonical `directory`, if it is the expected one.
pub(crate) fn unlock(
    directory: &Path,
    sealed: &SealedConfig,
    expected: &Expected<'_>,
    pins: Option<&Pins>,
    settings: &ProviderSettings,
    limits: KeyLimits,
) -> Result<Volume, CliError> {
    let (unlocked, recipients) = unlock_to_change(directory, sealed, expected, pins, settings)?;
    Ok(unlocked.volume(recipients, limits))
}

/// The same for those who change its config: with the volume key, and the providers of all keys on its list.
pub(crate) fn unlock_to_change(
    directory: &Path,
    sealed: &SealedConfig,
    expected: &Expected<'_>,
    pins: Option<&Pins>,
    settings: &ProviderSettings,
) -> Result<(Unlocked, Vec<Recipient>), CliError> {
    let remembered = check_before_key(directory, &sealed.config, expected, pins)?;
    let recipients = recipients(&sealed.config, settings);
    let unlocked = unlock_with_any(sealed, &recipients)?;
    if let Some(remembered) = remembered {
        remembered.check_fingerprint(directory, &unlocked.fingerprint())?;
    }
    Ok((unlocked, recipients))
}

/// The same for a volume that is in use, whose list of keys has changed: providers of `known` keys are used on, and every new
/// recipient is proven. No pin is looked at: the volume is compared with the one in use.
#[cfg(feature = "mount")]
pub(crate) fn unlock_again(
    directory: &Path,
    sealed: &SealedConfig,
    expected: &Expected<'_>,
    known: &[Recipient],
    settings: &ProviderSettings,
) -> Result<(Unlocked, Vec<Recipient>), CliError> {
    check_before_key(directory, &sealed.config, expected, None)?;
    let mut recipients = recipients(&sealed.config, settings);
    let mut new = Vec::new();
    for recipient in &mut recipients {
        match known.iter().find(|known| (known.kind, &known.key) == (recipient.kind, &recipient.key)) {
            Some(known) => recipient.provider = known.provider.clone(),
            None => new.push(recipient.clone()),
        }
    }
    let unlocked = unlock_with_any(sealed, &recipients)?;
    let to_prove = |recipient: &&Recipient| recipient.wraps_new && recipient.provider.can_unwrap();
    for Recipient { key, provider, .. } in new.iter().filter(to_prove) {
        Unlocked::open(sealed, provider.as_ref(), Some(key))?;
    }
    Ok((unlocked, recipients))
}

/// The keys on a config's list with their providers. No network is crossed; a provider that cannot be opened fails when it
/// is asked.
pub(crate) fn recipients(config: &VolumeConfig, settings: &ProviderSettings) -> Vec<Recipient> {
    let known = config.wrapping_keys.iter().filter_map(|key| Some((ProviderKind::from_name(&key.provider)?, key)));
    let local = config.wrapping_keys.iter().filter(|key| key.provider == ProviderKind::Local.name()).count();
    let recipient = known.map(|(kind, key)| Recipient {
        kind,
        key: key.key.clone(),
        wraps_new: volume::wraps_new(config, key),
        provider: providers::open_or_absent(
            kind,
            &key.key,
            key.location.as_deref().map(Path::new),
            settings,
            local > 1,
        ),
    });
    recipient.collect()
}

/// The checks that need no key; returns the remembered pin, whose fingerprint is still to be checked.
pub(crate) fn check_before_key(
    directory: &Path,
    config: &VolumeConfig,
    expected: &Expected<'_>,
    pins: Option<&Pins>,
) -> Result<Option<Remembered>, CliError> {
    if let Some(id) = expected.volume_id {
        pins::check("volume", directory, id, &config.volume_id)?;
    }
    check_keys(directory, config, expected.keys)?;
    let remembered = pins.map(|pins| pins.get(directory)).transpose()?.flatten();
    if let Some(remembered) = &remembered {
        remembered.check_volume(directory, &config.volume_id)?;
    }
    Ok(remembered)
}

/// Every key of the config must be an expected one: a single other one is enough to read along.
fn check_keys(directory: &Path, config: &VolumeConfig, expected: &[KeySpec]) -> Result<(), CliError> {
    if expected.is_empty() {
        return Ok(());
    }
    let wrapping = config.wrapping_keys.iter().map(|key| (&key.provider, &key.key));
    let volume = config.volume_keys.iter().map(|key| (&key.provider, &key.key));
    let expected: Vec<String> = expected.iter().map(KeySpec::to_string).collect();
    let stranger =
        wrapping.chain(volume).map(|(provider, key)| format!("{provider}:{key}")).find(|key| !expected.contains(key));
    stranger.map_or(Ok(()), |key| {
        let hint = format!(
            "if that key may protect the volume, expect it too: `kmsfs recipients list {}` shows the names",
            directory.display()
        );
        pins::check("key", directory, &expected.join(" or "), &key).map_err(|error| error.hint(hint))
    })
}

/// Tries each key that can unlock the volume and whose provider is known, local ones first. A recipient of age says nothing of
/// who wrapped for it, so it comes last; without its identity it is not asked if another can be.
fn unlock_with_any(sealed: &SealedConfig, recipients: &[Recipient]) -> Result<Unlocked, CliError> {
    let keys = recipients.iter().filter(|recipient| recipient.wraps_new);
    let (mut keys, mut wrap_only): (Vec<_>, Vec<_>) = keys.partition(|recipient| recipient.provider.can_unwrap());
    if keys.is_empty() {
        std::mem::swap(&mut keys, &mut wrap_only);
    }
    keys.sort_by_key(|recipient| recipient.kind.rank_to_unlock());
    let mut failures: Vec<CliError> = Vec::new();
    for Recipient { key, provider, .. } in keys {
        match Unlocked::open(sealed, provider.as_ref(), Some(key)) {
            Ok(unlocked) => {
                for failure in failures {
                    tracing::warn!("a recipient cannot be used: {failure}");
                }
                return Ok(unlocked);
            }
            // It was unlocked: no other key can make its seal right.
            Err(error @ KeyError::BrokenSeal) => return Err(error.into()),
            Err(error) => failures.push(error.into()),
        }
    }
    let unasked = wrap_only.into_iter().map(|Recipient { kind, key, .. }| format!("{kind}:{key}: {UNASKED}"));
    let config = &sealed.config;
    let unknown = config.wrapping_keys.iter().filter(|key| ProviderKind::from_name(&key.provider).is_none());
    let unknown = unknown.map(|key| format!("{}: {UNKNOWN}", name_of(key)));
    Err(combine(failures, unasked.chain(unknown).collect()))
}

/// Why a recipient was not asked.
const UNASKED: &str = "not asked: give the file of its identity with --age-identity";
const UNKNOWN: &str = "this program does not know the provider: use a newer kmsfs, or one built with more providers";

/// All failures in one, with the exit code of the last, and those that nobody could ask.
fn combine(mut failures: Vec<CliError>, others: Vec<String>) -> CliError {
    if failures.len() + others.len() > 1 {
        let messages: Vec<String> = failures.iter().map(CliError::to_string).chain(others).collect();
        let last = failures.pop().map_or(Exit::KeyRefused as u8, |error| error.code());
        return CliError::with_code(last, format_args!("no key unlocks the volume: {}", messages.join("; ")));
    }
    let other = others.into_iter().next().map(|message| CliError::new(Exit::KeyRefused, message));
    failures.pop().or(other).unwrap_or_else(|| {
        CliError::new(Exit::KeyRefused, "no provider that this program knows can unlock the volume")
            .hint("use a newer kmsfs, or one that was built with more providers")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::config::{End, Holes, WrappedVolumeKey, WrappingKey};

    fn config() -> VolumeConfig {
        let mut config = VolumeConfig::new([7; 16], "xaes-256-gcm", Holes::Allow, End::Lenient, 1);
        config.wrapping_keys.push(WrappingKey { provider: "aws-kms".into(), key: "arn:1".into(), location: None });
        let key = |key: &str| WrappedVolumeKey { provider: "aws-kms".into(), key: key.into(), wrapped: String::new() };
        config.volume_keys.extend([key("arn:1"), key("arn:2")]);
        config
    }

    fn check(expected: &Expected<'_>) -> Result<(), u8> {
        check_before_key(Path::new("/c"), &config(), expected, None).map(drop).map_err(|error| error.code())
    }

    #[test]
    fn a_key_that_is_not_expected_is_refused_wherever_it_stands() {
        let keys =
            |names: &[&str]| names.iter().map(|name| format!("aws-kms:{name}").parse().unwrap()).collect::<Vec<_>>();
        let check_keys = |names| check(&Expected { volume_id: None, keys: &keys(names) });
        assert_eq!(check_keys(&["arn:1", "arn:2", "arn:3"]), Ok(()));
        assert_eq!(check_keys(&["arn:1"]), Err(Exit::WrongVolume as u8));
        assert_eq!(check_keys(&["arn:2"]), Err(Exit::WrongVolume as u8));
    }

    #[test]
    fn another_volume_is_refused() {
        let id = config().volume_id;
        assert_eq!(check(&Expected { volume_id: Some(&id), keys: &[] }), Ok(()));
        assert_eq!(check(&Expected { volume_id: Some("another"), keys: &[] }), Err(Exit::WrongVolume as u8));
    }
}
