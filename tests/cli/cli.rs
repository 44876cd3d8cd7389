//! The command line: every bad input has its documented exit code and a clear message, and changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::support::fake_kms;
use crate::support::moto;
use crate::support::{self, Argument, Entry, Home, Volume, assert_same, flip, needs_root, run, text, tree};

/// A port where nobody listens.
const NOBODY: &str = "http://127.0.0.1:1";

/// A volume that is not mounted, and a mount point.
struct Unmounted {
    volume: Volume,
}

impl Unmounted {
    fn new(init: &[&str]) -> Self {
        Self::in_home(Home::new(), init)
    }

    fn in_home(home: Home, init: &[&str]) -> Self {
        let volume = Volume::in_home(home, init, &[]);
        fs::write(volume.path("file"), "content").unwrap();
        volume.unmount();
        Self { volume }
    }

    /// Mounting with more arguments fails like this, and nothing has changed.
    fn mount_refused(&self, code: i32, more: &[Argument<'_>]) -> String {
        let Volume { home, cipher, plain, .. } = &self.volume;
        let mut arguments: Vec<Argument<'_>> = vec![&"mount", cipher, plain];
        arguments.extend(more);
        let said = unchanged(home, || home.refused(code, &arguments));
        assert!(!Home::is_mounted(plain));
        said
    }

    fn config(&self) -> PathBuf {
        self.volume.cipher.join(".kmsfs/volume.toml")
    }
}

/// Nothing in the home is another after this than before.
fn unchanged<T>(home: &Home, work: impl FnOnce() -> T) -> T {
    let before = lasting(&home.path(""));
    let result = work();
    assert_same("what is left behind", &lasting(&home.path("")), &before);
    result
}

/// A directory in which something was made and taken away again is the same, but for its time.
fn lasting(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let mut found = tree(root);
    found
        .values_mut()
        .filter(|entry| entry.mode & libc::S_IFMT == libc::S_IFDIR)
        .for_each(|entry| entry.modified = (0, 0));
    found
}

// ---- keys ----

#[test]
fn passphrases() {
    let mut home = Home::new();
    home.secret("right", "correct horse\n");
    home.secret("wrong", "battery staple\n");
    home.secret("empty", "\n");
    home.set("KMSFS_PASSPHRASE", "correct horse");
    let mut unmounted = Unmounted::in_home(home, &[]);
    let keyring = fs::read_to_string(unmounted.volume.home.path("data/kmsfs/keyring.toml")).unwrap();
    assert!(keyring.contains("argon2id") && !keyring.contains("material"), "{keyring}");
    unmounted.volume.home.unset("KMSFS_PASSPHRASE");

    let said = unmounted.mount_refused(7, &[]);
    assert!(said.contains("passphrase"), "{said}");
    let said = unmounted.mount_refused(7, &[&"--passphrase-file", &"wrong"]);
    assert!(said.contains("passphrase"), "{said}");
    unmounted.mount_refused(7, &[&"--passphrase-file", &"empty"]);
    unmounted.mount_refused(7, &[&"--passphrase-file", &"missing"]);
    // There is no terminal to ask on.
    let mut without_terminal = unmounted.volume.home.command("setsid");
    without_terminal.arg("--wait").arg(unmounted.volume.home.program());
    let output = without_terminal.args(["mount", "--passphrase", "cipher", "plain"]).output().unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    unmounted.mount_refused(2, &[&"--passphrase", &"--passphrase-file", &"right"]);

    let home = &unmounted.volume.home;
    home.ok(&[&"mount", &"--passphrase-file", &"right", &unmounted.volume.cipher, &unmounted.volume.plain]);
    assert_eq!(fs::read(unmounted.volume.path("file")).unwrap(), b"content");
}

#[test]
fn wrong_and_missing_keys() {
    let unmounted = Unmounted::new(&[]);
    let home = &unmounted.volume.home;
    home.ok(&[&"init", &home.path("other"), &"--key", &"local:other.toml"]);
    let said = unmounted.mount_refused(6, &[&"--keyring", &"other.toml"]);
    assert!(said.contains("k-"), "the key that is missing is named: {said}");

    // A keyring of the same name with another key in it.
    let keyring = home.path("data/kmsfs/keyring.toml");
    let genuine = fs::read_to_string(&keyring).unwrap();
    let id = |text: &str| text.split_once("id = \"").unwrap().1[..18].to_owned();
    let strange = fs::read_to_string(home.path("other.toml")).unwrap();
    fs::write(&keyring, strange.replace(&id(&strange), &id(&genuine))).unwrap();
    // That cannot be told from a config that was changed.
    let said = unmounted.mount_refused(4, &[]);
    assert!(said.contains(&id(&genuine)), "{said}");
    fs::write(&keyring, genuine.replace("\"enabled\"", "\"disabled\"")).unwrap();
    let said = unmounted.mount_refused(6, &[]);
    assert!(said.contains("disabled"), "{said}");

    fs::write(&keyring, &genuine).unwrap();
    fs::set_permissions(&keyring, fs::Permissions::from_mode(0o644)).unwrap();
    let output = home.kmsfs(&unmounted.volume.mount_arguments());
    assert!(!output.status.success(), "a keyring that others can read");
    fs::remove_file(&keyring).unwrap();
    let said = unmounted.mount_refused(6, &[]);
    assert!(said.contains(keyring.to_str().unwrap()), "{said}");
}

#[test]
fn a_kms_that_refuses() {
    let moto = moto::Moto::start();
    let key = moto.create_key();
    let mut home = Home::new();
    moto::environment().iter().for_each(|(name, value)| home.set(*name, *value));
    home.set("KMSFS_ENDPOINT_URL", moto.endpoint());
    for (name, value) in [("ATTEMPT", "10"), ("OPERATION", "20")] {
        home.set(format!("KMSFS_KMS_{name}_TIMEOUT"), value);
    }
    unchanged(&home, || {
        let absent = "aws-kms:arn:aws:kms:us-east-1:123456789012:key/00000000-0000-0000-0000-000000000000";
        home.refused(6, &[&"init", &"cipher", &"--key", &absent]);
        home.refused(6, &[&"init", &"cipher", &"--key", &"aws-kms:alias/nothing"]);
    });
    let mut unmounted = Unmounted::in_home(home, &["--key", &format!("aws-kms:{}", key.id)]);
    for (error, word) in [("DisabledException", "isabled"), ("AccessDeniedException", "enied")] {
        let refusal = format!(r#"{{"__type":"{error}","message":"the service's words"}}"#);
        let kms = fake_kms::FakeKms::start(vec![(400, refusal)]);
        let said = unmounted.mount_refused(6, &[&"--endpoint-url", &kms.endpoint()]);
        assert!(said.contains(word), "{said}");
    }
    for variable in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] {
        unmounted.volume.home.set(variable, "");
    }
    unmounted.mount_refused(7, &[]);
    let endpoint: Argument<'_> = &NOBODY;
    for variable in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] {
        unmounted.volume.home.set(variable, "test");
    }
    unmounted.mount_refused(8, &[&"--endpoint-url", endpoint]);
    let home = &unmounted.volume.home;
    unchanged(home, || home.refused(8, &[&"init", &"new", &"--key", &"aws-kms:alias/x", &"--endpoint-url", endpoint]));
    unmounted.volume.mount();
}

// ---- volumes ----

#[test]
fn configs() {
    let unmounted = Unmounted::new(&["--files-per-data-key", "3"]);
    let (home, config) = (&unmounted.volume.home, unmounted.config());
    let genuine = fs::read_to_string(&config).unwrap();
    let said = |code: i32, text: &str| {
        fs::write(&config, text).unwrap();
        let said = unmounted.mount_refused(code, &[]);
        unchanged(home, || home.refused(code, &[&"inspect", &unmounted.volume.cipher]));
        said
    };
    let version = said(4, &genuine.replace("format = 1", "format = 2"));
    assert!(version.contains('2') && version.contains("version"), "{version}");
    for (from, to) in [
        ("holes = \"allow\"", "holes = \"deny\""),
        ("end = \"lenient\"", "end = \"strict\""),
        ("files-per-data-key = 3", "files-per-data-key = 4"),
        ("suite = \"x", "suite = \"y"),
        ("holes", "halos"),
        ("[seal]", "[deal]"),
        ("# A kmsfs", "# a kmsfs"),
    ] {
        assert!(genuine.contains(from), "{from}");
        said(4, &genuine.replace(from, to));
    }
    said(4, "");
    said(4, &genuine[..genuine.len() - 1]);
    said(4, &format!("{genuine}\n"));
    said(4, &genuine.replace('\n', "\r\n"));
    fs::write(&config, [genuine.as_bytes(), &vec![b'#'; 70_000]].concat()).unwrap();
    unmounted.mount_refused(4, &[]);

    fs::remove_file(&config).unwrap();
    let missing = unmounted.mount_refused(4, &[]);
    assert!(missing.contains("config .kmsfs/volume.toml is missing") && missing.contains("--repair"), "{missing}");
    fs::write(&config, &genuine).unwrap();
    unmounted.volume.mount();
}

/// One byte in each line, and what may come of it: never a mount.
#[test]
fn every_field_of_a_config_is_sealed() {
    let unmounted = Unmounted::new(&[]);
    let config = unmounted.config();
    let genuine = fs::read(&config).unwrap();
    let lines: Vec<&[u8]> = genuine.split_inclusive(|byte| *byte == b'\n').collect();
    let mut start = 0;
    for line in lines {
        // The middle of the value.
        let at = start + line.len() - line.len().min(4);
        start += line.len();
        let mut changed = genuine.clone();
        changed[at] ^= 1;
        fs::write(&config, &changed).unwrap();
        let output = unmounted.volume.home.kmsfs(&unmounted.volume.mount_arguments());
        let (code, shown) = (output.status.code().unwrap(), text(line));
        // The pin finds another id, and a key that is not there is refused, before the seal can be checked.
        let expected = if line.starts_with(b"volume-id") {
            vec![4, 5]
        } else if [b"provider".as_slice(), b"key =", b"location", b"wrapped"].iter().any(|name| line.starts_with(name))
        {
            vec![4, 6]
        } else {
            vec![4]
        };
        assert!(expected.contains(&code), "{code}: {shown}{}", text(&output.stderr));
        assert!(!Home::is_mounted(&unmounted.volume.plain));
    }
    fs::write(&config, &genuine).unwrap();
    unmounted.volume.mount();
}

#[test]
fn exchanged_and_unexpected_volumes() {
    let unmounted = Unmounted::new(&[]);
    let Volume { home, cipher, plain, .. } = &unmounted.volume;
    let id =
        |config: &Path| fs::read_to_string(config).unwrap().split_once("volume-id = \"").unwrap().1[..36].to_owned();
    let own = id(&unmounted.config());
    // Everything that may be told by other means is told before a provider is asked: there is none to ask.
    let keyring = home.path("data/kmsfs/keyring.toml");
    let key = format!("local:{}", &fs::read_to_string(&keyring).unwrap().split_once("id = \"").unwrap().1[..18]);
    fs::rename(&keyring, home.path("away")).unwrap();
    let another = "00112233-4455-6677-8899-aabbccddeeff";
    let said = unmounted.mount_refused(5, &[&"--volume-id", &another]);
    assert!(said.contains(another) && said.contains(&own), "{said}");
    let said = unmounted.mount_refused(5, &[&"--expect-key", &"aws-kms:arn:of:mine"]);
    assert!(said.contains("arn:of:mine") && said.contains(&key), "{said}");
    unmounted.mount_refused(2, &[&"--volume-id", &"no-uuid"]);
    unmounted.mount_refused(2, &[&"--expect-key", &"no-key"]);
    unmounted.mount_refused(6, &[&"--volume-id", &own]);
    fs::rename(home.path("away"), &keyring).unwrap();
    home.ok(&[&"mount", &"--volume-id", &own.to_uppercase(), &"--expect-key", &key, cipher, plain]);
    unmounted.volume.unmount();

    // Another volume at the same place.
    home.ok(&[&"init", &"other"]);
    let found = id(&home.path("other/.kmsfs/volume.toml"));
    fs::rename(cipher, home.path("own")).unwrap();
    fs::rename(home.path("other"), cipher).unwrap();
    let said = unmounted.mount_refused(5, &[]);
    assert!(said.contains(&own) && said.contains(&found) && said.contains("kmsfs forget"), "{said}");
    // `--init` makes nothing where another volume is remembered.
    fs::rename(cipher, home.path("other")).unwrap();
    fs::create_dir(cipher).unwrap();
    let said = unmounted.mount_refused(5, &[&"--init"]);
    assert!(said.contains(&own), "{said}");
    fs::remove_dir(cipher).unwrap();
    fs::rename(home.path("other"), cipher).unwrap();

    home.ok(&[&"forget", cipher]);
    unchanged(home, || home.refused(3, &[&"forget", cipher]));
    unmounted.volume.mount();
    assert!(!unmounted.volume.path("file").exists());
}

/// A config of the same id under another volume key, which only the fingerprint tells apart.
#[test]
fn a_volume_key_of_somebody_else_is_not_the_remembered_one() {
    let unmounted = Unmounted::new(&[]);
    let pins = unmounted.volume.home.path("data/kmsfs/known-volumes.toml");
    let remembered = fs::read_to_string(&pins).unwrap();
    let (before, fingerprint) = remembered.split_once("fingerprint = \"").unwrap();
    let mut other = fingerprint.as_bytes().to_vec();
    other[0] = if other[0] == b'0' { b'1' } else { b'0' };
    fs::write(&pins, format!("{before}fingerprint = \"{}", text(&other))).unwrap();
    let said = unmounted.mount_refused(5, &[]);
    assert!(said.contains(&fingerprint[..32]) && said.contains(&text(&other[..32])), "{said}");
    fs::write(&pins, "damaged").unwrap();
    unmounted.mount_refused(5, &[]);
}

// ---- places ----

#[test]
fn cipher_directories_that_are_none() {
    let home = Home::new();
    fs::create_dir(home.path("empty")).unwrap();
    fs::create_dir(home.path("plain")).unwrap();
    fs::write(home.path("file"), "").unwrap();
    for place in ["empty", "missing", "file", "missing/too"] {
        let said = unchanged(&home, || home.refused(3, &[&"mount", &place, &"plain"]));
        assert!(said.contains(place), "{said}");
    }
    unchanged(&home, || home.refused(3, &[&"inspect", &"empty"]));
}

#[test]
fn mount_points_that_will_not_do() {
    let unmounted = Unmounted::new(&[]);
    let Volume { home, cipher, .. } = &unmounted.volume;
    fs::write(home.path("file"), "").unwrap();
    fs::create_dir_all(home.path("full/entry")).unwrap();
    fs::create_dir_all(home.path("above")).unwrap();
    let inside = cipher.join("inside");
    fs::create_dir(&inside).unwrap();
    symlink(&inside, home.path("link-inside")).unwrap();
    let dangling = home.path("dangling");
    symlink("nowhere", &dangling).unwrap();
    let home_itself = home.path("");
    let link_inside = home.path("link-inside");
    let at = |name: &str| home.path(name);
    let cases: [(&Path, &str); 8] = [
        (&at("missing"), "No such file"),
        (&at("file"), "Not a directory"),
        (&at("full"), "not empty"),
        (&inside, "inside the cipher directory"),
        (&link_inside, "inside the cipher directory"),
        (cipher, "cipher directory itself"),
        (&home_itself, "lies inside it"),
        (&dangling, "No such file"),
    ];
    for (place, reason) in cases {
        let said = unchanged(home, || home.refused(9, &[&"mount", cipher, &place]));
        assert!(said.contains(reason), "{}: {said}", place.display());
    }
    // A mount point that will not do is found before a volume is made.
    unchanged(home, || home.refused(9, &[&"mount", &"--init", &"new", &"missing"]));
}

#[test]
fn init_where_something_is() {
    let unmounted = Unmounted::new(&[]);
    let Volume { home, cipher, .. } = &unmounted.volume;
    fs::create_dir_all(home.path("full/entry")).unwrap();
    fs::write(home.path("file"), "").unwrap();
    for place in [cipher.as_path(), &home.path("full"), &home.path("file"), &home.path("missing/below")] {
        let said = unchanged(home, || home.refused(3, &[&"init", &place, &"--key", &"local:new/keyring.toml"]));
        let named = if place.exists() { place } else { place.parent().unwrap() };
        assert!(said.contains(named.to_str().unwrap()), "{said}");
    }
}

/// A keyring is made before the volume, and goes with it.
#[test]
fn a_failed_init_leaves_no_keyring() {
    needs_root();
    let home = Home::new();
    fs::create_dir(home.path("full")).unwrap();
    run("mount", &[&"-t", &"tmpfs", &"-o", &"size=8k,nr_inodes=2", &"none", &home.path("full")], Path::new("/"));
    unchanged(&home, || home.refused(14, &[&"init", &"full/cipher"]));
    unchanged(&home, || home.refused(14, &[&"init", &"full/cipher", &"--key", &"local:keys/of/mine.toml"]));
    assert!(!home.path("data/kmsfs").exists() && !home.path("keys").exists());
    unchanged(&home, || home.refused(2, &[&"init", &"cipher", &"--key", &"local:cipher/keyring.toml"]));
}

#[test]
fn without_a_fuse_device() {
    needs_root();
    let unmounted = Unmounted::new(&[]);
    let Volume { home, cipher, plain, .. } = &unmounted.volume;
    // Something else in its place, in a mount namespace of its own.
    for device in ["/dev/null", "/etc/passwd"] {
        let script = format!("mount --bind {device} /dev/fuse && exec \"$0\" mount \"$1\" \"$2\"");
        let mut command = home.command("unshare");
        command.args(["-m", "sh", "-c", &script]).arg(home.program()).arg(cipher).arg(plain);
        let output = unchanged(home, || command.output().unwrap());
        assert_eq!(output.status.code(), Some(10), "{device}: {}", text(&output.stderr));
        assert!(text(&output.stderr).starts_with("kmsfs: "), "{}", text(&output.stderr));
    }
    // A /dev without it.
    let script = "mount -t tmpfs none /dev && exec \"$0\" mount \"$1\" \"$2\" 2>&1";
    let mut command = home.command("unshare");
    command.args(["-m", "sh", "-c", script]).arg(home.program()).arg(cipher).arg(plain);
    let output = unchanged(home, || command.output().unwrap());
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(10), "{said}");
    assert!(said.contains("/dev/fuse") && said.contains("modprobe fuse"), "{said}");
}

#[test]
fn nothing_is_mounted_there() {
    let unmounted = Unmounted::new(&[]);
    let Volume { home, cipher, plain, .. } = &unmounted.volume;
    for command in ["umount", "status"] {
        for place in [plain.as_path(), cipher, Path::new("missing"), Path::new("/")] {
            unchanged(home, || home.refused(12, &[&command, &place]));
        }
    }
}

// ---- usage and reports ----

#[test]
fn wrong_usage_touches_nothing() {
    let unmounted = Unmounted::new(&[]);
    let home = &unmounted.volume.home;
    let said = unmounted.mount_refused(2, &[&"-o", &"ro,sneaky"]);
    assert!(said.contains("sneaky") && said.contains("allow_other"), "{said}");
    unmounted.mount_refused(2, &[&"--suite", &"xaes-256-gcm"]);
    unmounted.mount_refused(2, &[&"--log-level", &"loud"]);
    unmounted.mount_refused(2, &[&"--kms-attempt-timeout", &"0"]);
    unmounted.mount_refused(2, &[&"--fips", &"--endpoint-url", &NOBODY]);
    fs::write(home.path("settings.toml"), "regoin = \"x\"\n").unwrap();
    let said = unmounted.mount_refused(2, &[&"--config", &"settings.toml"]);
    assert!(said.contains("regoin"), "{said}");
    let wrong: [&[Argument<'_>]; 9] = [
        &[],
        &[&"frobnicate"],
        &[&"mount", &"cipher"],
        &[&"init", &"new", &"--suite", &"rot13"],
        &[&"init", &"new", &"--key", &"gpg:me"],
        &[&"init", &"new", &"--key", &"local:"],
        &[&"init", &"new", &"--files-per-data-key", &"0"],
        &[&"init", &"new", &"--holes", &"maybe"],
        &[&"inspect"],
    ];
    for arguments in wrong {
        let output = unchanged(home, || home.kmsfs(arguments));
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    }
}

#[test]
fn a_log_of_keys_is_refused() {
    let mut home = Home::new();
    home.set("LOG_SENSITIVE_BODIES", "1");
    let said = unchanged(&home, || home.refused(2, &[&"init", &"cipher"]));
    assert!(said.contains("LOG_SENSITIVE_BODIES"), "{said}");
}

#[test]
fn inspect_tells_what_is_true() {
    let unmounted = Unmounted::new(&["--suite", "xchacha20-poly1305"]);
    let Volume { home, cipher, .. } = &unmounted.volume;
    let file = support::walk(cipher)
        .into_iter()
        .find(|path| path.is_file() && !path.starts_with(cipher.join(".kmsfs")))
        .unwrap();
    let report =
        |path: &Path| -> serde_json::Value { serde_json::from_str(&home.ok(&[&"inspect", &"--json", &path])).unwrap() };
    let shown = report(&file);
    assert_eq!(shown["plain_size"], 7);
    assert_eq!(shown["slots"][0]["mac"], "authentic");
    assert_eq!(shown["slots"][0]["suite"], "xchacha20-poly1305");
    let volume = report(cipher);
    assert_eq!((&volume["seal"], &volume["kind"]), (&"authentic".into(), &"volume".into()));
    assert_eq!(shown["slots"][0]["volume_id"], volume["volume_id"]);
    assert_eq!(report(&unmounted.config())["volume_id"], volume["volume_id"]);
    let several = home.ok(&[&"inspect", &"--json", &file, cipher]);
    assert_eq!(several.lines().filter(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()).count(), 2);
    let for_people = home.ok(&[&"inspect", &file, cipher]);
    assert!(for_people.contains("authentic") && for_people.contains("xchacha20-poly1305"), "{for_people}");

    fs::write(home.path("stranger"), vec![7; 10_000]).unwrap();
    let said = unchanged(home, || home.refused(13, &[&"inspect", &"stranger"]));
    assert!(said.contains("stranger"), "{said}");
    unchanged(home, || home.refused(14, &[&"inspect", &"missing"]));
    // What can be seen without a key is shown without one.
    fs::rename(home.path("data/kmsfs/keyring.toml"), home.path("away")).unwrap();
    assert!(report(&file)["slots"][0]["mac"].as_str().unwrap().starts_with("not checked"));
    assert!(report(cipher)["seal"].as_str().unwrap().starts_with("not checked"));
    fs::rename(home.path("away"), home.path("data/kmsfs/keyring.toml")).unwrap();

    flip(&file, 40);
    let output = unchanged(home, || home.kmsfs(&[&"inspect", &"--json", &file]));
    assert_eq!(output.status.code(), Some(13));
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(shown["slots"][0]["mac"].as_str().unwrap().contains("does not authenticate"), "{shown}");
}

#[test]
fn status_is_complete() {
    let volume = Volume::new(&["--suite", "xaes-256-gcm"]);
    fs::write(volume.path("file"), "x").unwrap();
    let open = fs::File::open(volume.path("file")).unwrap();
    let status = volume.status();
    assert_eq!(status["mountpoint"], volume.plain.to_str().unwrap());
    assert_eq!(status["suite"], "xaes-256-gcm");
    assert_eq!(status["read_only"], false);
    assert_eq!(status["files_open"], 1);
    assert!(status["log_file"].as_str().unwrap().starts_with(volume.home.path("state").to_str().unwrap()));
    let fields = ["pid", "volume_id", "wrapping_key", "key_cache_hits", "key_cache_misses", "provider_calls"];
    assert!(fields.iter().all(|field| !status[*field].is_null()), "{status}");
    drop(open);
    let for_people = volume.home.ok(&[&"status", &volume.plain]);
    assert!(for_people.lines().all(|line| line.contains(": ")), "{for_people}");
}

#[test]
fn help_speed_completions_and_manual_pages() {
    let home = Home::new();
    let help = home.ok(&[&"--help"]);
    assert!((0..=14).all(|code| help.contains(&format!("\n  {code:>2}  "))), "{help}");
    let speed: serde_json::Value = serde_json::from_str(&home.ok(&[&"speed", &"--json"])).unwrap();
    let suites = speed["suites"].as_array().unwrap();
    assert!(suites.iter().all(|suite| suite["seal_mb_per_s"].as_u64().is_some()), "{speed}");
    assert!(suites.iter().any(|suite| suite["suite"] == speed["auto"]), "{speed}");
    assert!(home.ok(&[&"speed"]).contains("auto"));
    for shell in ["bash", "zsh", "fish"] {
        assert!(home.ok(&[&"completions", &shell]).contains("kmsfs"));
    }
    fs::create_dir(home.path("man")).unwrap();
    home.ok(&[&"man", &"man"]);
    let pages = support::walk(&home.path("man"));
    let names: Vec<_> = pages.iter().map(|page| page.file_name().unwrap().to_str().unwrap()).collect();
    for page in ["kmsfs.1", "kmsfs-mount.1", "kmsfs-init.1", "kmsfs-umount.1"] {
        assert!(names.contains(&page), "{names:?}");
    }
    assert!(fs::read_to_string(home.path("man/man1/kmsfs.1")).unwrap().contains("EXIT STATUS"));
    home.refused(14, &[&"man", &"missing"]);
}

#[test]
fn mount_can_make_the_volume_first() {
    let home = Home::new();
    fs::create_dir(home.path("plain")).unwrap();
    home.ok(&[&"mount", &"--init", &"--holes", &"deny", &"cipher", &"plain"]);
    fs::write(home.path("plain/file"), "content").unwrap();
    assert!(fs::read_to_string(home.path("cipher/.kmsfs/volume.toml")).unwrap().contains("holes = \"deny\""));
    home.ok(&[&"umount", &"plain"]);
    // The second time it is there already.
    home.ok(&[&"mount", &"--init", &"cipher", &"plain"]);
    assert_eq!(fs::read(home.path("plain/file")).unwrap(), b"content");
    home.ok(&[&"umount", &"plain"]);
}
