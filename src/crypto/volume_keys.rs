//! The keys that HKDF makes of a volume key, and what each of them authenticates or seals.

use std::marker::PhantomData;

use aes_siv::KeyInit;
use aes_siv::siv::Aes256Siv;
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

use super::small_box::SmallBoxKey;
use super::{DataKey, Secret, Suite, Unauthentic, XattrKey, kdf, random_array, stack};

/// Every key of a volume. The volume key itself is not kept.
pub struct VolumeKeys {
    /// Authenticates file headers.
    pub header: HeaderKey,
    /// Encrypts names and authenticates directory ids.
    pub name: NameKey,
    /// Seals symlink targets.
    pub link: LinkKey,
    /// Encrypts extended attributes.
    pub xattr: XattrKey,
    /// Authenticates provisioned keys.
    pub provision: ProvisionKey,
    /// Authenticates audit logs.
    pub audit: AuditKey,
    /// Authenticates leases.
    pub lease: LeaseKey,
    config: MacKey<Configs>,
    fingerprint: Secret<16>,
}

impl VolumeKeys {
    /// Derives the keys of the volume `volume_id`.
    #[must_use]
    pub fn derive(volume_key: &DataKey, volume_id: &[u8; 16], suite: Suite) -> Self {
        let key = |label| kdf::derive::<32>(volume_key, volume_id, &[label]);
        Self {
            header: HeaderKey(key(kdf::HEADER)),
            name: NameKey { name: kdf::derive(volume_key, volume_id, &[kdf::NAME]), directory: key(kdf::DIRECTORY) },
            link: LinkKey(SmallBoxKey::new(suite, &key(kdf::LINK))),
            xattr: XattrKey::derive(volume_key, volume_id, suite),
            provision: MacKey::new(key(kdf::PROVISION)),
            audit: MacKey::new(key(kdf::AUDIT)),
            lease: MacKey::new(key(kdf::LEASE)),
            config: MacKey::new(key(kdf::CONFIG)),
            fingerprint: kdf::derive(volume_key, volume_id, &[kdf::FINGERPRINT]),
        }
    }

    /// The MAC over a volume config's body.
    #[must_use]
    pub fn config_mac(&self, body: &[u8]) -> [u8; 32] {
        self.config.mac(body)
    }

    /// Whether `mac` is the MAC of `body`.
    #[must_use]
    pub fn config_is_authentic(&self, body: &[u8], mac: &[u8; 32]) -> bool {
        self.config.is_authentic(body, mac)
    }

    /// A public name for the volume key: equal for equal keys, and of no use to anybody who lacks it.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 16] {
        *self.fingerprint.expose()
    }
}

/// Authenticates file headers.
pub struct HeaderKey(Secret<32>);

/// Proof that a header's MAC was checked: the fields that a file's keys depend on.
pub struct VerifiedHeader {
    suite: Suite,
    file_id: [u8; 32],
    commitment: [u8; 32],
}

impl VerifiedHeader {
    pub(super) fn suite(&self) -> Suite {
        self.suite
    }

    pub(super) fn file_id(&self) -> &[u8; 32] {
        &self.file_id
    }

    pub(super) fn commitment(&self) -> &[u8; 32] {
        &self.commitment
    }
}

impl HeaderKey {
    /// The MAC over the bytes of a header slot.
    #[must_use]
    pub fn mac(&self, signed: &[u8]) -> [u8; 32] {
        stack::wiped(|| hmac(&self.0, &[signed]).finalize().into_bytes().into())
    }

    /// Checks `mac` over `signed`, the slot bytes that `suite`, `file_id` and `commitment` were parsed from.
    ///
    /// # Errors
    /// [`Unauthentic`].
    pub fn verify(
        &self,
        signed: &[u8],
        mac: &[u8; 32],
        suite: Suite,
        file_id: [u8; 32],
        commitment: [u8; 32],
    ) -> Result<VerifiedHeader, Unauthentic> {
        stack::wiped(|| hmac(&self.0, &[signed]).verify_slice(mac)).map_err(|_| Unauthentic)?;
        Ok(VerifiedHeader { suite, file_id, commitment })
    }
}

/// Authenticates one kind of bytes with HMAC-SHA256; `Of` names the kind, so that no key serves two.
pub struct MacKey<Of> {
    key: Secret<32>,
    of: PhantomData<fn() -> Of>,
}

enum Configs {}
/// See [`ProvisionKey`].
pub enum ProvisionedKeys {}
/// See [`LeaseKey`].
pub enum Leases {}
/// See [`AuditKey`].
pub enum AuditRecords {}

/// Authenticates provisioned keys.
pub type ProvisionKey = MacKey<ProvisionedKeys>;
/// Authenticates leases.
pub type LeaseKey = MacKey<Leases>;
/// Authenticates the records of an audit log.
pub type AuditKey = MacKey<AuditRecords>;

impl<Of> MacKey<Of> {
    fn new(key: Secret<32>) -> Self {
        Self { key, of: PhantomData }
    }

    /// The MAC over `signed`.
    #[must_use]
    pub fn mac(&self, signed: &[u8]) -> [u8; 32] {
        stack::wiped(|| hmac(&self.key, &[signed]).finalize().into_bytes().into())
    }

    /// Whether `mac` is the MAC of `signed`, in constant time.
    #[must_use]
    pub fn is_authentic(&self, signed: &[u8], mac: &[u8; 32]) -> bool {
        stack::wiped(|| hmac(&self.key, &[signed]).verify_slice(mac).is_ok())
    }
}

impl AuditKey {
    /// What a record says of the one before it: the SHA-256 of its line. Needs no key.
    #[must_use]
    pub fn link(line: &[u8]) -> [u8; 32] {
        Sha256::digest(line).into()
    }
}

/// Encrypts names with AES-SIV (RFC 5297) and authenticates directory ids.
pub struct NameKey {
    name: Secret<64>,
    directory: Secret<32>,
}

impl NameKey {
    /// The ciphertext of `name` in the directory `directory_id`: deterministic, 16 bytes longer than the name.
    #[must_use]
    pub fn seal(&self, directory_id: &[u8; 16], name: &[u8]) -> Vec<u8> {
        siv_seal(&self.name, directory_id, name)
    }

    /// The name behind `sealed`.
    ///
    /// # Errors
    /// [`Unauthentic`] if it was not made for this directory of this volume.
    pub fn open(&self, directory_id: &[u8; 16], sealed: &[u8]) -> Result<Vec<u8>, Unauthentic> {
        siv_open(&self.name, directory_id, sealed)
    }

    /// The SHA-256 that stands for an encrypted name which is too long for a directory entry.
    #[must_use]
    pub fn digest(text: &[u8]) -> [u8; 32] {
        Sha256::digest(text).into()
    }

    /// A new directory id with its MAC: 32 bytes.
    #[must_use]
    pub fn new_directory_id(&self) -> ([u8; 16], [u8; 32]) {
        let id: [u8; 16] = random_array();
        let mut signed = [0; 32];
        signed[..16].copy_from_slice(&id);
        let mac: [u8; 32] = stack::wiped(|| hmac(&self.directory, &[&id]).finalize().into_bytes().into());
        signed[16..].copy_from_slice(&mac[..16]);
        (id, signed)
    }

    /// The directory id in `signed`.
    ///
    /// # Errors
    /// [`Unauthentic`] if this volume did not make it.
    pub fn directory_id(&self, signed: &[u8; 32]) -> Result<[u8; 16], Unauthentic> {
        let (id, mac) = signed.split_at(16);
        stack::wiped(|| hmac(&self.directory, &[id]).verify_truncated_left(mac)).map_err(|_| Unauthentic)?;
        id.try_into().map_err(|_| Unauthentic)
    }
}

/// Seals symlink targets under random nonces.
pub struct LinkKey(SmallBoxKey);

impl LinkKey {
    /// Bytes that sealing adds to a target.
    pub const OVERHEAD: usize = SmallBoxKey::OVERHEAD;

    /// `nonce | ciphertext | tag` of `target`.
    #[must_use]
    pub fn seal(&self, target: &[u8]) -> Vec<u8> {
        self.0.seal(&[], target)
    }

    /// The target behind `sealed`.
    ///
    /// # Errors
    /// [`Unauthentic`].
    pub fn open(&self, sealed: &[u8]) -> Result<Vec<u8>, Unauthentic> {
        self.0.open(&[], sealed)
    }

    /// Names a new file for a target.
    #[must_use]
    pub fn new_id() -> [u8; 16] {
        random_array()
    }

    /// The same for a target that is kept in the file `id`, to which it is bound.
    #[must_use]
    pub fn seal_long(&self, id: &[u8; 16], target: &[u8]) -> Vec<u8> {
        self.0.seal(id, target)
    }

    /// The target behind `sealed`, which is in the file `id`.
    ///
    /// # Errors
    /// [`Unauthentic`].
    pub fn open_long(&self, id: &[u8; 16], sealed: &[u8]) -> Result<Vec<u8>, Unauthentic> {
        self.0.open(id, sealed)
    }
}

#[allow(clippy::expect_used)] // one associated header never exceeds the 126 that SIV takes
pub(super) fn siv_seal(key: &Secret<64>, header: &[u8], text: &[u8]) -> Vec<u8> {
    stack::wiped(|| Aes256Siv::new(key.expose().into()).encrypt([header], text)).expect("one header")
}

pub(super) fn siv_open(key: &Secret<64>, header: &[u8], sealed: &[u8]) -> Result<Vec<u8>, Unauthentic> {
    stack::wiped(|| Aes256Siv::new(key.expose().into()).decrypt([header], sealed)).map_err(|_| Unauthentic)
}

#[allow(clippy::expect_used)] // HMAC takes keys of any length
fn hmac(key: &Secret<32>, parts: &[&[u8]]) -> Hmac<Sha256> {
    use hmac::KeyInit as _;
    let mut mac = Hmac::<Sha256>::new_from_slice(key.expose()).expect("any length");
    parts.iter().for_each(|part| mac.update(part));
    mac
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> VolumeKeys {
        VolumeKeys::derive(&Secret::random(), &[1; 16], Suite::Xaes256Gcm)
    }

    /// RFC 5297, appendix A, is for 256-bit keys; this is its shape for 512 bits: deterministic and bound to the directory.
    #[test]
    fn names_are_deterministic_and_bound_to_their_directory() {
        let keys = keys();
        let sealed = keys.name.seal(&[1; 16], b"letter.txt");
        assert_eq!(sealed.len(), 26);
        assert_eq!(sealed, keys.name.seal(&[1; 16], b"letter.txt"));
        assert_ne!(sealed, keys.name.seal(&[2; 16], b"letter.txt"));
        assert_eq!(keys.name.open(&[1; 16], &sealed).unwrap(), b"letter.txt");
        assert_eq!(keys.name.open(&[2; 16], &sealed), Err(Unauthentic));
        assert_eq!(keys.name.open(&[1; 16], &sealed[..15]), Err(Unauthentic));
    }

    #[test]
    fn directory_ids_authenticate() {
        let keys = keys();
        let (id, mut signed) = keys.name.new_directory_id();
        assert_eq!(keys.name.directory_id(&signed), Ok(id));
        signed[0] ^= 1;
        assert_eq!(keys.name.directory_id(&signed), Err(Unauthentic));
    }

    #[test]
    fn link_targets_authenticate() {
        let keys = keys();
        let mut sealed = keys.link.seal(b"../elsewhere");
        assert_eq!(keys.link.open(&sealed).unwrap(), b"../elsewhere");
        sealed[30] ^= 1;
        assert_eq!(keys.link.open(&sealed), Err(Unauthentic));
        assert_eq!(keys.link.open(&[0; 39]), Err(Unauthentic));
        let long = keys.link.seal_long(&[1; 16], b"far away");
        assert_eq!(keys.link.open_long(&[1; 16], &long).unwrap(), b"far away");
        assert_eq!((keys.link.open_long(&[2; 16], &long), keys.link.open(&long)), (Err(Unauthentic), Err(Unauthentic)));
    }

    #[test]
    fn config_macs_cover_the_body() {
        let keys = keys();
        let mac = keys.config_mac(b"suite = 1");
        assert!(keys.config_is_authentic(b"suite = 1", &mac));
        assert!(!keys.config_is_authentic(b"suite = 2", &mac));
    }
}
