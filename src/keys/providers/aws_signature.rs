//! Signature Version 4 of requests to KMS, which are all alike: `POST /` without a query.

use std::time::SystemTime;

use aws_credential_types::Credentials;
use aws_lc_rs::{digest, hmac};
use aws_sdk_kms::primitives::{DateTime, DateTimeFormat};

use crate::format::hex;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
/// The header of a session's token.
pub(super) const TOKEN: &str = "x-amz-security-token";

/// What a signature is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Scope {
    /// As `YYYYMMDD`.
    day: String,
    region: String,
    service: String,
}

/// Signs requests of one day.
pub(super) struct Signer {
    access_key: String,
    scope: String,
    day: String,
    key: hmac::Key,
}

impl Signer {
    /// Derives the key of the day.
    pub(super) fn new(credentials: &Credentials, scope: Scope) -> Self {
        let Scope { day, region, service } = scope;
        let secret = zeroize::Zeroizing::new(format!("AWS4{}", credentials.secret_access_key()));
        let mut key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        for part in [&*day, &*region, &*service, "aws4_request"] {
            key = hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&key, part.as_bytes()).as_ref());
        }
        let scope = format!("{day}/{region}/{service}/aws4_request");
        Self { access_key: credentials.access_key_id().to_owned(), scope, day, key }
    }

    /// The header that signs `headers`, which are in the order of their names and have no spaces to spare, and `body`; none on
    /// another day.
    pub(super) fn authorization(&self, headers: &[(&'static str, &str)], date: &str, body: &[u8]) -> Option<String> {
        if !date.starts_with(&self.day) {
            return None;
        }
        let lines: String = headers.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
        let names = headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
        let signature = self.signature(&format!("POST\n/\n\n{lines}\n{names}\n{}", sha256(body)), date);
        let (access_key, scope) = (&self.access_key, &self.scope);
        Some(format!("{ALGORITHM} Credential={access_key}/{scope}, SignedHeaders={names}, Signature={signature}"))
    }

    /// Of a canonical request.
    fn signature(&self, canonical: &str, date: &str) -> String {
        let text = format!("{ALGORITHM}\n{date}\n{}\n{}", self.scope, sha256(canonical.as_bytes()));
        hex::encode(hmac::sign(&self.key, text.as_bytes()).as_ref())
    }
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(digest::digest(&digest::SHA256, bytes).as_ref())
}

/// The scope in an `authorization` header, if it is one of `access_key` for KMS.
pub(super) fn scope_of(authorization: &str, access_key: &str) -> Option<Scope> {
    let credential = authorization.strip_prefix(ALGORITHM)?.trim_start().strip_prefix("Credential=")?;
    let scope = credential.split(',').next()?.strip_prefix(access_key)?.strip_prefix('/')?;
    match scope.split('/').collect::<Vec<_>>()[..] {
        [day, region, service @ "kms", "aws4_request"] if day.len() == 8 => {
            let [day, region, service] = [day, region, service].map(str::to_owned);
            Some(Scope { day, region, service })
        }
        _ => None,
    }
}

/// The `host` header of a request to `uri`, if that is a host and nothing else.
pub(super) fn host_of(uri: &str) -> Option<String> {
    let (scheme, rest) = uri.split_once("://")?;
    let host = rest.strip_suffix('/').unwrap_or(rest);
    let default = match scheme {
        "https" => ":443",
        "http" => ":80",
        _ => return None,
    };
    let is_host = !host.is_empty() && !host.contains(['/', '?', '#', '@']);
    is_host.then(|| host.strip_suffix(default).unwrap_or(host).to_owned())
}

/// As `YYYYMMDDTHHMMSSZ`, which sorts by time.
pub(super) fn timestamp(time: SystemTime) -> Option<String> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let date = DateTime::from_secs(i64::try_from(since.as_secs()).ok()?);
    Some(date.fmt(DateTimeFormat::DateTime).ok()?.replace(['-', ':'], ""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn scope(service: &str) -> Scope {
        let [day, region, service] = ["20150830", "us-east-1", service].map(str::to_owned);
        Scope { day, region, service }
    }

    /// The example in the description of Signature Version 4.
    #[test]
    fn signatures_are_those_of_the_published_example() {
        let credentials =
            Credentials::new("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", None, None, "example");
        let empty = sha256(b"");
        let canonical = format!(
            "GET\n/\nAction=ListUsers&Version=2010-05-08\ncontent-type:application/x-www-form-urlencoded; \
             charset=utf-8\nhost:iam.amazonaws.com\nx-amz-date:20150830T123600Z\n\ncontent-type;host;x-amz-date\n{empty}"
        );
        assert_eq!(
            Signer::new(&credentials, scope("iam")).signature(&canonical, "20150830T123600Z"),
            "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7"
        );
        let signer = Signer::new(&credentials, scope("kms"));
        let headers = [("host", "kms.us-east-1.amazonaws.com"), ("x-amz-date", "20150830T123600Z")];
        let header = signer.authorization(&headers, "20150830T123600Z", b"{}").unwrap();
        assert_eq!(scope_of(&header, "AKIDEXAMPLE"), Some(scope("kms")));
        assert_eq!(signer.authorization(&headers, "20150831T000000Z", b"{}"), None);
    }

    #[test]
    fn only_what_kms_is_sent_is_repeated() {
        let header =
            |credential: &str| format!("{ALGORITHM} Credential={credential}, SignedHeaders=host, Signature=00");
        assert_eq!(scope_of(&header("A/20150830/us-east-1/kms/aws4_request"), "A"), Some(scope("kms")));
        for bad in ["AB/20150830/us-east-1/kms/aws4_request", "A/20150830/us-east-1/sts/aws4_request", "A/kms", ""] {
            assert_eq!(scope_of(&header(bad), "A"), None, "{bad}");
        }
        assert_eq!(scope_of("Bearer A", "A"), None);
    }

    #[test]
    fn the_host_is_named_as_it_is_sent() {
        for (uri, host) in [
            ("https://kms.us-east-1.amazonaws.com/", "kms.us-east-1.amazonaws.com"),
            ("https://kms.example.com:443", "kms.example.com"),
            ("https://kms.example.com:80/", "kms.example.com:80"),
            ("http://127.0.0.1:5000/", "127.0.0.1:5000"),
            ("http://[::1]:80/", "[::1]"),
        ] {
            assert_eq!(host_of(uri).as_deref(), Some(host), "{uri}");
        }
        for bad in ["", "/", "https://", "https://a@b/", "https://a/b", "https://a/?b", "ftp://a/"] {
            assert_eq!(host_of(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_time_is_written_as_signatures_have_it() {
        let time = SystemTime::UNIX_EPOCH + Duration::new(1_440_938_160, 999_999_999);
        assert_eq!(timestamp(time).as_deref(), Some("20150830T123600Z"));
    }
}
