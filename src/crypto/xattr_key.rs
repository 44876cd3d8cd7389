//! Extended attributes: names by AES-SIV, values sealed, both bound to the file or directory that has them.

use super::small_box::SmallBoxKey;
use super::volume_keys::{siv_open, siv_seal};
use super::{DataKey, Secret, Suite, Unauthentic, kdf};

/// Encrypts the names and seals the values of extended attributes.
///
/// `owner` is the id of the file (32 bytes) or directory (16 bytes) that has the attribute.
pub struct XattrKey {
    name: Secret<64>,
    value: SmallBoxKey,
}

impl XattrKey {
    /// Bytes that sealing adds to a value.
    pub const OVERHEAD: usize = SmallBoxKey::OVERHEAD;

    pub(super) fn derive(volume_key: &DataKey, volume_id: &[u8; 16], suite: Suite) -> Self {
        Self {
            name: kdf::derive(volume_key, volume_id, &[kdf::XATTR_NAME]),
            value: SmallBoxKey::new(suite, &kdf::derive(volume_key, volume_id, &[kdf::XATTR])),
        }
    }

    /// The ciphertext of `name`: deterministic for one owner, 16 bytes longer than the name.
    #[must_use]
    pub fn seal_name(&self, owner: &[u8], name: &[u8]) -> Vec<u8> {
        siv_seal(&self.name, owner, name)
    }

    /// The name behind `sealed`.
    ///
    /// # Errors
    /// [`Unauthentic`] if it was not made for this owner.
    pub fn open_name(&self, owner: &[u8], sealed: &[u8]) -> Result<Vec<u8>, Unauthentic> {
        siv_open(&self.name, owner, sealed)
    }

    /// `nonce | ciphertext | tag` of a value.
    #[must_use]
    pub fn seal_value(&self, owner: &[u8], sealed_name: &[u8], value: &[u8]) -> Vec<u8> {
        self.value.seal(&[owner, sealed_name].concat(), value)
    }

    /// The value behind `sealed`.
    ///
    /// # Errors
    /// [`Unauthentic`] if it was not made for this attribute of this owner.
    pub fn open_value(&self, owner: &[u8], sealed_name: &[u8], sealed: &[u8]) -> Result<Vec<u8>, Unauthentic> {
        self.value.open(&[owner, sealed_name].concat(), sealed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_are_bound_to_their_owner_and_each_other() {
        let key = XattrKey::derive(&Secret::random(), &[1; 16], Suite::Xaes256Gcm);
        let (a, b) = ([1; 32], [2; 32]);
        let name = key.seal_name(&a, b"colour");
        assert_eq!(name, key.seal_name(&a, b"colour"));
        assert_ne!(name, key.seal_name(&b, b"colour"));
        assert_eq!(key.open_name(&a, &name).unwrap(), b"colour");
        assert_eq!(key.open_name(&b, &name), Err(Unauthentic));
        let value = key.seal_value(&a, &name, b"red");
        assert_eq!(value.len(), 3 + XattrKey::OVERHEAD);
        assert_eq!(key.open_value(&a, &name, &value).unwrap(), b"red");
        assert_eq!(key.open_value(&b, &name, &value), Err(Unauthentic));
        assert_eq!(key.open_value(&a, &key.seal_name(&a, b"size"), &value), Err(Unauthentic));
        assert_eq!(key.open_value(&a, &name, &value[..39]), Err(Unauthentic));
    }
}
