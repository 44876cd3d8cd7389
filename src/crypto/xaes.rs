//! XAES-256-GCM's key derivation (C2SP, <https://c2sp.org/XAES-256-GCM>): an AES-256-GCM key for each 12-byte nonce prefix.

use aes::Aes256;
use aes::cipher::{Array, BlockCipherEncrypt, KeyInit};
use aws_lc_rs::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
use zeroize::Zeroizing;

/// The first half of an XAES nonce; it selects the inner key.
pub(super) type NoncePrefix = [u8; 12];

/// An XAES key: the AES-256 key schedule and the CMAC subkey K1, both wiped on drop.
pub(super) struct XaesKey {
    cipher: Aes256,
    k1: Zeroizing<[u8; 16]>,
}

impl XaesKey {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        let cipher = Aes256::new(key.into());
        let mut l = Array([0_u8; 16]);
        cipher.encrypt_block(&mut l);
        let k1 = Zeroizing::new(double(u128::from_be_bytes(l.0)).to_be_bytes());
        Self { cipher, k1 }
    }

    /// The AES-256-GCM key for nonces that begin with `prefix`: CMAC of two counter blocks (SP 800-108r1).
    pub(super) fn inner_key(&self, prefix: &NoncePrefix) -> LessSafeKey {
        let mut key = Zeroizing::new([0_u8; 32]);
        for (counter, half) in (1_u8..).zip(key.chunks_exact_mut(16)) {
            let mut block = Array([0_u8; 16]);
            block[1] = counter;
            block[2] = b'X';
            block[4..].copy_from_slice(prefix);
            block.iter_mut().zip(self.k1.iter()).for_each(|(b, k)| *b ^= k);
            self.cipher.encrypt_block(&mut block);
            half.copy_from_slice(&block);
        }
        aes_256_gcm(&key)
    }
}

/// Multiplication by x in GF(2^128), as CMAC defines its first subkey.
fn double(l: u128) -> u128 {
    (l << 1) ^ if l >> 127 == 1 { 0x87 } else { 0 }
}

/// A key of the right length is never refused.
#[allow(clippy::expect_used)]
fn aes_256_gcm(key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("32 bytes are an AES-256 key"))
}
