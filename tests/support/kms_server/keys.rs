//! The keys, and what is done with them. Wrapped keys are as long as those of KMS: 167 bytes for a data key that it
//! made, 184 for one that it was given.

use std::collections::BTreeMap;
use std::sync::Arc;

use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce};
use serde_json::{Value, json};

use super::failure::{Failure, failure};
use super::{ACCOUNT, hex, random};

pub(super) const HANDLE_LEN: usize = 32;
const NONCE_LEN: usize = 12;
const TAG_LEN: usize = 16;
/// Before the handle: of what KMS made itself, and of what it was given.
pub(super) const GENERATED: [u8; 5] = [1, 1, 1, 0, 0x78];
pub(super) const GIVEN: [u8; 5] = [1, 2, 1, 0, 0x78];
/// Between handle and nonce, in the place of the real one's ASN.1; zeros, and authenticated.
pub(super) const GENERATED_FILL: usize = 70;
pub(super) const GIVEN_FILL: usize = 87;

/// Keys and aliases by Region.
#[derive(Default)]
pub(super) struct Vault {
    pub(super) keys: BTreeMap<(String, String), Key>,
    pub(super) aliases: BTreeMap<(String, String), String>,
}

pub(super) struct Key {
    pub(super) arn: String,
    pub(super) id: String,
    pub(super) state: State,
    pub(super) is_rotated: bool,
    pub(super) created: u64,
    pub(super) material: Arc<Material>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Enabled,
    Disabled,
    PendingDeletion { at: u64 },
}

/// What replicas share.
pub(super) struct Material {
    /// Names the key in what it wrapped.
    pub(super) handle: [u8; HANDLE_LEN],
    pub(super) key: LessSafeKey,
}

impl Key {
    pub(super) fn region(&self) -> &str {
        self.arn.split(':').nth(3).unwrap_or_default()
    }

    pub(super) fn check_usable(&self) -> Result<(), Failure> {
        match self.state {
            State::Enabled => Ok(()),
            State::Disabled => Err(failure("DisabledException", format!("{} is disabled.", self.arn))),
            State::PendingDeletion { .. } => self.check_not_pending(),
        }
    }

    pub(super) fn check_not_pending(&self) -> Result<(), Failure> {
        match self.state {
            State::PendingDeletion { .. } => {
                Err(failure("KMSInvalidStateException", format!("{} is pending deletion.", self.arn)))
            }
            State::Enabled | State::Disabled => Ok(()),
        }
    }

    pub(super) fn metadata(&self) -> Value {
        let mut metadata = json!({
            "AWSAccountId": ACCOUNT,
            "KeyId": self.id,
            "Arn": self.arn,
            "CreationDate": self.created,
            "Enabled": self.state == State::Enabled,
            "Description": "",
            "KeyUsage": "ENCRYPT_DECRYPT",
            "KeyState": self.state.name(),
            "Origin": "AWS_KMS",
            "KeyManager": "CUSTOMER",
            "KeySpec": "SYMMETRIC_DEFAULT",
            "EncryptionAlgorithms": ["SYMMETRIC_DEFAULT"],
            "MultiRegion": self.id.starts_with("mrk-"),
        });
        if let State::PendingDeletion { at } = self.state {
            metadata["DeletionDate"] = at.into();
        }
        metadata
    }
}

impl State {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Enabled => "Enabled",
            Self::Disabled => "Disabled",
            Self::PendingDeletion { .. } => "PendingDeletion",
        }
    }
}

impl Material {
    /// `prefix | handle | fill | nonce | ciphertext and tag`; everything before the nonce is associated data, before
    /// the context.
    pub(super) fn wrap(&self, prefix: [u8; 5], fill: usize, plaintext: &[u8], context: &[u8]) -> Vec<u8> {
        let mut wrapped = [&prefix[..], &self.handle, &vec![0; fill]].concat();
        let aad = [&wrapped, context].concat();
        let nonce = random::<NONCE_LEN>();
        let mut sealed = plaintext.to_vec();
        let nonce_of_key = Nonce::assume_unique_for_key(nonce);
        self.key.seal_in_place_append_tag(nonce_of_key, Aad::from(aad), &mut sealed).expect("a short plaintext");
        wrapped.extend_from_slice(&nonce);
        wrapped.append(&mut sealed);
        wrapped
    }

    pub(super) fn unwrap(&self, wrapped: Vec<u8>, context: &[u8]) -> Option<Vec<u8>> {
        let (header, rest) = wrapped.split_at(header_len(&wrapped)?);
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        let aad = Aad::from([header, context].concat());
        let mut sealed = sealed.to_vec();
        let opened = self.key.open_in_place(Nonce::assume_unique_for_key(*nonce), aad, &mut sealed);
        opened.ok().map(|plaintext| plaintext.to_vec())
    }
}

/// Where the nonce begins.
fn header_len(wrapped: &[u8]) -> Option<usize> {
    let fill = match *wrapped.first_chunk()? {
        GENERATED => GENERATED_FILL,
        GIVEN => GIVEN_FILL,
        _ => return None,
    };
    let length = GENERATED.len() + HANDLE_LEN + fill;
    (wrapped.len() > length + NONCE_LEN + TAG_LEN).then_some(length)
}

pub(super) fn handle(wrapped: &[u8]) -> Option<[u8; HANDLE_LEN]> {
    header_len(wrapped)?;
    wrapped.get(GENERATED.len()..)?.first_chunk().copied()
}

/// A random UUID.
pub(super) fn uuid() -> String {
    let digits = hex(&random::<16>());
    format!("{}-{}-4{}-8{}-{}", &digits[..8], &digits[8..12], &digits[13..16], &digits[17..20], &digits[20..])
}
