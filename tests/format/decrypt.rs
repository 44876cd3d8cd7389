//! `scripts/decrypt.py`, written from the format alone, reads what the program wrote: settled, and as a killed process
//! leaves it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::{self, Entry, Home, Volume, assert_same, bytes, flip, set_times, text, tree};

const PAGE: usize = 4048;

/// Runs it, with `out` as the directory for the plaintext.
fn decrypt(volume: &Volume, out: &Path, more: &[&str]) -> Output {
    let base = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = base.join(".venv/bin/python");
    let mut command = Command::new(&python);
    command
        .arg(base.join("scripts/decrypt.py"))
        .arg(&volume.cipher)
        .arg(out)
        .args(more)
        .current_dir(volume.home.path(""));
    command.output().unwrap_or_else(|error| panic!("{}: {error}: scripts/test installs it", python.display()))
}

/// Decrypts everything, which must succeed.
fn decrypted(volume: &Volume, name: &str, more: &[&str]) -> BTreeMap<PathBuf, Entry> {
    let out = volume.home.path(name);
    let output = decrypt(volume, &out, more);
    assert!(output.status.success(), "{}", text(&output.stderr));
    comparable(&out)
}

/// What the script restores: all but hard links, and the times of links.
fn comparable(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let mut found = tree(root);
    for entry in found.values_mut() {
        entry.links = 0;
        if entry.mode & libc::S_IFMT == libc::S_IFLNK {
            entry.modified = (0, 0);
        }
    }
    found
}

fn fill(root: &Path, sparse: bool) {
    for size in [0, 1, PAGE - 1, PAGE, PAGE + 1, 4096, 2 * PAGE, 100_000] {
        fs::write(root.join(format!("{size}")), bytes(size as u64, size)).unwrap();
    }
    let deep = root.join("d".repeat(255)).join("e".repeat(176));
    fs::create_dir_all(&deep).unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    fs::write(deep.join("f".repeat(175)), "175").unwrap();
    fs::write(deep.join("\u{1f600} \n"), "odd").unwrap();
    symlink("up/../and away", deep.join("link")).unwrap();
    symlink("t".repeat(3000), root.join("l".repeat(255))).unwrap();
    symlink("t".repeat(4000), root.join("far")).unwrap();
    fs::hard_link(root.join("4096"), deep.join("hard")).unwrap();
    let cut = File::create(root.join("cut")).unwrap();
    cut.write_all_at(&bytes(1, 3 * PAGE), 0).unwrap();
    cut.set_len(PAGE as u64 + 100).unwrap();
    drop(cut);
    let gaps = File::create(root.join("gaps")).unwrap();
    gaps.write_all_at(b"start", 10).unwrap();
    gaps.write_all_at(b"end", if sparse { 10_000_000 } else { 50_000 }).unwrap();
    gaps.set_len(if sparse { 20_000_123 } else { 60_123 }).unwrap();
    drop(gaps);
    fs::set_permissions(root.join("1"), fs::Permissions::from_mode(0o4750)).unwrap();
    let mut paths = support::walk(root);
    paths.reverse();
    (0..)
        .zip(paths)
        .for_each(|(number, path)| set_times(&path, 1_600_000_000 - 100_000_000 * number, 987_654_321 - number));
}

fn check(init: &[&str], sparse: bool) {
    let volume = Volume::new(init);
    fill(&volume.plain, sparse);
    let expected = comparable(&volume.plain);
    volume.unmount();
    let files = support::walk(&volume.cipher);
    let settled = |path: &PathBuf| path.is_file() && !fs::metadata(path).unwrap().len().is_multiple_of(4096);
    assert!(files.iter().filter(|path| settled(path)).count() >= 5, "unmounting settles files");
    assert_same("settled", &decrypted(&volume, "settled", &[]), &expected);

    volume.mount();
    for name in ["1", "4047", "100000", "cut", "gaps", "0"] {
        OpenOptions::new().append(true).open(volume.path(name)).unwrap().write_all(b"appended").unwrap();
    }
    fs::write(volume.path("late"), bytes(7, 7777)).unwrap();
    let times = |name: &str| set_times(&volume.path(name), 1_650_000_000, 5);
    ["1", "4047", "100000", "cut", "gaps", "0", "late", ""].iter().for_each(|name| times(name));
    let expected = comparable(&volume.plain);
    let backing = volume.behind("late");
    volume.kill();
    assert_eq!(fs::metadata(&backing).unwrap().size() % 4096, 0, "a killed process leaves files unsettled");
    assert_same("unsettled", &decrypted(&volume, "unsettled", &[]), &expected);
}

#[test]
fn reads_volumes_under_xaes() {
    check(&["--suite", "xaes-256-gcm"], true);
}

#[test]
fn reads_volumes_under_xchacha_with_shared_data_keys() {
    check(&["--suite", "xchacha20-poly1305", "--files-per-data-key", "4"], true);
}

#[test]
fn reads_volumes_with_the_strict_rules() {
    check(&["--holes", "deny", "--end", "strict"], false);
}

#[test]
fn reads_volumes_under_a_passphrase() {
    let mut home = Home::new();
    home.set("KMSFS_PASSPHRASE", "open sesame");
    let volume = Volume::in_home(home, &["--key", "local:keys.toml"], &[]);
    fs::write(volume.path("file"), "content").unwrap();
    volume.unmount();
    fs::write(volume.home.path("passphrase"), "open sesame\n").unwrap();
    fs::write(volume.home.path("wrong"), "open barley\n").unwrap();
    let found = decrypted(&volume, "right", &["--passphrase-file", "passphrase"]);
    assert_eq!(found[Path::new("file")].content, b"content");
    for arguments in [[].as_slice(), &["--passphrase-file", "wrong"]] {
        let output = decrypt(&volume, &volume.home.path("none"), arguments);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("passphrase"), "{}", text(&output.stderr));
        assert!(!volume.home.path("none").exists());
    }
}

#[test]
fn refuses_a_flipped_byte() {
    let volume = Volume::new(&[]);
    for name in ["page", "header", "good"] {
        fs::write(volume.path(name), bytes(1, 10_000)).unwrap();
    }
    let [page, header] = ["page", "header"].map(|name| volume.behind(name));
    volume.unmount();
    flip(&page, 4096 + 500);
    flip(&header, 70);
    let output = decrypt(&volume, &volume.home.path("out"), &[]);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains(page.to_str().unwrap()) && said.contains("page"), "{said}");
    assert!(said.contains(header.to_str().unwrap()) && said.contains("header mac"), "{said}");
    let found = tree(&volume.home.path("out"));
    assert_eq!(found.keys().collect::<Vec<_>>(), [Path::new("good")]);

    let config = volume.cipher.join(".kmsfs/volume.toml");
    let sealed = fs::read_to_string(&config).unwrap();
    fs::write(&config, sealed.replace("\"lenient\"", "\"strict\"")).unwrap();
    let output = decrypt(&volume, &volume.home.path("none"), &[]);
    assert_eq!((output.status.code(), volume.home.path("none").exists()), (Some(1), false));
    assert!(text(&output.stderr).contains("seal"), "{}", text(&output.stderr));
}
