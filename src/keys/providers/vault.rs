//! The transit engine of OpenBao or HashiCorp Vault: its encrypt and decrypt, on data keys that are made here.
//!
//! A wrapped key is the engine's ciphertext, `vault:vVERSION:BASE64`; the encryption context is its associated data. Data keys
//! are not the engine's `datakey`: servers that do not know associated data there leave it out without a word, and what they
//! wrap could not be unwrapped.
//!
//! Invariants: no answer is believed that has another shape (32 bytes, a ciphertext of the version that it names); before
//! a key wraps it is known to exist, because the engine would make one of a mistyped name; every operation ends in time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::super::{
    EncryptionContext, KeyDescription, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey,
};
use super::vault_client::{Body, Client, Refusal, Request};
use super::vault_describe::TransitKey;
use super::vault_login::Login;
use super::{MAX_WRAPPED_LEN, VaultSettings};
use crate::crypto::{DataKey, Secret};

/// Where the engine is mounted if a key's name does not say.
const USUAL_MOUNT: &str = "transit";
/// The longest name of a key with its mount, in bytes.
const MAX_KEY_LEN: usize = 512;
/// So long a key that was seen is taken to exist.
const KNOWN_FOR: Duration = Duration::from_secs(60);

/// A key of the transit engine.
pub(super) struct VaultProvider {
    /// `MOUNT/NAME`.
    key: String,
    client: Arc<Client>,
    login: Arc<Login>,
    /// Keys that exist, and when that was seen.
    known: Mutex<HashMap<String, Instant>>,
}

impl VaultProvider {
    /// The provider of `key`: `NAME`, or `MOUNT/NAME` if the engine is not at `transit`. Makes no call.
    ///
    /// # Errors
    /// `Misconfigured` if `key` cannot be a key, or the settings cannot work.
    pub(super) fn open(key: &str, settings: &VaultSettings) -> Result<Self, ProviderError> {
        let key = canonical(key)?;
        let client = Arc::new(Client::new(settings)?);
        let login = Login::new(settings, Arc::clone(&client))?;
        Ok(Self { key, client, login, known: Mutex::default() })
    }

    /// Sends a request with a token; with another one if the server has forgotten the first.
    fn call(&self, call: &Call<'_>, request: &Request<'_>) -> Result<Body, ProviderError> {
        let deadline = self.client.deadline();
        self.send(&call.path(), request, deadline).map_err(|refusal| {
            if refusal.0 == ProviderErrorKind::KeyNotFound {
                self.known().remove(call.key);
            }
            call.error(refusal)
        })
    }

    fn send(&self, path: &str, request: &Request<'_>, deadline: Instant) -> Result<Body, Refusal> {
        let token = self.login.token(deadline)?;
        let answer = self.client.send(path, Some(&token.text), request, deadline);
        // A token that is not known and one that may not are told apart by asking about the token itself.
        if !matches!(answer, Err((ProviderErrorKind::Denied, _))) {
            return answer;
        }
        match self.client.send("auth/token/lookup-self", Some(&token.text), &Request::Get, deadline) {
            Err((ProviderErrorKind::Denied, _)) => {}
            _ => return answer,
        }
        let token = self.login.replace(&token, deadline)?;
        self.client.send(path, Some(&token.text), request, deadline)
    }

    /// Whether `key` is there and can wrap. A caller who may not look is believed.
    fn check_exists(&self, key: &str) -> Result<(), ProviderError> {
        if self.known().get(key).is_some_and(|seen| seen.elapsed() < KNOWN_FOR) {
            return Ok(());
        }
        match self.read_key(key) {
            Ok(transit) => {
                transit.check_wraps().map_err(|refusal| Call { operation: "encrypt", key }.error(refusal))?
            }
            Err(error) if error.kind == ProviderErrorKind::Denied => {}
            Err(error) => return Err(error),
        }
        self.known().insert(key.to_owned(), Instant::now());
        Ok(())
    }

    fn read_key(&self, key: &str) -> Result<TransitKey, ProviderError> {
        let call = Call { operation: "keys", key };
        let answer = self.call(&call, &Request::Get)?;
        let parsed = serde_json::from_slice::<Answer<TransitKey>>(&answer).ok().and_then(|answer| answer.data);
        parsed.ok_or_else(|| call.bad_answer("it describes no key"))
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for VaultProvider {
    fn drop(&mut self) {
        self.login.close();
    }
}

impl Provider for VaultProvider {
    fn kind(&self) -> ProviderKind {
        ProviderKind::Vault
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn generate_data_key(&self, context: &EncryptionContext) -> Result<(DataKey, WrappedKey), ProviderError> {
        let data_key = DataKey::random();
        let wrapped = self.wrap(&self.key, &data_key, context)?;
        Ok((data_key, wrapped))
    }

    fn wrap(&self, key_id: &str, data_key: &DataKey, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        let key_id = canonical(key_id)?;
        self.check_exists(&key_id)?;
        let call = Call { operation: "encrypt", key: &key_id };
        let plaintext = Zeroizing::new(BASE64.encode(data_key.expose()));
        let answer = self.call(&call, &Request::Post(body("plaintext", &plaintext, context).as_bytes()))?;
        let encrypted = serde_json::from_slice::<Answer<Encrypted<'_>>>(&answer).ok().and_then(|answer| answer.data);
        let encrypted = encrypted.ok_or_else(|| call.bad_answer("it holds no ciphertext"))?;
        if !encrypted.is_right() {
            return Err(call.bad_answer("its ciphertext has not the shape of one"));
        }
        let bytes = encrypted.ciphertext.as_bytes().to_vec();
        Ok(WrappedKey { key_id, bytes })
    }

    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        let key_id = canonical(key_id)?;
        let call = Call { operation: "decrypt", key: &key_id };
        let ciphertext = std::str::from_utf8(wrapped).ok().filter(|text| version_of(text).is_some());
        let ciphertext = ciphertext
            .ok_or_else(|| call.error((ProviderErrorKind::Tampered, "this is no ciphertext of it".to_owned())))?;
        let answer = self.call(&call, &Request::Post(body("ciphertext", ciphertext, context).as_bytes()))?;
        let decrypted = serde_json::from_slice::<Answer<Decrypted<'_>>>(&answer).ok().and_then(|answer| answer.data);
        let decrypted = decrypted.ok_or_else(|| call.bad_answer("it holds no plaintext"))?;
        let data_key = data_key(decrypted.plaintext).ok_or_else(|| call.bad_answer("it holds no key of 32 bytes"))?;
        self.known().insert(key_id.clone(), Instant::now());
        Ok(data_key)
    }

    fn leave_pace_to_caller(&self) {
        self.client.leave_pace_to_caller();
    }

    fn hang_up(&self) {
        self.client.hang_up();
    }

    fn describe(&self, key_id: &str) -> Result<KeyDescription, ProviderError> {
        let key_id = canonical(key_id)?;
        let key = self.read_key(&key_id)?;
        Ok(key.description(key_id))
    }
}

/// An operation on a key, for its path and for messages.
struct Call<'a> {
    operation: &'static str,
    key: &'a str,
}

impl Call<'_> {
    fn path(&self) -> String {
        let (mount, name) = self.key.rsplit_once('/').unwrap_or((USUAL_MOUNT, self.key));
        format!("{mount}/{}/{name}", self.operation)
    }

    fn bad_answer(&self, what: &str) -> ProviderError {
        self.error((ProviderErrorKind::BadAnswer, format!("the answer cannot be right: {what}")))
    }

    /// An error that says what failed, why, and what to do.
    fn error(&self, (kind, why): Refusal) -> ProviderError {
        let advice = match kind {
            ProviderErrorKind::Denied => {
                let right = if self.operation == "keys" { "read" } else { "update" };
                format!("allow \"{right}\" on {} in a policy of the token", self.path())
            }
            ProviderErrorKind::KeyUnusable => {
                "restore the key, or lower its min_decryption_version (`bao write MOUNT/keys/NAME/config`)".to_owned()
            }
            ProviderErrorKind::KeyNotFound => "check the key's name, its mount and the namespace".to_owned(),
            ProviderErrorKind::Credentials => "log in anew, or check the token or AppRole that is given".to_owned(),
            ProviderErrorKind::Unavailable | ProviderErrorKind::Storage => {
                "check the server and the network, and try again".to_owned()
            }
            ProviderErrorKind::Throttled => "check the server's quotas, and try again later".to_owned(),
            ProviderErrorKind::Tampered => {
                "the wrapped key or its context was changed, or it belongs to another volume or key".to_owned()
            }
            ProviderErrorKind::BadAnswer => "check what answers at the address (server, proxy)".to_owned(),
            ProviderErrorKind::Misconfigured => {
                "check the address and the key: it must be aes256-gcm96 or chacha20-poly1305, and not derived"
                    .to_owned()
            }
        };
        let message = format!("Vault {} with key {}: {why}: {advice}", self.operation, self.key);
        ProviderError::new(kind, message)
    }
}

#[derive(Deserialize)]
struct Answer<T> {
    data: Option<T>,
}

/// Base64 needs no escapes, so what is borrowed is whole, and no copy of a key is made.
#[derive(Deserialize)]
struct Decrypted<'a> {
    plaintext: &'a str,
}

#[derive(Deserialize)]
struct Encrypted<'a> {
    ciphertext: &'a str,
    key_version: Option<u64>,
}

impl Encrypted<'_> {
    fn is_right(&self) -> bool {
        let version = version_of(self.ciphertext);
        version.is_some() && self.key_version.is_none_or(|told| Some(told) == version)
    }
}

/// `{"FIELD":"VALUE","associated_data":"..."}`, wiped on drop; `value` needs no escapes.
fn body(field: &str, value: &str, context: &EncryptionContext) -> Zeroizing<String> {
    let bound_to = BASE64.encode(context.associated_data());
    let mut body = Zeroizing::new(String::with_capacity(field.len() + value.len() + bound_to.len() + 32));
    for part in ["{\"", field, "\":\"", value, "\",\"associated_data\":\"", &bound_to, "\"}"] {
        body.push_str(part);
    }
    body
}

/// The data key that `text` spells in base64.
fn data_key(text: &str) -> Option<DataKey> {
    let mut bytes = Zeroizing::new([0; 48]);
    let len = if text.len() == 44 { BASE64.decode_slice(text, &mut *bytes).ok()? } else { 0 };
    let key: &[u8; 32] = bytes.get(..len)?.try_into().ok()?;
    Secret::fill_with(|secret| {
        secret.copy_from_slice(key);
        Ok::<_, ()>(())
    })
    .ok()
}

/// The version of the key in a ciphertext of the engine, if it has the shape of one.
fn version_of(ciphertext: &str) -> Option<u64> {
    let (version, rest) = ciphertext.strip_prefix("vault:v")?.split_once(':')?;
    let is_base64 = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte);
    let fits = !rest.is_empty() && ciphertext.len() <= MAX_WRAPPED_LEN && rest.bytes().all(is_base64);
    version.parse().ok().filter(|version| fits && *version > 0)
}

/// `MOUNT/NAME` of a key that may be named without its mount.
pub(super) fn canonical(key: &str) -> Result<String, ProviderError> {
    let key = if key.contains('/') { key.to_owned() } else { format!("{USUAL_MOUNT}/{key}") };
    if key.len() > MAX_KEY_LEN || !key.split('/').all(is_path_segment) {
        let message = format!("{key:?} is not a key of the transit engine: give NAME or MOUNT/NAME");
        return Err(ProviderError::new(ProviderErrorKind::Misconfigured, message));
    }
    Ok(key)
}

/// Whether a path of the server can have this between two slashes.
pub(super) fn is_path_segment(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !text.is_empty() && !text.starts_with('.') && text.bytes().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_named_with_or_without_their_mount() {
        assert_eq!(canonical("app").unwrap(), "transit/app");
        assert_eq!(canonical("team/kms/app-1").unwrap(), "team/kms/app-1");
        let call = Call { operation: "decrypt", key: "team/kms/app" };
        assert_eq!(call.path(), "team/kms/decrypt/app");
        for bad in ["", "/", "a/", "/a", "..", "a/../b", "a b", "a?b", "a%2fb", "\u{e9}", &"x".repeat(MAX_KEY_LEN + 1)]
        {
            assert_eq!(canonical(bad).unwrap_err().kind, ProviderErrorKind::Misconfigured, "{bad}");
        }
    }

    #[test]
    fn a_ciphertext_names_its_version() {
        assert_eq!(version_of("vault:v12:AAA+/="), Some(12));
        for bad in
            ["", "vault:v1", "vault:v1:", "vault:v0:AA", "vault:vx:AA", "other:v1:AA", "vault:v1:A\"A", "vault:v1:A A"]
        {
            assert_eq!(version_of(bad), None, "{bad}");
        }
        let right = |ciphertext, key_version| Encrypted { ciphertext, key_version }.is_right();
        assert!(right("vault:v2:AA", Some(2)) && right("vault:v2:AA", None) && !right("vault:v2:AA", Some(3)));
    }

    #[test]
    fn only_32_bytes_are_a_data_key() {
        let key = data_key(&BASE64.encode([7; 32])).unwrap();
        assert_eq!(key.expose(), &[7; 32]);
        for bad in [BASE64.encode([7; 31]), BASE64.encode([7; 33]), "?".repeat(44), String::new()] {
            assert!(data_key(&bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_body_is_json() {
        let context = EncryptionContext::volume_key(&[1; 16]);
        let body: serde_json::Value = serde_json::from_str(&body("plaintext", "AAAA", &context)).unwrap();
        assert_eq!(body["plaintext"], "AAAA");
        assert_eq!(BASE64.decode(body["associated_data"].as_str().unwrap()).unwrap(), context.associated_data());
    }
}
