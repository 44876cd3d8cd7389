//! `kmsfs doctor --policy`: what a role needs to use a volume under AWS KMS, and nothing more.
//!
//! No key is needed, so the config is not authenticated. What goes into a policy is therefore checked for its shape: no
//! wildcard can get in; and against the remembered volume.

use std::path::Path;

use serde_json::{Value, json};

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::pins::{self, Pins};
use crate::cli::{report, unlock};
use crate::format::config::VolumeConfig;
use crate::keys::ProviderKind;
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
#[derive(Clone, Copy)]
pub(super) enum Role {
    /// Reads, and creates files.
    Full,
    /// Reads, and creates files with provisioned keys only.
    Decrypt,
    /// Makes provisioned keys.
    Provision,
}

/// Prints the policies as JSON, or that there are none.
pub(super) fn print(path: &Path, request: &Request<'_>, environment: &Environment) -> Result<(), CliError> {
    let directory = CipherDirectory::open(path)?;
    let config = unlock::read_config(&directory)?.config;
    if let Some(pin) = Pins::of(environment).map(|pins| pins.get(directory.path())).transpose()?.flatten() {
        pins::check_remembered("volume", directory.path(), &pin.volume_id, &config.volume_id)?;
    }
    let Some(policies) = policies(&config, request)? else {
        return report::say("no key of this volume is in AWS KMS: there is no policy for it\n");
    };
    let text = serde_json::to_string_pretty(&policies).map_err(|error| CliError::new(Exit::Other, error))?;
    report::say(&format!("{text}\n"))
}

/// The IAM policy of a role, and the statements of the keys' own policies; none without a key in AWS KMS.
fn policies(config: &VolumeConfig, request: &Request<'_>) -> Result<Option<Value>, CliError> {
    let ours = |key: &&crate::format::config::WrappingKey| key.provider == ProviderKind::AwsKms.name();
    let keys = config.wrapping_keys.iter().filter(ours).map(|key| KeyArn::parse(&key.key));
    let keys = keys.collect::<Result<Vec<_>, _>>()?;
    let Some(first) = keys.first() else { return Ok(None) };
    let arns: Vec<&str> = keys.iter().map(|key| key.arn).collect();
    let role = format!("arn:{}:iam::{}:role/YOUR-ROLE", first.partition, first.account);
    let principal = json!({ "AWS": request.principal.unwrap_or(&role) });
    let allow = |resource: Value| [use_statement(config, request, resource.clone()), describe_statement(resource)];
    let of_key = allow(json!("*")).map(|mut statement| {
        statement["Principal"] = principal.clone();
        statement
    });
    Ok(Some(json!({
        "IamPolicy": { "Version": "2012-10-17", "Statement": allow(json!(arns)) },
        "KeyPolicyStatements": of_key,
    })))
}

fn use_statement(config: &VolumeConfig, request: &Request<'_>, resource: Value) -> Value {
    let actions: &[&str] = match request.role {
        Role::Full => &["kms:GenerateDataKey", "kms:Decrypt"],
        Role::Decrypt => &["kms:Decrypt"],
        Role::Provision => &["kms:GenerateDataKeyWithoutPlaintext", "kms:Decrypt"],
    };
    json!({
        "Sid": "KmsfsVolume",
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
                Ok(Self { arn, partition, account })
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
    use crate::format::config::{End, Holes, WrappingKey};

    const ARN: &str = "arn:aws-us-gov:kms:us-gov-west-1:111122223333:key/mrk-1234";

    fn config(keys: &[(&str, &str)]) -> VolumeConfig {
        let mut config = VolumeConfig::new([7; 16], "xaes-256-gcm", Holes::Allow, End::Lenient, 1);
        let keys = keys.iter().map(|(p, k)| WrappingKey { provider: (*p).into(), key: (*k).into(), location: None });
        config.wrapping_keys.extend(keys);
        config
    }

    fn request() -> Request<'static> {
        Request { principal: None, role: Role::Full }
    }

    #[test]
    fn a_role_is_held_to_the_volume_and_its_contexts() {
        let config = config(&[("local", "k-1"), ("aws-kms", ARN)]);
        let policies = policies(&config, &request()).unwrap().unwrap();
        let [iam, key] = [&policies["IamPolicy"]["Statement"], &policies["KeyPolicyStatements"]];
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
        assert_eq!(policies["KeyPolicyStatements"][1]["Principal"]["AWS"], "arn:aws:iam::1:role/r");
    }

    #[test]
    fn who_provisions_sees_no_new_data_key() {
        let request = Request { principal: None, role: Role::Provision };
        let policies = policies(&config(&[("aws-kms", ARN)]), &request).unwrap().unwrap();
        let actions = &policies["IamPolicy"]["Statement"][0]["Action"];
        assert_eq!(*actions, json!(["kms:GenerateDataKeyWithoutPlaintext", "kms:Decrypt"]));
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
