//! What the transit engine tells of a key, and whether such a key can wrap.

use std::collections::HashMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::{KeyDescription, KeyState, ProviderErrorKind};
use super::vault_client::Refusal;

/// What the engine tells of a key.
#[derive(Deserialize)]
pub(super) struct TransitKey {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    keys: HashMap<String, IgnoredAny>,
    #[serde(default)]
    latest_version: u64,
    #[serde(default)]
    min_decryption_version: u64,
    #[serde(default)]
    deletion_allowed: bool,
    #[serde(default)]
    derived: bool,
    #[serde(default)]
    exportable: bool,
    #[serde(default)]
    soft_deleted: bool,
    #[serde(default)]
    imported_key: bool,
    #[serde(default)]
    auto_rotate_period: u64,
}

impl TransitKey {
    /// Whether it can wrap, bound to a context.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn check_wraps(&self) -> Result<(), Refusal> {
        let misconfigured = |why: String| Err((ProviderErrorKind::Misconfigured, why));
        if self.soft_deleted {
            return Err((ProviderErrorKind::KeyUnusable, "the key is deleted, but can be restored".to_owned()));
        }
        if self.derived {
            return misconfigured("the key is one that others are derived of".to_owned());
        }
        if !(self.kind.contains("gcm") || self.kind.contains("poly1305")) {
            return misconfigured(format!("a key of type {} binds nothing to what it wraps", self.kind));
        }
        Ok(())
    }

    /// For people.
    pub(super) fn description(&self, key_id: String) -> KeyDescription {
        let state = match self.check_wraps() {
            _ if self.soft_deleted => KeyState::Disabled,
            Ok(()) => KeyState::Enabled,
            Err((_, why)) => KeyState::Unknown(why),
        };
        let every = match self.auto_rotate_period / 3600 {
            0 => "by hand".to_owned(),
            hours => format!("every {hours} hours"),
        };
        let (oldest, latest) = (self.min_decryption_version, self.latest_version);
        let mut usage = format!("{} (versions {oldest} to {latest} unwrap)", self.kind);
        if self.deletion_allowed {
            usage.push_str(", its deletion is allowed");
        }
        if self.exportable {
            usage.push_str(", exportable");
        }
        KeyDescription {
            key_id,
            state,
            rotation: Some(format!(
                "{every}, {} version{} there",
                self.keys.len(),
                if self.keys.len() == 1 { "" } else { "s" }
            )),
            origin: Some(if self.imported_key { "imported".to_owned() } else { "the server".to_owned() }),
            multi_region: false,
            usage,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_cannot_bind_a_context_are_described_so() {
        let key = |json: &str| serde_json::from_str::<TransitKey>(json).unwrap();
        let good = key(r#"{"type":"aes256-gcm96","keys":{"1":1,"2":2},"latest_version":2,"min_decryption_version":1}"#);
        let described = good.description("transit/a".into());
        assert_eq!(described.state, KeyState::Enabled);
        assert!(described.to_string().contains("versions 1 to 2 unwrap"), "{described}");
        for (json, kind) in [
            (r#"{"type":"rsa-2048"}"#, ProviderErrorKind::Misconfigured),
            (r#"{"type":"aes256-gcm96","derived":true}"#, ProviderErrorKind::Misconfigured),
            (r#"{"type":"aes256-gcm96","soft_deleted":true}"#, ProviderErrorKind::KeyUnusable),
        ] {
            assert_eq!(key(json).check_wraps().unwrap_err().0, kind, "{json}");
        }
    }
}
