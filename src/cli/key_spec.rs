//! `PROVIDER:ID`: how a key is named in arguments.

use std::fmt;
use std::str::FromStr;

use crate::keys::ProviderKind;

/// A wrapping key as its provider names it, or for `local` the path of a keyring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeySpec {
    /// Whose key it is.
    pub(crate) kind: ProviderKind,
    /// What follows the colon.
    pub(crate) id: String,
}

impl KeySpec {
    /// The id without what only this host needs to know of it: the query of a URI of PKCS #11.
    pub(crate) fn key(&self) -> &str {
        match self.kind {
            ProviderKind::Pkcs11 => self.id.split('?').next().unwrap_or_default(),
            _ => &self.id,
        }
    }
}

impl FromStr for KeySpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // These say themselves whose they are.
        let plain = [("arn:", ProviderKind::AwsKms), ("age1", ProviderKind::Age)];
        if let Some((_, kind)) = plain.into_iter().find(|(start, _)| text.starts_with(start)) {
            return Ok(Self { kind, id: text.to_owned() });
        }
        if text.starts_with("alias/") {
            return Err(format!("write aws-kms:{text}"));
        }
        if text.starts_with(['/', '.', '~']) || text.ends_with(".toml") && !text.contains(':') {
            return Err(format!("write local:{text} for a keyring file"));
        }
        let shape = "expected local:PATH, aws-kms:KEY, vault:KEY, pkcs11:URI or age:RECIPIENT";
        let (kind, id) = text.split_once(':').ok_or(shape)?;
        let kind = ProviderKind::from_name(kind).ok_or_else(|| format!("no provider is called {kind:?}: {shape}"))?;
        if id.is_empty() {
            return Err(format!("nothing after {kind}: {shape}"));
        }
        Ok(Self { kind, id: id.to_owned() })
    }
}

impl fmt::Display for KeySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind, self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arns_keep_their_colons() {
        let spec: KeySpec = "aws-kms:arn:aws:kms:eu-west-1:1:key/2".parse().unwrap();
        assert_eq!((spec.kind, spec.id.as_str()), (ProviderKind::AwsKms, "arn:aws:kms:eu-west-1:1:key/2"));
        assert_eq!(spec.to_string(), "aws-kms:arn:aws:kms:eu-west-1:1:key/2");
    }

    #[test]
    fn what_says_whose_it_is_needs_no_provider_and_the_rest_is_told_what_to_write() {
        for (text, whole) in
            [("arn:aws:kms:r:1:key/2", "aws-kms:arn:aws:kms:r:1:key/2"), ("age1zvkyg2l", "age:age1zvkyg2l")]
        {
            assert_eq!(text.parse::<KeySpec>().unwrap().to_string(), whole);
        }
        for (text, advice) in
            [("alias/a", "aws-kms:alias/a"), ("/a/k.toml", "local:/a/k.toml"), ("k.toml", "local:k.toml")]
        {
            assert!(text.parse::<KeySpec>().unwrap_err().contains(advice), "{text}");
        }
    }

    #[test]
    fn refuses_what_names_no_key() {
        for bad in ["", "local", "local:", "gpg:1", "/a/path", ":x"] {
            bad.parse::<KeySpec>().unwrap_err();
        }
    }
}
