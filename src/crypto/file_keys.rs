//! The keys of one file.

use hmac::digest::CtOutput;
use hmac::digest::array::Array;

use super::volume_keys::VerifiedHeader;
use super::{AeadSession, DataKey, Suite, SuiteKey, kdf};

/// The unwrapped data key is not the one the header was made with: another key, or a provider that lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the unwrapped data key does not match the header's commitment")]
pub struct CommitmentMismatch;

/// What opens and seals the pages of one file. Made only from an authenticated header and a data key that matches its
/// commitment, or for a file that is new.
pub struct FileKeys {
    content: SuiteKey,
}

impl FileKeys {
    /// The keys of the file whose header is `header`.
    ///
    /// # Errors
    /// [`CommitmentMismatch`] if `data_key` is not the key the header commits to.
    pub fn open(header: &VerifiedHeader, data_key: &DataKey) -> Result<Self, CommitmentMismatch> {
        let expected = CtOutput::<hmac::Hmac<sha2::Sha256>>::new(Array(commitment(data_key, header.file_id())));
        let stored = CtOutput::new(Array(*header.commitment()));
        if expected != stored {
            return Err(CommitmentMismatch);
        }
        Ok(Self::create(data_key, header.suite(), header.file_id()))
    }

    /// The keys of a new file with a fresh random `file_id`.
    #[must_use]
    pub fn create(data_key: &DataKey, suite: Suite, file_id: &[u8; 32]) -> Self {
        let key = kdf::derive(data_key, file_id, &[kdf::CONTENT, &[suite.id()]]);
        Self { content: SuiteKey::new(suite, &key) }
    }

    /// A run of pages to seal or open.
    #[must_use]
    pub fn session(&self) -> AeadSession<'_> {
        self.content.session()
    }
}

/// The commitment to `data_key` that a header of `file_id` stores; public.
#[must_use]
pub fn commitment(data_key: &DataKey, file_id: &[u8; 32]) -> [u8; 32] {
    *kdf::derive::<32>(data_key, file_id, &[kdf::COMMIT]).expose()
}
