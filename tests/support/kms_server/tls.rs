//! TLS with a certificate of its own for 127.0.0.1 and localhost, and a record of what clients offer.

use std::io;
use std::net::TcpStream;
use std::sync::{Arc, Mutex};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustls::crypto::aws_lc_rs as provider;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CipherSuite, NamedGroup, ServerConfig, ServerConnection, StreamOwned};

use super::{locked, random};

/// What a client offered, in its order.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    /// The cipher suites.
    pub suites: Vec<CipherSuite>,
    /// The groups for the key exchange.
    pub groups: Vec<NamedGroup>,
}

/// A certificate and its key.
pub(super) struct Identity {
    pub(super) pem: String,
    resolver: Arc<Resolver>,
}

#[derive(Debug)]
struct Resolver {
    key: Arc<CertifiedKey>,
    offers: Mutex<Vec<Offer>>,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let groups = hello.named_groups().unwrap_or_default().to_vec();
        locked(&self.offers).push(Offer { suites: hello.cipher_suites().to_vec(), groups });
        Some(Arc::clone(&self.key))
    }
}

impl Identity {
    pub(super) fn generate() -> Self {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("a key");
        let certificate = certificate(&key);
        let pem = pem(&certificate);
        let private = key.to_pkcs8v1().expect("an encoding");
        let private = PrivatePkcs8KeyDer::from(private.as_ref().to_vec()).into();
        let signing = provider::sign::any_ecdsa_type(&private).expect("a P-256 key");
        let key = Arc::new(CertifiedKey::new(vec![CertificateDer::from(certificate)], signing));
        Self { pem, resolver: Arc::new(Resolver { key, offers: Mutex::default() }) }
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        let builder = ServerConfig::builder_with_provider(Arc::new(provider::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().expect("known versions").with_no_client_auth();
        let resolver: Arc<dyn ResolvesServerCert> = Arc::clone(&self.resolver) as _;
        Arc::new(builder.with_cert_resolver(resolver))
    }

    pub(super) fn offers(&self) -> Vec<Offer> {
        locked(&self.resolver.offers).clone()
    }
}

/// The stream under TLS.
pub(super) fn accept(
    config: &Arc<ServerConfig>,
    stream: TcpStream,
) -> io::Result<StreamOwned<ServerConnection, TcpStream>> {
    let connection = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
    Ok(StreamOwned::new(connection, stream))
}

/// A self-signed certificate in DER, RFC 5280 section 4.1. It is not a CA's: an end's own certificate may only be
/// trusted directly.
fn certificate(key: &EcdsaKeyPair) -> Vec<u8> {
    const ECDSA_WITH_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
    const EC_PUBLIC_KEY: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1];
    const P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];
    const COMMON_NAME: &[u8] = &[0x55, 4, 3];
    const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];
    const INTEGER: u8 = 2;
    const BITS: u8 = 3;
    const OCTETS: u8 = 4;
    const OID: u8 = 6;
    const UTF8: u8 = 0xc;
    const TIME: u8 = 0x17;
    const SEQUENCE: u8 = 0x30;
    const SET: u8 = 0x31;
    let algorithm = der(SEQUENCE, &[&der(OID, &[ECDSA_WITH_SHA256])]);
    let attribute = der(SEQUENCE, &[&der(OID, &[COMMON_NAME]), &der(UTF8, &[b"a KMS for tests"])]);
    let name = der(SEQUENCE, &[&der(SET, &[&attribute])]);
    let validity = der(SEQUENCE, &[&der(TIME, &[b"250101000000Z"]), &der(TIME, &[b"491231235959Z"])]);
    let curve = der(SEQUENCE, &[&der(OID, &[EC_PUBLIC_KEY]), &der(OID, &[P256])]);
    let public = der(SEQUENCE, &[&curve, &der(BITS, &[&[0], key.public_key().as_ref()])]);
    let names = der(SEQUENCE, &[&der(0x82, &[b"localhost"]), &der(0x87, &[&[127, 0, 0, 1]])]);
    let extension = der(SEQUENCE, &[&der(OID, &[SUBJECT_ALT_NAME]), &der(OCTETS, &[&names])]);
    let extensions = der(0xa3, &[&der(SEQUENCE, &[&extension])]);
    let version = der(0xa0, &[&der(INTEGER, &[&[2]])]);
    // A leading 1 keeps the number positive and in its shortest form.
    let serial = der(INTEGER, &[&[1], &random::<8>()]);
    let body = der(SEQUENCE, &[&version, &serial, &algorithm, &name, &validity, &name, &public, &extensions]);
    let signature = key.sign(&aws_lc_rs::rand::SystemRandom::new(), &body).expect("a signature");
    der(SEQUENCE, &[&body, &algorithm, &der(BITS, &[&[0], signature.as_ref()])])
}

/// A value of `tag` with the given parts as its content.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let length = u16::try_from(content.len()).expect("a short certificate").to_be_bytes();
    let length = match length {
        [0, length @ ..0x80] => vec![length],
        [0, length] => vec![0x81, length],
        [high, low] => vec![0x82, high, low],
    };
    [&[tag], &length[..], &content].concat()
}

fn pem(certificate: &[u8]) -> String {
    let text = BASE64.encode(certificate);
    let lines: Vec<_> = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}
