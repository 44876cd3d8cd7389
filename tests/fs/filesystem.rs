//! The filesystem layer without a kernel: random operations against a plain directory, and single promises by themselves.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kmsfs::crypto::Suite;
use kmsfs::format::config::{self, End, Holes};
use kmsfs::format::name;
use kmsfs::fs::{
    Access, Attributes, Caller, Change, Error, Filesystem, InodeId, Kernel, NodeKind, Options, ROOT, RenameMode,
    SetTime, Timestamp,
};
use kmsfs::keys::providers::scripted::{Answer, ScriptedProvider};
use kmsfs::keys::volume::{self, NewVolume};
use kmsfs::keys::{KeyLimits, ProviderErrorKind};
use kmsfs::storage::CipherDirectory;
use proptest::prelude::*;

const ME: Caller = Caller { uid: 0, gid: 0, pid: 0, umask: 0 };

struct Mounted {
    path: PathBuf,
    limits: KeyLimits,
    options: Options,
    provider: Arc<ScriptedProvider>,
    fs: Arc<Filesystem>,
    _dir: tempfile::TempDir,
}

impl Mounted {
    fn new(remote: bool, holes: Holes, end: End) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cipher");
        let provider = Arc::new(ScriptedProvider::new("k", remote));
        let settings = NewVolume { suite: Suite::Xaes256Gcm, holes, end, files_per_data_key: 3 };
        let created = volume::create(&settings, provider.as_ref(), None).unwrap();
        CipherDirectory::create(&path, &created.config_file, &created.root_directory_id).unwrap();
        let (limits, options) = (KeyLimits::default(), Options::default());
        let fs = open(&path, &provider, limits, options);
        Self { path, limits, options, provider, fs, _dir: dir }
    }

    /// The same volume with other limits.
    fn with(mut self, limits: KeyLimits, options: Options) -> Self {
        (self.limits, self.options) = (limits, options);
        self.remount();
        self
    }

    fn remount(&mut self) {
        self.fs.shutdown().unwrap();
        self.fs = open(&self.path, &self.provider, self.limits, self.options);
    }

    fn walk(&self, path: &str) -> Result<Attributes, Error> {
        path.split('/')
            .filter(|part| !part.is_empty())
            .try_fold(self.fs.attributes(ROOT)?, |at, part| self.fs.lookup(at.id, part.as_bytes()))
    }

    /// The directory and the last part of a path.
    fn parent<'p>(&self, path: &'p str) -> Result<(InodeId, &'p [u8]), Error> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok((self.walk(parent)?.id, name.as_bytes()))
    }

    fn create(&self, path: &str, mode: u32) -> Result<Attributes, Error> {
        let (parent, name) = self.parent(path)?;
        let (send, receive) = channel();
        self.fs.create(parent, name, mode, ME, Box::new(move |made| send.send(made).unwrap()));
        receive.recv().unwrap()
    }

    fn open(&self, id: InodeId, access: Access) -> Result<(), Error> {
        let (send, receive) = channel();
        self.fs.open_file(id, access, Box::new(move |opened| send.send(opened).unwrap()));
        receive.recv().unwrap()
    }

    fn write(&self, path: &str, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let id = self.walk(path)?.id;
        self.open(id, Access::ReadWrite)?;
        let written = self.fs.write(id, offset, bytes);
        self.fs.release(id);
        written
    }

    fn truncate(&self, path: &str, size: u64) -> Result<(), Error> {
        let id = self.walk(path)?.id;
        let (send, receive) = channel();
        self.fs.resize(id, size, ME, Box::new(move |resized| send.send(resized).unwrap()));
        receive.recv().unwrap()
    }

    fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
        let found = self.walk(path)?;
        self.open(found.id, Access::Read)?;
        let mut plain = vec![0; usize::try_from(found.size).unwrap() + 100];
        let read = self.fs.read(found.id, 0, &mut plain);
        self.fs.release(found.id);
        plain.truncate(read?);
        Ok(plain)
    }

    fn list(&self, path: &str) -> Result<Vec<String>, Error> {
        let handle = self.fs.open_directory(self.walk(path)?.id)?;
        let mut names = Vec::new();
        let mut position = 0;
        loop {
            // Three entries at a time, so that positions are used.
            let mut room = 3;
            let before = names.len();
            self.fs.list(handle, position, true, |entry| {
                if room == 0 {
                    return false;
                }
                room -= 1;
                position = entry.next_position;
                names.push(String::from_utf8_lossy(entry.name).into_owned());
                true
            })?;
            if names.len() == before {
                break;
            }
        }
        self.fs.close_directory(handle);
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(names)
    }

    /// Everything below `path`, as text: names, kinds, sizes, contents, targets.
    fn tree(&self, path: &str) -> Result<BTreeMap<String, String>, Error> {
        let mut found = BTreeMap::new();
        for name in self.list(path)? {
            let child = format!("{path}/{name}");
            let attributes = self.walk(&child)?;
            let what = match attributes.kind {
                NodeKind::Directory => {
                    found.extend(self.tree(&child)?);
                    "directory".to_owned()
                }
                NodeKind::Symlink => {
                    let target = self.fs.readlink(attributes.id)?;
                    assert_eq!(attributes.size, target.len() as u64);
                    format!("-> {}", String::from_utf8_lossy(&target))
                }
                _ => {
                    let content = self.read(&child)?;
                    assert_eq!(attributes.size, content.len() as u64, "{child}");
                    format!("{:o} {} links {:?}", attributes.mode, attributes.nlink, digest(&content))
                }
            };
            found.insert(child, what);
        }
        Ok(found)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = self.fs.shutdown();
    }
}

fn open(path: &Path, provider: &Arc<ScriptedProvider>, limits: KeyLimits, options: Options) -> Arc<Filesystem> {
    let directory = CipherDirectory::open(path).unwrap();
    let sealed = config::parse(&directory.read_config().unwrap()).unwrap();
    let volume = volume::unlock(&sealed, provider.clone(), limits).unwrap();
    Filesystem::open(directory, volume, options).unwrap()
}

fn digest(content: &[u8]) -> (usize, u64) {
    let sum = content.iter().fold(5381_u64, |sum, byte| sum.wrapping_mul(33) ^ u64::from(*byte));
    (content.len(), sum)
}

/// The twin: the same operations on a plain directory.
fn plain_tree(root: &Path, path: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(root.join(path.trim_start_matches('/'))).unwrap().map(Result::unwrap) {
        let child = format!("{path}/{}", entry.file_name().to_str().unwrap());
        let metadata = entry.metadata().unwrap();
        let what = if metadata.is_dir() {
            found.extend(plain_tree(root, &child));
            "directory".to_owned()
        } else if metadata.is_symlink() {
            format!("-> {}", fs::read_link(entry.path()).unwrap().display())
        } else {
            let content = fs::read(entry.path()).unwrap();
            format!("{:o} {} links {:?}", metadata.mode() & 0o7777, metadata.nlink(), digest(&content))
        };
        found.insert(child, what);
    }
    found
}

#[derive(Clone, Debug)]
enum Step {
    Create(String),
    Write(String, u64, usize),
    Truncate(String, u64),
    Mkdir(String),
    Rmdir(String),
    Unlink(String),
    Rename(String, String),
    Link(String, String),
    Symlink(String, String),
    Remount,
}

/// Few names, so that they meet; one of them is long.
fn paths() -> impl Strategy<Value = String> {
    let name = prop_oneof![
        3 => Just("a".to_owned()),
        3 => Just("b".to_owned()),
        1 => Just("ü".to_owned()),
        1 => Just("l".repeat(255))
    ];
    proptest::collection::vec(name, 1..3).prop_map(|parts| parts.join("/"))
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => paths().prop_map(Step::Create),
        4 => (paths(), 0..9000_u64, 1..5000_usize).prop_map(|(p, at, len)| Step::Write(p, at, len)),
        2 => (paths(), 0..9000_u64).prop_map(|(p, size)| Step::Truncate(p, size)),
        4 => paths().prop_map(Step::Mkdir),
        2 => paths().prop_map(Step::Rmdir),
        2 => paths().prop_map(Step::Unlink),
        4 => (paths(), paths()).prop_map(|(p, q)| Step::Rename(p, q)),
        2 => (paths(), paths()).prop_map(|(p, q)| Step::Link(p, q)),
        2 => (paths(), paths()).prop_map(|(p, q)| Step::Symlink(p, q)),
        1 => Just(Step::Remount)
    ];
    proptest::collection::vec(step, 1..40)
}

fn apply_ours(mounted: &mut Mounted, number: u8, step: &Step) -> Result<(), Error> {
    let fs = Arc::clone(&mounted.fs);
    match step {
        Step::Create(path) => {
            let made = mounted.create(path, 0o640)?;
            fs.release(made.id);
            Ok(())
        }
        Step::Write(path, at, len) => mounted.write(path, *at, &vec![number; *len]),
        Step::Truncate(path, size) => mounted.truncate(path, *size),
        Step::Mkdir(path) => mounted.parent(path).and_then(|(dir, name)| fs.mkdir(dir, name, 0o750, ME)).map(|_| ()),
        Step::Rmdir(path) => mounted.parent(path).and_then(|(dir, name)| fs.rmdir(dir, name)),
        Step::Unlink(path) => mounted.parent(path).and_then(|(dir, name)| fs.unlink(dir, name)),
        Step::Rename(from, to) => {
            let ((from, name), (to, new)) = (mounted.parent(from)?, mounted.parent(to)?);
            fs.rename(from, name, to, new, RenameMode::Replace)
        }
        Step::Link(from, to) => {
            let ((dir, name), id) = (mounted.parent(to)?, mounted.walk(from)?.id);
            fs.link(id, dir, name).map(|_| ())
        }
        Step::Symlink(target, path) => {
            mounted.parent(path).and_then(|(dir, name)| fs.symlink(dir, name, target.as_bytes(), ME)).map(|_| ())
        }
        Step::Remount => {
            drop(fs);
            mounted.remount();
            Ok(())
        }
    }
}

fn apply_plain(root: &Path, number: u8, step: &Step) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
    // Unlike `open`, the layer below the kernel follows no symlinks; nor does the twin.
    let file = |path: &String| fs::OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(root.join(path));
    match step {
        Step::Create(path) => {
            fs::OpenOptions::new().write(true).create_new(true).mode(0o640).open(root.join(path)).map(|_| ())
        }
        Step::Write(path, at, len) => file(path)?.write_all_at(&vec![number; *len], *at),
        Step::Truncate(path, size) => file(path)?.set_len(*size),
        Step::Mkdir(path) => fs::DirBuilder::new().mode(0o750).create(root.join(path)),
        Step::Rmdir(path) => fs::remove_dir(root.join(path)),
        Step::Unlink(path) => fs::remove_file(root.join(path)),
        Step::Rename(from, to) => fs::rename(root.join(from), root.join(to)),
        Step::Link(from, to) => fs::hard_link(root.join(from), root.join(to)),
        Step::Symlink(target, path) => std::os::unix::fs::symlink(target, root.join(path)),
        Step::Remount => Ok(()),
    }
}

/// Parents that are symlinks are followed by the kernel above the one and by the twin's own walk: left out.
fn walks_a_symlink(root: &Path, step: &Step) -> bool {
    let paths: Vec<&String> = match step {
        Step::Rename(p, q) | Step::Link(p, q) => vec![p, q],
        Step::Symlink(_, p) => vec![p],
        Step::Create(p) | Step::Mkdir(p) | Step::Rmdir(p) | Step::Unlink(p) => vec![p],
        Step::Write(p, ..) | Step::Truncate(p, _) => vec![p],
        Step::Remount => vec![],
    };
    paths.iter().any(|path| Path::new(path).ancestors().skip(1).any(|up| root.join(up).is_symlink()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn behaves_like_a_plain_directory(steps in steps(), deny: bool) {
        // SAFETY-free: the process has one umask, and every test here wants none.
        rustix_umask();
        let holes = if deny { Holes::Deny } else { Holes::Allow };
        let mut mounted = Mounted::new(false, holes, End::Lenient);
        let plain = tempfile::tempdir().unwrap();
        for (number, step) in (0..).zip(&steps) {
            if walks_a_symlink(plain.path(), step) {
                continue;
            }
            let ours = apply_ours(&mut mounted, number, step);
            let theirs = apply_plain(plain.path(), number, step);
            prop_assert_eq!(ours.is_ok(), theirs.is_ok(), "{:?}: {:?} and {:?}", step, ours, theirs);
            if let (Err(ours), Err(theirs)) = (&ours, &theirs) && !matches!(step, Step::Write(..) | Step::Truncate(..)) {
                // An entry of a missing or wrong parent fails in the walk above this layer.
                let theirs = theirs.raw_os_error().unwrap();
                let same = ours.errno() == theirs || matches!(ours, Error::NoEntry | Error::DirectoryId) || theirs == libc::ENOTDIR;
                prop_assert!(same, "{:?}: {:?} and {}", step, ours, theirs);
            }
        }
        prop_assert_eq!(mounted.tree("").unwrap(), plain_tree(plain.path(), ""));
        mounted.remount();
        prop_assert_eq!(mounted.tree("").unwrap(), plain_tree(plain.path(), ""));
    }
}

fn rustix_umask() {
    rustix::process::umask(rustix::fs::Mode::empty());
}

#[test]
fn a_failed_create_leaves_nothing_behind() {
    let mounted = Mounted::new(true, Holes::Allow, End::Lenient);
    mounted.provider.always(Answer::Fail(ProviderErrorKind::Denied));
    assert_eq!(mounted.create("a", 0o600).unwrap_err().errno(), libc::EACCES);
    assert!(matches!(mounted.walk("a"), Err(Error::NoEntry)));
    mounted.provider.always(Answer::Right);
    assert!(mounted.create("a", 0o600).is_ok());
}

#[test]
fn an_open_that_waits_for_its_key_holds_nothing_up() {
    let mut mounted = Mounted::new(true, Holes::Allow, End::Lenient);
    for name in ["cold", "warm"] {
        mounted.create(name, 0o600).unwrap();
        mounted.write(name, 0, name.as_bytes()).unwrap();
    }
    mounted.remount();
    assert_eq!(mounted.read("warm").unwrap(), b"warm");
    let cold = mounted.walk("cold").unwrap().id;
    // Both have the same data key, so the cold one needs another volume to be cold: forget the cache.
    mounted.remount();
    let (warm, cold) = (mounted.walk("warm").unwrap().id, {
        let _ = cold;
        mounted.walk("cold").unwrap().id
    });
    mounted.open(warm, Access::Read).unwrap();
    mounted.provider.hold();
    let (send, receive) = channel();
    mounted.fs.open_file(cold, Access::Read, Box::new(move |opened| send.send(opened.is_ok()).unwrap()));
    let mut plain = [0; 10];
    assert_eq!(mounted.fs.read(warm, 0, &mut plain).unwrap(), 4);
    mounted.provider.release();
    assert!(receive.recv().unwrap());
}

/// A file that has a header from its beginning is made by way of those threads that may wait for a provider.
#[test]
fn a_node_of_a_strict_volume_holds_nothing_up_and_a_refused_one_is_gone() {
    let mounted = Mounted::new(true, Holes::Allow, End::Strict);
    let make = |name: &'static [u8]| {
        let ((send, answer), (tell, returned), fs) = (channel(), channel(), Arc::clone(&mounted.fs));
        std::thread::spawn(move || {
            fs.mknod(ROOT, name, (NodeKind::File, 0), 0o600, ME, Box::new(move |made| send.send(made).unwrap()));
            tell.send(()).unwrap();
        });
        (returned.recv_timeout(Duration::from_secs(20)), answer)
    };
    mounted.provider.hold();
    let (returned, answer) = make(b"slow");
    let is_early = answer.try_recv().is_err();
    mounted.provider.release();
    assert!(returned.is_ok() && is_early);
    assert_eq!(answer.recv().unwrap().unwrap().size, 0);
    let refused = (0..200).find_map(|_| {
        mounted.provider.always(Answer::Fail(ProviderErrorKind::Denied));
        make(b"refused").1.recv().unwrap().err().or_else(|| {
            // A key that was made ahead.
            mounted.fs.unlink(ROOT, b"refused").unwrap();
            None
        })
    });
    assert_eq!(refused.unwrap().errno(), libc::EACCES);
    assert!(matches!(mounted.walk("refused"), Err(Error::NoEntry)));
    assert_eq!(cipher_entries(&mounted.path).len(), 1);
}

#[test]
fn a_lying_provider_is_not_believed() {
    let mut mounted = Mounted::new(false, Holes::Allow, End::Lenient);
    mounted.create("a", 0o600).unwrap();
    mounted.write("a", 0, b"secret").unwrap();
    mounted.remount();
    mounted.provider.then(Answer::WrongKey);
    assert_eq!(mounted.read("a").unwrap_err().errno(), libc::EIO);
    assert_eq!(mounted.read("a").unwrap(), b"secret");
}

/// `files_per_data_key` is 3: seven files need three data keys, and reading them again costs three calls.
#[test]
fn files_share_data_keys_as_configured() {
    let mut mounted = Mounted::new(false, Holes::Allow, End::Lenient);
    let before = mounted.provider.calls();
    for n in 0..7 {
        mounted.create(&format!("f{n}"), 0o600).unwrap();
        mounted.write(&format!("f{n}"), 0, &[n; 10]).unwrap();
    }
    assert_eq!(mounted.provider.calls().generate - before.generate, 3);
    mounted.remount();
    let before = mounted.provider.calls();
    for n in 0..7 {
        assert_eq!(mounted.read(&format!("f{n}")).unwrap(), [n; 10]);
    }
    assert_eq!(mounted.provider.calls().unwrap - before.unwrap, 3);
}

#[test]
fn junk_headers_cost_no_call() {
    let mut mounted = Mounted::new(false, Holes::Allow, End::Lenient);
    mounted.create("a", 0o600).unwrap();
    mounted.write("a", 0, b"x").unwrap();
    mounted.remount();
    let entry = cipher_entries(&mounted.path).pop().unwrap();
    let good = fs::read(&entry).unwrap();
    let before = mounted.provider.calls();
    for at in (0..400).step_by(3) {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        fs::write(&entry, &bad).unwrap();
        assert_eq!(mounted.read("a").unwrap_err().errno(), libc::EIO, "{at}");
    }
    assert_eq!(mounted.provider.calls(), before);
    fs::write(&entry, &good).unwrap();
    assert_eq!(mounted.read("a").unwrap(), b"x");
}

fn cipher_entries(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| !path.file_name().unwrap().to_str().unwrap().starts_with('.')).collect()
}

#[test]
fn an_entry_moved_between_directories_is_left_out_and_counted() {
    let mut mounted = Mounted::new(false, Holes::Allow, End::Lenient);
    mounted.fs.mkdir(ROOT, b"d", 0o700, ME).unwrap();
    mounted.create("a", 0o600).unwrap();
    let (file, directory): (Vec<_>, Vec<_>) = cipher_entries(&mounted.path).into_iter().partition(|p| p.is_file());
    let moved = directory[0].join(file[0].file_name().unwrap());
    fs::rename(&file[0], moved).unwrap();
    mounted.remount();
    assert_eq!(mounted.list("").unwrap(), ["d"]);
    assert_eq!(mounted.list("d").unwrap(), Vec::<String>::new());
    assert!(mounted.fs.stats().undecryptable_names >= 1);
}

#[test]
fn an_empty_directory_without_an_id_gets_one_and_a_full_one_is_refused() {
    let mut mounted = Mounted::new(false, Holes::Allow, End::Lenient);
    mounted.fs.mkdir(ROOT, b"d", 0o700, ME).unwrap();
    let id = cipher_entries(&mounted.path)[0].join(name::DIRECTORY_ID);
    fs::remove_file(&id).unwrap();
    mounted.remount();
    mounted.create("d/a", 0o600).unwrap();
    assert_eq!(mounted.list("d").unwrap(), ["a"]);
    fs::remove_file(&id).unwrap();
    mounted.remount();
    assert!(matches!(mounted.list("d"), Err(Error::DirectoryId)));
    assert_eq!(mounted.walk("d/a").unwrap_err().errno(), libc::EIO);
}

#[test]
fn a_strict_volume_has_no_file_without_a_header() {
    let mut mounted = Mounted::new(false, Holes::Deny, End::Strict);
    mounted.create("a", 0o600).unwrap();
    mounted.remount();
    assert_eq!(mounted.read("a").unwrap(), b"");
    fs::write(&cipher_entries(&mounted.path)[0], b"").unwrap();
    mounted.remount();
    assert!(matches!(mounted.read("a"), Err(Error::NoHeader)));
}

#[test]
fn settled_sizes_need_no_read_and_unsettled_ones_are_right_too() {
    let mut mounted = Mounted::new(false, Holes::Allow, End::Lenient);
    mounted.create("a", 0o600).unwrap();
    mounted.write("a", 0, &[1; 5000]).unwrap();
    let entry = &cipher_entries(&mounted.path)[0];
    assert_eq!(fs::metadata(entry).unwrap().len(), 3 * 4096);
    let before = mounted.walk("a").unwrap();
    mounted.remount();
    assert_eq!(fs::metadata(entry).unwrap().len(), 3 * 4096 + 5000 - 4048);
    let after = mounted.walk("a").unwrap();
    assert_eq!((after.size, after.mtime), (5000, before.mtime));
    // What a crash before settling leaves.
    fs::OpenOptions::new().write(true).open(entry).unwrap().set_len(3 * 4096).unwrap();
    mounted.fs = open(&mounted.path, &mounted.provider, mounted.limits, mounted.options);
    assert_eq!(mounted.walk("a").unwrap().size, 5000);
}

/// The kernel sets the time of an open file before every sync; it reaches the disk with the last handle at the latest.
#[test]
fn a_modification_time_set_on_an_open_file_is_kept() {
    let mut mounted = Mounted::new(false, Holes::Allow, End::Lenient);
    let id = mounted.create("a", 0o600).unwrap().id;
    mounted.fs.write(id, 0, b"x").unwrap();
    let mtime = Timestamp { seconds: 1_000_000_000, nanoseconds: 42 };
    let change = Change { mode: None, uid: None, gid: None, atime: SetTime::Keep, mtime: SetTime::At(mtime) };
    assert_eq!(mounted.fs.change(id, &change).unwrap().mtime, mtime);
    assert_eq!(mounted.fs.attributes(id).unwrap().mtime, mtime);
    let entry = cipher_entries(&mounted.path)[0].clone();
    let on_disk = || fs::metadata(&entry).unwrap().mtime();
    assert_ne!(on_disk(), mtime.seconds);
    mounted.fs.sync(id, false).unwrap();
    assert_ne!(on_disk(), mtime.seconds);
    mounted.fs.sync(id, true).unwrap();
    assert_eq!(on_disk(), mtime.seconds);
    let later = Timestamp { seconds: 2_000_000_000, nanoseconds: 43 };
    mounted.fs.change(id, &Change { mtime: SetTime::At(later), ..change }).unwrap();
    mounted.fs.change(id, &Change { atime: SetTime::Now, mtime: SetTime::Keep, ..change }).unwrap();
    assert_eq!(on_disk(), later.seconds);
    mounted.fs.change(id, &change).unwrap();
    mounted.fs.release(id);
    assert_eq!(on_disk(), mtime.seconds);
    mounted.remount();
    assert_eq!(mounted.walk("a").unwrap().mtime, mtime);
}

#[test]
fn long_names_bring_their_link_and_take_it_away() {
    let mounted = Mounted::new(false, Holes::Allow, End::Lenient);
    let (long, other) = ("x".repeat(255), "y".repeat(200));
    mounted.create(&long, 0o600).unwrap();
    assert_eq!(cipher_entries(&mounted.path).len(), 2);
    mounted.fs.rename(ROOT, long.as_bytes(), ROOT, other.as_bytes(), RenameMode::Replace).unwrap();
    assert_eq!(mounted.list("").unwrap(), std::slice::from_ref(&other));
    assert_eq!(cipher_entries(&mounted.path).len(), 2);
    mounted.fs.unlink(ROOT, other.as_bytes()).unwrap();
    assert_eq!(cipher_entries(&mounted.path).len(), 0);
    assert_eq!(mounted.create(&"z".repeat(256), 0o600).unwrap_err().errno(), libc::ENAMETOOLONG);
}

#[test]
fn an_unlinked_file_lives_as_long_as_its_handle() {
    let mounted = Mounted::new(false, Holes::Allow, End::Lenient);
    let id = mounted.create("a", 0o600).unwrap().id;
    mounted.fs.write(id, 0, b"still here").unwrap();
    mounted.fs.unlink(ROOT, b"a").unwrap();
    let keep = Change { mode: Some(0o644), uid: None, gid: None, atime: SetTime::Now, mtime: SetTime::Keep };
    assert_eq!(mounted.fs.change(id, &keep).unwrap().nlink, 0);
    mounted.fs.sync(id, true).unwrap();
    let mut plain = [0; 20];
    assert_eq!(mounted.fs.read(id, 0, &mut plain).unwrap(), 10);
    mounted.fs.release(id);
    mounted.fs.forget(id, 1);
    assert_eq!(mounted.fs.attributes(id).unwrap_err().errno(), libc::ESTALE);
    assert_eq!(mounted.fs.stats().inodes_known, 1);
}

/// Waits, with a deadline, for what happens in the background.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A kernel that remembers which files it was to drop the content of.
struct Invalidated(Arc<Mutex<Vec<InodeId>>>);

impl Kernel for Invalidated {
    fn invalidate(&self, inode: InodeId) {
        self.0.lock().unwrap().push(inode);
    }
}

/// Keys that live for a moment, and a file that is open for reading.
fn short_lived(stale_grace: Duration) -> (Mounted, InodeId, Arc<Mutex<Vec<InodeId>>>) {
    let max_age = Duration::from_millis(200);
    let limits = KeyLimits { max_age, stale_grace, ..KeyLimits::default() };
    let mounted = Mounted::new(true, Holes::Allow, End::Lenient).with(limits, Options::default());
    let invalidated: Arc<Mutex<Vec<InodeId>>> = Arc::default();
    mounted.fs.connect(Box::new(Invalidated(Arc::clone(&invalidated))));
    mounted.create("a", 0o600).unwrap();
    mounted.write("a", 0, b"secret").unwrap();
    let id = mounted.walk("a").unwrap().id;
    mounted.open(id, Access::Read).unwrap();
    (mounted, id, invalidated)
}

#[test]
fn a_key_in_use_is_renewed_and_nobody_notices() {
    let (mounted, id, invalidated) = short_lived(Duration::ZERO);
    let before = mounted.provider.calls().unwrap;
    until("renewed three times", || mounted.provider.calls().unwrap >= before + 3);
    assert_eq!(mounted.fs.read(id, 0, &mut [0; 10]).unwrap(), 6);
    assert!(invalidated.lock().unwrap().is_empty());
}

#[test]
fn a_revoked_key_stops_open_files_and_a_granted_one_heals_them() {
    for (kind, errno) in
        [(ProviderErrorKind::KeyUnusable, libc::EKEYREVOKED), (ProviderErrorKind::Denied, libc::EACCES)]
    {
        let (mounted, id, invalidated) = short_lived(Duration::ZERO);
        mounted.provider.always(Answer::Fail(kind));
        until("revoked", || mounted.fs.read(id, 0, &mut [0; 10]).is_err());
        let error = |result: Result<usize, Error>| result.unwrap_err().errno();
        assert_eq!(error(mounted.fs.read(id, 0, &mut [0; 10])), errno);
        assert_eq!(mounted.fs.write(id, 0, b"x").unwrap_err().errno(), errno);
        assert_eq!(mounted.open(id, Access::Read).unwrap_err().errno(), errno);
        assert!(invalidated.lock().unwrap().contains(&id));
        assert_eq!(mounted.fs.stats().key_cache_entries, 0);
        // Neither needs a key.
        mounted.fs.sync(id, true).unwrap();
        assert_eq!(mounted.fs.attributes(id).unwrap().size, 6);
        mounted.provider.always(Answer::Right);
        until("healed", || mounted.fs.read(id, 0, &mut [0; 10]).is_ok());
    }
}

#[test]
fn an_unreachable_provider_stops_open_files_after_the_grace_only() {
    // The file's key was made for it, or asked for.
    for is_new in [true, false] {
        let (mounted, id, invalidated) = short_lived(Duration::from_secs(3600));
        if !is_new {
            mounted.fs.lock();
            mounted.fs.unlock();
            mounted.fs.read(id, 0, &mut [0; 10]).unwrap();
            invalidated.lock().unwrap().clear();
        }
        mounted.provider.always(Answer::Fail(ProviderErrorKind::Unavailable));
        let before = mounted.provider.calls().unwrap;
        until("asked in vain", || mounted.provider.calls().unwrap >= before + 4);
        assert!(invalidated.lock().unwrap().is_empty(), "it is not given up and opened again");
        assert_eq!(mounted.fs.read(id, 0, &mut [0; 10]).unwrap(), 6);
    }
    let (mounted, id, _) = short_lived(Duration::ZERO);
    mounted.provider.always(Answer::Fail(ProviderErrorKind::Unavailable));
    until("stopped", || mounted.fs.read(id, 0, &mut [0; 10]).is_err_and(|error| error.errno() == libc::ETIMEDOUT));
}

#[test]
fn a_refusal_is_remembered_for_a_moment() {
    let mounted = Mounted::new(true, Holes::Allow, End::Lenient);
    mounted.create("a", 0o600).unwrap();
    mounted.write("a", 0, b"secret").unwrap();
    mounted.fs.lock();
    mounted.fs.unlock();
    mounted.provider.always(Answer::Fail(ProviderErrorKind::Denied));
    let before = mounted.provider.calls().unwrap;
    for _ in 0..100 {
        assert_eq!(mounted.read("a").unwrap_err().errno(), libc::EACCES);
    }
    assert_eq!(mounted.provider.calls().unwrap, before + 1);
}

#[test]
fn a_locked_mount_has_names_and_no_content() {
    let mounted = Mounted::new(false, Holes::Allow, End::Lenient);
    mounted.create("a", 0o600).unwrap();
    mounted.write("a", 0, b"secret").unwrap();
    let id = mounted.walk("a").unwrap().id;
    mounted.open(id, Access::Read).unwrap();
    mounted.fs.lock();
    assert!(mounted.fs.stats().locked);
    assert_eq!(mounted.fs.stats().key_cache_entries, 0);
    assert_eq!(mounted.fs.read(id, 0, &mut [0; 10]).unwrap_err().errno(), libc::ENOKEY);
    assert_eq!(mounted.open(id, Access::Read).unwrap_err().errno(), libc::ENOKEY);
    assert_eq!(mounted.create("b", 0o600).unwrap_err().errno(), libc::ENOKEY);
    assert_eq!(mounted.fs.write(id, 0, b"x").unwrap_err().errno(), libc::ENOKEY);
    assert_eq!((mounted.list("").unwrap(), mounted.walk("a").unwrap().size), (vec!["a".to_owned()], 6));
    mounted.fs.unlock();
    assert_eq!(mounted.fs.read(id, 0, &mut [0; 10]).unwrap(), 6);
}

/// The answer of a provider comes when everything was locked, and even let go again.
#[test]
fn what_began_before_a_lock_opens_nothing_after_it() {
    for remote in [false, true] {
        let mounted = Mounted::new(remote, Holes::Allow, End::Lenient);
        let id = mounted.create("a", 0o600).unwrap().id;
        mounted.write("a", 0, b"secret").unwrap();
        mounted.fs.release(id);
        mounted.fs.lock();
        mounted.fs.unlock();
        mounted.provider.hold();
        std::thread::scope(|scope| {
            let opened = scope.spawn(|| mounted.open(id, Access::Read));
            mounted.provider.until_waiting(1);
            mounted.fs.lock();
            mounted.fs.unlock();
            mounted.provider.release();
            assert_eq!(opened.join().unwrap().unwrap_err().errno(), libc::ENOKEY);
        });
        mounted.provider.always(Answer::Fail(ProviderErrorKind::KeyUnusable));
        mounted.fs.lock();
        mounted.fs.unlock();
        assert_eq!(mounted.fs.read(id, 0, &mut [0; 10]).unwrap_err().errno(), libc::EKEYREVOKED);
    }
}

#[test]
fn a_lock_ends_the_wait_for_new_keys_and_no_others_are_asked_for() {
    let mounted = Mounted::new(true, Holes::Allow, End::Lenient);
    mounted.provider.hold();
    let before = std::thread::scope(|scope| {
        let made = scope.spawn(|| mounted.create("a", 0o600));
        mounted.provider.until_waiting(5);
        mounted.fs.lock();
        assert_eq!(made.join().unwrap().unwrap_err().errno(), libc::ENOKEY, "although nobody has answered");
        mounted.provider.calls().generate
    });
    mounted.provider.release();
    until("answered", || mounted.fs.metrics().keys.pool.calls == 0);
    assert_eq!(mounted.create("b", 0o600).unwrap_err().errno(), libc::ENOKEY);
    assert_eq!((mounted.provider.calls().generate, mounted.fs.metrics().keys.pool.ready), (before, 0));
    mounted.fs.unlock();
    assert!(mounted.create("c", 0o600).is_ok());
}

#[test]
fn an_idle_mount_locks_itself() {
    let options = Options { idle_lock: Some(Duration::from_secs(1)), ..Options::default() };
    let mounted = Mounted::new(false, Holes::Allow, End::Lenient).with(KeyLimits::default(), options);
    mounted.create("a", 0o600).unwrap();
    until("locked", || mounted.fs.stats().locked);
    assert_eq!(mounted.read("a").unwrap_or_default(), b"");
    mounted.fs.unlock();
    assert!(!mounted.fs.stats().locked);
}

/// Content is given up and opened again all the time, while threads use it.
#[test]
fn giving_content_up_loses_nothing() {
    let mounted = Mounted::new(false, Holes::Allow, End::Lenient);
    let id = mounted.create("a", 0o600).unwrap().id;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3_u64)
            .map(|thread| {
                let fs = &mounted.fs;
                scope.spawn(move || {
                    for slot in 0..300_u64 {
                        let byte = u8::try_from(thread + 1).unwrap();
                        while fs.write(id, (slot * 3 + thread) * 100, &[byte; 100]).is_err() {
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                mounted.fs.lock();
                mounted.fs.unlock();
            }
        });
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        done.store(true, Ordering::Relaxed);
    });
    let all = mounted.read("a").unwrap();
    assert_eq!(all.len(), 90000);
    assert!(all.chunks(100).enumerate().all(|(slot, bytes)| bytes.iter().all(|b| usize::from(*b) == slot % 3 + 1)));
}

/// Listing costs nothing; opening the first file of a listing fetches the keys of a few others, and each one after it of more.
#[test]
fn keys_are_fetched_ahead_once_a_listed_file_is_opened() {
    for prefetch in [true, false] {
        let options = Options { prefetch, ..Options::default() };
        let mut mounted = Mounted::new(true, Holes::Allow, End::Lenient).with(KeyLimits::default(), options);
        for n in 0..60 {
            mounted.create(&format!("f{n}"), 0o600).unwrap();
            mounted.write(&format!("f{n}"), 0, b"x").unwrap();
        }
        mounted.remount();
        let before = mounted.provider.calls().unwrap;
        let names = mounted.list("").unwrap();
        assert_eq!(mounted.provider.calls().unwrap, before);
        let handle = mounted.fs.open_directory(ROOT).unwrap();
        let mut files = Vec::new();
        let see = |entry: &kmsfs::fs::Listed<'_>| {
            if entry.name.starts_with(b"f") {
                files.push(entry.id);
            }
            true
        };
        mounted.fs.list(handle, 0, true, see).unwrap();
        // Programs that walk a tree open its files while they have the directory open. Three files share a data key.
        mounted.open(files[0], Access::Read).unwrap();
        if prefetch {
            until("some fetched", || mounted.fs.stats().key_cache_entries >= 3);
            std::thread::sleep(Duration::from_millis(100));
            let entries = mounted.fs.stats().key_cache_entries;
            assert!(entries <= 9, "{entries} keys were fetched for one file");
            files[1..4].iter().for_each(|file| mounted.open(*file, Access::Read).unwrap());
            until("all fetched", || mounted.fs.stats().key_cache_entries == 20);
        }
        mounted.fs.close_directory(handle);
        let before = mounted.provider.calls().unwrap;
        for name in &names {
            mounted.read(name).unwrap();
        }
        assert_eq!(mounted.provider.calls().unwrap - before, if prefetch { 0 } else { 19 });
    }
}

/// Near the end of a directory, the files of those that come after it are wanted next, although nobody has listed them.
#[test]
fn keys_of_the_next_directories_are_fetched_ahead_too() {
    let mut mounted = Mounted::new(true, Holes::Allow, End::Lenient);
    let directories = ["a", "b", "b/inner", "c"];
    for directory in directories {
        let (parent, name) = mounted.parent(directory).unwrap();
        mounted.fs.mkdir(parent, name, 0o700, ME).unwrap();
        for n in 0..15 {
            mounted.create(&format!("{directory}/f{n}"), 0o600).unwrap();
            mounted.write(&format!("{directory}/f{n}"), 0, b"x").unwrap();
        }
    }
    mounted.remount();
    let before = mounted.provider.calls().unwrap;
    // The walk goes in the order in which the backing filesystem lists.
    let listed = |directory: InodeId| {
        let handle = mounted.fs.open_directory(directory).unwrap();
        let mut listed = Vec::new();
        let see = |entry: &kmsfs::fs::Listed<'_>| {
            let name = String::from_utf8(entry.name.to_vec()).unwrap();
            if !name.starts_with('.') && name != "inner" {
                listed.push((entry.id, name));
            }
            true
        };
        mounted.fs.list(handle, 0, true, see).unwrap();
        mounted.fs.close_directory(handle);
        listed
    };
    let (directory, name) = listed(ROOT).swap_remove(0);
    let files = listed(directory);
    assert_eq!(mounted.provider.calls().unwrap, before);
    for (_, file) in &files[..6] {
        mounted.read(&format!("{name}/{file}")).unwrap();
    }
    // Three files share a data key, and there are 60 files.
    until("all fetched", || mounted.fs.stats().key_cache_entries == 20);
    let before = mounted.provider.calls().unwrap;
    for directory in directories {
        (0..15).for_each(|n| drop(mounted.read(&format!("{directory}/f{n}")).unwrap()));
    }
    assert_eq!(mounted.provider.calls().unwrap, before);
}

/// Everything in a directory, however deep.
fn everything_in(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let deeper = |path: PathBuf| {
        let below = if path.is_symlink() || !path.is_dir() { Vec::new() } else { everything_in(&path) };
        std::iter::once(path).chain(below)
    };
    let mut found: Vec<_> = entries.flat_map(deeper).collect();
    found.sort();
    found
}

#[test]
fn an_entry_that_cannot_become_its_callers_is_not_left_to_the_daemon() {
    if !rustix::process::geteuid().is_root() {
        println!("not tried: only root makes files for others");
        return;
    }
    let mounted = Mounted::new(false, Holes::Allow, End::Lenient);
    // What a first long target makes stays.
    mounted.fs.symlink(ROOT, b"first", &[b't'; 4000], ME).unwrap();
    mounted.fs.unlink(ROOT, b"first").unwrap();
    let before = everything_in(&mounted.path);
    let stranger = Caller { uid: 65534, gid: 65534, ..ME };
    let fs = Arc::clone(&mounted.fs);
    let tried = std::thread::spawn(move || {
        // Capabilities are a thread's own.
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::CHOWN);
        rustix::thread::set_capabilities(None, sets).unwrap();
        let make = |name: &[u8], kind, mode| {
            let (send, receive) = channel();
            let answer = Box::new(move |made: Result<Attributes, Error>| send.send(made).unwrap());
            fs.mknod(ROOT, name, (kind, 0x103), mode, stranger, answer);
            receive.recv().unwrap().map(drop)
        };
        let create = |name: &[u8], mode| {
            let (send, receive) = channel();
            fs.create(ROOT, name, mode, stranger, Box::new(move |made| send.send(made).unwrap()));
            receive.recv().unwrap().map(drop)
        };
        let long_name = [b'n'; 250];
        [
            create(b"file", 0o644),
            create(b"set-id", 0o6755),
            create(&long_name, 0o644),
            make(b"made", NodeKind::File, 0o6755),
            make(&long_name, NodeKind::Fifo, 0o644),
            make(b"fifo", NodeKind::Fifo, 0o644),
            make(b"socket", NodeKind::Socket, 0o644),
            make(b"device", NodeKind::CharDevice, 0o644),
            fs.symlink(ROOT, b"link", b"target", stranger).map(drop),
            fs.symlink(ROOT, b"long-link", &[b't'; 4000], stranger).map(drop),
            fs.symlink(ROOT, &long_name, b"target", stranger).map(drop),
            fs.mkdir(ROOT, b"directory", 0o755, stranger).map(drop),
            fs.mkdir(ROOT, &long_name, 0o2755, stranger).map(drop),
        ]
        .map(|made| made.unwrap_err().errno())
    });
    assert_eq!(tried.join().unwrap(), [libc::EPERM; 13]);
    assert_eq!(everything_in(&mounted.path), before);
    // Nor does anything stand in the way of those that can.
    mounted.fs.mknod(ROOT, b"set-id", (NodeKind::File, 0), 0o6755, stranger, Box::new(|made| assert!(made.is_ok())));
    let made = mounted.walk("set-id").unwrap();
    assert_eq!((made.mode, made.uid, made.gid), (0o6755, 65534, 65534));
}
