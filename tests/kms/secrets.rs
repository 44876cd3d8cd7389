//! No secret leaves the process: whole cycles at trace level, with errors, and then a search for every key, the
//! passphrase and the plaintext in everything that was printed, logged or stored.

use std::fmt::{Debug, Write as _};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::support::moto;
use crate::support::{self, Argument, Home, Volume, errno, eventually, flip, text};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use kmsfs::format::{header, hex};
use rustix::process::Signal;

const PASSPHRASE: &str = "correct horse battery staple";
const CONTENT: &str = "the treasure is under the old oak, three steps to the north of it";
const NAME: &str = "where-the-treasure-is";
const TARGET: &str = "the-way-to-the-treasure";
const CREDENTIAL: &str = "credential-of-the-test-0123456789";

/// Something that must not be found, and what it is.
struct Secret {
    what: String,
    bytes: Vec<u8>,
}

impl Secret {
    fn new(what: &str, bytes: impl Into<Vec<u8>>) -> Self {
        Self { what: what.to_owned(), bytes: bytes.into() }
    }

    /// It as programs may print it, each by a part that is long enough to be no accident.
    fn spellings(&self) -> Vec<(&'static str, Vec<u8>)> {
        let bytes = &self.bytes;
        let hex = hex::encode(bytes);
        let mut spaced = String::new();
        bytes.iter().take(8).for_each(|byte| write!(spaced, "{byte:02x} ").unwrap());
        let list = format!("{:?}", &bytes[..8]);
        // The last characters of base64 depend on the padding and on what follows.
        let base64 = |text: String| text.as_bytes()[..bytes.len() / 3 * 4].to_vec();
        vec![
            ("raw", bytes.clone()),
            ("hex", hex.as_bytes().to_vec()),
            ("upper-case hex", hex.to_ascii_uppercase().into_bytes()),
            ("spaced hex", spaced.trim_end().as_bytes().to_vec()),
            ("base64", base64(STANDARD.encode(bytes))),
            ("base64url", base64(URL_SAFE_NO_PAD.encode(bytes))),
            ("a list", list.trim_matches(['[', ']']).as_bytes().to_vec()),
            ("escaped", bytes[..12].escape_ascii().to_string().into_bytes()),
        ]
    }
}

/// What is found of the secrets in all files and names of the home, but for `own`, where they belong.
fn leaks(home: &Home, secrets: &[Secret], own: &[&str]) -> Vec<String> {
    let own: Vec<PathBuf> = own.iter().map(|name| home.path(name)).collect();
    let files: Vec<PathBuf> = support::walk(&home.path("")).into_iter().filter(|path| !own.contains(path)).collect();
    let texts: Vec<(PathBuf, Vec<u8>)> = files.into_iter().map(|path| (path.clone(), shown(&path))).collect();
    let mut found = Vec::new();
    for secret in secrets {
        for (spelling, pattern) in secret.spellings() {
            let leaking = texts.iter().filter(|(_, text)| contains(text, &pattern));
            found.extend(leaking.map(|(path, _)| format!("{} as {spelling} in {}", secret.what, path.display())));
        }
    }
    found
}

/// The name and what is in it.
fn shown(path: &Path) -> Vec<u8> {
    let mut bytes = path.as_os_str().as_bytes().to_vec();
    bytes.push(b'\n');
    match fs::read_link(path) {
        Ok(target) => bytes.extend(target.as_os_str().as_bytes()),
        Err(_) if path.is_file() => bytes.extend(fs::read(path).unwrap()),
        Err(_) => {}
    }
    bytes
}

fn contains(text: &[u8], pattern: &[u8]) -> bool {
    let first = pattern[0];
    let starts = (0..text.len()).filter(|at| text[*at] == first);
    starts.into_iter().any(|at| text[at..].starts_with(pattern))
}

/// Runs the program with its output kept in the home, to be searched later.
fn keep(home: &Home, number: &mut u32, arguments: &[Argument<'_>]) -> Option<i32> {
    *number += 1;
    let output = home.kmsfs(arguments);
    fs::write(home.path(format!("output-{number}")), [output.stdout, output.stderr].concat()).unwrap();
    output.status.code()
}

/// Everything that is done with a volume, well and badly, with a log of everything.
fn cycle(home: &Home, flags: &[&str], bad_flags: &[&[&str]]) {
    let (cipher, plain) = (home.path("cipher"), home.path("plain"));
    fs::create_dir(&plain).unwrap();
    let mut number = 0;
    let with = |first: &[Argument<'_>], flags: &[&str]| -> Vec<String> {
        let words = first.iter().map(|word| word.as_ref().to_str().unwrap().to_owned());
        words.chain(flags.iter().map(|flag| (*flag).to_owned())).collect()
    };
    let mut run = |arguments: &[String]| {
        let arguments: Vec<Argument<'_>> = arguments.iter().map(|word| word as Argument<'_>).collect();
        keep(home, &mut number, &arguments)
    };
    assert_eq!(run(&with(&[&"init", &cipher], flags)), Some(0));

    let key_flags: Vec<&str> = flags.iter().copied().filter(|flag| !flag.starts_with("--key=")).collect();
    let watched: [Argument<'_>; 5] =
        [&"mount", &cipher, &plain, &"--audit-log=audit.log", &"--metrics=unix:metrics.socket"];
    let foreground = with(&[&watched[..], &[&"--foreground"]].concat(), &key_flags);
    let foreground: Vec<Argument<'_>> = foreground.iter().map(|word| word as Argument<'_>).collect();
    let mount = home.start("foreground", &foreground);
    eventually("it is mounted", || home.kmsfs(&[&"status", &plain]).status.success());
    let file = plain.join(NAME);
    fs::write(&file, CONTENT.repeat(300)).unwrap();
    symlink(TARGET, plain.join("link")).unwrap();
    fs::write(plain.join("page"), CONTENT.repeat(100)).unwrap();
    fs::write(plain.join("header"), CONTENT).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), CONTENT.repeat(300));
    assert_eq!(run(&with(&[&"status", &plain], &[])), Some(0));
    assert_eq!(run(&with(&[&"top", &"--once", &"--json", &plain], &[])), Some(0));
    fs::write(home.path("metrics-page"), metrics(&home.path("metrics.socket"))).unwrap();
    let behind = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        let inode = fs::metadata(plain.join(name)).unwrap().ino();
        let same = |path: &PathBuf| fs::symlink_metadata(path).unwrap().ino() == inode;
        support::walk(&cipher).into_iter().find(same).unwrap()
    };
    let [page, header] = ["page", "header"].map(behind);
    mount.signal(Signal::TERM);
    assert_eq!(mount.end(), Some(0));

    flip(&page, 4096 + 77);
    flip(&header, 90);
    let background = with(&watched, &key_flags);
    assert_eq!(run(&background), Some(0));
    assert_eq!(errno(fs::read(plain.join("page"))), Some(libc::EIO));
    assert_eq!(errno(fs::read(plain.join("header"))), Some(libc::EIO));
    assert_eq!(fs::read_to_string(&file).unwrap(), CONTENT.repeat(300));
    assert_eq!(run(&with(&[&"inspect", &page, &header, &cipher], &key_flags)), Some(13));
    assert_eq!(run(&with(&[&"umount", &plain], &[])), Some(0));
    assert_eq!(run(&with(&[&"audit", &"verify", &"audit.log", &"--volume", &cipher], &key_flags)), Some(0));
    assert_eq!(run(&with(&[&"audit", &"show", &"audit.log"], &[])), Some(0));
    for bad in bad_flags {
        assert_ne!(run(&with(&[&"mount", &cipher, &plain], bad)), Some(0), "{bad:?}");
        run(&with(&[&"inspect", &cipher], bad));
    }
    let logged = [home.logs(), fs::read_to_string(home.path("foreground.err")).unwrap()].concat();
    assert!(logged.contains("does not authenticate") && logged.contains("mounted"), "{logged}");
}

/// The page of metrics.
fn metrics(socket: &Path) -> String {
    use std::io::{Read, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.ends_with("# EOF\n"), "{page}");
    page
}

/// All keys of the volume, down to those of its files, from the other implementation.
fn all_keys(home: &Home, keyring: &str, passphrase: &str) -> Vec<Secret> {
    let base = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = "import os, sys
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
import decrypt
unwrap, hkdf = decrypt.Keyring.unwrap, decrypt.hkdf
opened = []
def shown_unwrap(*arguments):
    key = unwrap(*arguments)
    opened.append(key)
    print('unwrapped', key.hex())
    return key
def shown_hkdf(key, salt, info, length=32):
    derived = hkdf(key, salt, info, length)
    if b'commit' not in info: print(info.split()[2].strip(bytes(range(32))).decode(), derived.hex())
    return derived
decrypt.Keyring.unwrap, decrypt.hkdf = shown_unwrap, shown_hkdf
cipher, keyring, passphrase = sys.argv[2:5]
keys = decrypt.Keyring(open(keyring, 'rb').read(), passphrase.encode())
for _, material in keys.keys.values(): print('wrapping', material.hex())
volume = decrypt.Volume(open(f'{cipher}/.kmsfs/volume.toml', 'rb').read(), keys)
print('audit', hkdf(opened[0], volume.id, b'kmsfs v1 audit', 32).hex())
for entry in os.scandir(cipher):
    if entry.is_file(follow_symlinks=False):
        try: decrypt.file_key(open(entry.path, 'rb').read(4096), volume)
        except decrypt.Bad: pass";
    let python = base.join(".venv/bin/python");
    let arguments: [Argument<'_>; 6] =
        [&"-c", &script, &base.join("scripts"), &home.path("cipher"), &home.path(keyring), &passphrase];
    let printed = support::run(python.to_str().unwrap(), &arguments, Path::new("/"));
    let decode = |text: &str| -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    };
    let keys = printed.lines().filter_map(|line| line.split_once(' '));
    keys.map(|(what, key)| Secret::new(&format!("{what} key"), decode(key))).collect()
}

fn plaintexts() -> Vec<Secret> {
    let texts = [("the content", CONTENT), ("a name", NAME), ("a target", TARGET), ("the passphrase", PASSPHRASE)];
    texts.iter().map(|(what, text)| Secret::new(what, *text)).collect()
}

#[test]
fn nothing_of_a_sealed_keyring_and_its_volume_is_told() {
    let mut home = Home::new();
    home.set("KMSFS_LOG", "trace");
    home.secret("passphrase", &format!("{PASSPHRASE}\n"));
    home.secret("wrong", "no horse\n");
    let flags = ["--key=local:keys.toml", "--passphrase-file=passphrase"];
    cycle(&home, &flags, &[&[], &["--passphrase-file=wrong"], &["--passphrase-file=missing"]]);
    let mut secrets = plaintexts();
    let keys = all_keys(&home, "keys.toml", PASSPHRASE);
    // One wrapping key, the volume's key and those that come of it, and two of each file that is sound.
    assert!(keys.len() >= 1 + 6 + 4, "{}", keys.len());
    secrets.extend(keys);
    assert_eq!(leaks(&home, &secrets, &["passphrase"]), Vec::<String>::new());
    // The search finds what is there.
    assert!(leaks(&home, &secrets, &[]).iter().any(|leak| leak.contains("the passphrase as raw")));
}

#[test]
fn nothing_of_an_open_keyring_and_its_volume_is_told() {
    let mut home = Home::new();
    home.set("KMSFS_LOG", "trace");
    home.ok(&[&"init", &"another", &"--key", &"local:other.toml"]);
    cycle(&home, &["--key=local:keys.toml"], &[&["--keyring=other.toml"], &["--keyring=missing"]]);
    let mut secrets = plaintexts();
    secrets.extend(all_keys(&home, "keys.toml", ""));
    assert_eq!(leaks(&home, &secrets, &["keys.toml"]), Vec::<String>::new());
    assert!(leaks(&home, &secrets, &[]).iter().any(|leak| leak.contains("wrapping key as base64")));
}

#[test]
fn nothing_that_a_kms_answers_is_told() {
    let moto = moto::Moto::start();
    let key = moto.create_key();
    let mut home = Home::new();
    moto::environment().iter().for_each(|(name, value)| home.set(*name, *value));
    for (name, value) in [
        ("KMSFS_LOG", "trace"),
        // What Rust programs usually listen to must not open another way.
        ("RUST_LOG", "trace"),
        ("KMSFS_KMS_ATTEMPT_TIMEOUT", "10"),
        ("KMSFS_KMS_OPERATION_TIMEOUT", "20"),
        ("AWS_SECRET_ACCESS_KEY", CREDENTIAL),
    ] {
        home.set(name, value);
    }
    home.set("KMSFS_ENDPOINT_URL", moto.endpoint());
    let nowhere = "--endpoint-url=http://127.0.0.1:1";
    let impatient = [nowhere, "--kms-attempt-timeout=1", "--kms-operation-timeout=2"];
    cycle(&home, &[&format!("--key=aws-kms:{}", key.arn)], &[&impatient]);

    let mut secrets = plaintexts();
    secrets.push(Secret::new("the credential", CREDENTIAL));
    let config = fs::read_to_string(home.path("cipher/.kmsfs/volume.toml")).unwrap();
    let field = |name: &str| config.split_once(&format!("\n{name} = \"")).unwrap().1.split('"').next().unwrap();
    let volume = field("volume-id");
    let unwrap = |what: &str, wrapped: &[u8], context: serde_json::Value| {
        let request = serde_json::json!({
            "CiphertextBlob": STANDARD.encode(wrapped), "EncryptionContext": context, "KeyId": key.arn
        });
        let answer = moto.post("Decrypt", &request.to_string());
        Secret::new(what, STANDARD.decode(answer["Plaintext"].as_str().unwrap()).unwrap())
    };
    let wrapped = URL_SAFE_NO_PAD.decode(field("wrapped")).unwrap();
    let context = serde_json::json!({ "kmsfs:purpose": "volume", "kmsfs:volume": volume });
    secrets.push(unwrap("the volume key", &wrapped, context));
    let files = support::walk(&home.path("cipher"))
        .into_iter()
        .filter(|path| fs::symlink_metadata(path).unwrap().is_file() && !path.starts_with(home.path("cipher/.kmsfs")));
    for file in files {
        let page: header::HeaderPage = fs::read(&file).unwrap()[..4096].try_into().unwrap();
        let [slot, _] = header::parse_page(&page);
        let header = slot.unwrap().header;
        let context = serde_json::json!({
            "kmsfs:data-key": hex::encode_uuid(&header.data_key_id), "kmsfs:volume": volume
        });
        // One header was tampered with, in the name of its key; its data key is a secret all the same.
        secrets.push(unwrap("a data key", &header.records[0].wrapped, context));
    }
    assert!(secrets.len() == 4 + 1 + 1 + 3, "{}", secrets.len());
    assert!(secrets[5..].iter().all(|secret| secret.bytes.len() == 32));
    assert_eq!(leaks(&home, &secrets, &[]), Vec::<String>::new());
}

/// Another process of the same user can neither read the memory nor get a core file.
#[test]
fn the_process_is_closed_to_others() {
    let volume = Volume::in_home(Home::of_nobody(), &[], &[]);
    let pid = volume.pid().as_raw_nonzero();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).collect::<Vec<_>>(), ["0", "0", "bytes"]);
    for file in ["mem", "environ", "maps"] {
        let mut command = volume.home.command("head");
        let output = command.args(["-c", "1"]).arg(format!("/proc/{pid}/{file}")).output().unwrap();
        assert!(text(&output.stderr).contains("Permission denied"), "{file}: {}", text(&output.stderr));
    }
}

/// Compiles only if the type has no such trait.
macro_rules! assert_lacks {
    ($bound:path: $($secret:ty),+) => {{
        struct Lacks;
        trait Ambiguous<T> { fn chosen() {} }
        impl<T: ?Sized> Ambiguous<()> for T {}
        impl<T: ?Sized + $bound> Ambiguous<Lacks> for T {}
        $(let _ = <$secret as Ambiguous<_>>::chosen;)+
    }};
}

#[test]
fn keys_cannot_be_printed_or_copied() {
    use kmsfs::crypto::{DataKey, FileKeys, HeaderKey, LinkKey, NameKey, SuiteKey, VolumeKeys};
    assert_lacks!(Debug: DataKey, FileKeys, HeaderKey, LinkKey, NameKey, SuiteKey, VolumeKeys);
    assert_lacks!(Clone: DataKey, FileKeys, HeaderKey, LinkKey, NameKey, SuiteKey, VolumeKeys);
    let passphrase = kmsfs::keys::providers::Passphrase::new(PASSPHRASE.as_bytes().to_vec());
    assert!(!format!("{passphrase:?}").contains("horse"));
}
