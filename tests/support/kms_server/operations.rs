//! What KMS does, operation by operation.

use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::failure::{Failure, Outcome, failure, invalid};
use super::input::{bytes, check_dry_run, context, flag, text};
use super::keys::{GENERATED, GENERATED_FILL, GIVEN, GIVEN_FILL, Key, Material, State, Vault, handle, uuid};
use super::{ACCOUNT, hex, now, random, sha256};

const MAX_PLAINTEXT: usize = 4096;
const MAX_CIPHERTEXT: usize = 6144;

impl Vault {
    pub(super) fn create_key(&mut self, region: &str, input: &Value) -> Outcome {
        if text(input, "KeySpec").is_some_and(|spec| spec != "SYMMETRIC_DEFAULT") {
            return Err(failure("UnsupportedOperationException", "only symmetric encryption keys"));
        }
        let id = if flag(input, "MultiRegion") { format!("mrk-{}", hex(&random::<16>())) } else { uuid() };
        let key = UnboundKey::new(&AES_256_GCM, &random::<32>()).map(LessSafeKey::new).expect("32 bytes");
        let handle = sha256(id.as_bytes()).as_ref().try_into().expect("32 bytes");
        Ok(json!({ "KeyMetadata": self.add(region, id, Arc::new(Material { handle, key })) }))
    }

    pub(super) fn replicate_key(&mut self, region: &str, input: &Value) -> Outcome {
        let replica = text(input, "ReplicaRegion").ok_or_else(|| invalid("ReplicaRegion is missing"))?.to_owned();
        let key = self.resolve(region, input, "KeyId")?;
        if !key.id.starts_with("mrk-") {
            return Err(failure("UnsupportedOperationException", format!("{} is not multi-Region", key.arn)));
        }
        let (id, material) = (key.id.clone(), Arc::clone(&key.material));
        if self.keys.contains_key(&(replica.clone(), id.clone())) {
            return Err(failure("AlreadyExistsException", format!("{id} exists in {replica}")));
        }
        Ok(json!({ "ReplicaKeyMetadata": self.add(&replica, id, material) }))
    }

    fn add(&mut self, region: &str, id: String, material: Arc<Material>) -> Value {
        let arn = format!("arn:aws:kms:{region}:{ACCOUNT}:key/{id}");
        let key = Key { arn, id: id.clone(), state: State::Enabled, is_rotated: false, created: now(), material };
        let metadata = key.metadata();
        self.keys.insert((region.to_owned(), id), key);
        metadata
    }

    pub(super) fn create_alias(&mut self, region: &str, input: &Value) -> Outcome {
        let alias = text(input, "AliasName").filter(|name| name.starts_with("alias/"));
        let alias = alias.ok_or_else(|| invalid("Invalid identifier"))?;
        let id = self.resolve(region, input, "TargetKeyId")?.id.clone();
        let name = (region.to_owned(), alias.to_owned());
        if self.aliases.contains_key(&name) {
            let message = format!("An alias with the name arn:aws:kms:{region}:{ACCOUNT}:{alias} already exists");
            return Err(failure("AlreadyExistsException", message));
        }
        self.aliases.insert(name, id);
        Ok(Value::Null)
    }

    pub(super) fn set_enabled(&mut self, region: &str, input: &Value, enabled: bool) -> Outcome {
        let key = self.resolve_mut(region, input)?;
        key.check_not_pending()?;
        key.state = if enabled { State::Enabled } else { State::Disabled };
        Ok(Value::Null)
    }

    pub(super) fn schedule_deletion(&mut self, region: &str, input: &Value) -> Outcome {
        let days = input.get("PendingWindowInDays").map_or(Some(30), Value::as_u64);
        let days = days.filter(|days| (7..=30).contains(days));
        let days = days.ok_or_else(|| invalid("PendingWindowInDays must be between 7 and 30"))?;
        let key = self.resolve_mut(region, input)?;
        key.check_not_pending()?;
        let at = now() + days * 86_400;
        key.state = State::PendingDeletion { at };
        let state = key.state.name();
        Ok(json!({ "KeyId": key.arn, "DeletionDate": at, "KeyState": state, "PendingWindowInDays": days }))
    }

    pub(super) fn cancel_deletion(&mut self, region: &str, input: &Value) -> Outcome {
        let key = self.resolve_mut(region, input)?;
        if key.check_not_pending().is_ok() {
            return Err(failure("KMSInvalidStateException", format!("{} is not pending deletion.", key.arn)));
        }
        key.state = State::Disabled;
        Ok(json!({ "KeyId": key.arn }))
    }

    pub(super) fn enable_rotation(&mut self, region: &str, input: &Value) -> Outcome {
        let key = self.resolve_mut(region, input)?;
        key.check_usable()?;
        key.is_rotated = true;
        Ok(Value::Null)
    }

    pub(super) fn rotation_status(&self, region: &str, input: &Value) -> Outcome {
        let key = self.resolve(region, input, "KeyId")?;
        key.check_not_pending()?;
        Ok(json!({ "KeyId": key.arn, "KeyRotationEnabled": key.is_rotated }))
    }

    pub(super) fn describe_key(&self, region: &str, input: &Value) -> Outcome {
        Ok(json!({ "KeyMetadata": self.resolve(region, input, "KeyId")?.metadata() }))
    }

    pub(super) fn generate_data_key(&self, region: &str, input: &Value, with_plaintext: bool) -> Outcome {
        let key = self.resolve(region, input, "KeyId")?;
        let length = match (text(input, "KeySpec"), input.get("NumberOfBytes").map(Value::as_u64)) {
            (Some("AES_256"), None) => 32,
            (Some("AES_128"), None) => 16,
            (None, Some(Some(length @ 1..=1024))) => usize::try_from(length).expect("at most 1024"),
            _ => return Err(invalid("Please specify either number of bytes or key spec.")),
        };
        key.check_usable()?;
        check_dry_run(input)?;
        let data_key = &random::<1024>()[..length];
        let wrapped = key.material.wrap(GENERATED, GENERATED_FILL, data_key, &context(input, "EncryptionContext")?);
        let mut answer = json!({ "KeyId": key.arn, "CiphertextBlob": BASE64.encode(wrapped) });
        if with_plaintext {
            answer["Plaintext"] = BASE64.encode(data_key).into();
        }
        Ok(answer)
    }

    pub(super) fn encrypt(&self, region: &str, input: &Value) -> Outcome {
        let key = self.resolve(region, input, "KeyId")?;
        let plaintext = bytes(input, "Plaintext", MAX_PLAINTEXT)?;
        key.check_usable()?;
        check_dry_run(input)?;
        let wrapped = key.material.wrap(GIVEN, GIVEN_FILL, &plaintext, &context(input, "EncryptionContext")?);
        let wrapped = BASE64.encode(wrapped);
        Ok(json!({ "KeyId": key.arn, "CiphertextBlob": wrapped, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT" }))
    }

    pub(super) fn decrypt(&self, region: &str, input: &Value) -> Outcome {
        let context = context(input, "EncryptionContext")?;
        let (key, plaintext) = self.unwrap(region, input, "KeyId", &context)?;
        check_dry_run(input)?;
        let plaintext = BASE64.encode(plaintext);
        Ok(json!({ "KeyId": key.arn, "Plaintext": plaintext, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT" }))
    }

    pub(super) fn re_encrypt(&self, region: &str, input: &Value) -> Outcome {
        let from = context(input, "SourceEncryptionContext")?;
        let to = context(input, "DestinationEncryptionContext")?;
        let destination = self.resolve(region, input, "DestinationKeyId")?;
        let (source, plaintext) = self.unwrap(region, input, "SourceKeyId", &from)?;
        destination.check_usable()?;
        check_dry_run(input)?;
        let wrapped = destination.material.wrap(GIVEN, GIVEN_FILL, &plaintext, &to);
        Ok(json!({
            "CiphertextBlob": BASE64.encode(wrapped),
            "SourceKeyId": source.arn,
            "KeyId": destination.arn,
            "SourceEncryptionAlgorithm": "SYMMETRIC_DEFAULT",
            "DestinationEncryptionAlgorithm": "SYMMETRIC_DEFAULT",
        }))
    }

    /// The key that wrapped the ciphertext in `input`, which must be the one that `name` names if it is given, and
    /// the plaintext.
    fn unwrap(&self, region: &str, input: &Value, name: &str, aad: &[u8]) -> Result<(&Key, Vec<u8>), Failure> {
        let wrapped = bytes(input, "CiphertextBlob", MAX_CIPHERTEXT)?;
        let asked = input.get(name).map(|_| self.resolve(region, input, name)).transpose()?;
        let handle = handle(&wrapped).ok_or_else(|| failure("InvalidCiphertextException", ""))?;
        let in_region = |key: &&Key| key.region() == region;
        let Some(key) = self.keys.values().filter(in_region).find(|key| key.material.handle == handle) else {
            let message = "The ciphertext refers to a customer master key that does not exist, does not exist in \
                           this region, or you are not allowed to access.";
            return Err(failure("AccessDeniedException", message));
        };
        if asked.is_some_and(|asked| asked.arn != key.arn) {
            let message = "The key ID in the request does not identify a CMK that can perform this operation.";
            return Err(failure("IncorrectKeyException", message));
        }
        key.check_usable()?;
        let plaintext = key.material.unwrap(wrapped, aad).ok_or_else(|| failure("InvalidCiphertextException", ""))?;
        Ok((key, plaintext))
    }

    /// The key that the field `name` names: by id, ARN, alias or alias ARN.
    fn resolve(&self, region: &str, input: &Value, name: &str) -> Result<&Key, Failure> {
        let id = self.id(region, input, name)?;
        let unknown =
            || failure("NotFoundException", format!("Key 'arn:aws:kms:{region}:{ACCOUNT}:key/{id}' does not exist"));
        self.keys.get(&(region.to_owned(), id.clone())).ok_or_else(unknown)
    }

    /// The key that `KeyId` names, to change it.
    fn resolve_mut(&mut self, region: &str, input: &Value) -> Result<&mut Key, Failure> {
        let id = self.resolve(region, input, "KeyId")?.id.clone();
        Ok(self.keys.get_mut(&(region.to_owned(), id)).expect("resolved"))
    }

    fn id(&self, region: &str, input: &Value, name: &str) -> Result<String, Failure> {
        let asked = text(input, name).filter(|asked| !asked.is_empty());
        let asked = asked.ok_or_else(|| invalid(format!("'{name}' must not be null")))?;
        let resource = match asked.split(':').collect::<Vec<_>>()[..] {
            [resource] => resource,
            ["arn", "aws", "kms", of, account, resource] => {
                if (of, account) != (region, ACCOUNT) {
                    return Err(failure("NotFoundException", format!("Invalid arn {of}")));
                }
                resource.strip_prefix("key/").unwrap_or(resource)
            }
            _ => return Err(failure("NotFoundException", format!("Invalid keyId {asked}"))),
        };
        if !resource.starts_with("alias/") {
            return Ok(resource.to_owned());
        }
        let unknown = || {
            let message = format!("Alias arn:aws:kms:{region}:{ACCOUNT}:{resource} is not found.");
            failure("NotFoundException", message)
        };
        self.aliases.get(&(region.to_owned(), resource.to_owned())).cloned().ok_or_else(unknown)
    }
}
