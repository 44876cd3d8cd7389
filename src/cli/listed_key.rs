//! The keys on a volume's list, by any name that `kmsfs recipients add` takes.
//!
//! Invariant: what a config says of itself decides nothing where a key is expected: a path there is read, not compared.

use std::path::Path;

use crate::format::config::{VolumeConfig, WrappingKey};
use crate::keys::ProviderKind;
use crate::keys::providers::{self, ProviderSettings};

use super::error::CliError;
use super::key_spec::KeySpec;

/// A key as arguments and reports name it.
pub(crate) fn name_of(key: &WrappingKey) -> String {
    format!("{}:{}", key.provider, key.key)
}

/// The same for people: with the file of a local key, where that is known.
pub(crate) fn described(key: &WrappingKey) -> String {
    let location = key.location.as_ref().map(|path| format!(" (in {path})"));
    name_of(key) + &location.unwrap_or_default()
}

/// The key among `keys` that `spec` names; none if it names none. An alias of AWS KMS costs a call of DescribeKey.
///
/// # Errors
/// Usage if it names several, and what the provider says of an alias.
pub(crate) fn find<'a>(
    spec: &KeySpec,
    keys: &'a [WrappingKey],
    settings: &ProviderSettings,
) -> Result<Option<&'a WrappingKey>, CliError> {
    let exact = keys.iter().find(|key| is_exactly(spec, key));
    if exact.is_some() {
        return Ok(exact);
    }
    let named: Vec<_> = keys.iter().filter(|key| is_named(spec, key) || is_near(spec, key)).collect();
    match named[..] {
        [] if is_alias(spec) => {
            let provider = providers::open_named(spec.kind, &spec.id, None, settings)?;
            let arn = provider.describe(&spec.id)?.key_id;
            Ok(keys.iter().find(|key| key.provider == spec.kind.name() && key.key == arn))
        }
        [] => Ok(None),
        [key] => Ok(Some(key)),
        _ => {
            let all: Vec<_> = named.into_iter().map(name_of).collect();
            Err(CliError::usage(format_args!("{spec} is several keys of this volume: name one of {}", all.join(", "))))
        }
    }
}

/// That `spec` names no key of the volume, and which there are.
pub(crate) fn unknown(spec: &KeySpec, keys: &[WrappingKey]) -> CliError {
    let all: Vec<_> = keys.iter().map(described).collect();
    CliError::usage(format_args!("{spec} is no key of this volume")).hint(format_args!("it has {}", all.join(", ")))
}

/// The expected keys, and with them those of `config` that are the same under another name. No provider is asked, so a key of
/// AWS KMS is expected by its ARN.
pub(crate) fn expected(specs: &[KeySpec], config: &VolumeConfig) -> Vec<KeySpec> {
    let is_meant = |key: &&WrappingKey| specs.iter().any(|spec| is_named(spec, key));
    let meant = config.wrapping_keys.iter().filter(is_meant);
    let meant =
        meant.filter_map(|key| Some(KeySpec { kind: ProviderKind::from_name(&key.provider)?, id: key.key.clone() }));
    specs.iter().cloned().chain(meant).collect()
}

fn is_exactly(spec: &KeySpec, key: &WrappingKey) -> bool {
    key.provider == spec.kind.name() && key.key == spec.key()
}

/// Whether both are the same key, by what cannot be made up.
fn is_named(spec: &KeySpec, key: &WrappingKey) -> bool {
    let is_it = || match spec.kind {
        ProviderKind::Local => {
            std::path::absolute(&spec.id).is_ok_and(|path| providers::is_keyring_with(&path, &key.key))
        }
        kind => providers::canonical(kind, spec.key()).is_some_and(|name| name == key.key),
    };
    is_exactly(spec, key) || key.provider == spec.kind.name() && is_it()
}

/// Whether both are the same key, by what the config says: where its keyring was, or the end of an ARN.
fn is_near(spec: &KeySpec, key: &WrappingKey) -> bool {
    let is_there = |path: &str| std::path::absolute(&spec.id).is_ok_and(|named| named == Path::new(path));
    key.provider == spec.kind.name()
        && match spec.kind {
            ProviderKind::Local => key.location.as_deref().is_some_and(is_there),
            ProviderKind::AwsKms => key.key.strip_suffix(&spec.id).is_some_and(|rest| rest.ends_with(":key/")),
            _ => false,
        }
}

fn is_alias(spec: &KeySpec) -> bool {
    spec.kind == ProviderKind::AwsKms && (spec.id.starts_with("alias/") || spec.id.contains(":alias/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::config::{End, Holes};

    const ARN: &str = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";

    fn key(name: &str, location: Option<&Path>) -> WrappingKey {
        let (provider, key) = name.split_once(':').unwrap();
        let location = location.map(|path| path.to_str().unwrap().to_owned());
        WrappingKey { provider: provider.into(), key: key.into(), location }
    }

    fn spec(text: &str) -> KeySpec {
        text.parse().unwrap()
    }

    fn found(text: &str, keys: &[WrappingKey]) -> Result<Option<String>, u8> {
        let found = find(&spec(text), keys, &ProviderSettings::default());
        found.map(|key| key.map(name_of)).map_err(|error| error.code())
    }

    #[test]
    fn a_key_is_found_by_every_name_that_adds_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r.toml");
        providers::create_local(&path, None).unwrap();
        let id = providers::list_keyring(&path, None).unwrap()[0].id.clone();
        let (local, gone) = (format!("local:{id}"), Path::new("/gone/g.toml"));
        let keys = [key(&local, None), key("local:k-gone", Some(gone)), key(&format!("aws-kms:{ARN}"), None)];
        let aws = name_of(&keys[2]);
        let by_path = format!("local:{}", path.display());
        for (text, expected) in [
            (local.as_str(), Some(&local)),
            (&by_path, Some(&local)),
            ("local:/gone/../gone/g.toml", None),
            ("local:/gone/g.toml", Some(&"local:k-gone".to_owned())),
            (ARN, Some(&aws)),
            ("aws-kms:1234abcd-12ab-34cd-56ef-1234567890ab", Some(&aws)),
            ("aws-kms:1234567890ab", None),
            ("local:/elsewhere", None),
        ] {
            assert_eq!(found(text, &keys), Ok(expected.cloned()), "{text}");
        }
        let twice = [keys[1].clone(), key("local:k-other", Some(gone))];
        assert_eq!(found("local:/gone/g.toml", &twice), Err(crate::cli::error::Exit::Usage as u8));
        assert!(format!("{:?}", unknown(&spec("local:x"), &keys)).contains("k-gone (in /gone/g.toml)"));
    }

    #[cfg(all(feature = "vault", feature = "pkcs11"))]
    #[test]
    fn names_that_a_provider_shortens_are_the_same() {
        let keys = [key("vault:transit/a", None), key("pkcs11:object=b;token=a", None)];
        assert_eq!(found("vault:a", &keys), Ok(Some("vault:transit/a".to_owned())));
        let canonical = providers::canonical(ProviderKind::Pkcs11, "token=a;object=b").unwrap();
        let keys = [key(&format!("pkcs11:{canonical}"), None)];
        for text in ["pkcs11:object=b;token=a", "pkcs11:token=a;object=b?module-path=/m"] {
            assert_eq!(found(text, &keys), Ok(Some(format!("pkcs11:{canonical}"))), "{text}");
        }
    }

    #[test]
    fn an_expected_keyring_is_read_and_a_place_in_the_config_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r.toml");
        providers::create_local(&path, None).unwrap();
        let id = providers::list_keyring(&path, None).unwrap()[0].id.clone();
        let mut config = VolumeConfig::new([7; 16], "xaes-256-gcm", Holes::Allow, End::Lenient, 1);
        config.wrapping_keys = vec![key(&format!("local:{id}"), None), key("local:k-stranger", Some(&path))];
        let named = KeySpec { kind: ProviderKind::Local, id: path.to_str().unwrap().to_owned() };
        let names = expected(std::slice::from_ref(&named), &config);
        assert_eq!(names, [named, spec(&format!("local:{id}"))]);
    }
}
