//! One interface over both suites: seal and open boxes with 24-byte nonces, from one buffer into another.

use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce};
use chacha20poly1305::XChaCha20Poly1305;
use chacha20poly1305::aead::inout::InOutBuf;
use chacha20poly1305::aead::{AeadInOut, KeyInit};

use super::xaes::{NoncePrefix, XaesKey};
use super::{NONCE_LEN, Secret, Suite, TAG_LEN, stack};

/// The box does not authenticate: it was changed, moved, or sealed under another key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("does not authenticate")]
pub struct Unauthentic;

/// A key of one suite, expanded. Wiped on drop by the implementations behind it; moves copy a pointer, not the key.
pub struct SuiteKey(Box<Kind>);

#[allow(clippy::large_enum_variant)] // the large one is the usual one
enum Kind {
    Xaes(XaesKey),
    XChaCha(XChaCha20Poly1305),
}

impl SuiteKey {
    /// Expands `key` for `suite`.
    #[must_use]
    pub fn new(suite: Suite, key: &Secret<32>) -> Self {
        stack::wiped(|| {
            Self(Box::new(match suite {
                Suite::Xaes256Gcm => Kind::Xaes(XaesKey::new(key.expose())),
                Suite::XChaCha20Poly1305 => Kind::XChaCha(XChaCha20Poly1305::new(key.expose().into())),
            }))
        })
    }

    /// A run of boxes under this key. It remembers the last derived inner key, so that boxes whose nonces share their
    /// first 12 bytes cost one derivation.
    #[must_use]
    pub fn session(&self) -> AeadSession<'_> {
        AeadSession { key: self, inner: None }
    }
}

/// See [`SuiteKey::session`].
pub struct AeadSession<'k> {
    key: &'k SuiteKey,
    inner: Option<(NoncePrefix, LessSafeKey)>,
}

impl AeadSession<'_> {
    /// Seals `plain` into `cipher` and returns the tag.
    ///
    /// # Panics
    /// If the two lengths differ.
    #[allow(clippy::expect_used)] // lengths were checked, and neither AEAD refuses a page
    pub fn seal(&mut self, nonce: &[u8; NONCE_LEN], aad: &[u8], plain: &[u8], cipher: &mut [u8]) -> [u8; TAG_LEN] {
        assert_eq!(plain.len(), cipher.len(), "a box is as long as its content");
        let mut tag = [0; TAG_LEN];
        match &*self.key.0 {
            Kind::Xaes(key) => {
                let (inner, nonce) = inner_key(&mut self.inner, key, nonce);
                inner
                    .seal_out_of_place_scatter(nonce, Aad::from(aad), plain, cipher, &[], &mut tag)
                    .expect("sealing a page");
            }
            Kind::XChaCha(key) => {
                let buffer = InOutBuf::new(plain, cipher).expect("equal lengths");
                tag = key.encrypt_inout_detached(nonce.into(), aad, buffer).expect("sealing a page").into();
            }
        }
        tag
    }

    /// Opens `cipher` into `plain`. On failure the content of `plain` is unspecified and must not be used.
    ///
    /// # Errors
    /// [`Unauthentic`].
    ///
    /// # Panics
    /// If the two lengths differ.
    #[allow(clippy::expect_used)] // lengths were checked
    pub fn open(
        &mut self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        cipher: &[u8],
        tag: &[u8; TAG_LEN],
        plain: &mut [u8],
    ) -> Result<(), Unauthentic> {
        assert_eq!(plain.len(), cipher.len(), "a box is as long as its content");
        match &*self.key.0 {
            Kind::Xaes(key) => {
                let (inner, nonce) = inner_key(&mut self.inner, key, nonce);
                inner.open_separate_gather(nonce, Aad::from(aad), cipher, tag, plain).map_err(|_| Unauthentic)
            }
            Kind::XChaCha(key) => {
                let buffer = InOutBuf::new(cipher, plain).expect("equal lengths");
                key.decrypt_inout_detached(nonce.into(), aad, buffer, tag.into()).map_err(|_| Unauthentic)
            }
        }
    }
}

/// The inner key and nonce of an XAES nonce, derived only if the prefix changed.
fn inner_key<'a>(
    last: &'a mut Option<(NoncePrefix, LessSafeKey)>,
    key: &XaesKey,
    nonce: &[u8; NONCE_LEN],
) -> (&'a LessSafeKey, Nonce) {
    let (mut prefix, mut suffix) = ([0; 12], [0; 12]);
    prefix.copy_from_slice(&nonce[..12]);
    suffix.copy_from_slice(&nonce[12..]);
    if last.as_ref().is_some_and(|(p, _)| *p != prefix) {
        *last = None;
    }
    let (_, inner) = last.get_or_insert_with(|| (prefix, key.inner_key(&prefix)));
    (inner, Nonce::assume_unique_for_key(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(suite: Suite, byte: u8) -> SuiteKey {
        let secret = Secret::fill_with(|k| {
            *k = [byte; 32];
            Ok::<_, ()>(())
        });
        SuiteKey::new(suite, &secret.unwrap())
    }

    fn seal(key: &SuiteKey, nonce: &[u8; 24], aad: &[u8], plain: &[u8]) -> Vec<u8> {
        let mut cipher = vec![0; plain.len()];
        let tag = key.session().seal(nonce, aad, plain, &mut cipher);
        cipher.extend(tag);
        cipher
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The two test vectors of the C2SP specification: one for each most significant bit of L.
    #[test]
    fn xaes_specification_vectors() {
        let nonce = b"ABCDEFGHIJKLMNOPQRSTUVWX";
        let first = seal(&key(Suite::Xaes256Gcm, 1), nonce, b"", b"XAES-256-GCM");
        assert_eq!(hex(&first), "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271");
        let second = seal(&key(Suite::Xaes256Gcm, 3), nonce, b"c2sp.org/XAES-256-GCM", b"XAES-256-GCM");
        assert_eq!(hex(&second), "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d");
    }

    /// draft-irtf-cfrg-xchacha-03, appendix A.3.1.
    #[test]
    fn xchacha_draft_vector() {
        let plain = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it.";
        let aad = [0x50, 0x51, 0x52, 0x53, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7];
        let secret = Secret::fill_with(|k| {
            for (byte, value) in k.iter_mut().zip(0x80..) {
                *byte = value;
            }
            Ok::<_, ()>(())
        });
        let nonce: [u8; 24] = std::array::from_fn(|i| 0x40 + u8::try_from(i).unwrap());
        let sealed = seal(&SuiteKey::new(Suite::XChaCha20Poly1305, &secret.unwrap()), &nonce, &aad, plain);
        assert_eq!(hex(&sealed[..16]), "bd6d179d3e83d43b9576579493c0e939");
        assert_eq!(hex(&sealed[plain.len()..]), "c0875924c1c7987947deafd8780acf49");
    }

    #[test]
    fn agrees_with_an_independent_xaes() {
        use xaes_256_gcm::aead::{Aead, KeyInit, Payload};
        for round in 0_u8..64 {
            let nonce: [u8; 24] = super::super::random_array();
            let plain = vec![round; usize::from(round) * 61];
            let ours = seal(&key(Suite::Xaes256Gcm, round), &nonce, &[round], &plain);
            let theirs = xaes_256_gcm::Xaes256Gcm::new(&[round; 32].into())
                .encrypt(&nonce.into(), Payload { msg: &plain, aad: &[round] })
                .unwrap();
            assert_eq!(ours, theirs);
        }
    }

    #[test]
    fn opens_only_what_was_sealed() {
        for suite in Suite::ALL {
            let key_1 = key(suite, 1);
            let nonce = [7; 24];
            let mut cipher = [0; 100];
            let tag = key_1.session().seal(&nonce, b"aad", &[5; 100], &mut cipher);
            let open = |key: &SuiteKey, nonce: &[u8; 24], aad: &[u8], cipher: &[u8], tag: &[u8; 16]| {
                let mut plain = [0; 100];
                key.session().open(nonce, aad, cipher, tag, &mut plain).map(|()| plain)
            };
            assert_eq!(open(&key_1, &nonce, b"aad", &cipher, &tag), Ok([5; 100]));
            assert_eq!(open(&key(suite, 2), &nonce, b"aad", &cipher, &tag), Err(Unauthentic));
            assert_eq!(open(&key_1, &[8; 24], b"aad", &cipher, &tag), Err(Unauthentic));
            assert_eq!(open(&key_1, &nonce, b"AAD", &cipher, &tag), Err(Unauthentic));
            let mut other = cipher;
            other[99] ^= 1;
            assert_eq!(open(&key_1, &nonce, b"aad", &other, &tag), Err(Unauthentic));
            let mut other = tag;
            other[0] ^= 0x80;
            assert_eq!(open(&key_1, &nonce, b"aad", &cipher, &other), Err(Unauthentic));
        }
    }

    #[test]
    fn a_session_follows_changing_prefixes() {
        let key = key(Suite::Xaes256Gcm, 9);
        let mut session = key.session();
        for round in [0_u8, 0, 1, 0, 2, 2] {
            let mut nonce = [3; 24];
            nonce[0] = round;
            let mut cipher = [0; 10];
            let tag = session.seal(&nonce, b"", &[round; 10], &mut cipher);
            assert_eq!([cipher.as_slice(), &tag].concat(), seal(&key, &nonce, b"", &[round; 10]));
        }
    }
}
