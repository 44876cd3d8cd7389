//! The one joint for wrapping keys: a provider wraps and unwraps, and nothing above it knows which it is.

use std::fmt;

use crate::crypto::DataKey;

use super::{EncryptionContext, KeyDescription, KeyState};

/// The kinds of provider, by their tag in file headers and their name everywhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProviderKind {
    /// A keyring file.
    Local,
    /// AWS Key Management Service.
    AwsKms,
    /// The transit engine of OpenBao or HashiCorp Vault.
    Vault,
    /// A security module that speaks PKCS #11.
    Pkcs11,
    /// A recipient of the file encryption tool age.
    Age,
}

impl ProviderKind {
    const ALL: [Self; 5] = [Self::Local, Self::AwsKms, Self::Vault, Self::Pkcs11, Self::Age];

    /// The tag in a header record.
    #[must_use]
    pub fn tag(self) -> u8 {
        match self {
            Self::Local => 1,
            Self::AwsKms => 2,
            Self::Vault => 3,
            Self::Pkcs11 => 4,
            Self::Age => 5,
        }
    }

    /// The kind with this tag.
    #[must_use]
    pub fn from_tag(tag: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.tag() == tag)
    }

    /// The name in arguments and configs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::AwsKms => "aws-kms",
            Self::Vault => "vault",
            Self::Pkcs11 => "pkcs11",
            Self::Age => "age",
        }
    }

    /// Whether its calls leave this process for a network or a device, as [`Provider::is_remote`].
    #[must_use]
    pub fn is_remote(self) -> bool {
        match self {
            Self::Local | Self::Age => false,
            Self::AwsKms | Self::Vault | Self::Pkcs11 => true,
        }
    }

    /// The order in which keys are tried on a volume: who is near first, and last a kind whose keys anybody can wrap for.
    #[must_use]
    pub fn rank_to_unlock(self) -> u8 {
        match self {
            Self::Local => 0,
            Self::AwsKms | Self::Vault | Self::Pkcs11 => 1,
            Self::Age => 2,
        }
    }

    /// The kind with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for ProviderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A data key under a wrapping key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedKey {
    /// The wrapping key's canonical id, as the provider names it (a KMS key's ARN, a keyring's key id, a transit key's path, an age
    /// recipient, the path of a PKCS #11 URI).
    pub key_id: String,
    /// The provider's ciphertext, at most 6144 bytes.
    pub bytes: Vec<u8>,
}

/// A new data key, and the same under a wrapping key.
pub type Generated = Result<(DataKey, WrappedKey), ProviderError>;

/// A source of data keys. Keys are named as in [`WrappedKey::key_id`]. Implementations set a deadline on every wait, check every answer (exactly 32 bytes, the key
/// that was asked for), and neither log nor keep what they unwrap.
pub trait Provider: Send + Sync {
    /// Which kind it is.
    fn kind(&self) -> ProviderKind;

    /// Whether calls wait for a network or a device, so that a thread that serves the kernel must not make them.
    fn is_remote(&self) -> bool;

    /// Whether it can unwrap at all. One that knows the public half of a key only wraps; it is not asked for more.
    fn can_unwrap(&self) -> bool {
        true
    }

    /// From now on the caller waits and tries again when calls are throttled: every attempt is to be one call of his.
    fn leave_pace_to_caller(&self) {}

    /// A new data key, bound to `context`, under the provider's own wrapping key.
    ///
    /// # Errors
    /// [`ProviderError`].
    fn generate_data_key(&self, context: &EncryptionContext) -> Generated;

    /// Whether [`Self::generate_data_keys`] makes many of them in the time of one.
    fn makes_many_at_once(&self) -> bool {
        false
    }

    /// A new data key for each context, as [`Self::generate_data_key`] makes it. `each` is told of every one as soon as it is
    /// there, with the place of its context, on this thread; it must not call a provider.
    fn generate_data_keys(&self, contexts: &[EncryptionContext], each: &mut dyn FnMut(usize, Generated)) {
        for (place, context) in contexts.iter().enumerate() {
            each(place, self.generate_data_key(context));
        }
    }

    /// The data key in `wrapped`, which was wrapped by `key_id` with the same `context`. The caller has checked that
    /// `key_id` is on the volume's list.
    ///
    /// # Errors
    /// [`ProviderError`].
    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError>;

    /// Closes connections, whose buffers hold the last answers. Calls under way end as they would; the next one connects
    /// again. A provider without connections leaves this as it is.
    fn hang_up(&self) {}

    /// A new data key that nobody has seen, bound to `context`, under the provider's own wrapping key.
    ///
    /// # Errors
    /// [`ProviderError`].
    fn generate_wrapped_key(&self, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        self.generate_data_key(context).map(|(_, wrapped)| wrapped)
    }

    /// `data_key` under the wrapping key `key_id`, bound to `context`: for a further record of a data key.
    ///
    /// # Errors
    /// [`ProviderError`].
    fn wrap(&self, key_id: &str, data_key: &DataKey, context: &EncryptionContext) -> Result<WrappedKey, ProviderError>;

    /// The data key in `wrapped`, which was wrapped by `from` with the same `context`, under the wrapping key `to`.
    ///
    /// # Errors
    /// [`ProviderError`].
    fn rewrap(
        &self,
        from: &str,
        wrapped: &[u8],
        to: &str,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, ProviderError> {
        self.wrap(to, &self.unwrap(from, wrapped, context)?, context)
    }

    /// What is known of the wrapping key `key_id`, for people. A provider whose keys have no state leaves this as it is.
    ///
    /// # Errors
    /// [`ProviderError`].
    fn describe(&self, key_id: &str) -> Result<KeyDescription, ProviderError> {
        Ok(KeyDescription {
            key_id: key_id.to_owned(),
            state: KeyState::Unknown("not told by its provider".to_owned()),
            rotation: None,
            origin: None,
            multi_region: false,
            usage: "wrapping".to_owned(),
        })
    }
}

/// What kind of failure it is; decides the errno and whether trying again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProviderErrorKind {
    /// The caller may not use the key.
    Denied,
    /// The key is disabled, pending deletion or otherwise out of use.
    KeyUnusable,
    /// There is no such key, or it is not the one that wrapped this.
    KeyNotFound,
    /// Credentials are missing or expired; for a keyring: the passphrase is missing or wrong.
    Credentials,
    /// Unreachable, timed out, out of order: trying again later may help.
    Unavailable,
    /// More calls than the account may make: trying again later, and less often, helps.
    Throttled,
    /// The wrapped key or its context was changed, or belongs to another volume.
    Tampered,
    /// The provider answered something that cannot be right.
    BadAnswer,
    /// The provider's settings cannot work.
    Misconfigured,
    /// A file of the provider cannot be read or written: its disk is full, read-only or out of order.
    Storage,
}

impl ProviderErrorKind {
    /// All of them, in order.
    pub const ALL: [Self; 10] = [
        Self::Denied,
        Self::KeyUnusable,
        Self::KeyNotFound,
        Self::Credentials,
        Self::Unavailable,
        Self::Throttled,
        Self::Tampered,
        Self::BadAnswer,
        Self::Misconfigured,
        Self::Storage,
    ];

    /// Whether nobody gets anything of the key any more.
    pub(super) fn is_end_of_key(self) -> bool {
        matches!(self, Self::KeyUnusable | Self::KeyNotFound)
    }

    /// Its name in metrics and audit logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::KeyUnusable => "key-unusable",
            Self::KeyNotFound => "key-not-found",
            Self::Credentials => "credentials",
            Self::Unavailable => "unavailable",
            Self::Throttled => "throttled",
            Self::Tampered => "tampered",
            Self::BadAnswer => "bad-answer",
            Self::Misconfigured => "misconfigured",
            Self::Storage => "storage",
        }
    }
}

/// A failed call of a provider. Its text says what is wrong and what to do, and never contains key material.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ProviderError {
    /// What kind of failure.
    pub kind: ProviderErrorKind,
    /// What is wrong, where, and what to do.
    pub message: String,
    /// What the provider called the request, if it got there.
    pub request_id: Option<String>,
}

impl ProviderError {
    /// An error of `kind`.
    pub fn new(kind: ProviderErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), request_id: None }
    }

    /// The same with what the provider called the request.
    #[must_use]
    pub fn of_request(self, id: Option<&str>) -> Self {
        Self { request_id: id.map(str::to_owned), ..self }
    }
}
