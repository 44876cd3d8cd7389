//! Volumes that earlier releases sealed, with their keyrings (`tests/compat`), open with every reader: a mount, `export`, `cat`
//! and `scripts/decrypt.py`; and go on being written.

use std::fmt::Write;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::support::{Home, Volume, needs_root, text, walk};
use rustix::fs::{getxattr, listxattr};
use sha2::{Digest, Sha256};

/// Of those that have one.
const PASSPHRASE: &str = "correct horse battery staple";

/// One volume of a release: where it lies, and whether it is under the passphrase.
fn volumes() -> Vec<(PathBuf, bool)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat");
    let releases = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let all: Vec<_> = releases.flat_map(|at| [(at.join("lenient"), false), (at.join("strict"), true)]).collect();
    assert!(!all.is_empty());
    all
}

fn quoted(path: &Path) -> String {
    path.as_os_str().as_bytes().iter().fold(String::new(), |mut text, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' | b'/' => text.push(char::from(*byte)),
            _ => write!(text, "%{byte:02X}").unwrap(),
        }
        text
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What `tests/compat/make` writes down of a path.
fn line(root: &Path, path: &Path) -> String {
    let found = fs::symlink_metadata(path).unwrap();
    let (file, directory) = (found.is_file(), found.is_dir());
    let what = match () {
        () if file => hex(&Sha256::digest(fs::read(path).unwrap())),
        () if found.is_symlink() => hex(&Sha256::digest(fs::read_link(path).unwrap().as_os_str().as_bytes())),
        () => "-".to_owned(),
    };
    let mut attributes = Vec::new();
    if file || directory {
        let mut names = vec![0; 4096];
        let len = listxattr(path, &mut names[..]).unwrap();
        for name in names[..len].split(|byte| *byte == 0).filter(|name| name.starts_with(b"user.")) {
            let mut value = vec![0; 4096];
            let len = getxattr(path, name, &mut value[..]).unwrap();
            attributes.push(format!("{}={}", String::from_utf8_lossy(name), hex(&value[..len])));
        }
    }
    attributes.sort();
    let attributes = if attributes.is_empty() { "-".to_owned() } else { attributes.join(",") };
    let time =
        if directory { "-".to_owned() } else { (found.mtime() * 1_000_000_000 + found.mtime_nsec()).to_string() };
    let name = quoted(path.strip_prefix(root).unwrap());
    format!("{name} {:o} {time} {what} {attributes}", found.mode())
}

fn lines(root: &Path) -> Vec<String> {
    let mut lines: Vec<_> = walk(root).iter().map(|path| line(root, path)).collect();
    lines.sort();
    lines
}

/// What the decryptor restores: no special files, no attributes, no times of links.
fn restored(lines: &[String]) -> Vec<String> {
    let kept =
        lines.iter().map(|line| line.split(' ').collect::<Vec<_>>()).filter(|fields| !fields[1].starts_with("10640"));
    let relaxed = kept.map(|mut fields| {
        if fields[1].starts_with("12") {
            fields[2] = "-";
        }
        fields.truncate(4);
        fields.join(" ")
    });
    relaxed.collect()
}

/// A volume of an earlier release, unpacked.
fn unpacked(at: &Path, sealed: bool) -> (Volume, Vec<String>) {
    let mut home = Home::new();
    home.shell(&format!("tar --xattrs --xattrs-include='user.*' -xpzf '{}.tar.gz'", at.display()));
    home.set("KMSFS_KEYRING", home.path("keyring"));
    if sealed {
        home.set("KMSFS_PASSPHRASE", PASSPHRASE);
    }
    let mut expected: Vec<_> =
        fs::read_to_string(at.with_extension("tree")).unwrap().lines().map(str::to_owned).collect();
    expected.sort();
    (Volume::unpacked(home), expected)
}

#[test]
fn volumes_of_earlier_releases_open_with_every_reader() {
    needs_root();
    for (at, sealed) in volumes() {
        let (volume, expected) = unpacked(&at, sealed);
        let (home, cipher) = (&volume.home, &volume.cipher);
        home.ok(&[&"check", cipher]);
        home.ok(&[&"export", &"--verify", cipher, &home.path("out")]);
        assert_eq!(lines(&home.path("out")), expected, "exported: {}", at.display());
        for path in walk(&home.path("out")).iter().filter(|path| path.is_file() && !path.is_symlink()) {
            let name = path.strip_prefix(home.path("out")).unwrap();
            let output = home.kmsfs(&[&"cat", cipher, &name]);
            assert!(output.status.success() && output.stdout == fs::read(path).unwrap(), "{}", text(&output.stderr));
        }
        fs::write(home.path("passphrase"), PASSPHRASE).unwrap();
        let base = Path::new(env!("CARGO_MANIFEST_DIR"));
        let script = format!(
            "'{base}/.venv/bin/python' '{base}/scripts/decrypt.py' cipher decrypted --keyring keyring --passphrase-file passphrase",
            base = base.display()
        );
        home.shell(&script);
        let decrypted = lines(&home.path("decrypted"));
        assert_eq!(restored(&decrypted), restored(&expected), "decrypted: {}", at.display());
        volume.mount();
        assert_eq!(lines(&volume.plain), expected, "mounted: {}", at.display());
        // And they are volumes like any other.
        fs::write(volume.path("letter"), "The treasure was dug up.\n").unwrap();
        fs::rename(volume.path("d"), volume.path("moved")).unwrap();
        volume.remount();
        assert_eq!(fs::read_to_string(volume.path("letter")).unwrap(), "The treasure was dug up.\n");
        assert!(volume.path("moved/pages").exists());
        volume.unmount();
        home.ok(&[&"check", cipher]);
    }
}
