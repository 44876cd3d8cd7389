//! How the SDK's requests leave this machine: under TLS that trusts the system's certificates or those of
//! `AWS_CA_BUNDLE`, and in clear text only to where nobody else listens.
//!
//! Invariants: a request of KMS, which may carry a plaintext key, goes in clear text to this machine only, whatever
//! named the endpoint; one for credentials also to the link-local addresses where AWS offers them; a file of
//! certificates is checked before the SDK, which would panic, sees it.

use std::fs::File;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use aws_sdk_kms::config::SharedHttpClient;
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, ConnectorBuilder};
use aws_smithy_runtime_api::client::http::{
    HttpClient as _, HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::result::ConnectorError;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// Names a file of the certificates that alone are trusted, as for other AWS programs.
pub(super) const CA_BUNDLE: &str = "AWS_CA_BUNDLE";
/// A file of certificates is not longer; the system's own has some 200 KiB.
const MAX_BUNDLE_LEN: u64 = 16 << 20;

/// Which addresses may be spoken to in clear text.
pub(super) type Trusted = fn(IpAddr) -> bool;

/// A way to send requests: under TLS, through the proxy that the environment names.
///
/// # Errors
/// Why the certificates in `bundle` cannot be used.
pub(super) fn client(bundle: Option<&Path>) -> Result<SharedHttpClient, String> {
    let store = match bundle {
        None => TrustStore::default(),
        Some(path) => {
            let pem = read_bundle(path).map_err(|why| format!("{CA_BUNDLE}: {}: {why}", path.display()))?;
            TrustStore::empty().with_pem_certificate(pem)
        }
    };
    let context = TlsContext::builder().with_trust_store(store).build().map_err(|error| error.to_string())?;
    Ok(Builder::new().build_with_connector_fn(move |settings, components| {
        let mut builder = ConnectorBuilder::default()
            .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
            .tls_context(context.clone())
            .proxy_config(ProxyConfig::from_env());
        builder.set_connector_settings(settings.cloned());
        if let Some(components) = components {
            builder.set_sleep_impl(components.sleep_impl());
        }
        builder.build()
    }))
}

/// The content of a file of certificates, all of which can be used, at least one.
fn read_bundle(path: &Path) -> Result<Vec<u8>, String> {
    let mut pem = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(MAX_BUNDLE_LEN + 1).read_to_end(&mut pem).map_err(|error| error.to_string())?;
    if pem.len() as u64 > MAX_BUNDLE_LEN {
        return Err(format!("larger than {MAX_BUNDLE_LEN} bytes"));
    }
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| format!("not PEM: {error}"))?;
        store.add(certificate).map_err(|error| format!("certificate {}: {error}", store.len() + 1))?;
    }
    if store.is_empty() { Err("it holds no certificate".to_owned()) } else { Ok(pem) }
}

/// `client`, but in clear text to `trusted` addresses only.
pub(super) fn guarded(client: SharedHttpClient, trusted: Trusted) -> SharedHttpClient {
    http_client_fn(move |settings, components| {
        SharedHttpConnector::new(Guard { inner: client.http_connector(settings, components), trusted })
    })
}

#[derive(Debug)]
struct Guard {
    inner: SharedHttpConnector,
    trusted: Trusted,
}

impl HttpConnector for Guard {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        match check_url(request.uri(), self.trusted) {
            Ok(()) => self.inner.call(request),
            Err(why) => HttpConnectorFuture::ready(Err(ConnectorError::user(why.into()))),
        }
    }
}

/// Whether secrets may be sent to `url`: under TLS, or in clear text to `trusted` addresses.
///
/// # Errors
/// Why not.
pub(super) fn check_url(url: &str, trusted: Trusted) -> Result<(), String> {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
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

/// The address in `HOST[:PORT]`, if its host is not a name that anybody could answer for.
fn host_address(host: &str) -> Option<IpAddr> {
    if let Some((address, _)) = host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return address.parse().ok().map(IpAddr::V6);
    }
    match host.split(':').next().unwrap_or_default() {
        name if name.eq_ignore_ascii_case("localhost") => Some(Ipv4Addr::LOCALHOST.into()),
        address => address.parse().ok().map(IpAddr::V4),
    }
}

/// Addresses of this machine.
pub(super) fn is_own(address: IpAddr) -> bool {
    address.is_loopback()
}

/// Also those where AWS offers credentials to what runs on its machines.
pub(super) fn is_own_or_link_local(address: IpAddr) -> bool {
    const AWS: [u16; 2] = [0xfd00, 0xec2];
    is_own(address)
        || match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local() || Ipv6Addr::segments(&address)[..2] == AWS,
        }
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
    fn credentials_may_come_from_where_aws_offers_them() {
        for good in
            ["http://169.254.169.254/latest", "http://169.254.170.2", "http://[fd00:ec2::254]", "http://[fe80::1]"]
        {
            assert_eq!(check_url(good, is_own_or_link_local), Ok(()), "{good}");
        }
        for bad in ["http://10.0.0.1", "http://[fd00:ec3::1]", "http://sts.example.com"] {
            assert!(check_url(bad, is_own_or_link_local).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_bundle_without_usable_certificates_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bundle.pem");
        assert!(client(Some(&path)).unwrap_err().starts_with(CA_BUNDLE));
        let pem = |body: &str| format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n");
        for bad in
            [String::new(), "hello".to_owned(), pem("AAAA"), pem("!"), "-----BEGIN CERTIFICATE-----\n".to_owned()]
        {
            std::fs::write(&path, &bad).unwrap();
            assert!(read_bundle(&path).is_err(), "{bad}");
        }
    }
}
