//! What a provider says of a wrapping key: for people, and for `kmsfs doctor`. Nothing is decided by it.

use std::fmt;

/// A wrapping key as its provider describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyDescription {
    /// The key's canonical id, as in [`super::WrappedKey::key_id`].
    pub key_id: String,
    /// Whether it may be used.
    pub state: KeyState,
    /// How it is rotated; none if the provider does not tell, or not to this caller.
    pub rotation: Option<String>,
    /// Where its material comes from, if the provider tells.
    pub origin: Option<String>,
    /// Whether keys of other Regions have the same material.
    pub multi_region: bool,
    /// What it is for, in the provider's words.
    pub usage: String,
}

/// Whether a wrapping key may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// For everything.
    Enabled,
    /// For nothing, until it is enabled again.
    Disabled,
    /// For nothing, and it will be gone for good at this date, if the provider tells it.
    PendingDeletion(Option<String>),
    /// For nothing, while its material or its key store is missing.
    Unavailable,
    /// The provider's words for what this program does not know.
    Unknown(String),
}

impl KeyState {
    /// What to do about a key that cannot be used; none if it can, or if nobody knows.
    #[must_use]
    pub fn advice(&self) -> Option<&'static str> {
        match self {
            Self::Enabled | Self::Unknown(_) => None,
            Self::Disabled => Some("enable the key: until then nothing that it wraps can be opened"),
            Self::PendingDeletion(_) => {
                Some("cancel the deletion and enable the key: once it is gone, everything that it wraps is lost")
            }
            Self::Unavailable => Some("import the key's material, or connect its key store"),
        }
    }
}

impl fmt::Display for KeyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Enabled => f.write_str("enabled"),
            Self::Disabled => f.write_str("disabled"),
            Self::PendingDeletion(None) => f.write_str("pending deletion"),
            Self::PendingDeletion(Some(date)) => write!(f, "pending deletion at {date}"),
            Self::Unavailable => f.write_str("unavailable"),
            Self::Unknown(words) => write!(f, "in an unknown state ({words})"),
        }
    }
}

impl fmt::Display for KeyDescription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rotation = self.rotation.as_deref().unwrap_or("unknown");
        write!(f, "{}, rotation {rotation}, for {}", self.state, self.usage)?;
        if let Some(origin) = &self.origin {
            write!(f, ", origin {origin}")?;
        }
        f.write_str(if self.multi_region { ", multi-Region" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_that_stops_work_says_how_to_mend_it() {
        let date = || Some("2030-01-01T00:00:00Z".to_owned());
        for state in [KeyState::Disabled, KeyState::PendingDeletion(date()), KeyState::Unavailable] {
            assert!(state.advice().is_some(), "{state}");
        }
        assert_eq!(KeyState::PendingDeletion(date()).to_string(), "pending deletion at 2030-01-01T00:00:00Z");
        assert_eq!((KeyState::Enabled.advice(), KeyState::Unknown("x".into()).advice()), (None, None));
    }

    #[test]
    fn shows_what_is_known() {
        let description = KeyDescription {
            key_id: "k".into(),
            state: KeyState::Enabled,
            rotation: None,
            origin: Some("AWS_KMS".into()),
            multi_region: true,
            usage: "ENCRYPT_DECRYPT".into(),
        };
        let expected = "enabled, rotation unknown, for ENCRYPT_DECRYPT, origin AWS_KMS, multi-Region";
        assert_eq!(description.to_string(), expected);
    }
}
