//! A key in a security module that speaks PKCS #11: AES-GCM, with the encryption context as associated data.
//!
//! A wrapped key is `1 | nonce 12 | ciphertext 32 | tag 16`. Associated data: the first byte, the key's canonical name with a
//! u16 length before it, and the encryption context. Nonces are random, so that 2^32 wrapped keys are safe under one key.
//!
//! Invariants: data keys are made here; nothing is believed that has another shape; what failed to decrypt is called changed
//! only if the module still decrypts what it encrypts.

use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, AttributeType, ObjectHandle};
use zeroize::Zeroizing;

use super::super::{
    EncryptionContext, KeyDescription, KeyState, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey,
};
use super::Pkcs11Settings;
use super::pkcs11_module::{Open, Refusal, Workers};
use super::pkcs11_uri::{KeyName, Query};
use crate::crypto::{DataKey, Secret, TAG_LEN, random_array};

const WRAPPED_VERSION: u8 = 1;
const NONCE_LEN: usize = 12;
const KEY_LEN: usize = 32;
const WRAPPED_LEN: usize = 1 + NONCE_LEN + KEY_LEN + TAG_LEN;
const TAG_BITS: u64 = 128;

/// A key on a token.
pub(super) struct Pkcs11Provider {
    key: KeyName,
    workers: Workers,
}

impl Pkcs11Provider {
    /// The provider of the key that the path of a URI names. Loads no module yet.
    ///
    /// # Errors
    /// `Misconfigured` if it names none.
    pub(super) fn open(path: &str, settings: &Pkcs11Settings) -> Result<Self, ProviderError> {
        Ok(Self { key: parse(path)?, workers: Workers::new(settings) })
    }

    /// The same of a whole URI, whose query comes before the settings. Only for what a user says, never for what a volume does.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(super) fn open_uri(uri: &str, settings: &Pkcs11Settings) -> Result<Self, ProviderError> {
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        let query = Query::parse(query).map_err(|why| not_a_key(uri, &why))?;
        let module = query.module.or_else(|| settings.module.clone());
        let pin_file = query.pin_file.or_else(|| settings.pin_file.clone());
        Self::open(path, &Pkcs11Settings { module, pin_file, ..settings.clone() })
    }
}

impl Provider for Pkcs11Provider {
    fn kind(&self) -> ProviderKind {
        ProviderKind::Pkcs11
    }

    /// A module may be as slow as a network, and often it is one.
    fn is_remote(&self) -> bool {
        true
    }

    fn generate_data_key(&self, context: &EncryptionContext) -> Result<(DataKey, WrappedKey), ProviderError> {
        let data_key = DataKey::random();
        let wrapped = self.wrap(&self.key.canonical(), &data_key, context)?;
        Ok((data_key, wrapped))
    }

    fn wrap(&self, key_id: &str, data_key: &DataKey, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        let key = parse(key_id)?;
        let key_id = key.canonical();
        let fail = |refusal| error("wrapping", &key_id, refusal);
        let nonce: [u8; NONCE_LEN] = random_array();
        let bound_to = associated_data(&key_id, context);
        let plain = Zeroizing::new(data_key.expose().to_vec());
        let run =
            self.workers.run(&key, move |open, handle| gcm(open, handle, nonce, &bound_to, Direction::Seal(&plain)));
        let sealed = run.map_err(fail)?;
        if sealed.len() != KEY_LEN + TAG_LEN {
            let why = format!("it made {} bytes of a key, not {}", sealed.len(), KEY_LEN + TAG_LEN);
            return Err(fail((ProviderErrorKind::BadAnswer, why)));
        }
        let bytes = [&[WRAPPED_VERSION], nonce.as_slice(), &sealed].concat();
        Ok(WrappedKey { key_id, bytes })
    }

    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        let key = parse(key_id)?;
        let key_id = key.canonical();
        let fail = |refusal| error("unwrapping", &key_id, refusal);
        let parts =
            wrapped.split_first().and_then(|(version, rest)| Some((version, rest.split_first_chunk::<NONCE_LEN>()?)));
        let Some((&WRAPPED_VERSION, (&nonce, sealed))) = parts.filter(|_| wrapped.len() == WRAPPED_LEN) else {
            return Err(fail((ProviderErrorKind::Tampered, "this is no wrapped key of it".to_owned())));
        };
        let (bound_to, sealed) = (associated_data(&key_id, context), sealed.to_vec());
        let opened = self.workers.run(&key, move |open, handle| {
            let opened = gcm(open, handle, nonce, &bound_to, Direction::Open(&sealed));
            opened.map_err(|error| if works(open, handle, &error) { CHANGED } else { error })
        });
        let opened = opened.map_err(fail)?;
        let opened: &[u8; KEY_LEN] = opened.as_slice().try_into().map_err(|_| {
            fail((ProviderErrorKind::BadAnswer, format!("it made a key of {} bytes, not 32", opened.len())))
        })?;
        Secret::fill_with(|secret| {
            secret.copy_from_slice(opened);
            Ok(())
        })
    }

    fn describe(&self, key_id: &str) -> Result<KeyDescription, ProviderError> {
        let key = parse(key_id)?;
        let wanted = [
            AttributeType::ValueLen,
            AttributeType::Encrypt,
            AttributeType::Decrypt,
            AttributeType::Extractable,
            AttributeType::Local,
        ];
        let attributes = self.workers.run(&key, move |open, handle| open.session.get_attributes(handle, &wanted));
        let attributes = attributes.map_err(|refusal| error("describing", &key.canonical(), refusal))?;
        Ok(description(key.canonical(), &attributes))
    }
}

/// What a module says of what was changed, if it says so plainly.
const CHANGED: Error = Error::Pkcs11(RvError::EncryptedDataInvalid, cryptoki::context::Function::Decrypt);

enum Direction<'a> {
    Seal(&'a [u8]),
    Open(&'a [u8]),
}

fn gcm(
    open: &Open,
    key: ObjectHandle,
    mut nonce: [u8; NONCE_LEN],
    bound_to: &[u8],
    direction: Direction<'_>,
) -> Result<Zeroizing<Vec<u8>>, Error> {
    let given = nonce;
    let params = GcmParams::new(&mut nonce, bound_to, TAG_BITS.into())?;
    let mechanism = Mechanism::AesGcm(params);
    let made = match direction {
        Direction::Seal(plain) => open.session.encrypt(&mechanism, key, plain)?,
        Direction::Open(sealed) => open.session.decrypt(&mechanism, key, sealed)?,
    };
    drop(mechanism);
    // A module that makes its own nonces writes them here; with another one nothing would open again.
    if nonce == given { Ok(Zeroizing::new(made)) } else { Err(Error::NotSupported) }
}

/// Whether a failure that may mean anything is one of what was decrypted: the module still opens what it seals.
fn works(open: &Open, key: ObjectHandle, error: &Error) -> bool {
    if !matches!(error, Error::Pkcs11(RvError::GeneralError | RvError::FunctionFailed | RvError::DeviceError, _)) {
        return false;
    }
    let (nonce, plain) = (random_array(), [0; KEY_LEN]);
    let sealed = gcm(open, key, nonce, b"", Direction::Seal(&plain));
    sealed
        .is_ok_and(|sealed| gcm(open, key, nonce, b"", Direction::Open(&sealed)).is_ok_and(|opened| **opened == plain))
}

/// The path of a URI with its attributes in order.
pub(super) fn canonical(path: &str) -> Result<String, ProviderError> {
    Ok(parse(path)?.canonical())
}

fn parse(path: &str) -> Result<KeyName, ProviderError> {
    KeyName::parse(path).map_err(|why| not_a_key(path, &why))
}

fn not_a_key(uri: &str, why: &str) -> ProviderError {
    let path = uri.split('?').next().unwrap_or_default();
    let message = format!("pkcs11:{path} is not a key: {why} (as in pkcs11:token=LABEL;object=LABEL)");
    ProviderError::new(ProviderErrorKind::Misconfigured, message)
}

/// `1 | u16 length of the name | name | context`.
fn associated_data(key_id: &str, context: &EncryptionContext) -> Vec<u8> {
    let length = u16::try_from(key_id.len()).unwrap_or(u16::MAX).to_le_bytes();
    [&[WRAPPED_VERSION], length.as_slice(), key_id.as_bytes(), &context.associated_data()].concat()
}

fn description(key_id: String, attributes: &[Attribute]) -> KeyDescription {
    let has = |wanted: &Attribute| attributes.contains(wanted);
    let state = match (has(&Attribute::Encrypt(false)), has(&Attribute::Decrypt(false))) {
        (_, true) => KeyState::Disabled,
        (true, false) => KeyState::Unknown("it only unwraps".to_owned()),
        (false, false) => KeyState::Enabled,
    };
    let bits = attributes.iter().find_map(|attribute| match attribute {
        Attribute::ValueLen(len) => Some(usize::from(*len) * 8),
        _ => None,
    });
    let mut usage = bits.map_or("AES".to_owned(), |bits| format!("AES-{bits}"));
    if has(&Attribute::Extractable(true)) {
        usage.push_str(", extractable");
    }
    KeyDescription {
        key_id,
        state,
        rotation: Some("none".to_owned()),
        origin: Some(if has(&Attribute::Local(true)) { "the module" } else { "imported" }.to_owned()),
        multi_region: false,
        usage,
    }
}

/// An error that says what failed, why, and what to do.
fn error(what: &str, key_id: &str, (kind, why): Refusal) -> ProviderError {
    let advice = match kind {
        ProviderErrorKind::Denied | ProviderErrorKind::KeyUnusable => "allow encryption and decryption with the key",
        ProviderErrorKind::KeyNotFound => "check the token and the key (`pkcs11-tool --list-objects --login`)",
        ProviderErrorKind::Credentials => "check the PIN, and that the token is not locked",
        ProviderErrorKind::Unavailable | ProviderErrorKind::Throttled | ProviderErrorKind::Storage => {
            "check the module and its device, and try again"
        }
        ProviderErrorKind::Tampered => {
            "the wrapped key or its context was changed, or it belongs to another volume or key"
        }
        ProviderErrorKind::BadAnswer => "check that the module is the one that it should be",
        ProviderErrorKind::Misconfigured => {
            "check the module's path; it must offer CKM_AES_GCM with nonces of the caller"
        }
    };
    ProviderError::new(kind, format!("PKCS #11: {what} with pkcs11:{key_id}: {why}: {advice}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_names_no_module() {
        let settings = Pkcs11Settings::default();
        let error = Pkcs11Provider::open("token=a;object=b?module-path=/evil.so", &settings).err().unwrap();
        assert_eq!(error.kind, ProviderErrorKind::Misconfigured);
        assert!(Pkcs11Provider::open_uri("token=a;object=b?module-path=/x.so", &settings).is_ok());
    }

    #[test]
    fn without_a_module_the_error_says_how_to_name_one() {
        let provider = Pkcs11Provider::open("token=a;object=b", &Pkcs11Settings::default()).unwrap();
        let error = provider.generate_data_key(&EncryptionContext::volume_key(&[1; 16])).err().unwrap();
        assert_eq!(error.kind, ProviderErrorKind::Misconfigured);
        assert!(error.message.contains("--pkcs11-module"), "{error}");
        let missing = Pkcs11Settings { module: Some("/nonexistent.so".into()), ..Pkcs11Settings::default() };
        let provider = Pkcs11Provider::open("token=a;object=b", &missing).unwrap();
        let error = provider.unwrap("token=a;object=b", &[1; WRAPPED_LEN], &EncryptionContext::volume_key(&[1; 16]));
        assert!(error.err().unwrap().message.contains("cannot be loaded"));
        let short = provider.unwrap("token=a;object=b", &[1; 5], &EncryptionContext::volume_key(&[1; 16]));
        assert_eq!(short.err().unwrap().kind, ProviderErrorKind::Tampered);
    }
}
