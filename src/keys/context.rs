//! The encryption context: what a wrapped key is bound to, and what an audit trail shows. Opaque ids only, never a path.

use std::collections::BTreeMap;

use crate::format::hex;

/// Names a data key in a context.
const DATA_KEY: &str = "kmsfs:data-key";

/// Name-value pairs that a provider binds to a wrapped key: unwrapping needs exactly the same ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncryptionContext(BTreeMap<&'static str, String>);

impl EncryptionContext {
    /// The context of a volume key.
    #[must_use]
    pub fn volume_key(volume_id: &[u8; 16]) -> Self {
        Self(BTreeMap::from([("kmsfs:volume", hex::encode_uuid(volume_id)), ("kmsfs:purpose", "volume".to_owned())]))
    }

    /// The context of a data key.
    #[must_use]
    pub fn data_key(volume_id: &[u8; 16], data_key_id: &[u8; 16]) -> Self {
        Self(BTreeMap::from([("kmsfs:volume", hex::encode_uuid(volume_id)), (DATA_KEY, hex::encode_uuid(data_key_id))]))
    }

    /// The id of the data key, as people read it; a volume key has none.
    #[must_use]
    pub fn data_key_id(&self) -> Option<&str> {
        self.0.get(DATA_KEY).map(String::as_str)
    }

    /// The pairs in the order of their names.
    pub fn pairs(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, value)| (*name, value.as_str()))
    }

    /// The context as associated data: `name u16-length-prefixed | value u16-length-prefixed` for each pair in order,
    /// little-endian.
    #[must_use]
    pub fn associated_data(&self) -> Vec<u8> {
        let mut data = Vec::new();
        for field in self.0.iter().flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]) {
            data.extend_from_slice(&u16::try_from(field.len()).unwrap_or(u16::MAX).to_le_bytes());
            data.extend_from_slice(field);
        }
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn associated_data_is_unambiguous() {
        let a = EncryptionContext(BTreeMap::from([("ab", "c".to_owned())]));
        let b = EncryptionContext(BTreeMap::from([("a", "bc".to_owned())]));
        assert_eq!(a.associated_data(), b"\x02\0ab\x01\0c");
        assert_ne!(a.associated_data(), b.associated_data());
    }

    #[test]
    fn shows_ids_only() {
        let context = EncryptionContext::data_key(&[1; 16], &[2; 16]);
        let pairs: Vec<_> = context.pairs().collect();
        assert_eq!(
            pairs,
            [
                ("kmsfs:data-key", "02020202-0202-0202-0202-020202020202"),
                ("kmsfs:volume", "01010101-0101-0101-0101-010101010101")
            ]
        );
    }
}
