//! The tests' own KMS against moto and ministack, case by case, and what only the own one does: signatures, Regions, throttling, TLS.
//!
//! Every case says what KMS does. The own server must do that; moto and ministack must too, except where
//! [`MOTO_DIFFERS`] and [`MINISTACK_DIFFERS`] say why not.

use std::collections::BTreeMap;
use std::io::{BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::isolated::isolated_in;
use crate::support::kms_server::wire::{Request, Response};
use crate::support::kms_server::{ACCESS_KEY, CreatedKey, KmsServer, Options, REGION, SECRET, sigv4};
use crate::support::ministack::Ministack;
use crate::support::moto::{self, Moto};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use kmsfs::keys::providers::{AwsSettings, ProviderSettings, open};
use kmsfs::keys::{EncryptionContext, Provider, ProviderErrorKind, ProviderKind, WrappedKey};
use serde_json::{Value, json};

/// Another Region than [`REGION`].
const ELSEWHERE: &str = "eu-west-1";
/// A key that no server has.
const NO_KEY: &str = "1234abcd-12ab-34cd-56ef-1234567890ab";

/// A case, what a server does, and why.
type Difference = (&'static str, &'static str, &'static str);

/// Where moto is known to differ from KMS: the case, what moto does, and why.
const MOTO_DIFFERS: [(&str, &str, &str); 31] = [
    ("decrypt: the boundary of name and value moved", OK, CONCATENATES),
    ("decrypt: another key is named", "400 AccessDeniedException", "moto has no IncorrectKeyException"),
    ("decrypt: 6145 bytes", "400 AccessDeniedException", NO_LIMIT),
    ("decrypt: dry run", OK, NO_DRY_RUN),
    ("generate: the key's ARN with another Region", OK, "moto takes the id out of an ARN and ignores the rest"),
    ("generate: dry run", OK, NO_DRY_RUN),
    ("generate: length of the wrapped key", "96", OWN_LAYOUT),
    ("encrypt: length of the wrapped key", "96", OWN_LAYOUT),
    ("re-encrypt: another source is named", OK, "moto ignores SourceKeyId"),
    ("disabled: generate", OK, NO_STATES),
    ("disabled: generate without plaintext", OK, NO_STATES),
    ("disabled: decrypt", OK, NO_STATES),
    ("disabled: encrypt", OK, NO_STATES),
    ("disabled: re-encrypt from it", OK, NO_STATES),
    ("disabled: re-encrypt to it", OK, NO_STATES),
    ("pending deletion: a window of 3 days", OK, "moto takes any window"),
    ("pending deletion: generate", OK, NO_STATES),
    ("pending deletion: decrypt", OK, NO_STATES),
    ("pending deletion: enable", OK, NO_STATES),
    ("pending deletion: schedule again", OK, NO_STATES),
    ("pending deletion: rotation", OK, NO_STATES),
    ("pending deletion: state", "Enabled", "moto enables a key that is to be deleted"),
    ("multi-Region: decrypt", "400 AccessDeniedException", MRK),
    ("multi-Region: the plaintext comes back", "false", MRK),
    ("multi-Region: decrypt in the replica", "400 AccessDeniedException", MRK),
    ("multi-Region: the replica's plaintext", "false", MRK),
    ("multi-Region: replicate another", "500", "moto fails on it"),
    ("signature: a wrong secret", OK, NO_SIGNATURES),
    ("signature: the body was changed", OK, NO_SIGNATURES),
    ("signature: none", OK, NO_SIGNATURES),
    ("an operation that KMS does not have", "500", "moto fails on it"),
];
/// Where ministack is known to differ from KMS.
const MINISTACK_DIFFERS: [(&str, &str, &str); 35] = [
    ("an operation that KMS does not have", "400 InvalidAction", "ministack has another code for it"),
    ("decrypt: 6145 bytes", "400 InvalidCiphertextException", "ministack has another code for it"),
    ("decrypt: a bit of the ciphertext flipped", OK, "ministack does not authenticate what it unwraps"),
    ("decrypt: an unknown key is named", OK, "ministack does not authenticate what it unwraps"),
    ("decrypt: another key is named", OK, "ministack does not authenticate what it unwraps"),
    ("decrypt: dry run", OK, "ministack ignores DryRun"),
    ("decrypt: in another Region", "400 InvalidCiphertextException", "ministack does not find the key there"),
    ("decrypt: one byte cut off", OK, "ministack does not authenticate what it unwraps"),
    ("decrypt: the last bit flipped", OK, "ministack does not authenticate what it unwraps"),
    ("disabled: re-encrypt from it", "400 InvalidAction", NO_RE_ENCRYPT),
    ("disabled: re-encrypt to it", "400 InvalidAction", NO_RE_ENCRYPT),
    ("encrypt: 4097 bytes", OK, "ministack takes any size"),
    ("encrypt: length of the wrapped key", "116", "ministack's wrapped keys have a layout of its own"),
    ("generate: 1025 bytes", OK, "ministack takes any size"),
    ("generate: an unknown spec", OK, "ministack takes any size"),
    ("generate: both spec and length", OK, "ministack takes any size"),
    ("generate: dry run", OK, "ministack ignores DryRun"),
    ("generate: length of the wrapped key", "116", "ministack's wrapped keys have a layout of its own"),
    ("generate: neither spec nor length", OK, "ministack takes any size"),
    ("pending deletion: enable", OK, "ministack lets a key that is to be deleted be changed"),
    ("pending deletion: rotation", OK, "ministack lets a key that is to be deleted be changed"),
    ("pending deletion: schedule again", OK, "ministack lets a key that is to be deleted be changed"),
    ("pending deletion: state", "Enabled", "ministack lets a key that is to be deleted be changed"),
    ("re-encrypt", "400 InvalidAction", NO_RE_ENCRYPT),
    ("re-encrypt: another context", "400 InvalidAction", NO_RE_ENCRYPT),
    ("re-encrypt: another source is named", "400 InvalidAction", NO_RE_ENCRYPT),
    ("re-encrypt: decrypt it", "400 InvalidCiphertextException", NO_RE_ENCRYPT),
    ("re-encrypt: the destination's ARN is told", "", NO_RE_ENCRYPT),
    ("re-encrypt: the plaintext comes back", "", NO_RE_ENCRYPT),
    ("re-encrypt: the source is named", "400 InvalidAction", NO_RE_ENCRYPT),
    ("re-encrypt: the source's ARN is told", "", NO_RE_ENCRYPT),
    ("re-encrypt: to an unknown key", "400 InvalidAction", NO_RE_ENCRYPT),
    ("signature: a wrong secret", OK, "ministack does not check signatures"),
    ("signature: none", OK, "ministack does not check signatures"),
    ("signature: the body was changed", OK, "ministack does not check signatures"),
];
const NO_RE_ENCRYPT: &str = "ministack has no ReEncrypt";
const OK: &str = "200";
const CONCATENATES: &str = "moto joins names and values without separators";
const NO_LIMIT: &str = "moto does not limit the length, and takes the first 36 bytes for a key's id";
const NO_DRY_RUN: &str = "moto ignores DryRun";
const NO_STATES: &str = "moto shows the state of a key but does not enforce it";
const OWN_LAYOUT: &str = "moto's wrapped keys have a layout of its own";
const MRK: &str = "moto's ids of multi-Region keys are longer than the place for them in what they wrap";
const NO_SIGNATURES: &str = "moto does not check signatures";

/// What a server answered.
struct Answer {
    status: u16,
    body: Value,
}

impl Answer {
    /// The status, and the exception if it is one.
    fn outcome(&self) -> String {
        let code = self.body["__type"].as_str().map(|code| format!(" {code}"));
        format!("{}{}", self.status, code.unwrap_or_default())
    }

    fn text(&self, name: &str) -> String {
        self.body[name].as_str().unwrap_or_default().to_owned()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        BASE64.decode(self.text(name)).unwrap()
    }
}

fn send(address: SocketAddr, request: &Request) -> Answer {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(&request.encode()).unwrap();
    let response = Response::read(&mut BufReader::new(stream)).unwrap();
    Answer { status: response.status, body: serde_json::from_slice(&response.body).unwrap_or_default() }
}

fn signed(address: SocketAddr, region: &str, operation: &str, input: &Value) -> Request {
    // moto takes the Region from the signature, as KMS does.
    sigv4::request(&address.to_string(), region, SECRET, operation, &input.to_string())
}

/// The run of all cases on one server.
struct Run {
    address: SocketAddr,
    /// By the name of the case: what KMS does, and what this server did.
    seen: BTreeMap<&'static str, (String, String)>,
}

impl Run {
    fn call_in(&self, region: &str, operation: &str, input: &Value) -> Answer {
        send(self.address, &signed(self.address, region, operation, input))
    }

    fn call(&self, operation: &str, input: &Value) -> Answer {
        self.call_in(REGION, operation, input)
    }

    /// A call that every server can answer; not a case.
    fn must(&self, operation: &str, input: &Value) -> Answer {
        let answer = self.call(operation, input);
        assert_eq!(answer.status, 200, "{operation}: {}", answer.body);
        answer
    }

    fn fact(&mut self, name: &'static str, expected: impl ToString, found: impl ToString) {
        let earlier = self.seen.insert(name, (expected.to_string(), found.to_string()));
        assert!(earlier.is_none(), "two cases are named {name:?}");
    }

    /// A case: a call and the outcome that KMS gives.
    fn case(&mut self, name: &'static str, expected: &str, operation: &str, input: &Value) -> Answer {
        let answer = self.call(operation, input);
        self.fact(name, expected, answer.outcome());
        answer
    }

    fn create_key(&self, input: &Value) -> Value {
        self.must("CreateKey", input).body["KeyMetadata"].take()
    }

    fn state(&self, key: &Value) -> String {
        let metadata = self.must("DescribeKey", &json!({ "KeyId": key })).body["KeyMetadata"].take();
        metadata["KeyState"].as_str().unwrap().to_owned()
    }
}

/// `input` with another value of a field; `null` removes it.
fn with(input: &Value, name: &str, value: impl Into<Value>) -> Value {
    let mut input = input.clone();
    match value.into() {
        Value::Null => drop(input.as_object_mut().unwrap().remove(name)),
        value => input[name] = value,
    }
    input
}

fn run(address: SocketAddr) -> BTreeMap<&'static str, (String, String)> {
    let mut run = Run { address, seen: BTreeMap::new() };
    names_of_keys(&mut run);
    generating(&mut run);
    decrypting(&mut run);
    encrypting(&mut run);
    re_encrypting(&mut run);
    a_disabled_key(&mut run);
    a_key_pending_deletion(&mut run);
    rotation(&mut run);
    multi_region_keys(&mut run);
    signatures(&mut run);
    run.seen
}

fn names_of_keys(run: &mut Run) {
    let key = run.create_key(&json!({}));
    let (arn, id) = (key["Arn"].as_str().unwrap(), key["KeyId"].as_str().unwrap());
    run.fact("names: the ARN ends with the id", true, arn.ends_with(&format!(":key/{id}")));
    run.fact("names: a new key is enabled", "Enabled", key["KeyState"].as_str().unwrap());
    let alias = json!({ "AliasName": "alias/one", "TargetKeyId": id });
    run.case("names: create an alias", OK, "CreateAlias", &alias);
    run.case("names: create it again", "400 AlreadyExistsException", "CreateAlias", &alias);
    run.case("names: not an alias", "400 ValidationException", "CreateAlias", &with(&alias, "AliasName", "one"));
    let lost = json!({ "AliasName": "alias/two", "TargetKeyId": NO_KEY });
    run.case("names: an alias of no key", "400 NotFoundException", "CreateAlias", &lost);
    let alias_arn = arn.replace(&format!("key/{id}"), "alias/one");
    for (case, used, name) in [
        ("names: by id", "names: by id, the ARN is told", id),
        ("names: by ARN", "names: by ARN, the ARN is told", arn),
        ("names: by alias", "names: by alias, the ARN is told", "alias/one"),
        ("names: by alias ARN", "names: by alias ARN, the ARN is told", &alias_arn),
    ] {
        let answer = run.case(case, OK, "GenerateDataKey", &json!({ "KeyId": name, "KeySpec": "AES_256" }));
        run.fact(used, arn, answer.text("KeyId"));
    }
    for (case, name) in [
        ("names: an unknown id", NO_KEY),
        ("names: an unknown alias", "alias/none"),
        ("names: an unknown ARN", &arn.replace(id, NO_KEY)),
        ("names: nonsense", "nonsense"),
    ] {
        run.case(case, "400 NotFoundException", "DescribeKey", &json!({ "KeyId": name }));
    }
    run.case("an operation that KMS does not have", "400 UnknownOperationException", "Divulge", &json!({}));
}

fn generating(run: &mut Run) {
    let key = run.create_key(&json!({}))["Arn"].take();
    let aes_256 = json!({ "KeyId": key, "KeySpec": "AES_256", "EncryptionContext": { "a": "b" } });
    let answer = run.case("generate: AES_256", OK, "GenerateDataKey", &aes_256);
    run.fact("generate: length of the key", 32, answer.bytes("Plaintext").len());
    run.fact("generate: length of the wrapped key", 167, answer.bytes("CiphertextBlob").len());
    let again = run.must("GenerateDataKey", &aes_256);
    run.fact("generate: another key each time", true, again.text("Plaintext") != answer.text("Plaintext"));
    let answer = run.case("generate: AES_128", OK, "GenerateDataKey", &with(&aes_256, "KeySpec", "AES_128"));
    run.fact("generate: length of an AES_128 key", 16, answer.bytes("Plaintext").len());
    let by_length = json!({ "KeyId": key, "NumberOfBytes": 64 });
    let answer = run.case("generate: 64 bytes", OK, "GenerateDataKey", &by_length);
    run.fact("generate: length of 64 bytes", 64, answer.bytes("Plaintext").len());
    for (case, input) in [
        ("generate: 1025 bytes", with(&by_length, "NumberOfBytes", 1025)),
        ("generate: both spec and length", with(&aes_256, "NumberOfBytes", 32)),
        ("generate: neither spec nor length", with(&aes_256, "KeySpec", Value::Null)),
        ("generate: an unknown spec", with(&aes_256, "KeySpec", "AES_512")),
    ] {
        run.case(case, "400 ValidationException", "GenerateDataKey", &input);
    }
    let elsewhere = with(&aes_256, "KeyId", key.as_str().unwrap().replace(REGION, ELSEWHERE));
    run.case("generate: the key's ARN with another Region", "400 NotFoundException", "GenerateDataKey", &elsewhere);
    let dry = with(&aes_256, "DryRun", true);
    run.case("generate: dry run", "412 DryRunOperationException", "GenerateDataKey", &dry);
    let answer = run.case("generate: without plaintext", OK, "GenerateDataKeyWithoutPlaintext", &aes_256);
    run.fact("generate: no plaintext", true, answer.body.get("Plaintext").is_none());
    let wrapped = json!({ "CiphertextBlob": answer.text("CiphertextBlob"), "EncryptionContext": { "a": "b" } });
    let answer = run.case("generate: decrypt what came without plaintext", OK, "Decrypt", &wrapped);
    run.fact("generate: its length", 32, answer.bytes("Plaintext").len());
}

fn decrypting(run: &mut Run) {
    let key = run.create_key(&json!({}))["Arn"].take();
    let other = run.create_key(&json!({}))["Arn"].take();
    let context = json!({ "vol": "v1", "purpose": "test" });
    let made =
        run.must("GenerateDataKey", &json!({ "KeyId": key, "KeySpec": "AES_256", "EncryptionContext": context }));
    let right = json!({ "KeyId": key, "CiphertextBlob": made.text("CiphertextBlob"), "EncryptionContext": context });
    let answer = run.case("decrypt", OK, "Decrypt", &right);
    run.fact("decrypt: the plaintext comes back", made.text("Plaintext"), answer.text("Plaintext"));
    run.fact("decrypt: the ARN is told", key.as_str().unwrap(), answer.text("KeyId"));
    run.case("decrypt: no key is named", OK, "Decrypt", &with(&right, "KeyId", Value::Null));
    run.case("decrypt: dry run", "412 DryRunOperationException", "Decrypt", &with(&right, "DryRun", true));
    run.case("decrypt: another key is named", "400 IncorrectKeyException", "Decrypt", &with(&right, "KeyId", other));
    run.case("decrypt: an unknown key is named", "400 NotFoundException", "Decrypt", &with(&right, "KeyId", NO_KEY));
    for (case, context) in [
        ("decrypt: no context", Value::Null),
        ("decrypt: an empty context", json!({})),
        ("decrypt: another value", json!({ "vol": "v2", "purpose": "test" })),
        ("decrypt: another case", json!({ "Vol": "v1", "purpose": "test" })),
        ("decrypt: a pair too few", json!({ "vol": "v1" })),
        ("decrypt: a pair too many", json!({ "vol": "v1", "purpose": "test", "more": "" })),
        ("decrypt: the boundary of name and value moved", json!({ "volv": "1", "purpose": "test" })),
    ] {
        let input = with(&right, "EncryptionContext", context);
        run.case(case, "400 InvalidCiphertextException", "Decrypt", &input);
    }
    let blob = made.bytes("CiphertextBlob");
    let changed = |at: usize| {
        let mut blob = blob.clone();
        blob[at] ^= 1;
        BASE64.encode(blob)
    };
    for (case, blob) in [
        ("decrypt: the last bit flipped", changed(blob.len() - 1)),
        ("decrypt: a bit of the ciphertext flipped", changed(blob.len() - 20)),
        ("decrypt: a bit of the nonce or tag flipped", changed(blob.len() - 50)),
        ("decrypt: one byte cut off", BASE64.encode(&blob[..blob.len() - 1])),
        ("decrypt: one byte", BASE64.encode([1])),
    ] {
        run.case(case, "400 InvalidCiphertextException", "Decrypt", &with(&right, "CiphertextBlob", blob));
    }
    let long = with(&right, "CiphertextBlob", BASE64.encode([1; 6145]));
    run.case("decrypt: 6145 bytes", "400 ValidationException", "Decrypt", &long);
    let elsewhere = run.call_in(ELSEWHERE, "Decrypt", &with(&right, "KeyId", Value::Null));
    run.fact("decrypt: in another Region", "400 AccessDeniedException", elsewhere.outcome());
}

fn encrypting(run: &mut Run) {
    let key = run.create_key(&json!({}))["Arn"].take();
    let plain = BASE64.encode([7; 32]);
    let input = json!({ "KeyId": key, "Plaintext": plain, "EncryptionContext": { "a": "b" } });
    let wrapped = run.case("encrypt", OK, "Encrypt", &input);
    run.fact("encrypt: the ARN is told", key.as_str().unwrap(), wrapped.text("KeyId"));
    run.fact("encrypt: length of the wrapped key", 184, wrapped.bytes("CiphertextBlob").len());
    let back =
        json!({ "KeyId": key, "CiphertextBlob": wrapped.text("CiphertextBlob"), "EncryptionContext": { "a": "b" } });
    let answer = run.case("encrypt: decrypt it", OK, "Decrypt", &back);
    run.fact("encrypt: the plaintext comes back", &plain, answer.text("Plaintext"));
    let other = with(&back, "EncryptionContext", json!({ "a": "c" }));
    run.case("encrypt: decrypt it in another context", "400 InvalidCiphertextException", "Decrypt", &other);
    run.case("encrypt: 4096 bytes", OK, "Encrypt", &with(&input, "Plaintext", BASE64.encode([7; 4096])));
    let long = with(&input, "Plaintext", BASE64.encode([7; 4097]));
    run.case("encrypt: 4097 bytes", "400 ValidationException", "Encrypt", &long);
    run.case("encrypt: with an unknown key", "400 NotFoundException", "Encrypt", &with(&input, "KeyId", NO_KEY));
}

fn re_encrypting(run: &mut Run) {
    let [from, to] = [(); 2].map(|()| run.create_key(&json!({}))["Arn"].take());
    let (old, new) = (json!({ "in": "old" }), json!({ "in": "new" }));
    let made = run.must("GenerateDataKey", &json!({ "KeyId": from, "KeySpec": "AES_256", "EncryptionContext": old }));
    let input = json!({
        "CiphertextBlob": made.text("CiphertextBlob"),
        "SourceEncryptionContext": old,
        "DestinationKeyId": to,
        "DestinationEncryptionContext": new,
    });
    let answer = run.case("re-encrypt", OK, "ReEncrypt", &input);
    run.fact("re-encrypt: the source's ARN is told", from.as_str().unwrap(), answer.text("SourceKeyId"));
    run.fact("re-encrypt: the destination's ARN is told", to.as_str().unwrap(), answer.text("KeyId"));
    let back = json!({ "KeyId": to, "CiphertextBlob": answer.text("CiphertextBlob"), "EncryptionContext": new });
    let plain = run.case("re-encrypt: decrypt it", OK, "Decrypt", &back).text("Plaintext");
    run.fact("re-encrypt: the plaintext comes back", made.text("Plaintext"), plain);
    let in_old = with(&back, "EncryptionContext", old);
    run.case("re-encrypt: decrypt it in the old context", "400 InvalidCiphertextException", "Decrypt", &in_old);
    run.case("re-encrypt: the source is named", OK, "ReEncrypt", &with(&input, "SourceKeyId", from));
    let wrong = with(&input, "SourceKeyId", to);
    run.case("re-encrypt: another source is named", "400 IncorrectKeyException", "ReEncrypt", &wrong);
    let elsewhere = with(&input, "SourceEncryptionContext", new);
    run.case("re-encrypt: another context", "400 InvalidCiphertextException", "ReEncrypt", &elsewhere);
    let nowhere = with(&input, "DestinationKeyId", NO_KEY);
    run.case("re-encrypt: to an unknown key", "400 NotFoundException", "ReEncrypt", &nowhere);
}

fn a_disabled_key(run: &mut Run) {
    const DISABLED: &str = "400 DisabledException";
    let [key, other] = [(); 2].map(|()| run.create_key(&json!({}))["KeyId"].take());
    let generate = json!({ "KeyId": key, "KeySpec": "AES_256" });
    let made = run.must("GenerateDataKey", &generate).text("CiphertextBlob");
    let others = run.must("GenerateDataKey", &with(&generate, "KeyId", other.clone())).text("CiphertextBlob");
    let decrypt = json!({ "KeyId": key, "CiphertextBlob": made });
    run.case("disabled: disable", OK, "DisableKey", &json!({ "KeyId": key }));
    run.case("disabled: disable again", OK, "DisableKey", &json!({ "KeyId": key }));
    let state = run.state(&key);
    run.fact("disabled: state", "Disabled", state);
    run.case("disabled: generate", DISABLED, "GenerateDataKey", &generate);
    run.case("disabled: generate without plaintext", DISABLED, "GenerateDataKeyWithoutPlaintext", &generate);
    run.case("disabled: decrypt", DISABLED, "Decrypt", &decrypt);
    run.case("disabled: encrypt", DISABLED, "Encrypt", &json!({ "KeyId": key, "Plaintext": "AQID" }));
    let from = json!({ "CiphertextBlob": made, "DestinationKeyId": other });
    run.case("disabled: re-encrypt from it", DISABLED, "ReEncrypt", &from);
    let to = json!({ "CiphertextBlob": others, "DestinationKeyId": key });
    run.case("disabled: re-encrypt to it", DISABLED, "ReEncrypt", &to);
    run.case("disabled: rotation", OK, "GetKeyRotationStatus", &json!({ "KeyId": key }));
    run.case("disabled: enable", OK, "EnableKey", &json!({ "KeyId": key }));
    run.case("disabled: decrypt after enabling", OK, "Decrypt", &decrypt);
}

fn a_key_pending_deletion(run: &mut Run) {
    const INVALID: &str = "400 KMSInvalidStateException";
    let [key, other] = [(); 2].map(|()| run.create_key(&json!({}))["KeyId"].take());
    let named = json!({ "KeyId": key });
    let generate = json!({ "KeyId": key, "KeySpec": "AES_256" });
    let made = run.must("GenerateDataKey", &generate).text("CiphertextBlob");
    let decrypt = json!({ "KeyId": key, "CiphertextBlob": made });
    let soon = json!({ "KeyId": other, "PendingWindowInDays": 3 });
    run.case("pending deletion: a window of 3 days", "400 ValidationException", "ScheduleKeyDeletion", &soon);
    let answer = run.case("pending deletion: schedule", OK, "ScheduleKeyDeletion", &named);
    run.fact("pending deletion: the date is told", true, answer.body["DeletionDate"].is_number());
    let metadata = run.must("DescribeKey", &named).body["KeyMetadata"].take();
    run.fact("pending deletion: state after scheduling", "PendingDeletion", metadata["KeyState"].as_str().unwrap());
    run.fact("pending deletion: the date is described", true, metadata["DeletionDate"].is_number());
    run.case("pending deletion: generate", INVALID, "GenerateDataKey", &generate);
    run.case("pending deletion: decrypt", INVALID, "Decrypt", &decrypt);
    run.case("pending deletion: schedule again", INVALID, "ScheduleKeyDeletion", &named);
    run.case("pending deletion: rotation", INVALID, "GetKeyRotationStatus", &named);
    run.case("pending deletion: enable", INVALID, "EnableKey", &named);
    let state = run.state(&key);
    run.fact("pending deletion: state", "PendingDeletion", state);
    run.case("pending deletion: cancel", OK, "CancelKeyDeletion", &named);
    let state = run.state(&key);
    run.fact("pending deletion: state after cancelling", "Disabled", state);
    run.case("pending deletion: enable after cancelling", OK, "EnableKey", &named);
    run.case("pending deletion: decrypt after cancelling", OK, "Decrypt", &decrypt);
}

fn rotation(run: &mut Run) {
    let key = json!({ "KeyId": run.create_key(&json!({}))["KeyId"].take() });
    let answer = run.case("rotation: status", OK, "GetKeyRotationStatus", &key);
    run.fact("rotation: off at first", false, answer.body["KeyRotationEnabled"].as_bool().unwrap());
    run.case("rotation: enable", OK, "EnableKeyRotation", &key);
    let answer = run.must("GetKeyRotationStatus", &key);
    run.fact("rotation: on", true, answer.body["KeyRotationEnabled"].as_bool().unwrap());
}

fn multi_region_keys(run: &mut Run) {
    let key = run.create_key(&json!({ "MultiRegion": true }));
    let id = key["KeyId"].as_str().unwrap();
    run.fact("multi-Region: the id says so", true, id.starts_with("mrk-"));
    run.fact("multi-Region: the description says so", true, key["MultiRegion"].as_bool().unwrap());
    let made = run.must("GenerateDataKey", &json!({ "KeyId": id, "KeySpec": "AES_256" }));
    let decrypt = json!({ "KeyId": id, "CiphertextBlob": made.text("CiphertextBlob") });
    let answer = run.case("multi-Region: decrypt", OK, "Decrypt", &decrypt);
    let same = |answer: &Answer| made.text("Plaintext") == answer.text("Plaintext");
    run.fact("multi-Region: the plaintext comes back", true, same(&answer));
    let early = run.call_in(ELSEWHERE, "Decrypt", &decrypt);
    run.fact("multi-Region: decrypt before there is a replica", "400 NotFoundException", early.outcome());
    let replicate = json!({ "KeyId": id, "ReplicaRegion": ELSEWHERE });
    run.case("multi-Region: replicate", OK, "ReplicateKey", &replicate);
    let answer = run.call_in(ELSEWHERE, "Decrypt", &decrypt);
    run.fact("multi-Region: decrypt in the replica", OK, answer.outcome());
    run.fact("multi-Region: the replica's plaintext", true, same(&answer));
    let single = run.create_key(&json!({}))["KeyId"].take();
    let single = with(&replicate, "KeyId", single);
    run.case("multi-Region: replicate another", "400 UnsupportedOperationException", "ReplicateKey", &single);
}

fn signatures(run: &mut Run) {
    const INVALID: &str = "400 InvalidSignatureException";
    let (host, input) = (run.address.to_string(), r#"{"Description":"a"}"#);
    let good = sigv4::request(&host, REGION, SECRET, "CreateKey", input);
    let answer = send(run.address, &good);
    run.fact("signature: right", OK, answer.outcome());
    let answer = send(run.address, &sigv4::request(&host, REGION, "wrong", "CreateKey", input));
    run.fact("signature: a wrong secret", INVALID, answer.outcome());
    let mut changed = good.clone();
    changed.body = br#"{"Description":"b"}"#.to_vec();
    let answer = send(run.address, &changed);
    run.fact("signature: the body was changed", INVALID, answer.outcome());
    let mut unsigned = good;
    unsigned.headers.retain(|(name, _)| name != "authorization");
    let answer = send(run.address, &unsigned);
    run.fact("signature: none", "400 MissingAuthenticationTokenException", answer.outcome());
}

#[test]
fn every_case_is_answered_as_by_kms_and_others_differ_where_they_are_known_to() {
    let (server, moto, ministack) = (KmsServer::start(), Moto::start(), Ministack::start());
    let moto_address = moto.endpoint().strip_prefix("http://").unwrap().parse().unwrap();
    let own = run(server.address());
    let wrong = surprises(&own, |_| None);
    assert!(wrong.is_empty(), "the own server: {wrong:#?}");
    let others: [(_, _, &[Difference]); 2] =
        [("moto", moto_address, &MOTO_DIFFERS), ("ministack", ministack.address, &MINISTACK_DIFFERS)];
    for (name, address, differences) in others {
        let other = run(address);
        assert!(own.keys().eq(other.keys()), "{name}");
        let wrong =
            surprises(&other, |case| differences.iter().find(|(known, ..)| *known == case).map(|(_, does, _)| *does));
        assert!(wrong.is_empty(), "{name}: {wrong:#?}");
        let differs = |(case, does, _): &&(_, _, _)| own.get(case).is_some_and(|(kms, _)| kms != does);
        let stale: Vec<_> = differences.iter().filter(|known| !differs(known)).collect();
        assert!(stale.is_empty(), "{name}: no such case, or no difference: {stale:#?}");
    }
}

/// The cases where a server did not do as KMS does, or as it is `known` to do instead.
fn surprises(
    seen: &BTreeMap<&'static str, (String, String)>,
    known: impl Fn(&str) -> Option<&'static str>,
) -> Vec<String> {
    let wrong = seen.iter().filter(|(case, (kms, found))| known(case).unwrap_or(kms) != found);
    wrong.map(|(case, (kms, found))| format!("{case}: KMS {kms}, known {:?}, found {found}", known(case))).collect()
}

/// The example of AWS's documentation of the signature, "get-vanilla".
#[test]
fn the_signature_is_that_of_the_specification() {
    let headers = [("host", "example.amazonaws.com"), ("x-amz-date", "20150830T123600Z")];
    let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let request = Request { method: "GET".to_owned(), path: "/".to_owned(), headers, ..Request::default() };
    let (scope, secret) = ("20150830/us-east-1/service/aws4_request", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY");
    assert_eq!(
        sigv4::signature_of(&request, scope, &["host", "x-amz-date"], secret),
        "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"
    );
    for (seconds, text) in [
        (0, "19700101T000000Z"),
        (951_782_400, "20000229T000000Z"),
        (1_440_938_160, "20150830T123600Z"),
        (4_107_542_399, "21000228T235959Z"),
    ] {
        assert_eq!(sigv4::timestamp(seconds), text);
    }
}

/// `request` with another value of a header.
fn with_header(request: &Request, name: &str, change: impl Fn(&str) -> String) -> Request {
    let mut request = request.clone();
    for (known, value) in &mut request.headers {
        if known == name {
            *value = change(value);
        }
    }
    request
}

#[test]
fn a_signature_covers_the_operation_the_host_and_the_time() {
    let server = KmsServer::start();
    let good = signed(server.address(), REGION, "CreateKey", &json!({}));
    assert_eq!(send(server.address(), &good).outcome(), OK);
    let authorization = |from: &'static str, to: &'static str| {
        with_header(&good, "authorization", move |value| value.replace(from, to))
    };
    let (invalid, incomplete) = ("400 InvalidSignatureException", "400 IncompleteSignatureException");
    for (expected, request) in [
        (invalid, with_header(&good, "x-amz-target", |_| "TrentService.DescribeKey".to_owned())),
        (invalid, with_header(&good, "host", |_| "another".to_owned())),
        (invalid, with_header(&good, "x-amz-date", |_| "20150830T123600Z".to_owned())),
        (invalid, authorization("SignedHeaders=content-type;host;x-amz-date;x-amz-target", "SignedHeaders=host")),
        (invalid, authorization("/kms/", "/sts/")),
        (incomplete, authorization("Signature=", "")),
        (incomplete, authorization("AWS4-HMAC-SHA256", "Bearer")),
        ("400 UnrecognizedClientException", authorization("Credential=test/", "Credential=other/")),
    ] {
        assert_eq!(send(server.address(), &request).outcome(), expected, "{:?}", request.headers);
    }
}

#[test]
fn calls_are_counted_throttled_and_denied() {
    let server = KmsServer::start_with(Options { rate: Some(2), ..Options::default() }).unwrap();
    let key = server.create_key();
    let describe =
        || send(server.address(), &signed(server.address(), REGION, "DescribeKey", &json!({ "KeyId": key.id })));
    assert_eq!([(); 3].map(|()| describe().outcome()), [OK, OK, "400 ThrottlingException"]);
    server.set_rate(None);
    server.deny("DescribeKey");
    assert_eq!(describe().outcome(), "400 AccessDeniedException");
    server.allow("DescribeKey");
    assert_eq!(describe().outcome(), OK);
    assert_eq!((server.calls("DescribeKey"), server.calls("Decrypt"), server.all_calls()), (5, 0, 5));
    assert_eq!((server.failures("ThrottlingException"), server.failures("AccessDeniedException")), (1, 1));
}

#[test]
fn latency_is_that_of_a_call_and_not_of_a_queue() {
    let latency = Duration::from_millis(300);
    let server = KmsServer::start_with(Options { latency, ..Options::default() }).unwrap();
    let key = server.create_key();
    let (server, key) = (&server, &key);
    let started = Instant::now();
    thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(move || {
                let input = json!({ "KeyId": key.id });
                let started = Instant::now();
                assert_eq!(
                    send(server.address(), &signed(server.address(), REGION, "DescribeKey", &input)).status,
                    200
                );
                assert!(started.elapsed() >= latency);
            });
        }
    });
    assert!(started.elapsed() < 10 * latency, "{:?}", started.elapsed());
}

#[test]
fn a_dropped_server_hangs_up_and_refuses() {
    let server = KmsServer::start();
    let address = server.address();
    let mut idle = BufReader::new(TcpStream::connect(address).unwrap());
    let request = signed(address, REGION, "CreateKey", &json!({}));
    idle.get_mut().write_all(&request.encode()).unwrap();
    assert_eq!(Response::read(&mut idle).unwrap().status, 200);
    drop(server);
    assert!(Response::read(&mut idle).is_err());
    assert!(TcpStream::connect(address).is_err());
}

/// Decrypts on one connection, with one signature, as fast as the server answers.
fn hammer(address: SocketAddr, request: &[u8], calls: u32) {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    let mut stream = BufReader::new(stream);
    for _ in 0..calls {
        stream.get_mut().write_all(request).unwrap();
        assert_eq!(Response::read(&mut stream).unwrap().status, 200);
    }
}

/// The bound is far below what an idle machine of 2 cores does, and far above what moto does anywhere: about 250.
#[test]
fn it_decrypts_thousands_of_times_a_second() {
    const CONNECTIONS: u32 = 4;
    const CALLS: u32 = 2500;
    let server = KmsServer::start();
    let key = server.create_key();
    let made = server.administer("GenerateDataKey", &json!({ "KeyId": key.id, "KeySpec": "AES_256" }));
    let input = json!({ "KeyId": key.arn, "CiphertextBlob": made["CiphertextBlob"] });
    let request = signed(server.address(), REGION, "Decrypt", &input).encode();
    let started = Instant::now();
    thread::scope(|scope| {
        for _ in 0..CONNECTIONS {
            scope.spawn(|| hammer(server.address(), &request, CALLS));
        }
    });
    let rate = f64::from(CONNECTIONS * CALLS) / started.elapsed().as_secs_f64();
    println!("{rate:.0} Decrypt/s on {CONNECTIONS} connections");
    assert_eq!(server.calls("Decrypt"), u64::from(CONNECTIONS * CALLS));
    assert!(rate > 1000.0, "{rate:.0} Decrypt/s");
}

fn provider(key: &str, endpoint: &str) -> Arc<dyn Provider> {
    let aws = AwsSettings {
        endpoint: Some(endpoint.to_owned()),
        attempt_timeout: Duration::from_secs(20),
        operation_timeout: Duration::from_secs(30),
        ..AwsSettings::default()
    };
    open(ProviderKind::AwsKms, key, None, &ProviderSettings { aws, ..ProviderSettings::default() }).unwrap()
}

/// That the SDK can use a server: its signatures, its JSON, its errors.
fn round_trip(key: &str, endpoint: &str) {
    let context = EncryptionContext::data_key(&[1; 16], &[2; 16]);
    let provider = provider(key, endpoint);
    let (data_key, wrapped) = provider.generate_data_key(&context).unwrap();
    let again = provider.unwrap(&wrapped.key_id, &wrapped.bytes, &context).unwrap();
    assert_eq!(again.expose(), data_key.expose());
    let other = EncryptionContext::data_key(&[1; 16], &[3; 16]);
    let error = provider.unwrap(&wrapped.key_id, &wrapped.bytes, &other).err().unwrap();
    assert_eq!(error.kind, ProviderErrorKind::Tampered, "{error}");
}

/// One data key through every operation: wrapped by another key, brought from key to key, and made unseen.
fn every_operation(keys: [&str; 2], alias: &str, endpoint: &str) {
    let [first, second] = keys;
    let [context, other] = [2, 3].map(|id| EncryptionContext::data_key(&[1; 16], &[id; 16]));
    let provider = provider(first, endpoint);
    let (data_key, made) = provider.generate_data_key(&context).unwrap();
    let is_it = |wrapped: &WrappedKey| {
        let again = provider.unwrap(&wrapped.key_id, &wrapped.bytes, &context).unwrap();
        assert_eq!(again.expose(), data_key.expose());
        let error = provider.unwrap(&wrapped.key_id, &wrapped.bytes, &other).err().unwrap();
        assert_eq!(error.kind, ProviderErrorKind::Tampered, "{error}");
    };
    let wrapped = provider.wrap(second, &data_key, &context).unwrap();
    assert_eq!(wrapped.key_id, second);
    is_it(&wrapped);
    for to in [second, alias] {
        let rewrapped = provider.rewrap(&made.key_id, &made.bytes, to, &context).unwrap();
        assert!(rewrapped.key_id == second && rewrapped.bytes != made.bytes, "{to}");
        is_it(&rewrapped);
        is_it(&provider.rewrap(to, &rewrapped.bytes, first, &context).unwrap());
    }
    let error = provider.rewrap(&made.key_id, &made.bytes, second, &other).unwrap_err();
    assert_eq!(error.kind, ProviderErrorKind::Tampered, "{error}");
    assert!(error.message.contains("ReEncrypt"), "{error}");
    for error in [
        provider.wrap(NO_KEY, &data_key, &context).unwrap_err(),
        provider.rewrap(&made.key_id, &made.bytes, NO_KEY, &context).unwrap_err(),
    ] {
        assert_eq!(error.kind, ProviderErrorKind::KeyNotFound, "{error}");
    }
    let [one, two] = [(); 2].map(|()| provider.generate_wrapped_key(&context).unwrap());
    let open = |wrapped: &WrappedKey| provider.unwrap(first, &wrapped.bytes, &context).unwrap();
    assert!(one.key_id == first && open(&one).expose() != open(&two).expose());
    assert!(provider.unwrap(first, &one.bytes, &other).is_err());
}

#[test]
fn every_operation_works_on_both() {
    isolated_in(&moto::environment(), "kms_server::every_operation_works_on_both", || {
        let (server, moto) = (KmsServer::start(), Moto::start());
        let [first, second] = [(); 2].map(|()| server.create_key());
        server.administer("CreateAlias", &json!({ "AliasName": "alias/b", "TargetKeyId": second.id }));
        every_operation([&first.arn, &second.arn], "alias/b", &server.endpoint());
        // Each costs one call.
        assert_eq!((server.calls("Encrypt"), server.calls("GenerateDataKeyWithoutPlaintext")), (2, 2));
        assert_eq!(server.calls("ReEncrypt"), 6);
        let [first, second] = [(); 2].map(|()| moto.create_key());
        moto.create_alias("alias/b", &second);
        every_operation([&first.arn, &second.arn], "alias/b", &moto.endpoint());
    });
}

#[test]
fn a_key_that_cannot_be_used_stops_every_operation() {
    isolated_in(&moto::environment(), "kms_server::a_key_that_cannot_be_used_stops_every_operation", || {
        let server = KmsServer::start();
        let [key, other] = [(); 2].map(|()| server.create_key());
        let context = EncryptionContext::data_key(&[1; 16], &[2; 16]);
        let provider = provider(&key.arn, &server.endpoint());
        let (data_key, made) = provider.generate_data_key(&context).unwrap();
        let others = provider.wrap(&other.arn, &data_key, &context).unwrap();
        let all = || {
            [
                provider.generate_wrapped_key(&context).err(),
                provider.wrap(&key.arn, &data_key, &context).err(),
                provider.rewrap(&key.arn, &made.bytes, &other.arn, &context).err(),
                provider.rewrap(&other.arn, &others.bytes, &key.arn, &context).err(),
            ]
            .map(|error| error.map(|error| error.kind))
        };
        assert_eq!(all(), [None; 4]);
        server.administer("DisableKey", &json!({ "KeyId": key.id }));
        assert_eq!(all(), [Some(ProviderErrorKind::KeyUnusable); 4]);
        server.administer("ScheduleKeyDeletion", &json!({ "KeyId": key.id }));
        assert_eq!(all(), [Some(ProviderErrorKind::KeyUnusable); 4]);
        server.administer("CancelKeyDeletion", &json!({ "KeyId": key.id }));
        server.administer("EnableKey", &json!({ "KeyId": key.id }));
        for operation in ["GenerateDataKeyWithoutPlaintext", "Encrypt", "ReEncrypt"] {
            server.deny(operation);
        }
        assert_eq!(all(), [Some(ProviderErrorKind::Denied); 4]);
        let error = provider.rewrap(&key.arn, &made.bytes, &other.arn, &context).unwrap_err();
        assert!(error.message.contains("kms:ReEncryptFrom and kms:ReEncryptTo"), "{error}");
    });
}

/// What a multi-Region key wrapped is unwrapped by its replicas too, under their own names; and it can be brought to a
/// key of another Region, though ReEncrypt does not reach there.
#[test]
fn what_a_multi_region_key_wrapped_survives_its_region() {
    isolated_in(&moto::environment(), "kms_server::what_a_multi_region_key_wrapped_survives_its_region", || {
        let server = KmsServer::start();
        let key = server.administer("CreateKey", &json!({ "MultiRegion": true }))["KeyMetadata"].take();
        let [arn, id] = ["Arn", "KeyId"].map(|name| key[name].as_str().unwrap());
        server.administer("ReplicateKey", &json!({ "KeyId": id, "ReplicaRegion": ELSEWHERE }));
        let replica = arn.replace(REGION, ELSEWHERE);
        let single = server.create_key();
        let context = EncryptionContext::data_key(&[1; 16], &[2; 16]);
        let here = provider(id, &server.endpoint());
        let (data_key, made) = here.generate_data_key(&context).unwrap();
        assert_eq!(made.key_id, arn);
        let further = here.wrap(arn, &data_key, &context).unwrap();
        let unseen = here.generate_wrapped_key(&context).unwrap();
        let there = provider(&replica, &server.endpoint());
        for wrapped in [&made, &further] {
            for name in [arn, &replica] {
                let again = there.unwrap(name, &wrapped.bytes, &context).unwrap();
                assert_eq!(again.expose(), data_key.expose(), "{name}");
            }
        }
        let [one, two] = [arn, &replica].map(|name| there.unwrap(name, &unseen.bytes, &context).unwrap());
        assert_eq!(one.expose(), two.expose());
        let calls = server.calls("ReEncrypt");
        let home = there.rewrap(&replica, &made.bytes, &single.arn, &context).unwrap();
        assert_eq!((home.key_id.as_str(), server.calls("ReEncrypt")), (single.arn.as_str(), calls));
        assert_eq!(here.unwrap(&single.arn, &home.bytes, &context).unwrap().expose(), data_key.expose());
        let back = here.rewrap(&single.arn, &home.bytes, arn, &context).unwrap();
        assert_eq!(server.calls("ReEncrypt"), calls + 1);
        assert_eq!(there.unwrap(&replica, &back.bytes, &context).unwrap().expose(), data_key.expose());
    });
}

#[test]
fn the_sdk_uses_all_of_them() {
    isolated_in(&moto::environment(), "kms_server::the_sdk_uses_all_of_them", || {
        let (server, moto, ministack) = (KmsServer::start(), Moto::start(), Ministack::start());
        round_trip(&server.create_key().arn, &server.endpoint());
        round_trip(&moto.create_key().arn, &moto.endpoint());
        let other = Run { address: ministack.address, seen: BTreeMap::new() };
        let [key, replicated] = [json!({}), json!({ "MultiRegion": true })].map(|input| other.create_key(&input));
        round_trip(key["Arn"].as_str().unwrap(), &ministack.endpoint());
        round_trip(replicated["Arn"].as_str().unwrap(), &ministack.endpoint());
        let CreatedKey { arn, id } = server.create_key();
        server.administer("DisableKey", &json!({ "KeyId": id }));
        other.must("DisableKey", &json!({ "KeyId": key["KeyId"] }));
        let context = EncryptionContext::data_key(&[1; 16], &[2; 16]);
        for (arn, endpoint) in [(arn.as_str(), server.endpoint()), (key["Arn"].as_str().unwrap(), ministack.endpoint())]
        {
            let error = provider(arn, &endpoint).generate_data_key(&context).err().unwrap();
            assert_eq!(error.kind, ProviderErrorKind::KeyUnusable, "{error}");
        }
    });
}

#[test]
fn wrong_credentials_are_refused() {
    for (variable, code) in
        [("AWS_SECRET_ACCESS_KEY", "InvalidSignatureException"), ("AWS_ACCESS_KEY_ID", "UnrecognizedClientException")]
    {
        let environment =
            moto::environment().map(|(name, value)| (name, if name == variable { "wrong" } else { value }));
        let environment = [environment.as_slice(), &[("KMSFS_TEST_CODE", code)]].concat();
        isolated_in(&environment, "kms_server::wrong_credentials_are_refused", || {
            let code = std::env::var("KMSFS_TEST_CODE").unwrap();
            let server = KmsServer::start();
            let context = EncryptionContext::data_key(&[1; 16], &[2; 16]);
            let provider = provider(&server.create_key().arn, &server.endpoint());
            let error = provider.generate_data_key(&context).err().unwrap();
            assert_eq!(error.kind, ProviderErrorKind::Credentials, "{error}");
            assert!(error.message.contains(&code), "{error}");
        });
    }
    assert_eq!((ACCESS_KEY, SECRET), ("test", "test"), "what moto::environment says");
}

/// The system's certificates are trusted, and rustls-native-certs takes SSL_CERT_FILE for the place of those.
#[test]
fn the_sdk_speaks_tls_with_forward_secrecy_only() {
    let server = KmsServer::start_with(Options { tls: true, ..Options::default() }).unwrap();
    let (key, endpoint) = (server.create_key(), server.endpoint());
    let directory = tempfile::tempdir().unwrap();
    let trusted = directory.path().join("trusted.pem");
    std::fs::write(&trusted, server.certificate()).unwrap();
    let own =
        [("SSL_CERT_FILE", trusted.to_str().unwrap()), ("KMSFS_TEST_KEY", &key.arn), ("KMSFS_TEST_URL", &endpoint)];
    let environment = [moto::environment().as_slice(), &own].concat();
    isolated_in(&environment, "kms_server::the_sdk_speaks_tls_with_forward_secrecy_only", || {
        let [key, endpoint] = ["KMSFS_TEST_KEY", "KMSFS_TEST_URL"].map(|name| std::env::var(name).unwrap());
        round_trip(&key, &endpoint);
    });
    if std::env::var_os("KMSFS_TEST_KEY").is_some() {
        return;
    }
    assert_eq!((server.calls("GenerateDataKey"), server.calls("Decrypt")), (1, 2));
    let offers = server.offers();
    assert!(!offers.is_empty());
    for offer in offers {
        let suites: Vec<_> = offer.suites.iter().filter_map(|suite| suite.as_str()).collect();
        // The last one is no suite: it says that renegotiation is refused.
        let is_forward_secret = |suite: &str| {
            ["TLS13_", "TLS_ECDHE_", "TLS_EMPTY_RENEGOTIATION_INFO_SCSV"].iter().any(|start| suite.starts_with(start))
        };
        assert!(suites.len() == offer.suites.len() && suites.iter().all(|suite| is_forward_secret(suite)), "{offer:?}");
        assert!(suites[0].starts_with("TLS13_"), "{suites:?}");
        assert_eq!(offer.groups.first().and_then(|group| group.as_str()), Some("X25519MLKEM768"), "{offer:?}");
    }
}

#[test]
fn a_certificate_that_is_not_trusted_ends_the_call() {
    isolated_in(&moto::environment(), "kms_server::a_certificate_that_is_not_trusted_ends_the_call", || {
        let server = KmsServer::start_with(Options { tls: true, ..Options::default() }).unwrap();
        let context = EncryptionContext::data_key(&[1; 16], &[2; 16]);
        let error = provider(&server.create_key().arn, &server.endpoint()).generate_data_key(&context).err().unwrap();
        assert_eq!(error.kind, ProviderErrorKind::Misconfigured, "{error}");
        assert!(error.message.contains("certificate") && error.message.contains("SSL_CERT_FILE"), "{error}");
        assert_eq!(server.all_calls(), 0);
    });
}
