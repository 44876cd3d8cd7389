//! The cipher suites of format version 1.

use std::fmt;

/// An AEAD with a 256-bit key, a 24-byte nonce and a 16-byte tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Suite {
    /// XAES-256-GCM (C2SP): AES-256-GCM under a key derived from the first half of the nonce.
    Xaes256Gcm,
    /// XChaCha20-Poly1305, for CPUs without AES instructions.
    XChaCha20Poly1305,
}

impl Suite {
    /// Both suites, in the order of their ids.
    pub const ALL: [Self; 2] = [Self::Xaes256Gcm, Self::XChaCha20Poly1305];

    /// The id on disk.
    #[must_use]
    pub fn id(self) -> u8 {
        match self {
            Self::Xaes256Gcm => 1,
            Self::XChaCha20Poly1305 => 2,
        }
    }

    /// The suite with this id on disk.
    #[must_use]
    pub fn from_id(id: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|suite| suite.id() == id)
    }

    /// The name in configuration and arguments.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Xaes256Gcm => "xaes-256-gcm",
            Self::XChaCha20Poly1305 => "xchacha20-poly1305",
        }
    }

    /// The suite with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|suite| suite.name() == name)
    }

    /// The suite that is faster on this CPU: XAES-256-GCM where AES and carry-less multiplication are instructions.
    #[must_use]
    pub fn fastest_here() -> Self {
        if cpu_has_aes() { Self::Xaes256Gcm } else { Self::XChaCha20Poly1305 }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_has_aes() -> bool {
    std::is_x86_feature_detected!("aes") && std::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(target_arch = "aarch64")]
fn cpu_has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_has_aes() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names_round_trip() {
        for suite in Suite::ALL {
            assert_eq!(Suite::from_id(suite.id()), Some(suite));
            assert_eq!(Suite::from_name(suite.name()), Some(suite));
        }
        assert_eq!(Suite::from_id(0), None);
        assert_eq!(Suite::from_name("null"), None);
    }
}
