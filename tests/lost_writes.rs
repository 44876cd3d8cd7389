//! Writes that are lost after a program was told that they are done: it hears of them, and nobody reads or stores a zero in
//! their place.
#![cfg(feature = "mount")]
#![allow(clippy::unwrap_used)] // it is how a test fails

#[path = "support/mount.rs"]
mod support;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use support::{Home, Volume, errno, eventually, run};

/// A volume under a keyring's key that is asked for again after two seconds.
struct Revocable {
    volume: Volume,
    keyring: PathBuf,
    key: String,
}

impl Revocable {
    fn new() -> Self {
        let home = Home::new();
        let keyring = home.path("keyring");
        let key = format!("local:{}", keyring.display());
        let volume = Volume::in_home(home, &["--key", &key], &["--key-max-age", "2"]);
        let key = volume.home.ok(&[&"keys", &"list", &volume.cipher, &"--json"]);
        let start = key.find("k-").unwrap();
        Self { keyring, key: key[start..start + 18].to_owned(), volume }
    }

    fn set(&self, state: &str) {
        self.volume.home.ok(&[&"keys", &state, &self.key, &"--keyring", &self.keyring]);
    }

    /// Waits until the mount refuses what is done with the file `probe`.
    fn disable(&self) {
        self.set("disable");
        eventually("the key is refused", || fs::read(self.volume.path("probe")).is_err());
    }

    fn enable(&self) {
        self.set("enable");
        eventually("the key is given again", || fs::read(self.volume.path("probe")).is_ok());
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).append(true).create(true).open(path).unwrap()
}

#[test]
fn a_log_whose_key_was_refused_goes_on_without_zeros() {
    let of = Revocable::new();
    let log = of.volume.path("log");
    fs::write(of.volume.path("probe"), "probe").unwrap();
    let mut open_log = open(&log);
    open_log.write_all(&[b'A'; 4000]).unwrap();
    open_log.sync_all().unwrap();
    of.disable();
    // The page is in the kernel already, or the write is refused itself.
    let lost = open_log.write_all(&[b'B'; 8192]).and_then(|()| open_log.sync_all());
    assert!(lost.is_err(), "nobody was told");
    of.enable();
    if let Ok(found) = fs::read(&log) {
        assert!(found.iter().all(|byte| [b'A', b'C'].contains(byte)), "a byte that nobody wrote");
    }
    drop(open_log.write_all(b"CCCC").and_then(|()| open_log.sync_all()));
    drop(open_log);
    eventually("the file is usable", || {
        let mut again = open(&log);
        again.write_all(b"DDDD").and_then(|()| again.sync_all()).is_ok()
    });
    of.volume.remount();
    let found = fs::read(&log).unwrap();
    assert!(
        found.starts_with(&[b'A'; 4000]) && found.ends_with(b"DDDD") && found.len() < 5000,
        "{} bytes",
        found.len()
    );
    assert!(!found.contains(&0), "zeros that nobody wrote");
}

#[test]
fn a_far_write_that_was_refused_leaves_no_hole_and_cutting_the_file_makes_it_usable() {
    let of = Revocable::new();
    let path = of.volume.path("far");
    fs::write(of.volume.path("probe"), "probe").unwrap();
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all_at(&[b'A'; 4096], 0).unwrap();
    file.sync_all().unwrap();
    of.disable();
    let lost = file.write_all_at(&[b'B'; 4096], 1 << 20).and_then(|()| file.sync_all());
    assert!(lost.is_err());
    of.enable();
    assert!(file.write_all_at(&[b'C'; 4096], 2 << 20).and_then(|()| file.sync_all()).is_err(), "it would store a hole");
    assert!(file.set_len(3 << 20).is_err(), "so would this");
    file.set_len(4096).unwrap();
    file.write_all_at(&[b'D'; 4096], 8192).unwrap();
    file.sync_all().unwrap();
    drop(file);
    of.volume.remount();
    let found = fs::read(&path).unwrap();
    let expected = [[b'A'; 4096], [0; 4096], [b'D'; 4096]].concat();
    assert!(found == expected, "the program itself has made this hole");
}

/// `docs/FORMAT.md` 4.5: it never became durable, and is empty.
#[test]
fn a_file_with_a_header_of_zeros_is_empty_and_begins_anew() {
    let volume = Volume::new(&[]);
    for name in ["read", "appended"] {
        fs::write(volume.path(name), [7; 10_000]).unwrap();
    }
    let behind = ["read", "appended"].map(|name| volume.behind(name));
    volume.unmount();
    for path in &behind {
        OpenOptions::new().write(true).open(path).unwrap().write_all_at(&[0; 4096], 0).unwrap();
    }
    volume.mount();
    assert_eq!(fs::read(volume.path("read")).unwrap(), b"");
    assert_eq!(fs::metadata(volume.path("read")).unwrap().len(), 0);
    open(&volume.path("appended")).write_all(b"more").unwrap();
    assert_eq!(fs::read(volume.path("appended")).unwrap(), b"more");
    volume.remount();
    assert_eq!(fs::read(volume.path("appended")).unwrap(), b"more");
    let said = volume.home.kmsfs(&[&"check", &volume.cipher]);
    assert!(support::text(&said.stdout).contains("the header is zeros"), "{}", support::text(&said.stdout));
}

/// Only XFS has files of that size.
#[test]
fn the_last_bytes_of_the_largest_file_are_what_was_written() {
    const MOST: u64 = 9_115_285_645_797_871_760;
    support::needs_root();
    let home = Home::new();
    let (image, disk) = (home.path("image"), home.path("cipher"));
    File::create(&image).unwrap().set_len(320 << 20).unwrap();
    run("mkfs.xfs", &[&"-q", &image], Path::new("/"));
    fs::create_dir(&disk).unwrap();
    run("mount", &[&"-o", &"loop", &image, &disk], Path::new("/"));
    let volume = Volume::in_home(home, &[], &[]);
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(volume.path("large")).unwrap();
    file.write_all_at(&[b'z'; 100], MOST - 100).unwrap();
    file.sync_all().unwrap();
    volume.home.ok(&[&"lock", &volume.plain]);
    volume.home.ok(&[&"unlock", &volume.plain]);
    let mut found = [0; 100];
    file.read_exact_at(&mut found, MOST - 100).unwrap();
    assert_eq!(found, [b'z'; 100]);
    assert_eq!(errno(file.write_all_at(b"z", MOST).and_then(|()| file.sync_all())), Some(libc::EFBIG));
}
