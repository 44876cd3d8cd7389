//! Files of age, as long as a wrapped key is: the header, one chunk of content.
//!
//! Implements `age-encryption.org/v1` (C2SP, age.md) for X25519 recipients: its text is the law, the program `age` the test.
//!
//! Invariants: nothing of the content is given out before the header's MAC and the chunk's tag were checked; a file that has
//! more than one chunk is malformed here.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;
use chacha20poly1305::ChaCha20Poly1305;
use chacha20poly1305::aead::{AeadInOut as _, KeyInit as _};
use hkdf::Hkdf;
use hmac::{Hmac, Mac as _};
use sha2::Sha256;

use super::age_keys::{BadPoint, Identity, Recipient};
use crate::crypto::{Secret, random_array};

/// The first line, without its end.
pub(super) const INTRO: &[u8] = b"age-encryption.org/v1";
const KIND: &str = "X25519";
const WRAP_INFO: &[u8] = b"age-encryption.org/v1/X25519";
const FILE_KEY_LEN: usize = 16;
const KEY_LEN: usize = 32;
const NONCE_LEN: usize = 16;
const TAG_LEN: usize = 16;
/// Of a line of a stanza's body.
const LINE_LEN: usize = 64;
/// No wrapped key has more recipients.
const MAX_STANZAS: usize = 32;
/// The nonce of the first chunk, which is the last one too: eleven bytes of a counter, and a mark.
const ONLY_CHUNK: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// Why a file cannot be made or opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum AgeError {
    /// It is no file of age.
    #[error("the wrapped key is not a file of age ({0})")]
    Malformed(&'static str),
    /// None of its recipients is the identity's.
    #[error("the wrapped key is not for this recipient")]
    NotForIdentity,
    /// Its MAC or its tag is wrong.
    #[error("the wrapped key was changed")]
    Unauthentic,
    /// A cipher cannot work.
    #[error("the cipher library failed")]
    Cipher,
}

impl From<BadPoint> for AgeError {
    fn from(_: BadPoint) -> Self {
        Self::Cipher
    }
}

/// A file with `content`, of less than 64 KiB, for `recipient`.
///
/// # Errors
/// `Cipher`.
pub(super) fn seal(recipient: &Recipient, content: &[u8]) -> Result<Vec<u8>, AgeError> {
    let file_key = Secret::<FILE_KEY_LEN>::random();
    let ephemeral = Identity::generate()?;
    let share = *ephemeral.recipient().point();
    let wrapping = wrapping_key(&ephemeral.agree(recipient.point())?, &share, recipient)?;
    let body = encrypt(&wrapping, &[0; 12], file_key.expose())?;
    let mut file = INTRO.to_vec();
    file.extend_from_slice(format!("\n-> {KIND} {}\n{}\n---", BASE64.encode(share), BASE64.encode(body)).as_bytes());
    let mac = header_mac(&file_key, &file)?.finalize().into_bytes();
    file.extend_from_slice(format!(" {}\n", BASE64.encode(mac)).as_bytes());
    let nonce: [u8; NONCE_LEN] = random_array();
    file.extend_from_slice(&nonce);
    file.extend_from_slice(&encrypt(&payload_key(&file_key, &nonce)?, &ONLY_CHUNK, content)?);
    Ok(file)
}

/// Fills `content` from a file that has exactly so much, with the first stanza that is for `identity`.
///
/// # Errors
/// [`AgeError`]; then `content` is undefined.
pub(super) fn open(identity: &Identity, file: &[u8], content: &mut [u8]) -> Result<(), AgeError> {
    let header = Header::parse(file)?;
    let file_key = header.shares.iter().find_map(|(share, body)| unwrap_file_key(identity, share, body));
    let file_key = file_key.ok_or(AgeError::NotForIdentity)?;
    header_mac(&file_key, header.signed)?.verify_slice(&header.mac).map_err(|_| AgeError::Unauthentic)?;
    let (nonce, chunk) = header.payload.split_first_chunk::<NONCE_LEN>().ok_or(AgeError::Malformed("no payload"))?;
    if chunk.len() != content.len() + TAG_LEN {
        return Err(AgeError::Malformed("a payload of another length"));
    }
    decrypt(&payload_key(&file_key, nonce)?, &ONLY_CHUNK, chunk, content)
}

/// The parts of a file.
struct Header<'a> {
    /// Of each stanza for X25519: the ephemeral share, and the body.
    shares: Vec<([u8; KEY_LEN], [u8; FILE_KEY_LEN + TAG_LEN])>,
    signed: &'a [u8],
    mac: [u8; 32],
    payload: &'a [u8],
}

impl<'a> Header<'a> {
    fn parse(file: &'a [u8]) -> Result<Self, AgeError> {
        let mut lines = Lines { file, at: 0 };
        if lines.next()? != std::str::from_utf8(INTRO).unwrap_or_default() {
            return Err(AgeError::Malformed("another version"));
        }
        let mut shares = Vec::new();
        for _ in 0..=MAX_STANZAS {
            let start = lines.at;
            let line = lines.next()?;
            if let Some(mac) = line.strip_prefix("--- ") {
                let mac = decode(mac)?;
                return Ok(Self { shares, signed: &file[..start + 3], mac, payload: &file[lines.at..] });
            }
            let arguments = line.strip_prefix("-> ").ok_or(AgeError::Malformed("no stanza"))?;
            let body = lines.body()?;
            if let Some(share) = arguments.strip_prefix(KIND).and_then(|rest| rest.strip_prefix(' ')) {
                shares.push((decode(share)?, decode(&body)?));
            }
        }
        Err(AgeError::Malformed("too many stanzas"))
    }
}

struct Lines<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Lines<'a> {
    fn next(&mut self) -> Result<&'a str, AgeError> {
        let rest = &self.file[self.at..];
        let end = rest.iter().position(|byte| *byte == b'\n').ok_or(AgeError::Malformed("a line without an end"))?;
        self.at += end + 1;
        let line = &rest[..end];
        let is_plain = line.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ');
        let line = std::str::from_utf8(line).ok().filter(|_| is_plain);
        line.ok_or(AgeError::Malformed("a line that is not text"))
    }

    /// The body of a stanza: full lines, and one that is not.
    fn body(&mut self) -> Result<String, AgeError> {
        let mut body = String::new();
        loop {
            let line = self.next()?;
            if line.len() > LINE_LEN || body.len() > 1024 {
                return Err(AgeError::Malformed("a body that is too long"));
            }
            body.push_str(line);
            if line.len() < LINE_LEN {
                return Ok(body);
            }
        }
    }
}

/// Exactly `N` bytes of canonical base64.
fn decode<const N: usize>(text: &str) -> Result<[u8; N], AgeError> {
    let malformed = AgeError::Malformed("bad base64");
    let bytes = BASE64.decode(text).map_err(|_| malformed)?;
    bytes.try_into().map_err(|_| malformed)
}

/// None if the stanza is for another identity.
fn unwrap_file_key(
    identity: &Identity,
    share: &[u8; KEY_LEN],
    body: &[u8; FILE_KEY_LEN + TAG_LEN],
) -> Option<Secret<FILE_KEY_LEN>> {
    let shared = identity.agree(share).ok()?;
    let wrapping = wrapping_key(&shared, share, &identity.recipient()).ok()?;
    Secret::fill_with(|file_key| decrypt(&wrapping, &[0; 12], body, file_key)).ok()
}

fn wrapping_key(
    shared: &Secret<KEY_LEN>,
    share: &[u8; KEY_LEN],
    recipient: &Recipient,
) -> Result<Secret<KEY_LEN>, AgeError> {
    let salt = [*share, *recipient.point()].concat();
    derive(shared.expose(), &salt, WRAP_INFO)
}

fn payload_key(file_key: &Secret<FILE_KEY_LEN>, nonce: &[u8; NONCE_LEN]) -> Result<Secret<KEY_LEN>, AgeError> {
    derive(file_key.expose(), nonce, b"payload")
}

fn header_mac(file_key: &Secret<FILE_KEY_LEN>, signed: &[u8]) -> Result<Hmac<Sha256>, AgeError> {
    let key = derive(file_key.expose(), &[], b"header")?;
    let mut mac = <Hmac<Sha256> as hmac::KeyInit>::new_from_slice(key.expose()).map_err(|_| AgeError::Cipher)?;
    mac.update(signed);
    Ok(mac)
}

fn derive(secret: &[u8], salt: &[u8], info: &[u8]) -> Result<Secret<KEY_LEN>, AgeError> {
    let hkdf = Hkdf::<Sha256>::new(Some(salt), secret);
    Secret::fill_with(|key| hkdf.expand(info, key).map_err(|_| AgeError::Cipher))
}

/// The ciphertext and its tag.
fn encrypt(key: &Secret<KEY_LEN>, nonce: &[u8; 12], content: &[u8]) -> Result<Vec<u8>, AgeError> {
    let mut sealed = Vec::with_capacity(content.len() + TAG_LEN);
    sealed.extend_from_slice(content);
    let cipher = ChaCha20Poly1305::new(key.expose().into());
    let tag = cipher.encrypt_inout_detached(nonce.into(), &[], sealed.as_mut_slice().into());
    sealed.extend_from_slice(&tag.map_err(|_| AgeError::Cipher)?);
    Ok(sealed)
}

fn decrypt(key: &Secret<KEY_LEN>, nonce: &[u8; 12], sealed: &[u8], content: &mut [u8]) -> Result<(), AgeError> {
    let (ciphertext, tag) = sealed.split_last_chunk::<TAG_LEN>().ok_or(AgeError::Unauthentic)?;
    if ciphertext.len() != content.len() {
        return Err(AgeError::Unauthentic);
    }
    content.copy_from_slice(ciphertext);
    let cipher = ChaCha20Poly1305::new(key.expose().into());
    let opened = cipher.decrypt_inout_detached(nonce.into(), &[], content.into(), tag.into());
    opened.map_err(|_| AgeError::Unauthentic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stanzas_of_others_are_skipped() {
        let (mine, other) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        let file = seal(&mine.recipient(), &[7; 64]).unwrap();
        let mut content = [0; 64];
        open(&mine, &file, &mut content).unwrap();
        assert_eq!(content, [7; 64]);
        assert_eq!(open(&other, &file, &mut content), Err(AgeError::NotForIdentity));
        assert_eq!(open(&mine, &file, &mut [0; 63]), Err(AgeError::Malformed("a payload of another length")));
        // Stanzas of unknown kinds stand before ours; the MAC does not hold then, but they are no obstacle to parsing.
        let text = "\n-> joint-oil 1 2\nAAAA\n-> x\n\n";
        let grease = [INTRO, text.as_bytes(), &file[INTRO.len() + 1..]].concat();
        assert_eq!(Header::parse(&grease).unwrap().shares.len(), 1);
        assert_eq!(open(&mine, &grease, &mut content), Err(AgeError::Unauthentic));
    }

    #[test]
    fn what_is_no_file_of_age_is_refused() {
        let intro = "age-encryption.org/v1\n";
        let many = "-> x\n\n".repeat(MAX_STANZAS + 1);
        for bad in [
            "",
            "age",
            "age-encryption.org/v2\n-> x\n\n--- \n",
            intro,
            &format!("{intro}--- AAAA\n"),
            &format!("{intro}{many}"),
        ] {
            assert!(matches!(Header::parse(bad.as_bytes()), Err(AgeError::Malformed(_))), "{bad}");
        }
    }
}
