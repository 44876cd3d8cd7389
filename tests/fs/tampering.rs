//! Somebody changes a cipher directory: each attack of the design, with the result that `docs/THREATS.md` promises, and every byte of
//! a small volume flipped, one at a time. Nothing wrong is ever read, and nothing hangs or panics.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, symlink};
use std::path::{Path, PathBuf};

use crate::support::library::{self, Found, Library, entries};
use kmsfs::crypto::Suite;
use kmsfs::format::config::{End, Holes};
use kmsfs::fs::{Error, ROOT};

const PAGE: usize = 4096;
const PAYLOAD: usize = 4048;

/// Content in which no two pages are alike.
fn content(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| ((at * 7 + at / 256 * 13 + seed * 31) % 251).to_le_bytes()[0] + 1).collect()
}

fn errno<T>(result: Result<T, Error>) -> Option<i32> {
    result.err().map(|error| error.errno())
}

fn long_name() -> String {
    "l".repeat(200)
}

/// A few files of up to three pages, a symlink, a directory, an extended attribute, a long name.
fn small_volume(suite: Suite) -> Library {
    let library = Library::new(suite, Holes::Allow, End::Lenient);
    library.mkdir("directory");
    library.write("one", 0, &content(1, 100)).unwrap();
    library.write("directory/three", 0, &content(2, 2 * PAYLOAD + 900)).unwrap();
    library.write(&long_name(), 0, &content(3, PAYLOAD)).unwrap();
    library.set_xattr("one", "user.key", b"value");
    library.fs().symlink(ROOT, b"link", b"directory/three", library::ME).unwrap();
    library
}

/// Nothing is there that was not, and what reads is what it was. Names may be missing, and reads may fail.
fn nothing_wrong(what: &str, truth: &BTreeMap<String, Found>, found: &BTreeMap<String, Found>) {
    for (path, found) in found.iter().filter(|(_, found)| found.is_ok()) {
        assert!(truth.get(path) == Some(found), "{what}: {path} reads as something else");
    }
    // What failed is named as it was, or is the listing of a directory.
    for path in found.keys() {
        assert!(truth.contains_key(path) || path.ends_with('/'), "{what}: there is a {path:?}");
    }
}

fn flip(path: &Path, at: u64, mask: u8) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ mask], at).unwrap();
}

#[test]
fn no_flipped_byte_of_a_file_is_ever_read() {
    for suite in [Suite::Xaes256Gcm, Suite::XChaCha20Poly1305] {
        let mut library = small_volume(suite);
        library.open().unwrap();
        let truth = library.tree();
        assert!(truth.values().all(Result::is_ok), "{truth:?}");
        let (mut flips, mut refused) = (0, 0);
        for path in ["one", "directory/three", &long_name()] {
            let backing = library.behind(path);
            let expected = library.read(path).unwrap();
            // The tail past the last page has no bytes of its own.
            let end = fs::metadata(&backing).unwrap().len() / PAGE as u64 * PAGE as u64;
            for at in 0..end {
                let mask = 1 << (at % 8);
                flip(&backing, at, mask);
                match library.read(path) {
                    Ok(found) => assert!(found == expected, "{path}: byte {at}"),
                    Err(error) => {
                        assert_eq!(error.errno(), libc::EIO, "{path}: byte {at}");
                        refused += 1;
                    }
                }
                if at % 499 == 0 {
                    library.open().unwrap();
                    nothing_wrong(&format!("byte {at} of {path}"), &truth, &library.tree());
                }
                flip(&backing, at, mask);
                flips += 1;
            }
        }
        library.open().unwrap();
        assert_eq!(library.tree(), truth, "all is as before");
        println!("{suite:?}: {flips} bytes flipped, {refused} refused");
        // The second slot of a header is not in use, and some bytes of the first say nothing that is needed.
        assert!(refused >= flips - 3 * 2048, "{refused} of {flips}");
    }
}

#[test]
fn no_flipped_byte_of_names_targets_ids_and_attributes_is_ever_believed() {
    let mut library = small_volume(Suite::Xaes256Gcm);
    library.open().unwrap();
    let truth = library.tree();
    library.close();
    let mut flips = 0;
    let mut look = |library: &mut Library, what: &str| {
        flips += 1;
        if library.open().is_ok() {
            nothing_wrong(what, &truth, &library.tree());
            library.close();
        }
    };
    let ours = library.cipher.join(".kmsfs");
    for entry in entries(&library.cipher).into_iter().filter(|entry| !entry.starts_with(&ours)) {
        let name = entry.file_name().unwrap().to_str().unwrap().to_owned();
        for (at, changed) in changed_texts(&name) {
            let other = entry.with_file_name(changed);
            if fs::symlink_metadata(&other).is_ok() {
                continue;
            }
            fs::rename(&entry, &other).unwrap();
            look(&mut library, &format!("character {at} of the name {name}"));
            fs::rename(&other, &entry).unwrap();
        }
        let Ok(target) = fs::read_link(&entry) else { continue };
        for (at, changed) in changed_texts(target.to_str().unwrap()) {
            replace_link(&entry, &changed);
            look(&mut library, &format!("character {at} of the target of {name}"));
        }
        replace_link(&entry, target.to_str().unwrap());
    }
    flips += attribute_flips(&mut library, &truth);
    library.open().unwrap();
    assert_eq!(library.tree(), truth, "all is as before");
    println!("{flips} characters of names, targets, ids and attributes changed");
}

fn replace_link(path: &Path, target: &str) {
    fs::remove_file(path).unwrap();
    symlink(target, path).unwrap();
}

/// The text with each of its characters changed to another of the alphabet, or with one bit of it flipped.
fn changed_texts(text: &str) -> Vec<(usize, String)> {
    let change = |at: usize| {
        let mut bytes = text.as_bytes().to_vec();
        bytes[at] = match bytes[at] {
            b'A' => b'B',
            byte if at.is_multiple_of(2) => byte ^ 1,
            _ => b'A',
        };
        (at, String::from_utf8(bytes).unwrap())
    };
    (0..text.len()).map(change).filter(|(_, changed)| !changed.contains(['/', '\0'])).collect()
}

/// Attributes are reached by their tools: the standard library knows none.
fn attribute_flips(library: &mut Library, truth: &BTreeMap<String, Found>) -> usize {
    library.open().unwrap();
    let file = library.behind("one");
    let names = kernel::names(&file);
    let name = names.iter().find(|name| name.starts_with("user.kmsfs.")).expect("a stored attribute").clone();
    let value = kernel::get(&file, &name);
    let mut flips = 0;
    for at in 0..value.len() {
        let mut changed = value.clone();
        changed[at] ^= 1 << (at % 8);
        kernel::set(&file, &name, &changed);
        nothing_wrong(&format!("byte {at} of an attribute"), truth, &library.tree());
        flips += 1;
    }
    kernel::set(&file, &name, &value);
    for (at, changed) in changed_texts(&name).into_iter().filter(|(at, _)| *at >= "user.".len()) {
        kernel::remove(&file, &name);
        kernel::set(&file, &changed, &value);
        nothing_wrong(&format!("character {at} of the name of an attribute"), truth, &library.tree());
        kernel::remove(&file, &changed);
        kernel::set(&file, &name, &value);
        flips += 1;
    }
    flips
}

/// Extended attributes as the backing filesystem has them.
mod kernel {
    use std::path::Path;

    pub(super) fn names(path: &Path) -> Vec<String> {
        let mut buffer = [0_u8; 4096];
        let len = rustix::fs::listxattr(path, &mut buffer[..]).unwrap();
        let names = buffer[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
        names.map(|name| String::from_utf8(name.to_vec()).unwrap()).collect()
    }

    pub(super) fn get(path: &Path, name: &str) -> Vec<u8> {
        let mut buffer = [0_u8; 4096];
        let len = rustix::fs::getxattr(path, name, &mut buffer[..]).unwrap();
        buffer[..len].to_vec()
    }

    pub(super) fn set(path: &Path, name: &str, value: &[u8]) {
        rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
    }

    pub(super) fn remove(path: &Path, name: &str) {
        rustix::fs::removexattr(path, name).unwrap();
    }
}

/// No parameter can be downgraded: whatever is changed in the config, the volume does not open.
#[test]
fn no_changed_config_is_used() {
    let mut library = Library::new(Suite::Xaes256Gcm, Holes::Deny, End::Strict);
    library.write("one", 0, b"content").unwrap();
    library.close();
    let path = library.cipher.join(".kmsfs/volume.toml");
    let good = fs::read_to_string(&path).unwrap();
    for (from, to) in [
        ("holes = \"deny\"", "holes = \"allow\""),
        ("end = \"strict\"", "end = \"lenient\""),
        ("xaes-256-gcm", "xchacha20-poly1305"),
        ("files-per-data-key = 1", "files-per-data-key = 9"),
    ] {
        assert!(good.contains(from), "{from}");
        fs::write(&path, good.replace(from, to)).unwrap();
        library.open().unwrap_err();
    }
    for at in 0..good.len() {
        let mut bad = good.clone().into_bytes();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, bad).unwrap();
        assert!(library.open().is_err(), "byte {at}");
    }
    fs::write(&path, &good).unwrap();
    library.open().unwrap();
    assert_eq!(library.read("one").unwrap(), b"content");
    println!("{} bytes of a config flipped", good.len());
}

/// Two files of three pages, closed.
fn two_files(holes: Holes, end: End) -> (Library, PathBuf, PathBuf) {
    let mut library = Library::new(Suite::Xaes256Gcm, holes, end);
    library.write("a", 0, &content(1, 3 * PAYLOAD)).unwrap();
    library.write("b", 0, &content(2, 3 * PAYLOAD)).unwrap();
    let (a, b) = (library.behind("a"), library.behind("b"));
    library.close();
    (library, a, b)
}

fn page_of(file: &[u8], page: usize) -> std::ops::Range<usize> {
    assert!(file.len() >= (page + 2) * PAGE);
    (page + 1) * PAGE..(page + 2) * PAGE
}

#[test]
fn a_page_that_was_moved_is_refused_and_the_others_are_read() {
    let (mut library, a, b) = two_files(Holes::Allow, End::Lenient);
    let (good, other) = (fs::read(&a).unwrap(), fs::read(&b).unwrap());
    for (source, page) in [(&good, 2), (&good, 0), (&other, 1)] {
        let mut bad = good.clone();
        bad[page_of(&good, 1)].copy_from_slice(&source[page_of(source, page)]);
        fs::write(&a, &bad).unwrap();
        library.open().unwrap();
        let id = library.walk("a").unwrap().id;
        assert_eq!(errno(library.read_file(id, PAYLOAD as u64, 10)), Some(libc::EIO));
        for page in [0, 2] {
            let start = page * PAYLOAD;
            let found = library.read_file(id, start as u64, PAYLOAD).unwrap();
            assert!(found == content(1, 3 * PAYLOAD)[start..start + PAYLOAD]);
        }
        assert!(library.fs().stats().unauthentic_pages > 0);
    }
}

/// Documented: version 1 has no memory of what it wrote.
#[test]
fn an_older_state_of_a_page_or_a_file_is_not_detected() {
    let (mut library, a, _) = two_files(Holes::Allow, End::Lenient);
    let old = fs::read(&a).unwrap();
    library.open().unwrap();
    library.write("a", 0, &content(9, 3 * PAYLOAD)).unwrap();
    library.close();
    let mut mixed = fs::read(&a).unwrap();
    mixed[page_of(&old, 1)].copy_from_slice(&old[page_of(&old, 1)]);
    fs::write(&a, &mixed).unwrap();
    library.open().unwrap();
    assert!(library.read("a").unwrap()[PAYLOAD..2 * PAYLOAD] == content(1, 3 * PAYLOAD)[PAYLOAD..2 * PAYLOAD]);
    fs::write(&a, &old).unwrap();
    library.open().unwrap();
    assert!(library.read("a").unwrap() == content(1, 3 * PAYLOAD));
}

#[test]
fn a_header_of_another_file_or_volume_opens_nothing() {
    let (mut library, a, b) = two_files(Holes::Allow, End::Lenient);
    let (_foreign, foreign_file, _) = two_files(Holes::Allow, End::Lenient);
    let good = fs::read(&a).unwrap();
    for source in [b, foreign_file] {
        let header = fs::read(&source).unwrap()[..PAGE].to_vec();
        for slots in [0..PAGE, 0..PAGE / 2] {
            let mut bad = good.clone();
            bad[slots.clone()].copy_from_slice(&header[slots]);
            fs::write(&a, &bad).unwrap();
            library.open().unwrap();
            assert_eq!(errno(library.read("a")), Some(libc::EIO));
        }
    }
    // A whole file under another name of the volume is a file of the volume: documented.
    fs::write(&a, fs::read(library.behind("b")).unwrap()).unwrap();
    library.open().unwrap();
    assert!(library.read("a").unwrap() == content(2, 3 * PAYLOAD));
}

#[test]
fn names_and_ids_that_were_moved_between_directories_are_left_out_and_counted() {
    let mut library = Library::new(Suite::Xaes256Gcm, Holes::Allow, End::Lenient);
    for directory in ["x", "y"] {
        library.mkdir(directory);
        library.write(&format!("{directory}/file"), 0, directory.as_bytes()).unwrap();
        library.write(&format!("{directory}/{}", long_name()), 0, directory.as_bytes()).unwrap();
    }
    let (x, y) = (library.behind("x"), library.behind("y"));
    let file = library.behind("x/file");
    library.close();
    // A name moved.
    let moved = y.join(file.file_name().unwrap());
    fs::rename(&file, &moved).unwrap();
    library.open().unwrap();
    let list = |library: &Library, path: &str| library.list(library.walk(path).unwrap().id).unwrap();
    assert_eq!((list(&library, "x").len(), list(&library, "y").len()), (1, 2));
    assert_eq!(library.fs().stats().undecryptable_names, 1);
    fs::rename(&moved, &file).unwrap();
    // Ids swapped.
    let ids = [&x, &y].map(|directory| fs::read_link(directory.join(".kmsfs.dir")).unwrap());
    for (directory, id) in [&x, &y].into_iter().zip(ids.iter().rev()) {
        replace_link(&directory.join(".kmsfs.dir"), id.to_str().unwrap());
    }
    library.open().unwrap();
    assert_eq!((list(&library, "x"), list(&library, "y")), (Vec::new(), Vec::new()));
    assert_eq!(library.fs().stats().undecryptable_names, 4);
    assert_eq!(errno(library.walk("x/file")), Some(libc::ENOENT));
}

#[test]
fn a_file_that_was_cut_at_a_page_is_counted_or_refused() {
    for (end, refused) in [(End::Lenient, false), (End::Strict, true)] {
        let (mut library, a, b) = two_files(Holes::Allow, end);
        fs::OpenOptions::new().write(true).open(&a).unwrap().set_len(3 * PAGE as u64).unwrap();
        // And within a page: no file of the format has this size.
        fs::OpenOptions::new().write(true).open(&b).unwrap().set_len(3 * PAGE as u64 - 7).unwrap();
        library.open().unwrap();
        match library.read("a") {
            Ok(found) if !refused => assert!(found == content(1, 2 * PAYLOAD)),
            Err(error) if refused => assert_eq!(error.errno(), libc::EIO),
            other => panic!("{end:?}: {:?}", other.map(|found| found.len())),
        }
        assert_eq!(library.fs().stats().missing_end_marks, u64::from(!refused));
        assert_eq!(errno(library.read("b")), Some(libc::EIO));
    }
}

#[test]
fn a_punched_hole_is_zeros_or_refused() {
    for (holes, refused) in [(Holes::Allow, false), (Holes::Deny, true)] {
        let (mut library, a, _) = two_files(holes, End::Lenient);
        let good = fs::read(&a).unwrap();
        let mut bad = good.clone();
        bad[page_of(&good, 1)].fill(0);
        fs::write(&a, &bad).unwrap();
        library.open().unwrap();
        let id = library.walk("a").unwrap().id;
        match library.read_file(id, PAYLOAD as u64, PAYLOAD) {
            Ok(found) if !refused => assert!(found == [0; PAYLOAD]),
            Err(error) if refused => assert_eq!(error.errno(), libc::EIO),
            other => panic!("{holes:?}: {:?}", other.map(|found| found.len())),
        }
        assert!(library.read_file(id, 0, PAYLOAD).unwrap() == content(1, PAYLOAD));
    }
}

/// Whoever plants an entry of another kind under a name gains nothing: no symlink is followed, no FIFO blocks.
#[test]
fn planted_symlinks_and_fifos_lead_nowhere() {
    let (mut library, a, b) = two_files(Holes::Allow, End::Lenient);
    let secret = library.cipher.with_file_name("secret");
    fs::write(&secret, "outside").unwrap();
    fs::remove_file(&a).unwrap();
    symlink(&secret, &a).unwrap();
    fs::remove_file(&b).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &b, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(fs::symlink_metadata(&b).unwrap().file_type().is_fifo());
    library.open().unwrap();
    assert_eq!(errno(library.fs().readlink(library.walk("a").unwrap().id)), Some(libc::EIO));
    assert!(library.read("a").is_err());
    assert!(library.read("b").is_err());
    // Nor does a directory id that is a file, or a long name's symlink that leads out.
    library.mkdir("d");
    let id = library.behind("d").join(".kmsfs.dir");
    library.close();
    fs::remove_file(&id).unwrap();
    fs::write(&id, "x").unwrap();
    library.open().unwrap();
    assert!(library.list(library.walk("d").unwrap().id).is_err());
}
