//! `kmsfs doctor --policy`: what a role needs to use a volume under AWS KMS, and nothing more.
//!
//! No key is needed, so the config is not authenticated. What goes into a policy is therefore checked for its shape: no
//! wildcard can get in; and against the remembered volume.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::key_spec::KeySpec;
use crate::cli::listed_key;
use crate::cli::pins::Pins;
use crate::cli::{report, unlock};
use crate::format::config::{VolumeConfig, WrappingKey};
use crate::keys::providers::ProviderSettings;
use crate::keys::{ProviderKind, volume};
use crate::storage::CipherDirectory;

/// All names in the encryption contexts of a volume.
const CONTEXT_NAMES: [&str; 3] = ["kmsfs:volume", "kmsfs:data-key", "kmsfs:purpose"];

/// For whom, and for what.
pub(super) struct Request<'a> {
    /// Whom the key policy allows; a placeholder if none.
    pub(super) principal: Option<&'a str>,
    /// What the role does.
    pub(super) role: Role,
}

/// What a role does with a volume.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Reads, and creates files; seals them anew (`kmsfs rekey`).
    Full,
    /// Reads, and creates files with provisioned keys only.
    Decrypt,
    /// Makes provisioned keys.
    Provision,
    /// Runs `kmsfs rewrap`.
    Rewrap,
}

/// The volume's keys in AWS KMS as they are while a role works, and what else matters to it.
struct Keys<'a> {
    all: Vec<Key<'a>>,
    /// Recipients of all kinds.
    recipients: usize,
}

/// A wrapping key, of any kind.
struct Key<'a> {
    /// None of another kind.
    arn: Option<KeyArn<'a>>,
    /// The volume can be unlocked with it, so new files get a record of it.
    unlocks: bool,
    /// `kmsfs rewrap` gives files a record of it.
    stays: bool,
    /// `kmsfs rewrap --to` brings the volume under it.
    is_new: bool,
}

/// Prints the policies as JSON, or that there are none. `to` and `from` are those of `kmsfs rewrap`.
pub(super) fn print(
    path: &Path,
    request: &Request<'_>,
    to: Option<&KeySpec>,
    from: Option<&KeySpec>,
    environment: &Environment,
) -> Result<(), CliError> {
    let directory = CipherDirectory::open(path)?;
    let config = unlock::read_config(&directory)?.config;
    if let Some(remembered) = Pins::of(environment).map(|pins| pins.get(directory.path())).transpose()?.flatten() {
        remembered.check_volume(directory.path(), &config.volume_id)?;
    }
    let Some(policies) = policies(&config, request, to, from)? else {
        return report::say("no key of this volume is in AWS KMS: there is no policy for it\n");
    };
    let text = serde_json::to_string_pretty(&policies).map_err(|error| CliError::new(Exit::Other, error))?;
    report::say(&format!("{text}\n"))
}

/// The IAM policy of a role, and the statements of each key's own policy; none without a key in AWS KMS.
fn policies(
    config: &VolumeConfig,
    request: &Request<'_>,
    to: Option<&KeySpec>,
    from: Option<&KeySpec>,
) -> Result<Option<Value>, CliError> {
    let keys = Keys::of(config, to, from)?;
    let arns: Vec<&KeyArn<'_>> = keys.all.iter().filter_map(|key| key.arn.as_ref()).collect();
    let Some(first) = arns.first() else { return Ok(None) };
    let role = format!("arn:{}:iam::{}:role/YOUR-ROLE", first.partition, first.account);
    let principal = json!({ "AWS": request.principal.unwrap_or(&role) });
    let mut groups: BTreeMap<Vec<&str>, Vec<&str>> = BTreeMap::new();
    let mut of_keys = serde_json::Map::new();
    for key in &keys.all {
        let (Some(arn), actions) = (&key.arn, keys.actions(key, request.role)) else { continue };
        if actions.is_empty() {
            continue;
        }
        let own = [use_statement(config, "KmsfsVolume", &actions, json!("*")), describe_statement(json!("*"))];
        let own = own.map(|mut statement| {
            statement["Principal"] = principal.clone();
            statement
        });
        of_keys.insert(arn.arn.to_owned(), json!(own));
        groups.entry(actions).or_default().push(arn.arn);
    }
    let used: Vec<_> = groups.values().flatten().collect();
    let describe = describe_statement(json!(used));
    let statements = groups.iter().enumerate().map(|(number, (actions, arns))| {
        let sid = if number == 0 { "KmsfsVolume".to_owned() } else { format!("KmsfsVolume{}", number + 1) };
        use_statement(config, &sid, actions, json!(arns))
    });
    let statements: Vec<_> = statements.chain([describe]).collect();
    Ok(Some(json!({
        "IamPolicy": { "Version": "2012-10-17", "Statement": statements },
        "KeyPolicyStatements": of_keys,
    })))
}

impl<'a> Keys<'a> {
    fn of(config: &'a VolumeConfig, to: Option<&'a KeySpec>, from: Option<&KeySpec>) -> Result<Self, CliError> {
        let aws = ProviderKind::AwsKms.name();
        let parse = |provider: &str, key: &'a str| (provider == aws).then(|| KeyArn::parse(key)).transpose();
        let new = to.map(|to| parse(to.kind.name(), &to.id)).transpose().map_err(|error| error.hint(NEW_BY_ARN))?;
        let is_new = |key: &WrappingKey| to.is_some_and(|to| key.provider == to.kind.name() && key.key == to.id);
        let listed: Vec<_> = config.wrapping_keys.iter().filter(|key| !is_new(key)).cloned().collect();
        let old = to.map(|_| replaced(from, &listed)).transpose()?;
        let mut all = Vec::new();
        for key in config.wrapping_keys.iter().filter(|key| !is_new(key)) {
            let unlocks = volume::wraps_new(config, key);
            let stays = unlocks && old.as_ref() != Some(key);
            all.push(Key { arn: parse(&key.provider, &key.key)?, unlocks, stays, is_new: false });
        }
        all.extend(new.map(|arn| Key { arn, unlocks: true, stays: true, is_new: true }));
        Ok(Self { recipients: all.iter().filter(|key| key.unlocks).count(), all })
    }

    /// Every call that the role makes with the key, whichever of the others is away.
    fn actions(&self, key: &Key<'_>, role: Role) -> Vec<&'static str> {
        let Some(arn) = &key.arn else { return Vec::new() };
        let is_first = || self.all.iter().find(|key| key.unlocks).is_some_and(|first| std::ptr::eq(first, key));
        let others = || self.all.iter().filter(|other| !std::ptr::eq(*other, key));
        // ReEncrypt does not leave a Region, and other providers are reached through this program.
        let is_near = |other: &Key<'_>| other.arn.as_ref().is_some_and(|other| other.region == arn.region);
        let rewraps = role == Role::Rewrap;
        let all = [
            ("kms:GenerateDataKey", role == Role::Full && key.unlocks),
            ("kms:GenerateDataKeyWithoutPlaintext", role == Role::Provision && is_first()),
            (
                "kms:Encrypt",
                role == Role::Full && key.unlocks && self.recipients > 1
                    || rewraps && (key.is_new || key.stays && others().any(|other| !is_near(other))),
            ),
            (
                "kms:Decrypt",
                match role {
                    Role::Full | Role::Decrypt => true,
                    Role::Provision => key.unlocks,
                    Role::Rewrap => key.unlocks || others().any(|other| other.stays && !is_near(other)),
                },
            ),
            ("kms:ReEncryptFrom", rewraps && others().any(|other| other.stays && is_near(other))),
            ("kms:ReEncryptTo", rewraps && key.stays && others().any(is_near)),
        ];
        all.into_iter().filter(|(_, needed)| *needed).map(|(action, _)| action).collect()
    }
}

const NEW_BY_ARN: &str = "name the key of --to by its ARN, aws-kms:arn:...";

/// The key that `--to` replaces.
fn replaced(from: Option<&KeySpec>, listed: &[WrappingKey]) -> Result<WrappingKey, CliError> {
    match (from, listed) {
        (None, [only]) => Ok(only.clone()),
        (None, _) => {
            let all: Vec<_> = listed.iter().map(listed_key::described).collect();
            Err(CliError::usage("the volume has several wrapping keys")
                .hint(format_args!("say which one --to replaces with --from: {}", all.join(", "))))
        }
        (Some(from), _) => {
            let found = listed_key::find(from, listed, &ProviderSettings::default())?;
            found.cloned().ok_or_else(|| listed_key::unknown(from, listed))
        }
    }
}

fn use_statement(config: &VolumeConfig, sid: &str, actions: &[&str], resource: Value) -> Value {
    json!({
        "Sid": sid,
        "Effect": "Allow",
        "Action": actions,
        "Resource": resource,
        "Condition": {
            "StringEquals": { "kms:EncryptionContext:kmsfs:volume": config.volume_id },
            "ForAllValues:StringEquals": { "kms:EncryptionContextKeys": CONTEXT_NAMES },
        },
    })
}

/// These two have no encryption context.
fn describe_statement(resource: Value) -> Value {
    json!({
        "Sid": "KmsfsDoctor",
        "Effect": "Allow",
        "Action": ["kms:DescribeKey", "kms:GetKeyRotationStatus"],
        "Resource": resource,
    })
}

/// The ARN of a key, of which nothing can widen a policy.
struct KeyArn<'a> {
    arn: &'a str,
    partition: &'a str,
    region: &'a str,
    account: &'a str,
}

impl<'a> KeyArn<'a> {
    fn parse(arn: &'a str) -> Result<Self, CliError> {
        let is_plain = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        match arn.split(':').collect::<Vec<_>>()[..] {
            ["arn", partition, "kms", region, account, resource]
                if [partition, region, account].into_iter().all(is_plain)
                    && resource.strip_prefix("key/").is_some_and(is_plain) =>
            {
                Ok(Self { arn, partition, region, account })
            }
            _ => {
                let what = format!("{:?} is not the ARN of a KMS key: no policy is made for it", arn);
                Err(CliError::new(Exit::Config, what).hint("was the config changed? `kmsfs doctor` checks its seal"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::config::{End, Holes, WrappedVolumeKey};

    const ARN: &str = "arn:aws-us-gov:kms:us-gov-west-1:111122223333:key/mrk-1234";

    /// A volume under these keys, of which one that begins with `-` is kept for old files only.
    fn config(keys: &[(&str, &str)]) -> VolumeConfig {
        let mut config = VolumeConfig::new([7; 16], "xaes-256-gcm", Holes::Allow, End::Lenient, 1);
        for (provider, key) in keys {
            let (provider, key) = (provider.trim_start_matches('-').to_owned(), (*key).to_owned());
            config.wrapping_keys.push(WrappingKey { provider, key, location: None });
        }
        for (provider, key) in keys.iter().filter(|(provider, _)| !provider.starts_with('-')) {
            let (provider, key) = ((*provider).to_owned(), (*key).to_owned());
            config.volume_keys.push(WrappedVolumeKey { provider, key, wrapped: String::new() });
        }
        config
    }

    fn request() -> Request<'static> {
        Request { principal: None, role: Role::Full }
    }

    fn policies(config: &VolumeConfig, request: &Request<'_>) -> Result<Option<Value>, CliError> {
        super::policies(config, request, None, None)
    }

    /// The actions of a role with each key, without the prefix, in the config's order; the key of `to` is last.
    fn allowed(keys: &[(&str, &str)], role: Role, to: Option<&str>, from: Option<&str>) -> Vec<String> {
        let (to, from) = [to, from].map(|spec| spec.map(|spec| spec.parse::<KeySpec>().unwrap())).into();
        let all = config(keys);
        let policies = super::policies(&all, &Request { principal: None, role }, to.as_ref(), from.as_ref());
        let policies = policies.unwrap().unwrap();
        let iam = policies["IamPolicy"]["Statement"].as_array().unwrap();
        let mut by_key = Vec::new();
        let new = to.filter(|to| !keys.iter().any(|(_, key)| *key == to.id)).map(|to| to.id);
        for key in keys.iter().map(|(_, key)| (*key).to_owned()).chain(new) {
            let of_key = &policies["KeyPolicyStatements"][key.as_str()];
            let Some(actions) = of_key[0]["Action"].as_array() else { continue };
            let granting = iam.iter().filter(|statement| {
                statement["Resource"].as_array().unwrap().contains(&json!(key)) && statement["Sid"] != "KmsfsDoctor"
            });
            let granting: Vec<_> = granting.map(|statement| statement["Action"].as_array().unwrap()).collect();
            assert_eq!(granting, [actions], "both say the same");
            let words = actions.iter().map(|action| action.as_str().unwrap().trim_start_matches("kms:"));
            by_key.push(words.collect::<Vec<_>>().join(" "));
        }
        by_key
    }

    #[test]
    fn a_role_is_held_to_the_volume_and_its_contexts() {
        let config = config(&[("-local", "k-1"), ("aws-kms", ARN)]);
        let policies = policies(&config, &request()).unwrap().unwrap();
        let [iam, key] = [&policies["IamPolicy"]["Statement"], &policies["KeyPolicyStatements"][ARN]];
        for statement in [&iam[0], &key[0]] {
            assert_eq!(statement["Action"], json!(["kms:GenerateDataKey", "kms:Decrypt"]));
            let condition = &statement["Condition"];
            assert_eq!(condition["StringEquals"]["kms:EncryptionContext:kmsfs:volume"], config.volume_id);
            let names = &condition["ForAllValues:StringEquals"]["kms:EncryptionContextKeys"];
            assert_eq!(*names, json!(["kmsfs:volume", "kmsfs:data-key", "kmsfs:purpose"]));
        }
        assert_eq!((&iam[0]["Resource"], &key[0]["Resource"]), (&json!([ARN]), &json!("*")));
        assert_eq!(key[0]["Principal"]["AWS"], "arn:aws-us-gov:iam::111122223333:role/YOUR-ROLE");
        assert!(iam[0].get("Principal").is_none());
        let all = policies.to_string();
        assert!(!all.contains("kms:*") && all.matches("\"*\"").count() == 2, "{all}");
    }

    #[test]
    fn each_key_is_allowed_what_is_called_with_it() {
        const NEAR: &str = "arn:aws-us-gov:kms:us-gov-west-1:111122223333:key/near";
        const FAR: &str = "arn:aws-us-gov:kms:us-gov-east-1:111122223333:key/far";
        let (aws, near, far) = (("aws-kms", ARN), ("aws-kms", NEAR), ("aws-kms", FAR));
        let (old, age) = (("-aws-kms", NEAR), ("age", "age1x"));
        let full = |keys: &[_]| allowed(keys, Role::Full, None, None);
        assert_eq!(full(&[aws]), ["GenerateDataKey Decrypt"]);
        assert_eq!(full(&[aws, old]), ["GenerateDataKey Decrypt", "Decrypt"]);
        assert_eq!(full(&[aws, age]), ["GenerateDataKey Encrypt Decrypt"]);
        assert_eq!(full(&[aws, near]), ["GenerateDataKey Encrypt Decrypt"; 2]);
        assert_eq!(allowed(&[aws, old, age], Role::Decrypt, None, None), ["Decrypt"; 2]);
        let provision = |keys: &[_]| allowed(keys, Role::Provision, None, None);
        assert_eq!(provision(&[aws, near, ("-aws-kms", FAR)]), ["GenerateDataKeyWithoutPlaintext Decrypt", "Decrypt"]);
        assert_eq!(provision(&[("local", "k"), aws]), ["Decrypt"]);
        let rewrap = |keys: &[_], to, from| allowed(keys, Role::Rewrap, to, from);
        assert_eq!(rewrap(&[aws, near], None, None), ["Decrypt ReEncryptFrom ReEncryptTo"; 2]);
        assert_eq!(rewrap(&[aws, old], None, None), ["Decrypt ReEncryptTo", "ReEncryptFrom"]);
        assert_eq!(rewrap(&[aws, far], None, None), ["Encrypt Decrypt"; 2]);
        assert_eq!(rewrap(&[aws, age], None, None), ["Encrypt Decrypt"]);
        assert_eq!(rewrap(&[aws], Some(NEAR), None), ["Decrypt ReEncryptFrom", "Encrypt Decrypt ReEncryptTo"]);
        assert_eq!(rewrap(&[aws], Some(FAR), None), ["Decrypt", "Encrypt Decrypt"]);
        assert_eq!(rewrap(&[aws], Some("local:new.toml"), None), ["Decrypt"]);
        assert_eq!(
            rewrap(&[aws, age], Some(NEAR), Some(ARN)),
            ["Decrypt ReEncryptFrom", "Encrypt Decrypt ReEncryptTo"]
        );
    }

    /// Every name that a call carries is allowed, and no other.
    #[test]
    fn the_names_are_those_of_the_contexts() {
        use crate::keys::EncryptionContext;
        let contexts = [EncryptionContext::volume_key(&[1; 16]), EncryptionContext::data_key(&[1; 16], &[2; 16])];
        let mut used: Vec<_> = contexts.iter().flat_map(EncryptionContext::pairs).map(|(name, _)| name).collect();
        used.sort_unstable();
        used.dedup();
        let mut allowed = CONTEXT_NAMES;
        allowed.sort_unstable();
        assert_eq!(used, allowed);
    }

    #[test]
    fn a_reader_may_not_create_and_a_principal_is_named() {
        let request = Request { principal: Some("arn:aws:iam::1:role/r"), role: Role::Decrypt };
        let policies = policies(&config(&[("aws-kms", ARN)]), &request).unwrap().unwrap();
        assert!(!policies.to_string().contains("GenerateDataKey"));
        assert_eq!(policies["KeyPolicyStatements"][ARN][1]["Principal"]["AWS"], "arn:aws:iam::1:role/r");
    }

    #[test]
    fn a_changed_config_cannot_widen_a_policy() {
        assert!(policies(&config(&[("local", "k-1")]), &request()).unwrap().is_none());
        let wild = ["*", "arn:aws:kms:*:1:key/a", "arn:aws:kms:r:1:key/*", "arn:aws:kms:r:1:key/", "alias/a"];
        for key in wild {
            let error = policies(&config(&[("aws-kms", ARN), ("aws-kms", key)]), &request()).unwrap_err();
            assert_eq!(error.code(), Exit::Config as u8, "{key}");
        }
    }
}
