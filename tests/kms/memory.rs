//! Keys are where they should be in the memory of a mount, and gone after lock and unmount: a search of everything that
//! root can read of the process, for every key that a KMS of the tests' own has given out.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::kms_server::{ACCESS_KEY, KmsServer, Options, REGION, SECRET};
use crate::support::memory_scan::{Found, Pattern, Scan, scan};
use crate::support::{Home, Volume, bytes, errno, eventually, is_dead, needs_root};
use aes::Aes256;
use aes::cipher::{Array, BlockCipherEncrypt as _, KeyInit as _};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use kmsfs::crypto::Suite;
use kmsfs::format::geometry::PageIndex;
use kmsfs::format::page::{Page, associated_data, part};
use kmsfs::format::{header, hex};
use kmsfs::keys::providers::{ProviderSettings, open};
use kmsfs::keys::{EncryptionContext, ProviderKind};
use rustix::process::Signal;
use serde_json::json;

const FILES: usize = 60;
/// Of these files handles stay open.
const OPEN: usize = 20;

const DATA_KEY: &str = "data key";
const DATA_KEY_TEXT: &str = "data key in base64";
const VOLUME_KEY: &str = "volume key";
/// Of the volume's keys, those that are used as they are.
const DERIVED_VOLUME_KEY: &str = "derived volume key";
const CONTENT_KEY: &str = "content key";
const PAGE_KEY: &str = "page key";
/// As a keyring's file has it.
const WRAPPING_KEY_TEXT: &str = "wrapping key in base64";
const ALL: [&str; 7] =
    [DATA_KEY, DATA_KEY_TEXT, VOLUME_KEY, DERIVED_VOLUME_KEY, CONTENT_KEY, PAGE_KEY, WRAPPING_KEY_TEXT];
/// What is in protected memory while it is needed, and nowhere else.
const PROTECTED: [&str; 2] = [DATA_KEY, DERIVED_VOLUME_KEY];
/// What is nowhere after lock.
const GONE: [&str; 5] = [DATA_KEY, DATA_KEY_TEXT, VOLUME_KEY, CONTENT_KEY, PAGE_KEY];

/// A file's content, different for each.
fn content(number: usize) -> Vec<u8> {
    bytes(number as u64 + 1, 9000)
}

/// HKDF-SHA256 as the format document has it.
fn derive<const N: usize>(key: &[u8], salt: &[u8], info: &[u8]) -> Vec<u8> {
    let mut derived = [0; N];
    hkdf::Hkdf::<sha2::Sha256>::new(Some(salt), key).expand(info, &mut derived).unwrap();
    derived.to_vec()
}

/// The AES-256-GCM key of a page, as XAES-256-GCM derives it of the content key and the page's nonce.
fn page_key(content_key: &[u8], nonce: &[u8]) -> Vec<u8> {
    let cipher = Aes256::new(content_key.try_into().unwrap());
    let mut l = Array([0_u8; 16]);
    cipher.encrypt_block(&mut l);
    let l = u128::from_be_bytes(l.0);
    let k1 = ((l << 1) ^ if l >> 127 == 1 { 0x87 } else { 0 }).to_be_bytes();
    let half = |counter: u8| {
        let mut block = Array([0_u8; 16]);
        block[1] = counter;
        block[2] = b'X';
        block[4..].copy_from_slice(&nonce[..12]);
        block.iter_mut().zip(k1).for_each(|(byte, k)| *byte ^= k);
        cipher.encrypt_block(&mut block);
        block.0
    };
    [half(1), half(2)].concat()
}

/// Whether a page authenticates under this key.
fn opens(key: &[u8], index: usize, page: &Page) -> bool {
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).unwrap());
    let nonce = Nonce::try_assume_unique_for_key(&page[part::NONCE][12..]).unwrap();
    let aad = associated_data(PageIndex(index as u64), page[part::TRAILER].try_into().unwrap());
    let mut plain = vec![0; 4048];
    key.open_separate_gather(nonce, Aad::from(aad), &page[part::CIPHERTEXT], &page[part::TAG], &mut plain).is_ok()
}

/// From now on `script`, with the program under test in the place of `PROGRAM`, starts it.
fn wrap(home: &mut Home, script: &str) {
    let path = home.path("wrapper");
    fs::write(&path, script.replace("PROGRAM", home.program().to_str().unwrap())).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    home.set_program(path);
}

/// Unwraps what the key of this id has wrapped in this context.
type Unwrap = Box<dyn Fn(&str, &[u8], &EncryptionContext) -> Vec<u8>>;

/// A mounted volume under a provider that tells every key.
struct Scene {
    volume: Volume,
    unwrap: Unwrap,
}

impl Scene {
    /// Under a KMS of the tests' own. `wrapper`, a script with `PROGRAM` in it, runs the program under test.
    fn under_kms(suite: &str, wrapper: Option<&str>) -> Self {
        let mut home = Home::new();
        let server = KmsServer::start_with(Options { tls: true, ..Options::default() }).unwrap();
        let trusted = home.path("ca.pem");
        fs::write(&trusted, server.certificate()).unwrap();
        for (name, value) in [
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_REGION", REGION),
            ("AWS_CONFIG_FILE", "/dev/null"),
            ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            ("NO_PROXY", "127.0.0.1"),
            ("KMSFS_KMS_ATTEMPT_TIMEOUT", "10"),
            ("KMSFS_KMS_OPERATION_TIMEOUT", "20"),
        ] {
            home.set(name, value);
        }
        home.set("SSL_CERT_FILE", trusted);
        home.set("KMSFS_ENDPOINT_URL", server.endpoint());
        if let Some(wrapper) = wrapper {
            wrap(&mut home, wrapper);
        }
        let key = format!("aws-kms:{}", server.create_key().arn);
        let volume = Volume::in_home(home, &["--key", &key, "--suite", suite], &[]);
        let unwrap = move |key_id: &str, wrapped: &[u8], context: &EncryptionContext| {
            let context: BTreeMap<&str, &str> = context.pairs().collect();
            let blob = STANDARD.encode(wrapped);
            let request = json!({ "CiphertextBlob": blob, "EncryptionContext": context, "KeyId": key_id });
            STANDARD.decode(server.administer("Decrypt", &request)["Plaintext"].as_str().unwrap()).unwrap()
        };
        Self { volume, unwrap: Box::new(unwrap) }
    }

    /// Under a keyring.
    fn under_keyring(suite: &str) -> Self {
        let home = Home::new();
        let keyring = home.path("keyring.toml");
        let key = format!("local:{}", keyring.display());
        let volume = Volume::in_home(home, &["--key", &key, "--suite", suite], &[]);
        let provider = open(ProviderKind::Local, "", Some(&keyring), &ProviderSettings::default()).unwrap();
        let unwrap = move |key_id: &str, wrapped: &[u8], context: &EncryptionContext| {
            provider.unwrap(key_id, wrapped, context).unwrap().expose().to_vec()
        };
        Self { volume, unwrap: Box::new(unwrap) }
    }

    fn memory(&self) -> String {
        self.volume.status()["key_memory"].as_str().unwrap().to_owned()
    }

    /// Every key behind what is in the cipher directory.
    fn secrets(&self) -> Vec<Pattern> {
        let config = fs::read_to_string(self.volume.cipher.join(".kmsfs/volume.toml")).unwrap();
        let field = |name: &str| config.split_once(&format!("\n{name} = \"")).unwrap().1.split('"').next().unwrap();
        let volume_id: [u8; 16] = hex::decode_uuid(field("volume-id")).unwrap();
        let wrapped = URL_SAFE_NO_PAD.decode(field("wrapped")).unwrap();
        let volume_key = (self.unwrap)(field("key"), &wrapped, &EncryptionContext::volume_key(&volume_id));
        let mut secrets = Vec::new();
        let mut add = |kind, bytes: Vec<u8>| secrets.push(Pattern { kind, bytes });
        let of_volume = |label: &str| derive::<32>(&volume_key, &volume_id, label.as_bytes());
        add(DERIVED_VOLUME_KEY, of_volume("kmsfs v1 header"));
        add(DERIVED_VOLUME_KEY, of_volume("kmsfs v1 directory"));
        add(DERIVED_VOLUME_KEY, of_volume("kmsfs v1 config"));
        add(DERIVED_VOLUME_KEY, of_volume("kmsfs v1 audit"));
        add(DERIVED_VOLUME_KEY, derive::<64>(&volume_key, &volume_id, b"kmsfs v1 name")[..32].to_vec());
        add(DERIVED_VOLUME_KEY, derive::<64>(&volume_key, &volume_id, b"kmsfs v1 name")[32..].to_vec());
        // The last characters of base64 depend on what follows.
        add(DATA_KEY_TEXT, STANDARD.encode(&volume_key).as_bytes()[..42].to_vec());
        add(VOLUME_KEY, volume_key);
        if let Ok(keyring) = fs::read_to_string(self.volume.home.path("keyring.toml")) {
            let material = keyring.split_once("\nmaterial = \"").unwrap().1.split('"').next().unwrap();
            add(WRAPPING_KEY_TEXT, material.as_bytes()[..42].to_vec());
        }
        for number in 0..FILES {
            let sealed = fs::read(self.volume.behind(name(number))).unwrap();
            let (head, pages) = sealed.split_at(4096);
            let page: header::HeaderPage = head.try_into().unwrap();
            let header = header::parse_page(&page)[0].as_ref().unwrap().header.clone();
            let (record, context) = (&header.records[0], EncryptionContext::data_key(&volume_id, &header.data_key_id));
            let data_key = (self.unwrap)(str::from_utf8(&record.key_id).unwrap(), &record.wrapped, &context);
            let label = [b"kmsfs v1 content".as_slice(), &[header.suite]].concat();
            let content_key = derive::<32>(&data_key, &header.file_id, &label);
            for (index, page) in pages.as_chunks::<4096>().0.iter().enumerate() {
                if header.suite != Suite::Xaes256Gcm.id() {
                    break;
                }
                let key = page_key(&content_key, &page[part::NONCE]);
                assert!(opens(&key, index, page), "page {index} of file {number}");
                add(PAGE_KEY, key);
            }
            add(CONTENT_KEY, content_key);
            add(DATA_KEY_TEXT, STANDARD.encode(&data_key).as_bytes()[..42].to_vec());
            add(DATA_KEY, data_key);
        }
        secrets
    }

    fn write_all(&self) {
        for number in 0..FILES {
            fs::write(self.volume.path(name(number)), content(number)).unwrap();
        }
    }

    fn read_all(&self) {
        for number in 0..FILES {
            assert!(fs::read(self.volume.path(name(number))).unwrap() == content(number), "file {number}");
        }
    }

    /// Searches the process's memory. While it is mounted, what must not be outside of protected memory is not.
    fn scan(&self, when: &str, secrets: &[Pattern]) -> Scan {
        needs_root();
        let scan = scan(self.volume.pid(), secrets);
        let counts: Vec<String> = ALL.iter().map(|kind| format!("{kind} {}", scan.count(kind))).collect();
        println!("{when}: {} MiB: {}; not readable: {:?}", scan.searched >> 20, counts.join(", "), scan.unreadable);
        assert!(scan.searched > 1 << 20);
        let outside: Vec<&Found> = scan.found.iter().filter(|found| PROTECTED.contains(&found.kind)).collect();
        assert!(outside.iter().all(|found| found.locked), "{when}: {:#?}", scan.places(&PROTECTED));
        // Once it has served its turn, nothing keeps it.
        assert_eq!(scan.places(&[VOLUME_KEY, WRAPPING_KEY_TEXT]), Vec::<String>::new(), "{when}");
        scan
    }

    fn lock(&self) {
        self.volume.home.ok(&[&"lock", &self.volume.plain]);
    }

    fn unlock(&self) {
        self.volume.home.ok(&[&"unlock", &self.volume.plain]);
    }

    /// Operations and connections that are under way end in their own time; then no key of a file is anywhere.
    fn until_gone(&self, secrets: &[Pattern]) {
        let mut left = Vec::new();
        let end = Instant::now() + Duration::from_secs(30);
        while Instant::now() < end {
            left = self.scan("locked", secrets).places(&GONE);
            if left.is_empty() {
                return;
            }
        }
        panic!("keys are left after lock: {left:#?}");
    }
}

fn name(number: usize) -> String {
    format!("file-{number}")
}

/// All keys of a volume in the best memory that this kernel gives: written, mounted anew, read, locked and unlocked.
fn whole_life(scene: &Scene) {
    let volume = &scene.volume;
    println!("{} memory", scene.memory());
    scene.write_all();
    let secrets = scene.secrets();
    scene.scan("written", &secrets);
    volume.remount();
    let mounted = scene.scan("mounted", &secrets);
    assert_eq!(mounted.places(&[DATA_KEY, CONTENT_KEY, PAGE_KEY]), Vec::<String>::new());
    scene.read_all();
    let handles: Vec<fs::File> = (0..OPEN).map(|n| fs::File::open(volume.path(name(n))).unwrap()).collect();
    let read = scene.scan("read", &secrets);
    // The search finds what is there: the expanded content keys of open files are on the heap.
    assert!(read.count(CONTENT_KEY) >= OPEN, "{}", read.count(CONTENT_KEY));

    scene.lock();
    scene.until_gone(&secrets);
    assert_eq!(errno(fs::File::open(volume.path(name(OPEN)))), Some(libc::ENOKEY));
    assert_eq!(volume.status()["key_cache_entries"], 0);
    scene.unlock();
    scene.read_all();
    assert!(volume.status()["key_cache_entries"].as_u64().unwrap() >= FILES as u64);
    scene.scan("unlocked", &secrets);
    drop(handles);
    let pid = volume.pid();
    volume.unmount();
    eventually("no process, no memory", || is_dead(pid));
}

#[test]
fn keys_from_a_kms_are_in_protected_memory_and_gone_after_lock() {
    whole_life(&Scene::under_kms("xaes-256-gcm", None));
}

#[test]
fn and_so_they_are_with_the_other_suite() {
    whole_life(&Scene::under_kms("xchacha20-poly1305", None));
}

#[test]
fn keys_from_a_keyring_are_in_protected_memory_and_gone_after_lock() {
    whole_life(&Scene::under_keyring("xaes-256-gcm"));
}

/// A seccomp filter that answers ENOSYS to memfd_secret, as older kernels do and some containers.
const NO_SECRET_MEMORY: &str = "#!/usr/bin/env python3
import ctypes, os, struct, sys
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 447), (0x06, 0, 0, 0x00050000 | 38), (0x06, 0, 0, 0x7fff0000)]
filter = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *line) for line in code))
class Program(ctypes.Structure):
    _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_void_p)]
program = Program(len(code), ctypes.addressof(filter))
if ctypes.CDLL(None, use_errno=True).prctl(22, 2, ctypes.byref(program), 0, 0) != 0:
    sys.exit(f'seccomp: {os.strerror(ctypes.get_errno())}')
os.execv('PROGRAM', ['PROGRAM', *sys.argv[1:]])
";

/// In memory that is only locked, root can see keys: where they should be, and nowhere after lock.
#[test]
fn without_secret_memory_keys_are_locked() {
    let scene = Scene::under_kms("auto", Some(NO_SECRET_MEMORY));
    assert_eq!(scene.memory(), "locked");
    scene.write_all();
    let secrets = scene.secrets();
    scene.volume.remount();
    scene.read_all();
    let read = scene.scan("read", &secrets);
    assert!(read.count(DATA_KEY) >= FILES, "{}", read.count(DATA_KEY));
    // The one for the config has served its turn.
    assert!(read.count(DERIVED_VOLUME_KEY) >= 4, "{}", read.count(DERIVED_VOLUME_KEY));
    scene.lock();
    scene.until_gone(&secrets);
    // Those of the volume stay, so that names and attributes can be had.
    assert!(scene.scan("locked", &secrets).count(DERIVED_VOLUME_KEY) >= 4);
    scene.unlock();
    scene.read_all();
    assert!(scene.scan("unlocked", &secrets).count(DATA_KEY) >= FILES);
}

#[test]
fn an_ordinary_user_has_protected_memory_too() {
    let volume = Volume::in_home(Home::of_nobody(), &[], &[]);
    assert_ne!(volume.status()["key_memory"], "ordinary");
    assert!(!volume.home.logs().contains("ordinary memory"), "{}", volume.home.logs());
}

#[test]
fn without_locked_memory_a_mount_works_and_says_so_once() {
    let mut home = Home::of_nobody();
    wrap(&mut home, "#!/bin/sh\nexec prlimit --memlock=0:0 PROGRAM \"$@\"\n");
    let volume = Volume::in_home(home, &[], &[]);
    assert_eq!(volume.status()["key_memory"], "ordinary");
    let warned = || volume.home.logs().matches("keys are in ordinary memory").count();
    eventually("it is in the log", || warned() > 0);
    volume.home.shell("echo content > plain/file && cat plain/file");
    // Several rounds of the thread that says it.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(warned(), 1, "{}", volume.home.logs());
    assert!(volume.home.logs().contains("LimitMEMLOCK=8M"));
    volume.unmount();
    let diagnosis: serde_json::Value =
        serde_json::from_str(&volume.home.ok(&[&"doctor", &"--json", &volume.cipher])).unwrap();
    let checks = diagnosis["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["check"] == "locked memory").unwrap();
    assert_eq!(check["grade"], "warn", "{check}");
    assert!(check["what"].as_str().unwrap().contains("ordinary memory"), "{check}");
}

/// Whatever limit it is started with, a crash leaves no core file.
#[test]
fn a_crash_leaves_no_core() {
    let mut home = Home::new();
    let shell = |then: &str| format!("ulimit -c unlimited; {then}");
    let control = Command::new("sh").args(["-c", &shell("kill -ABRT $$")]).current_dir(home.path("")).status().unwrap();
    println!("another program leaves a core here: {}", control.core_dumped());
    home.ok(&[&"init", &"cipher"]);
    wrap(&mut home, &format!("#!/bin/sh\n{}\n", shell("exec PROGRAM \"$@\"")));
    fs::create_dir(home.path("plain")).unwrap();
    let mount = home.start("mount", &[&"mount", &"--foreground", &"cipher", &"plain"]);
    eventually("it is mounted", || home.kmsfs(&[&"status", &"plain"]).status.success());
    fs::write(home.path("plain/file"), "content").unwrap();
    mount.signal(Signal::ABORT);
    let status = mount.status();
    assert_eq!(status.signal(), Some(libc::SIGABRT));
    assert!(!status.core_dumped());
}
