//! HKDF-SHA256 (RFC 5869) with the labels of format version 1. One label, one use.

use hkdf::Hkdf;
use sha2::Sha256;

use super::{Secret, stack};

pub(super) const CONTENT: &[u8] = b"kmsfs v1 content";
pub(super) const COMMIT: &[u8] = b"kmsfs v1 commit";
pub(super) const HEADER: &[u8] = b"kmsfs v1 header";
pub(super) const NAME: &[u8] = b"kmsfs v1 name";
pub(super) const DIRECTORY: &[u8] = b"kmsfs v1 directory";
pub(super) const LINK: &[u8] = b"kmsfs v1 link";
pub(super) const XATTR: &[u8] = b"kmsfs v1 xattr";
pub(super) const XATTR_NAME: &[u8] = b"kmsfs v1 xattr name";
pub(super) const CONFIG: &[u8] = b"kmsfs v1 config";
pub(super) const PROVISION: &[u8] = b"kmsfs v1 provision";
pub(super) const AUDIT: &[u8] = b"kmsfs v1 audit";
pub(super) const LEASE: &[u8] = b"kmsfs v1 lease";
pub(super) const FINGERPRINT: &[u8] = b"kmsfs v1 fingerprint";

/// `N` bytes of HKDF-SHA256(`key`, `salt`, the concatenation of `info`).
#[allow(clippy::expect_used)] // only lengths above 255 blocks are refused
pub(super) fn derive<const N: usize>(key: &Secret<32>, salt: &[u8], info: &[&[u8]]) -> Secret<N> {
    let fill = |out: &mut [u8; N]| Hkdf::<Sha256>::new(Some(salt), key.expose()).expand_multi_info(info, out);
    stack::wiped(|| Secret::fill_with(fill)).expect("a short output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_salts_separate() {
        let key = Secret::random();
        let base: Secret<32> = derive(&key, b"salt", &[CONTENT, &[1]]);
        let same: Secret<32> = derive(&key, b"salt", &[b"kmsfs v1 content\x01"]);
        assert_eq!(base.expose(), same.expose());
        for (salt, info) in [(&b"salt"[..], COMMIT), (b"tlas", CONTENT), (b"salt", CONTENT)] {
            let other: Secret<32> = derive(&key, salt, &[info]);
            assert_ne!(base.expose(), other.expose());
        }
    }
}
