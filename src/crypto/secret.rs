//! Secrets: types that cannot be printed or copied by accident.

use super::arena::Slot;

/// `N` secret bytes, at most 64, in memory that the kernel protects ([`super::KeyMemory`]), wiped on drop. Has neither
/// `Debug` nor `Clone`; moves copy a pointer, not the bytes.
pub struct Secret<const N: usize>(Slot<N>);

/// A 256-bit data key as a provider generates it.
pub type DataKey = Secret<32>;

impl<const N: usize> Secret<N> {
    /// Fills a new secret in place; on an error what was written is wiped.
    ///
    /// # Errors
    /// The error of `fill`.
    pub fn fill_with<E>(fill: impl FnOnce(&mut [u8; N]) -> Result<(), E>) -> Result<Self, E> {
        let mut secret = Self(Slot::zeros());
        fill(secret.0.bytes_mut())?;
        Ok(secret)
    }

    /// A secret of random bytes from the kernel.
    ///
    /// # Panics
    /// If the kernel has no randomness to give, which no supported kernel does after boot.
    #[must_use]
    pub fn random() -> Self {
        let mut secret = Self(Slot::zeros());
        fill_random(secret.0.bytes_mut());
        secret
    }

    /// The bytes. Every use of this is a place to audit.
    #[must_use]
    pub fn expose(&self) -> &[u8; N] {
        self.0.bytes()
    }
}

/// `N` random bytes from the kernel, for ids and nonces.
///
/// # Panics
/// If the kernel has no randomness to give, which no supported kernel does after boot.
#[must_use]
pub fn random_array<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    fill_random(&mut bytes);
    bytes
}

/// Going on without randomness would repeat nonces, so this is the one place that may stop the process.
#[allow(clippy::expect_used)]
fn fill_random(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("the kernel's random number generator");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_fill_returns_the_error() {
        assert_eq!(Secret::<4>::fill_with(|_| Err::<(), _>("no")).err(), Some("no"));
    }

    #[test]
    fn random_secrets_differ() {
        assert_ne!(Secret::<32>::random().expose(), Secret::<32>::random().expose());
    }
}
