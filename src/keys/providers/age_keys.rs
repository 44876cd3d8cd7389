//! The keys of age: X25519, spelled in Bech32 (`age1...` and `AGE-SECRET-KEY-1...`).
//!
//! Invariant: a secret scalar lies in a [`Secret`], and what is computed with it is wiped.

use std::str::FromStr;

use aws_lc_rs::agreement::{self, PrivateKey, UnparsedPublicKey, X25519};
use bech32::Bech32;
use bech32::primitives::decode::CheckedHrpstring;

use crate::crypto::Secret;

const RECIPIENT_PREFIX: &str = "age";
const IDENTITY_PREFIX: &str = "age-secret-key-";
const KEY_LEN: usize = 32;

/// The public half of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Recipient {
    point: [u8; KEY_LEN],
    text: String,
}

/// The secret half of a key, wiped on drop.
pub(super) struct Identity {
    scalar: Secret<KEY_LEN>,
    recipient: Recipient,
}

/// A computation that failed: a point that nobody has honestly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadPoint;

impl Recipient {
    /// In Bech32, lower case.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The point, in the encoding of X25519.
    pub(super) fn point(&self) -> &[u8; KEY_LEN] {
        &self.point
    }

    fn of_point(point: [u8; KEY_LEN]) -> Result<Self, BadPoint> {
        let prefix = bech32::Hrp::parse(RECIPIENT_PREFIX).map_err(|_| BadPoint)?;
        let text = bech32::encode::<Bech32>(prefix, &point).map_err(|_| BadPoint)?;
        Ok(Self { point, text })
    }
}

impl FromStr for Recipient {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const SHAPE: &str = "expected age1 and 58 more letters and digits, as age-keygen shows it";
        if text.starts_with("age1") && text.chars().any(|c| c.is_ascii_uppercase()) {
            return Err("it must be in lower case");
        }
        let parsed = CheckedHrpstring::new::<Bech32>(text).map_err(|_| SHAPE)?;
        if parsed.hrp().as_str() != RECIPIENT_PREFIX {
            return Err("only recipients of the kind age1... are supported");
        }
        let point: Vec<u8> = parsed.byte_iter().collect();
        let point = point.try_into().map_err(|_| SHAPE)?;
        Self::of_point(point).map_err(|_| SHAPE)
    }
}

impl Identity {
    /// The identity that `text` spells.
    ///
    /// # Errors
    /// Why it is none, without its text.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        const SHAPE: &str = "expected AGE-SECRET-KEY-1 and 58 more letters and digits, as age-keygen writes it";
        let parsed = CheckedHrpstring::new::<Bech32>(text).map_err(|_| SHAPE)?;
        if parsed.hrp().to_lowercase() != IDENTITY_PREFIX {
            return Err("only identities of the kind AGE-SECRET-KEY-1... are supported (no SSH keys, no plugins)");
        }
        let mut bytes = parsed.byte_iter();
        let scalar = Secret::fill_with(|secret| {
            for byte in secret.iter_mut() {
                *byte = bytes.next().ok_or(SHAPE)?;
            }
            if bytes.next().is_some() { Err(SHAPE) } else { Ok(()) }
        })?;
        Self::of_scalar(scalar).map_err(|_| SHAPE)
    }

    /// A new random one.
    ///
    /// # Errors
    /// [`BadPoint`] if the cipher library cannot work.
    pub(super) fn generate() -> Result<Self, BadPoint> {
        Self::of_scalar(Secret::random())
    }

    fn of_scalar(scalar: Secret<KEY_LEN>) -> Result<Self, BadPoint> {
        let private = PrivateKey::from_private_key(&X25519, scalar.expose()).map_err(|_| BadPoint)?;
        let public = private.compute_public_key().map_err(|_| BadPoint)?;
        let point = public.as_ref().try_into().map_err(|_| BadPoint)?;
        Ok(Self { scalar, recipient: Recipient::of_point(point)? })
    }

    /// The public half.
    pub(super) fn recipient(&self) -> Recipient {
        self.recipient.clone()
    }

    /// The secret that this identity shares with the holder of `point`'s secret half.
    ///
    /// # Errors
    /// [`BadPoint`] if it would be no secret.
    pub(super) fn agree(&self, point: &[u8; KEY_LEN]) -> Result<Secret<KEY_LEN>, BadPoint> {
        let private = PrivateKey::from_private_key(&X25519, self.scalar.expose()).map_err(|_| BadPoint)?;
        let peer = UnparsedPublicKey::new(&X25519, point);
        agreement::agree(&private, peer, BadPoint, |shared| {
            if shared.len() != KEY_LEN || shared.iter().all(|byte| *byte == 0) {
                return Err(BadPoint);
            }
            Secret::fill_with(|secret| {
                secret.copy_from_slice(shared);
                Ok(())
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_recipients_that_are_whole_are_taken() {
        let identity = Identity::generate().unwrap();
        let text = identity.recipient().text().to_owned();
        assert_eq!(text.parse::<Recipient>().unwrap(), identity.recipient());
        let mut typo = text.clone().into_bytes();
        typo[20] = if typo[20] == b'q' { b'p' } else { b'q' };
        let typo = String::from_utf8(typo).unwrap();
        for bad in ["", "age1", &typo, &text.to_uppercase(), &text[..61], "ssh-ed25519 AAAA", "age1yubikey1q"] {
            assert!(bad.parse::<Recipient>().is_err(), "{bad}");
        }
    }

    #[test]
    fn both_sides_come_to_one_secret_and_small_points_to_none() {
        let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        let [left, right] = [(&a, &b), (&b, &a)].map(|(x, y)| x.agree(y.recipient().point()).ok().unwrap());
        assert_eq!(left.expose(), right.expose());
        assert!(a.agree(&[0; KEY_LEN]).is_err());
        let mut one = [0; KEY_LEN];
        one[0] = 1;
        assert!(a.agree(&one).is_err());
    }
}
