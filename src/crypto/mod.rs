//! Pure functions over bytes: secrets, AEAD suites, key derivation, and the keys of a volume and of a file.
//!
//! Nothing here does I/O, logs, or knows where its bytes came from. Invariants:
//! * a secret has no `Debug`, no `Clone`, is filled in place, lies in memory that the kernel protects, and is wiped on drop;
//! * what is computed with a key itself leaves nothing of it on the stack;
//! * [`FileKeys`] exist only after the header that names them authenticated and the data key matched its commitment;
//! * every comparison of a MAC, a tag or a commitment takes constant time.
//!
//! Implements `docs/FORMAT.md` sections 3 (pages), 5 (keys of a file) and 7 (names, link targets, extended attributes).

mod aead;
mod arena;
mod file_keys;
mod kdf;
mod secret;
mod small_box;
mod stack;
mod suite;
mod volume_keys;
mod xaes;
mod xattr_key;

pub use aead::{AeadSession, SuiteKey, Unauthentic};
pub use arena::KeyMemory;
pub use file_keys::{CommitmentMismatch, FileKeys, commitment};
pub use secret::{DataKey, Secret, random_array};
#[cfg(feature = "age")]
pub(crate) use stack::wiped;
pub use suite::Suite;
pub use volume_keys::{
    AuditKey, AuditRecords, HeaderKey, LeaseKey, Leases, LinkKey, MacKey, NameKey, ProvisionKey, ProvisionedKeys,
    VerifiedHeader, VolumeKeys,
};
pub use xattr_key::XattrKey;

/// Bytes of an authentication tag of either suite.
pub const TAG_LEN: usize = 16;
/// Bytes of a nonce of either suite; random nonces of this length are safe for 2^80 messages under one key.
pub const NONCE_LEN: usize = 24;
