//! How calls reach AWS: whose certificates are trusted, which host is called, and that no key goes over a network in
//! clear text.
//!
//! Each case runs the program itself, in an environment of its own.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc;
use std::time::Duration;

use crate::support::aws_account::{AwsAccount, CONTAINER_TOKEN};
use crate::support::kms_server::{KmsServer, Options};
use crate::support::moto;
use crate::support::{self, Home};

const ARN: &str = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";
const PATIENCE: Duration = Duration::from_secs(60);

/// A home with credentials, for a machine that may be busy.
fn home() -> Home {
    let mut home = Home::new();
    moto::environment().iter().for_each(|(name, value)| home.set(*name, *value));
    home.set("KMSFS_KMS_ATTEMPT_TIMEOUT", "20");
    home.set("KMSFS_KMS_OPERATION_TIMEOUT", "40");
    home
}

fn set_file(home: &mut Home, variable: &str, content: &str) {
    let path = home.path(variable);
    fs::write(&path, content).unwrap();
    home.set(variable, path);
}

/// Tries to make a volume under `arn`, which must end with this exit code; returns what it says.
fn init_refused(home: &Home, code: i32, arn: &str) -> String {
    home.refused(code, &[&"init", &"cipher", &"--key", &format!("aws-kms:{arn}")])
}

// ---- TLS ----

/// What a client offers in its first message, RFC 8446 section 4.1.2: cipher suites, groups and versions.
fn client_hello(message: &[u8]) -> [Vec<u16>; 3] {
    fn take<'a>(bytes: &mut &'a [u8], length: usize) -> &'a [u8] {
        let (taken, rest) = bytes.split_at(length);
        *bytes = rest;
        taken
    }
    /// What stands behind its length, which has `width` bytes.
    fn vector<'a>(bytes: &mut &'a [u8], width: usize) -> &'a [u8] {
        let length = take(bytes, width).iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        take(bytes, length)
    }
    let numbers = |bytes: &[u8]| bytes.chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
    let mut rest = message;
    assert_eq!(take(&mut rest, 1), [1], "a ClientHello");
    let mut body = vector(&mut rest, 3);
    take(&mut body, 2 + 32);
    vector(&mut body, 1);
    let suites = numbers(vector(&mut body, 2));
    vector(&mut body, 1);
    let mut extensions = vector(&mut body, 2);
    let (mut groups, mut versions) = (Vec::new(), Vec::new());
    while !extensions.is_empty() {
        let kind = take(&mut extensions, 2);
        let mut content = vector(&mut extensions, 2);
        match kind {
            [0, 10] => groups = numbers(vector(&mut content, 2)),
            [0, 43] => versions = numbers(vector(&mut content, 1)),
            _ => {}
        }
    }
    [suites, groups, versions]
}

/// Every suite has a key exchange that is forgotten (TLS 1.3, or ECDHE) and an AEAD; the first group is a hybrid with
/// ML-KEM.
#[test]
fn only_forward_secrecy_is_offered() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut home = home();
    home.set("AWS_ENDPOINT_URL_KMS", format!("https://{}", listener.local_addr().unwrap()));
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut head = [0; 5];
            stream.read_exact(&mut head).unwrap();
            assert_eq!(head[0], 22, "a handshake");
            let mut message = vec![0; usize::from(u16::from_be_bytes([head[3], head[4]]))];
            stream.read_exact(&mut message).unwrap();
            let _ = send.send(message);
        }
    });
    init_refused(&home, 8, ARN);
    let [suites, groups, versions] = client_hello(&receive.recv_timeout(PATIENCE).unwrap());
    let tls13 = [0x1302, 0x1301];
    let ecdhe = [0xc02c, 0xc02b, 0xc030, 0xc02f, 0xcca8];
    // It says that renegotiation is refused.
    let no_suite = [0x00ff];
    assert_eq!(suites, [&tls13[..], &ecdhe, &no_suite].concat(), "{suites:04x?}");
    assert_eq!(groups, [0x11ec, 0x001d, 0x0017, 0x0018], "{groups:04x?}");
    assert_eq!(versions, [0x0304, 0x0303], "{versions:04x?}");
}

#[test]
fn a_certificate_is_trusted_if_a_bundle_or_the_system_has_it() {
    for (variable, works) in [(None, false), (Some("AWS_CA_BUNDLE"), true), (Some("SSL_CERT_FILE"), true)] {
        let server = KmsServer::start_with(Options { tls: true, ..Options::default() }).unwrap();
        let mut home = home();
        home.set("AWS_ENDPOINT_URL_KMS", server.endpoint());
        if let Some(variable) = variable {
            set_file(&mut home, variable, server.certificate());
        }
        let arn = server.create_key().arn;
        if works {
            home.ok(&[&"init", &"cipher", &"--key", &format!("aws-kms:{arn}")]);
            home.ok(&[&"doctor", &"cipher"]);
            continue;
        }
        let said = init_refused(&home, 2, &arn);
        for expected in ["certificate is not trusted", "AWS_CA_BUNDLE", "SSL_CERT_FILE"] {
            assert!(said.contains(expected), "{expected}: {said}");
        }
        assert_eq!(server.all_calls(), 0);
    }
}

/// The bundle is in the place of the system's certificates, not beside them.
#[test]
fn a_bundle_alone_is_trusted() {
    let [server, other] = [(); 2].map(|()| KmsServer::start_with(Options { tls: true, ..Options::default() }).unwrap());
    let mut home = home();
    home.set("AWS_ENDPOINT_URL_KMS", server.endpoint());
    set_file(&mut home, "SSL_CERT_FILE", server.certificate());
    set_file(&mut home, "AWS_CA_BUNDLE", other.certificate());
    let said = init_refused(&home, 2, &server.create_key().arn);
    assert!(said.contains("certificate is not trusted"), "{said}");
}

#[test]
fn a_bundle_that_cannot_be_used_is_named() {
    let mut home = home();
    for content in ["", "not a certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        set_file(&mut home, "AWS_CA_BUNDLE", content);
        assert!(init_refused(&home, 2, ARN).contains("AWS_CA_BUNDLE"), "{content}");
    }
    home.set("AWS_CA_BUNDLE", "/nonexistent/bundle.pem");
    assert!(init_refused(&home, 2, ARN).contains("/nonexistent/bundle.pem"));
}

// ---- hosts ----

/// A proxy that lets nobody through, and the first lines of what it is asked for.
fn refusing_proxy() -> (SocketAddr, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            let _ = send.send(line);
            let _ = (&stream).write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n");
        }
    });
    (address, receive)
}

/// The host that `init` wants to reach, told by a proxy that lets nobody through.
fn host_called(mut home: Home, arguments: &[&str]) -> String {
    let (address, receive) = refusing_proxy();
    home.set("HTTPS_PROXY", format!("http://{address}"));
    let key = format!("aws-kms:{ARN}");
    let mut all: Vec<support::Argument<'_>> = vec![&"init", &"cipher", &"--key", &key];
    all.extend(arguments.iter().map(|argument| argument as support::Argument<'_>));
    home.refused(8, &all);
    receive.recv_timeout(PATIENCE).unwrap().trim_end().to_owned()
}

#[test]
fn fips_hosts_are_called_when_asked_for() {
    let with = |name: &str, value: &str| {
        let mut home = home();
        home.set(name, value);
        home
    };
    assert_eq!(host_called(home(), &[]), "CONNECT kms.us-east-1.amazonaws.com:443 HTTP/1.1");
    let fips = "CONNECT kms-fips.us-east-1.amazonaws.com:443 HTTP/1.1";
    assert_eq!(host_called(home(), &["--fips"]), fips);
    assert_eq!(host_called(with("KMSFS_FIPS", "true"), &[]), fips);
    assert_eq!(host_called(with("AWS_USE_FIPS_ENDPOINT", "true"), &[]), fips);
    let mut profile = home();
    set_file(&mut profile, "AWS_CONFIG_FILE", "[default]\nuse_fips_endpoint = true\n");
    assert_eq!(host_called(profile, &[]), fips);
}

#[test]
fn fips_and_another_endpoint_exclude_each_other_everywhere() {
    let server = KmsServer::start();
    let mut home = home();
    home.set("AWS_ENDPOINT_URL_KMS", server.endpoint());
    let arn = server.create_key().arn;
    home.ok(&[&"init", &"cipher", &"--key", &format!("aws-kms:{arn}")]);
    home.ok(&[&"doctor", &"cipher"]);
    fs::create_dir(home.path("plain")).unwrap();
    home.set("AWS_USE_FIPS_ENDPOINT", "true");
    let calls = server.all_calls();
    let key = format!("aws-kms:{arn}");
    for said in [
        home.refused(2, &[&"init", &"other", &"--key", &key]),
        home.refused(2, &[&"mount", &"cipher", &"plain"]),
        home.refused(2, &[&"doctor", &"cipher"]),
    ] {
        assert!(said.contains("FIPS") && said.contains("AWS_ENDPOINT_URL_KMS"), "{said}");
    }
    assert_eq!(server.all_calls(), calls);
}

/// Only the first call can know.
#[test]
fn fips_and_an_endpoint_of_a_profile_exclude_each_other() {
    let mut home = home();
    set_file(&mut home, "AWS_CONFIG_FILE", "[default]\nendpoint_url = https://127.0.0.1:1\nuse_fips_endpoint = true\n");
    let said = init_refused(&home, 2, ARN);
    assert!(said.contains("FIPS and custom endpoint are not supported"), "{said}");
}

// ---- clear text ----

#[test]
fn keys_do_not_leave_the_machine_in_clear_text() {
    for variable in ["KMSFS_ENDPOINT_URL", "AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL"] {
        let mut home = home();
        home.set(variable, "http://kms.example.com");
        assert!(init_refused(&home, 2, ARN).contains("clear text"), "{variable}");
    }
    // Only the first call can know of this one; nothing is sent.
    let mut home = home();
    set_file(&mut home, "AWS_CONFIG_FILE", "[default]\nendpoint_url = http://[fd00:ec2::1]:8000\n");
    assert!(init_refused(&home, 2, ARN).contains("clear text"));
}

#[test]
fn an_identity_does_not_leave_the_machine_in_clear_text() {
    let mut home = Home::new();
    for (name, value) in moto::environment().iter().filter(|(name, _)| !name.contains("KEY")) {
        home.set(*name, *value);
    }
    set_file(&mut home, "AWS_WEB_IDENTITY_TOKEN_FILE", "identity");
    home.set("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/kmsfs");
    home.set("AWS_ENDPOINT_URL_STS", "http://sts.example.com");
    assert!(init_refused(&home, 7, ARN).contains("clear text"));
}

/// Every variable that names a proxy names one here that lets nobody through; what it is asked for comes out.
fn name_a_proxy(home: &mut Home) -> mpsc::Receiver<String> {
    let (address, asked) = refusing_proxy();
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        home.set(name, format!("http://{address}"));
        home.set(name.to_ascii_lowercase(), format!("http://{address}"));
    }
    for name in ["NO_PROXY", "no_proxy"] {
        home.set(name, "");
    }
    asked
}

#[test]
fn what_stays_on_this_machine_passes_no_proxy() {
    let servers = [KmsServer::start(), KmsServer::start_with(Options { tls: true, ..Options::default() }).unwrap()];
    for (server, host) in [(&servers[0], "127.0.0.1"), (&servers[0], "localhost"), (&servers[1], "127.0.0.1")] {
        let mut home = home();
        let asked = name_a_proxy(&mut home);
        home.set("AWS_ENDPOINT_URL_KMS", server.endpoint().replace("127.0.0.1", host));
        if server.endpoint().starts_with("https") {
            set_file(&mut home, "AWS_CA_BUNDLE", server.certificate());
        }
        home.ok(&[&"init", &"cipher", &"--key", &format!("aws-kms:{}", server.create_key().arn)]);
        home.ok(&[&"doctor", &"cipher"]);
        assert_eq!(asked.try_recv(), Err(mpsc::TryRecvError::Empty), "{}", server.endpoint());
    }
}

#[test]
fn credentials_in_clear_text_pass_no_proxy() {
    let account = AwsAccount::start();
    let mut home = Home::new();
    for (name, value) in moto::environment().iter().filter(|(name, _)| !name.contains("KEY")) {
        home.set(*name, *value);
    }
    let asked = name_a_proxy(&mut home);
    home.set("AWS_ENDPOINT_URL_KMS", account.url());
    home.set("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("{}/container", account.url()));
    home.set("AWS_CONTAINER_AUTHORIZATION_TOKEN", CONTAINER_TOKEN);
    home.ok(&[&"init", &"cipher", &"--key", &format!("aws-kms:{}", account.create_key().arn)]);
    home.ok(&[&"doctor", &"cipher"]);
    assert!(account.seen().iter().any(|seen| seen.what.contains("/container")), "{:?}", account.seen());
    assert_eq!(asked.try_recv(), Err(mpsc::TryRecvError::Empty));
}
