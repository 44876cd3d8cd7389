//! Where secrets may be sent: under TLS to whom a trusted certificate names, in clear text to this machine only.
//!
//! Invariant: a file of certificates is checked before a client of HTTP, which could panic or trust nobody, sees it.

use std::fs::File;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// A file of certificates is not longer; the system's own has some 200 KiB.
const MAX_BUNDLE_LEN: u64 = 16 << 20;

/// Which addresses may be spoken to in clear text.
pub(super) type Trusted = fn(IpAddr) -> bool;

/// The content of a file of certificates and the certificates in it, all of which can be used, at least one.
///
/// # Errors
/// Why they cannot be used.
pub(super) fn read_bundle(path: &Path) -> Result<(Vec<u8>, Vec<CertificateDer<'static>>), String> {
    let mut pem = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(MAX_BUNDLE_LEN + 1).read_to_end(&mut pem).map_err(|error| error.to_string())?;
    if pem.len() as u64 > MAX_BUNDLE_LEN {
        return Err(format!("larger than {MAX_BUNDLE_LEN} bytes"));
    }
    let (mut store, mut certificates) = (RootCertStore::empty(), Vec::new());
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| format!("not PEM: {error}"))?;
        certificates.push(certificate.clone());
        store.add(certificate).map_err(|error| format!("certificate {}: {error}", store.len() + 1))?;
    }
    if store.is_empty() { Err("it holds no certificate".to_owned()) } else { Ok((pem, certificates)) }
}

/// Whether secrets may be sent to `url`: under TLS, or in clear text to `trusted` addresses.
///
/// # Errors
/// Why not.
pub(super) fn check_url(url: &str, trusted: Trusted) -> Result<(), String> {
    let (scheme, host) = scheme_and_host(url);
    let is_trusted = || host_address(host).is_some_and(trusted);
    match scheme.to_ascii_lowercase().as_str() {
        "https" => Ok(()),
        "http" if is_trusted() => Ok(()),
        "http" => Err(format!(
            "http://{host} would carry secrets in clear text: use https, or a tunnel from an address of this machine \
             (127.0.0.1)"
        )),
        _ => Err("an endpoint is a URL that begins with https://".to_owned()),
    }
}

/// Whether a request to `url` passes no proxy: what is in clear text, which the proxy would read, and what stays on this
/// machine.
pub(super) fn goes_direct(url: &str) -> bool {
    let (scheme, host) = scheme_and_host(url);
    !scheme.eq_ignore_ascii_case("https") || host_address(host).is_some_and(is_own)
}

/// The addresses of this machine under a name that only it has, whatever a resolver says.
pub(super) fn resolve_own(name: &str) -> Option<[IpAddr; 2]> {
    name.eq_ignore_ascii_case("localhost").then(|| [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()])
}

/// The scheme and `HOST[:PORT]`.
fn scheme_and_host(url: &str) -> (&str, &str) {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    (scheme, authority.rsplit('@').next().unwrap_or_default())
}

/// The address in `HOST[:PORT]`, if its host is not a name that anybody could answer for.
fn host_address(host: &str) -> Option<IpAddr> {
    if let Some((address, _)) = host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return address.parse().ok().map(IpAddr::V6);
    }
    match host.split(':').next().unwrap_or_default() {
        name if resolve_own(name).is_some() => Some(Ipv4Addr::LOCALHOST.into()),
        address => address.parse().ok().map(IpAddr::V4),
    }
}

/// Addresses of this machine.
pub(super) fn is_own(address: IpAddr) -> bool {
    address.is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clear_text_stays_on_this_machine() {
        for good in [
            "https://kms.example.com",
            "HTTPS://a@b",
            "http://127.0.0.1:80/",
            "http://127.1.2.3",
            "http://localhost:5000",
            "http://LocalHost/?a",
            "http://[::1]:5000",
            "http://user@127.0.0.1",
        ] {
            assert_eq!(check_url(good, is_own), Ok(()), "{good}");
        }
        for bad in [
            "http://kms.example.com",
            "http://10.0.0.1:80",
            "http://169.254.169.254",
            "http://localhost.example.com",
            "http://127.0.0.1.example.com",
            "http://127.0.0.1@example.com",
            "http://example.com/127.0.0.1",
            "http://example.com?@127.0.0.1",
            "http://example.com#@127.0.0.1",
            "http://[2001:db8::1]",
            "http://[::1",
            "http://0.0.0.0",
            "Http://a",
            "ftp://127.0.0.1",
            "127.0.0.1:80",
            "http://",
            "",
        ] {
            assert!(check_url(bad, is_own).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_proxy_sees_nothing_in_clear_text_and_nothing_of_this_machine() {
        for direct in ["http://127.0.0.1:1", "HTTP://kms.example.com", "http://169.254.169.254/", "https://[::1]:8200"]
        {
            assert!(goes_direct(direct), "{direct}");
        }
        for proxied in ["https://kms.example.com", "https://localhost.example.com", "HTTPS://127.0.0.1@example.com"] {
            assert!(!goes_direct(proxied), "{proxied}");
        }
        assert!(resolve_own("LocalHost").is_some_and(|own| own.into_iter().all(is_own)));
        assert!(resolve_own("localhost.example.com").is_none());
    }

    #[test]
    fn a_bundle_without_usable_certificates_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bundle.pem");
        assert!(read_bundle(&path).is_err());
        let pem = |body: &str| format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n");
        for bad in
            [String::new(), "hello".to_owned(), pem("AAAA"), pem("!"), "-----BEGIN CERTIFICATE-----\n".to_owned()]
        {
            std::fs::write(&path, &bad).unwrap();
            assert!(read_bundle(&path).is_err(), "{bad}");
        }
    }
}
