//! URIs of PKCS #11 (RFC 7512): which key on which token, and what only this host can know of the way to it.
//!
//! Invariant: what names a key in a volume has no query, so no cipher directory can name a module to load or a file to read.

use std::fmt::Write as _;
use std::path::PathBuf;

/// A key on a token, as the path of a URI names it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct KeyName {
    pub(super) token: Option<String>,
    pub(super) serial: Option<String>,
    pub(super) manufacturer: Option<String>,
    pub(super) model: Option<String>,
    pub(super) object: Option<String>,
    pub(super) id: Option<Vec<u8>>,
}

/// What the query of a URI says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Query {
    pub(super) module: Option<PathBuf>,
    pub(super) pin_file: Option<PathBuf>,
}

/// What is wrong with a URI.
type Why = String;

impl KeyName {
    /// From a path without `pkcs11:` and without a query.
    ///
    /// # Errors
    /// What is wrong.
    pub(super) fn parse(path: &str) -> Result<Self, Why> {
        if path.contains('?') {
            return Err("a key of a volume has no query: name the module with --pkcs11-module".to_owned());
        }
        let mut name = Self::default();
        for attribute in path.split(';').filter(|attribute| !attribute.is_empty()) {
            let (key, value) = attribute.split_once('=').ok_or_else(|| format!("{attribute:?} has no value"))?;
            let bytes = decode(value)?;
            let text = || String::from_utf8(bytes.clone()).map_err(|_| format!("the value of {key} is not UTF-8"));
            let twice = match key {
                "token" => name.token.replace(text()?).is_some(),
                "serial" => name.serial.replace(text()?).is_some(),
                "manufacturer" => name.manufacturer.replace(text()?).is_some(),
                "model" => name.model.replace(text()?).is_some(),
                "object" => name.object.replace(text()?).is_some(),
                "id" => name.id.replace(bytes).is_some(),
                "type" if bytes == b"secret-key" => false,
                "type" => return Err("only keys of type secret-key wrap".to_owned()),
                _ => return Err(format!("the attribute {key:?} is not supported")),
            };
            if twice {
                return Err(format!("{key} is named twice"));
            }
        }
        match (&name.token, &name.serial, &name.object, &name.id) {
            (None, None, ..) => Err("it names no token: token=LABEL or serial=NUMBER".to_owned()),
            (.., None, None) => Err("it names no key: object=LABEL or id=%XX".to_owned()),
            _ => Ok(name),
        }
    }

    /// The one way to write it.
    pub(super) fn canonical(&self) -> String {
        let text = |text: &Option<String>| text.as_ref().map(|text| encode(text.as_bytes(), false));
        let attributes = [
            ("token", text(&self.token)),
            ("manufacturer", text(&self.manufacturer)),
            ("model", text(&self.model)),
            ("serial", text(&self.serial)),
            ("object", text(&self.object)),
            ("id", self.id.as_ref().map(|id| encode(id, true))),
        ];
        let written: Vec<_> =
            attributes.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?))).collect();
        written.join(";")
    }

    /// Whether a token with these labels can be the one.
    pub(super) fn is_on(&self, label: &str, serial: &str, manufacturer: &str, model: &str) -> bool {
        let fits =
            |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found.trim_end());
        fits(&self.token, label)
            && fits(&self.serial, serial)
            && fits(&self.manufacturer, manufacturer)
            && fits(&self.model, model)
    }
}

impl Query {
    /// From what follows the question mark.
    ///
    /// # Errors
    /// What is wrong.
    pub(super) fn parse(query: &str) -> Result<Self, Why> {
        let mut parsed = Self::default();
        for attribute in query.split('&').filter(|attribute| !attribute.is_empty()) {
            let (key, value) = attribute.split_once('=').ok_or_else(|| format!("{attribute:?} has no value"))?;
            let path = || {
                let path = String::from_utf8(decode(value)?).map_err(|_| format!("the value of {key} is not UTF-8"))?;
                let path = path.strip_prefix("file:").unwrap_or(&path);
                let path = path.strip_prefix("//").unwrap_or(path);
                if path.starts_with('/') { Ok(PathBuf::from(path)) } else { Err(format!("{key} is no absolute path")) }
            };
            match key {
                "module-path" => parsed.module = Some(path()?),
                "pin-source" => parsed.pin_file = Some(path()?),
                "pin-value" => return Err("a PIN in an argument is seen by everybody: use pin-source".to_owned()),
                _ => return Err(format!("the attribute {key:?} is not supported")),
            }
        }
        Ok(parsed)
    }
}

fn decode(value: &str) -> Result<Vec<u8>, Why> {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = rest.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let digits = digits.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.ok_or_else(|| format!("a % in {value:?} is not followed by two hexadecimal digits"))?);
        rest = &rest[2..];
    }
    Ok(bytes)
}

fn encode(bytes: &[u8], all: bool) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if !all && (byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)) {
            text.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn there_is_one_way_to_write_a_key() {
        for (given, canonical) in [
            ("token=kms;object=app", "token=kms;object=app"),
            ("object=app;type=secret-key;token=kms;", "token=kms;object=app"),
            ("token=My%20Token;id=%01%ab", "token=My%20Token;id=%01%AB"),
            ("serial=12;object=a%3bb", "serial=12;object=a%3Bb"),
        ] {
            let name = KeyName::parse(given).unwrap();
            assert_eq!(name.canonical(), canonical);
            assert_eq!(KeyName::parse(canonical).unwrap(), name);
        }
    }

    #[test]
    fn what_names_no_key_is_refused() {
        for bad in [
            "",
            "token=a",
            "object=a",
            "token=a;object",
            "token=a;object=%4",
            "token=a;object=%zz",
            "token=a;object=%+1",
            "token=a;object=b;slot-id=1",
            "token=a;token=b;object=c",
            "token=a;object=b;type=cert",
            "token=%ff;object=a",
            "token=a;object=b?module-path=/evil.so",
        ] {
            assert!(KeyName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_query_names_files_and_no_pin() {
        let query = Query::parse("module-path=/usr/lib/x.so&pin-source=file:///etc/pin%20file").unwrap();
        assert_eq!(query.module.as_deref(), Some(Path::new("/usr/lib/x.so")));
        assert_eq!(query.pin_file.as_deref(), Some(Path::new("/etc/pin file")));
        assert_eq!(Query::parse("pin-source=file:/a").unwrap().pin_file.as_deref(), Some(Path::new("/a")));
        for bad in ["pin-value=1234", "module-path=x.so", "module-path", "a=b"] {
            let why = Query::parse(bad).unwrap_err();
            assert!(!why.contains("1234"), "{why}");
        }
    }

    #[test]
    fn tokens_are_told_apart_by_all_that_is_named() {
        let name = KeyName::parse("token=kms;serial=12;object=a").unwrap();
        assert!(name.is_on("kms", "12", "any", "any") && name.is_on("kms   ", "12", "", ""));
        assert!(!name.is_on("kms", "13", "", "") && !name.is_on("other", "12", "", ""));
    }
}
