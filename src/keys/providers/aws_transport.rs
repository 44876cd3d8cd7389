//! How the SDK's requests leave this machine: under TLS that trusts the system's certificates or those of
//! `AWS_CA_BUNDLE`, and in clear text only to where nobody else listens (`endpoint`).
//!
//! Invariants: a request of KMS, which may carry a plaintext key, goes in clear text to this machine only, whatever
//! named the endpoint; one for credentials also to the link-local addresses where AWS offers them; no proxy sees either; a
//! file of certificates is checked before the SDK, which would panic, sees it.

use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

use aws_sdk_kms::config::SharedHttpClient;
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, ConnectorBuilder};
use aws_smithy_runtime_api::client::dns::{DnsFuture, ResolveDns, ResolveDnsError};
use aws_smithy_runtime_api::client::http::{
    HttpClient as _, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector, http_client_fn,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;

use super::endpoint::{Trusted, check_url, goes_direct, is_own, read_bundle, resolve_own};

/// Names a file of the certificates that alone are trusted, as for other AWS programs.
pub(super) const CA_BUNDLE: &str = "AWS_CA_BUNDLE";

/// A way to send requests: under TLS, through the proxy that the environment names unless they stay on this machine.
///
/// # Errors
/// Why the certificates in `bundle` cannot be used.
pub(super) fn client(bundle: Option<&Path>) -> Result<SharedHttpClient, String> {
    let store = match bundle {
        None => TrustStore::default(),
        Some(path) => {
            let (pem, _) = read_bundle(path).map_err(|why| format!("{CA_BUNDLE}: {}: {why}", path.display()))?;
            TrustStore::empty().with_pem_certificate(pem)
        }
    };
    let context = TlsContext::builder().with_trust_store(store).build().map_err(|error| error.to_string())?;
    let begin = move |settings: Option<&HttpConnectorSettings>, components: Option<&RuntimeComponents>| {
        let mut builder =
            ConnectorBuilder::default().tls_provider(Provider::Rustls(CryptoMode::AwsLc)).tls_context(context.clone());
        builder.set_connector_settings(settings.cloned());
        if let Some(components) = components {
            builder.set_sleep_impl(components.sleep_impl());
        }
        builder
    };
    let direct = {
        let begin = begin.clone();
        Builder::new().build_with_connector_fn(move |settings, components| {
            begin(settings, components).build_with_resolver(Localhost)
        })
    };
    let proxied = Builder::new().build_with_connector_fn(move |settings, components| {
        begin(settings, components).proxy_config(ProxyConfig::from_env()).build()
    });
    Ok(http_client_fn(move |settings, components| {
        let [direct, proxied] = [&direct, &proxied].map(|client| client.http_connector(settings, components));
        SharedHttpConnector::new(Routes { direct, proxied })
    }))
}

/// A proxy reads what is sent in clear text, and has no way to this machine's loopback.
#[derive(Debug)]
struct Routes {
    direct: SharedHttpConnector,
    proxied: SharedHttpConnector,
}

impl HttpConnector for Routes {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        if goes_direct(request.uri()) { self.direct.call(request) } else { self.proxied.call(request) }
    }
}

/// Finds this machine under its own name, whatever the resolver says, and nobody else.
#[derive(Clone, Debug)]
struct Localhost;

impl ResolveDns for Localhost {
    fn resolve_dns<'a>(&'a self, name: &'a str) -> DnsFuture<'a> {
        let found = resolve_own(name).ok_or_else(|| ResolveDnsError::new("it is no name of this machine"));
        DnsFuture::ready(found.map(Vec::from))
    }
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
    fn a_bundle_that_cannot_be_used_is_named() {
        assert!(client(Some(Path::new("/nonexistent"))).unwrap_err().starts_with(CA_BUNDLE));
    }
}
