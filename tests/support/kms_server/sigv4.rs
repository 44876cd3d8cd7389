//! Signature Version 4, as a server checks it and a client makes it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use aws_lc_rs::{constant_time, hmac};

use super::failure::{Failure, failure};
use super::wire::Request;
use super::{ACCESS_KEY, hex, locked, now, sha256};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
/// How far the clocks may differ, in seconds.
const MAX_SKEW: u64 = 300;
/// What a signature must cover, or a request could be used for another operation, host or time.
const REQUIRED: [&str; 3] = ["host", "x-amz-date", "x-amz-target"];

/// Checks a request's signature, and returns the Region it was made for and the access key.
pub(super) fn verify(
    request: &Request,
    secret_of: impl Fn(&str) -> Option<String>,
) -> Result<(String, String), Failure> {
    let missing = || failure("MissingAuthenticationTokenException", "Missing Authentication Token");
    let authorization = request.header("authorization").ok_or_else(missing)?;
    let incomplete = || failure("IncompleteSignatureException", "Authorization header is incomplete");
    let fields = authorization.strip_prefix(ALGORITHM).ok_or_else(incomplete)?;
    let field = |name: &str| fields.split(',').find_map(|field| field.trim().strip_prefix(name)?.strip_prefix('='));
    let [Some(credential), Some(signed), Some(signature)] = ["Credential", "SignedHeaders", "Signature"].map(field)
    else {
        return Err(incomplete());
    };
    let (access_key, scope) = credential.split_once('/').ok_or_else(incomplete)?;
    let unknown = || failure("UnrecognizedClientException", "The security token included in the request is invalid.");
    let secret = secret_of(access_key).ok_or_else(unknown)?;
    let invalid = |message: &str| failure("InvalidSignatureException", message);
    let [day, region, "kms", "aws4_request"] = scope.split('/').collect::<Vec<_>>()[..] else {
        return Err(invalid("Credential should be scoped to correct service: 'kms'."));
    };
    let signed: Vec<_> = signed.split(';').collect();
    if let Some(name) = REQUIRED.into_iter().find(|name| !signed.contains(name)) {
        return Err(invalid(&format!("'{name}' must be a 'SignedHeader' in the AWS Authorization.")));
    }
    let date = request.header("x-amz-date").unwrap_or_default();
    if date < &*timestamp(now() - MAX_SKEW) || date > &*timestamp(now() + MAX_SKEW) || !date.starts_with(day) {
        return Err(invalid(&format!("Signature expired: {date} is not near {}", timestamp(now()))));
    }
    let expected = signature_of(request, scope, &signed, &secret);
    if constant_time::verify_slices_are_equal(expected.as_bytes(), signature.as_bytes()).is_err() {
        return Err(invalid("The request signature we calculated does not match the signature you provided."));
    }
    Ok((region.to_owned(), access_key.to_owned()))
}

/// A signed request for an operation of KMS.
pub(crate) fn request(host: &str, region: &str, secret: &str, operation: &str, body: &str) -> Request {
    let date = timestamp(now());
    let headers = [
        ("content-type", "application/x-amz-json-1.1"),
        ("host", host),
        ("x-amz-date", &date),
        ("x-amz-target", &format!("TrentService.{operation}")),
    ];
    let signed = headers.map(|(name, _)| name);
    let mut request = Request {
        method: "POST".to_owned(),
        path: "/".to_owned(),
        headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
        body: body.into(),
        is_last: false,
    };
    let scope = format!("{}/{region}/kms/aws4_request", &date[..8]);
    let signature = signature_of(&request, &scope, &signed, secret);
    let signed = signed.join(";");
    let authorization =
        format!("{ALGORITHM} Credential={ACCESS_KEY}/{scope}, SignedHeaders={signed}, Signature={signature}");
    request.headers.push(("authorization".to_owned(), authorization));
    request.headers.push(("content-length".to_owned(), request.body.len().to_string()));
    request
}

/// The signature in hexadecimal. A query is not part of any request to KMS.
pub(crate) fn signature_of(request: &Request, scope: &str, signed: &[&str], secret: &str) -> String {
    let header = |name: &&str| {
        let value = request.header(name).unwrap_or_default();
        format!("{name}:{}\n", value.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let headers: String = signed.iter().map(header).collect();
    let (method, path, signed) = (&request.method, &request.path, signed.join(";"));
    let body = hex(sha256(&request.body).as_ref());
    let canonical = format!("{method}\n{path}\n\n{headers}\n{signed}\n{body}");
    let date = request.header("x-amz-date").unwrap_or_default();
    let text = format!("{ALGORITHM}\n{date}\n{scope}\n{}", hex(sha256(canonical.as_bytes()).as_ref()));
    hex(hmac::sign(&signing_key(scope, secret), text.as_bytes()).as_ref())
}

/// Derived once for a day, as clients do.
fn signing_key(scope: &str, secret: &str) -> Arc<hmac::Key> {
    const MOST: usize = 64;
    static KEYS: Mutex<BTreeMap<(String, String), Arc<hmac::Key>>> = Mutex::new(BTreeMap::new());
    let of = (scope.to_owned(), secret.to_owned());
    let mut keys = locked(&KEYS);
    if let Some(key) = keys.get(&of) {
        return Arc::clone(key);
    }
    if keys.len() >= MOST {
        keys.clear();
    }
    let new = |bytes: &[u8]| hmac::Key::new(hmac::HMAC_SHA256, bytes);
    let first = new(format!("AWS4{secret}").as_bytes());
    let key = scope.split('/').fold(first, |key, part| new(hmac::sign(&key, part.as_bytes()).as_ref()));
    let key = Arc::new(key);
    keys.insert(of, Arc::clone(&key));
    key
}

/// Seconds since 1970 as `YYYYMMDDTHHMMSSZ`, which sorts by time. The date by Hinnant's `civil_from_days`.
pub(crate) fn timestamp(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
}
