//! How encrypted extended attributes are spelled. `docs/FORMAT.md` section 7.6.

use super::name::{decode, encode};

/// What the names of encrypted attributes begin with.
const PREFIX: &str = "user.kmsfs.";
/// The longest attribute name that Linux takes, in bytes.
const NAME_MAX: usize = 255;

/// How an attribute is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredXattr {
    /// Its name on the backing file.
    pub name: String,
    /// What stands in front of the sealed value: nothing, or the encrypted name that the stored name is a digest of.
    pub lead: Vec<u8>,
}

impl StoredXattr {
    /// The spelling of the encrypted name `sealed`. `digest` is the SHA-256 of the text it is given.
    #[must_use]
    pub fn new(sealed: &[u8], digest: impl FnOnce(&[u8]) -> [u8; 32]) -> Self {
        let name = format!("{PREFIX}{}", encode(sealed));
        if name.len() <= NAME_MAX {
            return Self { name, lead: Vec::new() };
        }
        let len = u16::try_from(sealed.len()).unwrap_or(u16::MAX);
        let lead = [&len.to_le_bytes(), sealed].concat();
        Self { name: format!("{PREFIX}~{}", encode(&digest(sealed))), lead }
    }

    /// The sealed value in `stored`, if it is one of this attribute.
    #[must_use]
    pub fn value<'s>(&self, stored: &'s [u8]) -> Option<&'s [u8]> {
        stored.strip_prefix(self.lead.as_slice())
    }
}

/// What the name of a stored attribute tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredName {
    /// The encrypted name.
    Sealed(Vec<u8>),
    /// It is in front of the value: see [`sealed_name_in`].
    InValue,
}

/// Sorts the name of an attribute of a backing file; `None` if it is not an encrypted one.
#[must_use]
pub fn classify(name: &[u8]) -> Option<StoredName> {
    match name.strip_prefix(PREFIX.as_bytes())? {
        [b'~', ..] => Some(StoredName::InValue),
        text => decode(text).map(StoredName::Sealed),
    }
}

/// The encrypted name in front of the value of an attribute whose name is a digest.
#[must_use]
pub fn sealed_name_in(stored: &[u8]) -> Option<&[u8]> {
    let (len, rest) = stored.split_first_chunk::<2>()?;
    rest.get(..u16::from_le_bytes(*len).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_spelled_out_and_long_ones_go_with_the_value() {
        let digest = |_: &[u8]| [0; 32];
        let short = StoredXattr::new(&[0; 183], digest);
        assert_eq!((short.name.len(), short.lead.len()), (NAME_MAX, 0));
        assert_eq!(classify(short.name.as_bytes()), Some(StoredName::Sealed(vec![0; 183])));
        let long = StoredXattr::new(&[7; 184], digest);
        assert_eq!(classify(long.name.as_bytes()), Some(StoredName::InValue));
        let stored = [&long.lead[..], b"value"].concat();
        assert_eq!(sealed_name_in(&stored), Some(&[7; 184][..]));
        assert_eq!(long.value(&stored), Some(&b"value"[..]));
        assert_eq!(long.value(b"other"), None);
    }

    #[test]
    fn other_names_are_not_ours() {
        for name in [&b"user.colour"[..], b"security.capability", b"user.kmsfs", b"user.kmsfs.AR"] {
            assert_eq!(classify(name), None, "{name:?}");
        }
        for stored in [&b""[..], b"\x01", b"\x05\x00abcd"] {
            assert_eq!(sealed_name_in(stored), None, "{stored:?}");
        }
    }
}
