//! Power cuts during changes of names. What a change does to the cipher directory is watched, step by step; each beginning of these
//! steps is replayed on a copy, as one journal leaves it, and opened: the change is there or not, and every name decrypts.

use std::collections::BTreeMap;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::library::{Library, ME, entries, wait};
use kmsfs::crypto::Suite;
use kmsfs::format::config::{End, Holes};
use kmsfs::fs::{NodeKind, ROOT, RenameMode};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

/// One step in a cipher directory, by relative paths.
#[derive(Clone, Debug)]
enum Step {
    Directory(PathBuf),
    Link(PathBuf, PathBuf),
    File(PathBuf),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
}

/// Watches all directories that there are.
struct Watch {
    root: PathBuf,
    fd: OwnedFd,
    directories: BTreeMap<i32, PathBuf>,
}

impl Watch {
    fn begin(root: &Path) -> Self {
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
        let mut directories = BTreeMap::new();
        let below = entries(root).into_iter().filter(|entry| fs::symlink_metadata(entry).unwrap().is_dir());
        for directory in below.chain([root.to_owned()]) {
            let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO;
            let watch = inotify::add_watch(&fd, &directory, flags).unwrap();
            directories.insert(watch, directory.strip_prefix(root).unwrap().to_owned());
        }
        Self { root: root.to_owned(), fd, directories }
    }

    /// What happened, in order. What came into a new directory came right after it: nobody watched it.
    fn end(self) -> Vec<Step> {
        let mut buffer = [MaybeUninit::uninit(); 16384];
        let mut reader = inotify::Reader::new(&self.fd, &mut buffer);
        let (mut steps, mut moved) = (Vec::new(), BTreeMap::new());
        while let Ok(event) = reader.next() {
            let Some(name) = event.file_name() else { continue };
            let path = self.directories[&event.wd()].join(name.to_str().unwrap());
            let happened = event.events();
            if happened.contains(ReadFlags::CREATE) {
                self.made(path, &mut steps);
            } else if happened.contains(ReadFlags::DELETE) {
                steps.push(Step::Remove(path));
            } else if happened.contains(ReadFlags::MOVED_FROM) {
                moved.insert(event.cookie(), path);
            } else {
                steps.push(Step::Rename(moved.remove(&event.cookie()).expect("from where"), path));
            }
        }
        steps
    }

    fn made(&self, path: PathBuf, steps: &mut Vec<Step>) {
        let now = self.root.join(&path);
        // A file may have been renamed or removed since: none of the changes here does that.
        let kind = fs::symlink_metadata(&now).unwrap().file_type();
        if kind.is_symlink() {
            steps.push(Step::Link(path, fs::read_link(&now).unwrap()));
        } else if kind.is_dir() {
            steps.push(Step::Directory(path.clone()));
            for entry in fs::read_dir(&now).unwrap().map(Result::unwrap) {
                self.made(path.join(entry.file_name()), steps);
            }
        } else {
            steps.push(Step::File(path));
        }
    }
}

impl Step {
    /// Takes the step in `root`; files come from `after`.
    fn take(&self, root: &Path, after: &Path) {
        match self {
            Self::Directory(path) => fs::create_dir(root.join(path)).unwrap(),
            Self::Link(path, target) => symlink(target, root.join(path)).unwrap(),
            Self::File(path) => drop(fs::copy(after.join(path), root.join(path)).unwrap()),
            Self::Rename(from, to) => fs::rename(root.join(from), root.join(to)).unwrap(),
            Self::Remove(path) => {
                let path = root.join(path);
                let is_directory = fs::symlink_metadata(&path).unwrap().is_dir();
                if is_directory { fs::remove_dir(path).unwrap() } else { fs::remove_file(path).unwrap() }
            }
        }
    }
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}

fn long(letter: &str) -> String {
    letter.repeat(230)
}

type Change = (&'static str, usize, fn(&Library));

fn rename(library: &Library, from: &str, to: &str) {
    let ((from, old), (to, new)) = (library.parent(from), library.parent(to));
    library.fs().rename(from, old, to, new, RenameMode::Replace).unwrap();
}

/// A change, and how many steps below it takes.
const CHANGES: [Change; 15] = [
    ("mkdir", 2, |library| library.mkdir("new")),
    ("mkdir, long", 3, |library| library.mkdir(&format!("full/{}", long("n")))),
    ("create", 1, |library| create(library, "new")),
    ("create, long", 2, |library| create(library, &format!("full/{}", long("n")))),
    ("symlink, long", 2, |library| {
        library.fs().symlink(ROOT, long("n").as_bytes(), b"target", ME).unwrap();
    }),
    ("link, long", 2, |library| {
        let id = library.walk("file").unwrap().id;
        library.fs().link(id, ROOT, long("n").as_bytes()).unwrap();
    }),
    ("rename to a long name", 2, |library| rename(library, "file", &format!("full/{}", long("n")))),
    ("rename from a long name", 2, |library| rename(library, &long("l"), "full/new")),
    ("rename from a long name over one", 2, |library| {
        rename(library, &long("l"), &format!("full/{}", long("f")));
    }),
    ("rename of a directory", 3, |library| rename(library, &long("d"), &long("n"))),
    ("rename over an empty directory", 2, |library| rename(library, "full", "empty")),
    ("unlink", 1, |library| library.fs().unlink(ROOT, b"file").unwrap()),
    ("unlink, long", 2, |library| library.fs().unlink(ROOT, long("l").as_bytes()).unwrap()),
    ("rmdir", 2, |library| library.fs().rmdir(ROOT, b"empty").unwrap()),
    ("rmdir, long", 3, |library| library.fs().rmdir(ROOT, long("d").as_bytes()).unwrap()),
];

fn create(library: &Library, path: &str) {
    let (parent, name) = library.parent(path);
    let made = wait(|send| {
        library.fs().create(parent, name, 0o600, ME, Box::new(move |made| send.send(made).unwrap()));
    });
    library.fs().release(made.unwrap().id);
}

fn a_volume() -> Library {
    let library = Library::new(Suite::Xaes256Gcm, Holes::Allow, End::Lenient);
    library.write("file", 0, b"content").unwrap();
    library.write(&long("l"), 0, b"content under a long name").unwrap();
    for directory in ["full", "empty", &long("d")] {
        library.mkdir(directory);
    }
    library.write("full/inside", 0, b"inside").unwrap();
    library.write(&format!("full/{}", long("f")), 0, b"long inside").unwrap();
    library
}

/// Removes everything, as a program can that knows nothing of all this.
fn remove_all(library: &Library, path: &str) {
    let directory = library.walk(path).unwrap().id;
    for name in library.list(directory).unwrap() {
        let child = format!("{path}/{name}");
        if library.walk(&child).unwrap().kind == NodeKind::Directory {
            remove_all(library, &child);
            library.fs().rmdir(directory, name.as_bytes()).unwrap();
        } else {
            library.fs().unlink(directory, name.as_bytes()).unwrap();
        }
    }
}

#[test]
fn a_power_cut_leaves_a_change_of_names_done_or_not_and_names_decrypt() {
    let mut cuts = 0;
    for (what, expected, change) in CHANGES {
        let mut library = a_volume();
        library.open().unwrap();
        let before = library.tree();
        library.close();
        let original = library.cipher.clone();
        let saved = original.with_file_name("before");
        copy(&original, &saved);
        library.open().unwrap();
        let watch = Watch::begin(&original);
        change(&library);
        let steps = watch.end();
        assert_eq!(steps.len(), expected, "{what}: {steps:?}");
        let after = library.tree();
        assert_ne!(before, after, "{what}");
        library.close();
        for taken in 0..=steps.len() {
            let replay = original.with_file_name(format!("replay-{taken}"));
            copy(&saved, &replay);
            steps[..taken].iter().for_each(|step| step.take(&replay, &original));
            library.cipher = replay;
            library.open().unwrap();
            let found = library.tree();
            let done = if taken == 0 { found == before } else { found == before || found == after };
            assert!(done, "{what}, {taken} of {steps:?}: {:?}", found.keys());
            assert!(taken < steps.len() || found == after, "{what}");
            assert_eq!(library.fs().stats().undecryptable_names, 0, "{what}, {taken} of {steps:?}");
            // Whatever is left over is in nobody's way.
            remove_all(&library, "");
            assert_eq!(library.tree(), BTreeMap::new());
            library.close();
            cuts += 1;
        }
    }
    println!("{cuts} power cuts during {} changes of names", CHANGES.len());
}

/// The replay would find it if the symlink of a long name came after its entry, or went before it.
#[test]
fn the_replay_finds_a_wrong_order() {
    let mut library = a_volume();
    let watch = Watch::begin(&library.cipher);
    create(&library, &long("n"));
    let steps = watch.end();
    library.close();
    let replay = library.cipher.with_file_name("replay");
    copy(&library.cipher, &replay);
    for step in &steps {
        let (Step::Link(path, _) | Step::File(path)) = step else { panic!("{step:?}") };
        fs::remove_file(replay.join(path)).unwrap();
    }
    steps[1].take(&replay, &library.cipher);
    library.cipher = replay;
    library.open().unwrap();
    assert_eq!(library.tree().len(), a_volume().tree().len(), "the entry is left out");
    assert!(library.fs().stats().undecryptable_names > 0);
}
