//! Recipients of age: whoever knows the public half of a key wraps, and only who has its identity unwraps. For recovery.
//!
//! A wrapped key is a file of age, which `age --decrypt` opens too. What is in it is 64 bytes: SHA-256 of the encryption context
//! as associated data, and the data key. Age itself binds a file to nothing.
//!
//! Invariants: without an identity nothing is unwrapped and nothing asked for; a key is believed only with the context that
//! was wrapped with it. That it unwraps says nothing of who wrapped it: anybody can, who knows the recipient.

use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::super::{
    EncryptionContext, KeyDescription, KeyState, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey,
};
use super::AgeSettings;
use super::age_file::{self, AgeError};
use super::age_keys::{Identity, Recipient};
use super::secret_file::{Readers, read};
use crate::crypto::{DataKey, Secret, wiped};

/// The longest file of identities, in bytes.
const MAX_IDENTITIES_LEN: usize = 65_536;
/// What is inside: the hash of the context, and the key.
const HASH_LEN: usize = 32;
const CONTENT_LEN: usize = HASH_LEN + 32;

/// A recipient of age, and the identities that the settings name.
pub(super) struct AgeProvider {
    recipient: Recipient,
    identities: Vec<Identity>,
}

impl AgeProvider {
    /// The provider of the recipient `key`, `age1...`.
    ///
    /// # Errors
    /// `Misconfigured` if it is none, or if a file of identities is named that is none or that others can read; `Credentials`
    /// if that cannot be read.
    pub(super) fn open(key: &str, settings: &AgeSettings) -> Result<Self, ProviderError> {
        let recipient = parse_recipient(key)?;
        let identities = settings.identity_file.as_deref().map(read_identities).transpose()?.unwrap_or_default();
        Ok(Self { recipient, identities })
    }

    /// The identity of `recipient`.
    fn identity(&self, recipient: &Recipient) -> Result<&Identity, ProviderError> {
        let found = self.identities.iter().find(|identity| identity.recipient() == *recipient);
        found.ok_or_else(|| {
            let why = match self.identities.len() {
                0 => "no identity is given: name its file with --age-identity or KMSFS_AGE_IDENTITY",
                _ => "the identities that are given are of other recipients",
            };
            ProviderError::new(ProviderErrorKind::Credentials, format!("age recipient {}: {why}", recipient.text()))
        })
    }
}

impl Provider for AgeProvider {
    fn kind(&self) -> ProviderKind {
        ProviderKind::Age
    }

    fn is_remote(&self) -> bool {
        false
    }

    fn can_unwrap(&self) -> bool {
        self.identities.iter().any(|identity| identity.recipient() == self.recipient)
    }

    fn generate_data_key(&self, context: &EncryptionContext) -> Result<(DataKey, WrappedKey), ProviderError> {
        let data_key = DataKey::random();
        let wrapped = self.wrap(self.recipient.text(), &data_key, context)?;
        Ok((data_key, wrapped))
    }

    fn wrap(&self, key_id: &str, data_key: &DataKey, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        let recipient = parse_recipient(key_id)?;
        let content = Secret::<CONTENT_LEN>::fill_with(|content| {
            content[..HASH_LEN].copy_from_slice(&hash(context));
            content[HASH_LEN..].copy_from_slice(data_key.expose());
            Ok(())
        })?;
        let sealed = wiped(|| age_file::seal(&recipient, content.expose()));
        let bytes = sealed.map_err(|error| failed(&recipient, error))?;
        Ok(WrappedKey { key_id: recipient.text().to_owned(), bytes })
    }

    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        let recipient = parse_recipient(key_id)?;
        let identity = self.identity(&recipient)?;
        let content = wiped(|| Secret::<CONTENT_LEN>::fill_with(|content| age_file::open(identity, wrapped, content)));
        let content = content.map_err(|error| failed(&recipient, error))?;
        let content = content.expose();
        if content[..HASH_LEN] != hash(context) {
            let why = "the wrapped key is of another context: it was changed, or it belongs to another volume";
            return Err(error(&recipient, ProviderErrorKind::Tampered, why));
        }
        Secret::fill_with(|secret| {
            secret.copy_from_slice(&content[HASH_LEN..]);
            Ok(())
        })
    }

    fn describe(&self, key_id: &str) -> Result<KeyDescription, ProviderError> {
        let recipient = parse_recipient(key_id)?;
        let here = self.identities.iter().any(|identity| identity.recipient() == recipient);
        Ok(KeyDescription {
            key_id: recipient.text().to_owned(),
            state: if here {
                KeyState::Enabled
            } else {
                KeyState::Unknown("its identity is not here, so it only wraps".to_owned())
            },
            rotation: Some("none".to_owned()),
            origin: Some("age".to_owned()),
            multi_region: false,
            usage: "X25519".to_owned(),
        })
    }
}

fn hash(context: &EncryptionContext) -> [u8; HASH_LEN] {
    Sha256::digest(context.associated_data()).into()
}

fn parse_recipient(text: &str) -> Result<Recipient, ProviderError> {
    text.parse().map_err(|why: &str| {
        ProviderError::new(ProviderErrorKind::Misconfigured, format!("{text:?} is not a recipient of age: {why}"))
    })
}

/// The identities in a file as `age-keygen` writes it: one a line, and comments.
fn read_identities(path: &Path) -> Result<Vec<Identity>, ProviderError> {
    let bytes = read(path, "the age identity", MAX_IDENTITIES_LEN, Readers::OwnerOnly)?;
    let fail = |why: &str| {
        let message = format!("the age identity: {}: {why}", path.display());
        Err(ProviderError::new(ProviderErrorKind::Misconfigured, message))
    };
    if bytes.starts_with(age_file::INTRO) || bytes.starts_with(b"-----BEGIN AGE ENCRYPTED FILE-----") {
        return fail("it is encrypted: decrypt it first (age --decrypt), into memory that is not written to disk");
    }
    let Ok(text) = std::str::from_utf8(&bytes) else { return fail("it is not text") };
    let lines = text.lines().map(str::trim).enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let mut identities = Vec::new();
    for (number, line) in lines {
        match Identity::parse(line) {
            Ok(identity) => identities.push(identity),
            // Its text is a secret, or was meant to be one.
            Err(why) => return fail(&format!("line {}: {why}", number + 1)),
        }
    }
    if identities.is_empty() { fail("there is no identity in it") } else { Ok(identities) }
}

fn failed(recipient: &Recipient, age: AgeError) -> ProviderError {
    let kind = match age {
        AgeError::Malformed(_) | AgeError::NotForIdentity | AgeError::Unauthentic => ProviderErrorKind::Tampered,
        AgeError::Cipher => ProviderErrorKind::BadAnswer,
    };
    error(recipient, kind, &age.to_string())
}

fn error(recipient: &Recipient, kind: ProviderErrorKind, why: &str) -> ProviderError {
    ProviderError::new(kind, format!("age recipient {}: {why}", recipient.text()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn context() -> EncryptionContext {
        EncryptionContext::volume_key(&[1; 16])
    }

    /// A provider with its identity, and one that has only the recipient.
    fn two() -> (AgeProvider, AgeProvider) {
        let identity = Identity::generate().unwrap();
        let recipient = identity.recipient();
        let public = AgeProvider { recipient: recipient.clone(), identities: Vec::new() };
        (AgeProvider { recipient, identities: vec![identity] }, public)
    }

    #[test]
    fn whoever_knows_the_recipient_wraps_and_only_the_identity_unwraps() {
        let (whole, public) = two();
        let (data_key, wrapped) = public.generate_data_key(&context()).unwrap();
        assert_eq!(whole.unwrap(&wrapped.key_id, &wrapped.bytes, &context()).unwrap().expose(), data_key.expose());
        let kind = |provider: &AgeProvider, context: &EncryptionContext| {
            provider.unwrap(&wrapped.key_id, &wrapped.bytes, context).err().unwrap().kind
        };
        assert_eq!(kind(&public, &context()), ProviderErrorKind::Credentials);
        assert_eq!(kind(&whole, &EncryptionContext::volume_key(&[2; 16])), ProviderErrorKind::Tampered);
        assert_eq!(kind(&two().0, &context()), ProviderErrorKind::Credentials);
        assert!(whole.can_unwrap() && !public.can_unwrap());
        assert!(public.describe(&wrapped.key_id).unwrap().to_string().contains("only wraps"));
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let (whole, public) = two();
        let (_, wrapped) = public.generate_data_key(&context()).unwrap();
        for at in 0..wrapped.bytes.len() {
            let mut changed = wrapped.bytes.clone();
            changed[at] ^= 1;
            let answer = whole.unwrap(&wrapped.key_id, &changed, &context());
            assert_eq!(answer.err().unwrap().kind, ProviderErrorKind::Tampered, "{at}");
        }
        for len in 0..wrapped.bytes.len() {
            assert!(whole.unwrap(&wrapped.key_id, &wrapped.bytes[..len], &context()).is_err(), "{len}");
        }
    }

    #[test]
    fn identities_are_read_as_age_keygen_writes_them_and_never_shown() {
        const SECRET: &str = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX";
        const RECIPIENT: &str = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj";
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.txt");
        let settings = AgeSettings { identity_file: Some(path.clone()) };
        let open = |content: &str| {
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            AgeProvider::open(RECIPIENT, &settings)
        };
        assert!(open(&format!("# created: x\n# public key: {RECIPIENT}\n{SECRET}\n")).unwrap().can_unwrap());
        for bad in
            ["", "# nothing\n", "AGE-SECRET-KEY-1GFPYYSJZ", "ssh-ed25519 AAAA", "age-encryption.org/v1\n", RECIPIENT]
        {
            let error = open(bad).err().unwrap();
            assert_eq!(error.kind, ProviderErrorKind::Misconfigured, "{bad}");
            assert!(!error.message.contains("GFPYYSJZ"), "{error}");
        }
        open(SECRET).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(AgeProvider::open(RECIPIENT, &settings).err().unwrap().message.contains("chmod"));
    }
}
