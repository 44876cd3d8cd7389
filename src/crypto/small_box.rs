//! Short texts sealed under random nonces: link targets and values of extended attributes.

use super::{DataKey, NONCE_LEN, Suite, SuiteKey, TAG_LEN, Unauthentic, random_array};

/// Seals texts of a few bytes to a few kilobytes, each under a random nonce that goes with it.
pub(super) struct SmallBoxKey(SuiteKey);

impl SmallBoxKey {
    /// Bytes that sealing adds.
    pub(super) const OVERHEAD: usize = NONCE_LEN + TAG_LEN;

    pub(super) fn new(suite: Suite, key: &DataKey) -> Self {
        Self(SuiteKey::new(suite, key))
    }

    /// `nonce | ciphertext | tag` of `plain`, bound to `aad`.
    pub(super) fn seal(&self, aad: &[u8], plain: &[u8]) -> Vec<u8> {
        let nonce: [u8; NONCE_LEN] = random_array();
        let mut sealed = vec![0; plain.len() + Self::OVERHEAD];
        let end = NONCE_LEN + plain.len();
        sealed[..NONCE_LEN].copy_from_slice(&nonce);
        let tag = self.0.session().seal(&nonce, aad, plain, &mut sealed[NONCE_LEN..end]);
        sealed[end..].copy_from_slice(&tag);
        sealed
    }

    /// The text behind `sealed`.
    pub(super) fn open(&self, aad: &[u8], sealed: &[u8]) -> Result<Vec<u8>, Unauthentic> {
        let (nonce, rest) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(Unauthentic)?;
        let (cipher, tag) = rest.split_last_chunk::<TAG_LEN>().ok_or(Unauthentic)?;
        let mut plain = vec![0; cipher.len()];
        self.0.session().open(nonce, aad, cipher, tag, &mut plain)?;
        Ok(plain)
    }
}
