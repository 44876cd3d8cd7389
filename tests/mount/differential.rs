//! Two directories that get the same operations, and must show the same.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    self, AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use rustix::thread;

/// What an operation came to: an errno, or what it told.
type Outcome = Result<String, Errno>;

/// Names that are tried: short ones, long ones that are stored by digest, odd bytes.
const NAMES: [&[u8]; 8] = [b"a", b"b", b"c", b"dir", b"\xff\xfe odd\n", b".hidden", b"~tilde.n", &[b'L'; 240]];
/// Sizes and offsets around what the format has edges at.
const EDGES: [u64; 12] = [0, 1, 100, 4047, 4048, 4049, 4096, 8095, 8096, 12288, 40480, 70000];
const XATTRS: [&str; 4] = ["user.a", "user.second", "user.x", "trusted.t"];
const HANDLES: usize = 4;
/// Who takes turns: root half of the time, two users of one group, a stranger. Their groups beside the first.
const USERS: [(u32, u32, &[u32]); 6] =
    [(0, 0, &[]), (0, 0, &[]), (0, 0, &[]), (6001, 200, &[]), (6002, 200, &[201]), (65534, 65534, &[])];
/// A time that is so near is that of now; the others were chosen.
const NEAR: i64 = 86400;

pub(crate) struct Twins {
    /// The mount's, and the plain one's.
    roots: [PathBuf; 2],
    /// Open files, some of which have no name any more.
    handles: Vec<[File; 2]>,
    random: u64,
    steps: u64,
    successes: u64,
    /// Who does the present step.
    user: usize,
    /// What it may have changed.
    touched: Vec<PathBuf>,
    /// The last operations, for the report of a difference.
    history: Vec<String>,
}

impl Twins {
    pub(crate) fn new(mount: &Path, plain: &Path, seed: u64) -> Self {
        let roots = [mount, plain].map(|root| root.join(format!("worker-{seed}")));
        for root in &roots {
            std::fs::create_dir(root).unwrap();
            fs::chmod(root, Mode::from_raw_mode(0o777)).unwrap();
        }
        let (handles, touched, history) = (Vec::new(), Vec::new(), Vec::new());
        Self { roots, handles, random: seed | 1, steps: 0, successes: 0, user: 0, touched, history }
    }

    /// Operations so far, and how many of them did something.
    pub(crate) fn counts(&self) -> [u64; 2] {
        [self.steps, self.successes]
    }

    fn below(&mut self, n: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }

    /// A path of one to three names.
    fn path(&mut self) -> PathBuf {
        let depth = [1, 1, 2, 2, 3][usize::try_from(self.below(5)).unwrap()];
        let path: PathBuf = (0..depth)
            .map(|level| {
                let name: &[u8] =
                    if level + 1 < depth { self.pick(&[b"dir", b"b", &[b'L'; 240]]) } else { self.pick(&NAMES) };
                OsStr::from_bytes(name).to_owned()
            })
            .collect();
        self.touched.push(path.clone());
        path
    }

    fn edge(&mut self) -> u64 {
        let edge = self.pick(&EDGES);
        (edge + self.below(3)).saturating_sub(1)
    }

    /// Does the same to both and compares what comes of it.
    fn both(&mut self, what: String, operation: impl Fn(usize, &Path) -> Outcome) {
        let (uid, gid, groups) = USERS[self.user];
        self.history.push(format!("{uid}: {what}"));
        become_user(uid, gid, groups);
        let [mount, plain] = [0, 1].map(|side| operation(side, &self.roots[side]));
        become_user(0, 0, &[]);
        if mount != plain {
            self.report(&format!("the mount says {mount:?}, the plain directory {plain:?}"));
        }
        self.successes += u64::from(plain.is_ok());
        for path in &self.touched {
            let [mount, plain] = [0, 1].map(|side| {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                attributes(fs::open(self.roots[side].join(path), flags, Mode::empty())?)
            });
            if mount != plain {
                self.report(&format!("{path:?} is {mount:?} on the mount, {plain:?} on the plain directory"));
            }
            // A program would take it for a hole and not read it.
            if fs::lstat(self.roots[0].join(path))
                .is_ok_and(|stat| stat.st_size > 0 && is_file(&stat) && stat.st_blocks == 0)
            {
                self.report(&format!("{path:?} has content and takes no space"));
            }
        }
    }

    fn report(&self, difference: &str) -> ! {
        let last = self.history.len().saturating_sub(25);
        panic!("step {}, {}: {difference}\n{}", self.steps, self.roots[0].display(), self.history[last..].join("\n"));
    }

    pub(crate) fn step(&mut self) {
        self.steps += 1;
        if self.history.len() > 1000 {
            self.history.drain(..900);
        }
        self.touched.clear();
        self.user = usize::try_from(self.below(USERS.len() as u64)).unwrap();
        match self.below(10) {
            0..=2 => self.change_a_name(),
            3..=5 => self.use_a_file(),
            6..=7 => self.change_attributes(),
            _ => self.use_a_handle(),
        }
        if self.steps.is_multiple_of(64) {
            self.compare_everything();
        }
    }

    fn change_a_name(&mut self) {
        let (path, other, mode) =
            (self.path(), self.path(), self.pick(&[0o644, 0o600, 0o755, 0o4755, 0o2775, 0o1777, 0o444]));
        let flags =
            self.pick(&[RenameFlags::empty(), RenameFlags::empty(), RenameFlags::NOREPLACE, RenameFlags::EXCHANGE]);
        let kind = self.pick(&[FileType::Fifo, FileType::Socket, FileType::CharacterDevice, FileType::RegularFile]);
        let target_len = usize::try_from(self.pick(&[1, 30, 255, 3031, 3032, 4095])).unwrap();
        match self.below(10) {
            0..=2 => self.both(format!("mkdir {path:?} {mode:o}"), |_, root| {
                told(fs::mkdir(root.join(&path), Mode::from_raw_mode(mode)))
            }),
            3 => self.both(format!("rmdir {path:?}"), |_, root| told(fs::rmdir(root.join(&path)))),
            4 => self.both(format!("unlink {path:?}"), |_, root| told(fs::unlink(root.join(&path)))),
            5 => self.both(format!("link {path:?} {other:?}"), |_, root| {
                told(fs::link(root.join(&path), root.join(&other)))
            }),
            6 => self.both(format!("symlink {target_len} {path:?}"), |_, root| {
                told(fs::symlink("t".repeat(target_len), root.join(&path)))
            }),
            7 => self.both(format!("mknod {path:?} {kind:?} {mode:o}"), |_, root| {
                told(fs::mknodat(CWD, root.join(&path), kind, Mode::from_raw_mode(mode), 0x0103))
            }),
            _ => self.both(format!("rename {path:?} {other:?} {flags:?}"), |_, root| {
                told(fs::renameat_with(CWD, root.join(&path), CWD, root.join(&other), flags))
            }),
        }
    }

    fn use_a_file(&mut self) {
        let (path, offset, len) = (self.path(), self.edge(), self.edge());
        let extra = self.pick(&[
            OFlags::empty(),
            OFlags::CREATE,
            OFlags::CREATE,
            OFlags::CREATE | OFlags::EXCL,
            OFlags::TRUNC,
            OFlags::APPEND,
        ]);
        let access = self.pick(&[OFlags::RDWR, OFlags::RDWR, OFlags::RDONLY, OFlags::WRONLY]);
        let flags = access | extra | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let data = vec![b'A' + u8::try_from(self.below(26)).unwrap(); usize::try_from(len).unwrap()];
        let keep = self.handles.len() < HANDLES && self.below(3) == 0;
        let files: [std::cell::RefCell<Option<File>>; 2] = Default::default();
        self.both(format!("open {path:?} {flags:?}, write {len} at {offset}, read"), |side, root| {
            let file = File::from(fs::open(root.join(&path), flags, Mode::from_raw_mode(0o640))?);
            let is_file = FileType::from_raw_mode(fs::fstat(&file)?.st_mode) == FileType::RegularFile;
            if !is_file {
                return Ok("not a file".to_owned());
            }
            let written = write(&file, &data, offset);
            let read = read(&file, offset.saturating_sub(5000), 12000);
            *files[side].borrow_mut() = Some(file);
            Ok(format!("{written:?} {read:?}"))
        });
        let [mount, plain] = files.map(std::cell::RefCell::into_inner);
        if let (Some(mount), Some(plain), true) = (mount, plain, keep) {
            self.handles.push([mount, plain]);
        }
    }

    fn change_attributes(&mut self) {
        let path = self.path();
        let mode = self.pick(&[0o644, 0o600, 0o4711, 0o2755, 0o2644, 0o6777, 0o1777, 0o777, 0o666, 0o000, 0o444]);
        let (size, seconds) = (self.edge(), self.pick(&[-5, 0, 1_000_000_000, 4_000_000_000]));
        let (user, name) = (u32::try_from(self.below(3)).unwrap() * 1000, self.pick(&XATTRS));
        let (value, flags) = (
            vec![b'v'; usize::try_from(self.below(300)).unwrap()],
            self.pick(&[XattrFlags::empty(), XattrFlags::CREATE, XattrFlags::REPLACE]),
        );
        match self.below(8) {
            0 => self.both(format!("chmod {path:?} {mode:o}"), |_, root| {
                told(fs::chmod(root.join(&path), Mode::from_raw_mode(mode)))
            }),
            1 => self.both(format!("lchown {path:?} {user}"), |_, root| {
                let (owner, group) = (Uid::from_raw(user), Gid::from_raw(user));
                told(fs::chownat(CWD, root.join(&path), Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW))
            }),
            2 => self.both(format!("utimensat {path:?} {seconds}"), |_, root| {
                let time = Timespec { tv_sec: seconds, tv_nsec: 123_456_789 };
                let times = Timestamps { last_access: time, last_modification: time };
                fs::utimensat(CWD, root.join(&path), &times, AtFlags::SYMLINK_NOFOLLOW)?;
                let stat = fs::lstat(root.join(&path))?;
                Ok(format!("{} {}", stat.st_mtime, stat.st_mtime_nsec))
            }),
            3 => self.both(format!("truncate {path:?} {size}"), |_, root| {
                let file =
                    fs::open(root.join(&path), OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW, Mode::empty())?;
                told(fs::ftruncate(&file, size))
            }),
            4 => self
                .both(format!("removexattr {path:?} {name}"), |_, root| told(fs::lremovexattr(root.join(&path), name))),
            5 => self.both(format!("getxattr {path:?} {name}"), |_, root| {
                let mut room = vec![0; 400];
                let len = fs::lgetxattr(root.join(&path), name, &mut room[..])?;
                let needed = fs::lgetxattr(root.join(&path), name, &mut [0_u8; 0][..])?;
                let tight = fs::lgetxattr(root.join(&path), name, &mut [0_u8; 3][..]).map_err(|e| e.raw_os_error());
                Ok(format!("{:?} {needed} {tight:?}", &room[..len]))
            }),
            _ => self.both(format!("setxattr {path:?} {name} {} {flags:?}", value.len()), |_, root| {
                told(fs::lsetxattr(root.join(&path), name, &value, flags))
            }),
        }
    }

    fn use_a_handle(&mut self) {
        if self.handles.is_empty() {
            return;
        }
        let at = usize::try_from(self.below(self.handles.len() as u64)).unwrap();
        let (offset, len, mode) = (self.edge(), self.edge(), self.pick(&[0o644, 0o4755]));
        let data = vec![b'a' + u8::try_from(self.below(26)).unwrap(); usize::try_from(len).unwrap()];
        let allocate = self.pick(&[
            FallocateFlags::empty(),
            FallocateFlags::KEEP_SIZE,
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE,
            FallocateFlags::ZERO_RANGE,
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        ]);
        let handles = std::mem::take(&mut self.handles);
        let files = &handles[at];
        match self.below(8) {
            0 => self.both(format!("write {len} at {offset} by handle {at}"), |side, _| {
                Ok(format!("{:?}", write(&files[side], &data, offset)))
            }),
            1 => self.both(format!("read by handle {at} at {offset}"), |side, _| {
                Ok(format!("{:?}", read(&files[side], offset, 20000)))
            }),
            2 => {
                self.both(format!("ftruncate handle {at} to {len}"), |side, _| told(fs::ftruncate(&files[side], len)));
            }
            3 | 4 => self.both(format!("fallocate handle {at} {allocate:?} {offset} {len}"), |side, _| {
                told(fs::fallocate(&files[side], allocate, offset, len))
            }),
            5 => self.both(format!("fchmod handle {at} {mode:o}"), |side, _| {
                fs::fchmod(&files[side], Mode::from_raw_mode(mode))?;
                fs::fsetxattr(&files[side], "user.by-handle", b"yes", XattrFlags::empty())?;
                fs::fchown(&files[side], Some(Uid::from_raw(0)), None)?;
                told(fs::fsync(&files[side]))
            }),
            _ => self.both(format!("fstat handle {at}"), |side, _| attributes(&files[side])),
        }
        self.handles = handles;
        if self.below(6) == 0 {
            self.history.push(format!("close handle {at}"));
            self.handles.swap_remove(at);
        }
    }

    /// Compares all names, attributes, extended attributes and content.
    pub(crate) fn compare_everything(&mut self) {
        let [mount, plain] = [0, 1].map(|side| listing(&self.roots[side]));
        if mount != plain {
            let differs = |(path, entry): (&PathBuf, &String)| plain.get(path) != Some(entry);
            let first = mount.iter().find(|(path, entry)| differs((path, entry)));
            let lacking = plain.keys().find(|path| !mount.contains_key(*path));
            let other = first.and_then(|(path, _)| plain.get(path));
            self.report(&format!(
                "{first:?} on the mount, {other:?} on the plain directory; not on the mount: {lacking:?}"
            ));
        }
    }
}

/// Makes this thread a user's. Its real ids stay root's, so that it can come back.
fn become_user(uid: u32, gid: u32, groups: &[u32]) {
    let (root, root_group) = (Uid::from_raw(0), Gid::from_raw(0));
    thread::set_thread_res_uid(root, root, root).unwrap();
    let groups: Vec<Gid> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
    thread::set_thread_groups(&groups).unwrap();
    thread::set_thread_res_gid(root_group, Gid::from_raw(gid), root_group).unwrap();
    thread::set_thread_res_uid(root, Uid::from_raw(uid), root).unwrap();
}

fn is_file(stat: &fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
}

fn told(result: rustix::io::Result<()>) -> Outcome {
    result.map(|()| String::new())
}

fn write(file: &File, data: &[u8], offset: u64) -> Result<usize, Option<i32>> {
    file.write_at(data, offset).map_err(|error| error.raw_os_error())
}

/// How much was read, and a digest of it.
fn read(file: &File, offset: u64, len: usize) -> Result<String, Option<i32>> {
    let mut buffer = vec![0; len];
    let mut done = 0;
    while done < len {
        match file.read_at(&mut buffer[done..], offset + done as u64).map_err(|error| error.raw_os_error())? {
            0 => break,
            read => done += read,
        }
    }
    Ok(format!("{done} {:016x}", digest(&buffer[..done])))
}

/// FNV-1a.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn attributes(file: impl AsFd) -> Outcome {
    let stat = fs::fstat(file)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    // Sizes of directories are the backing filesystem's own affair.
    let size = if kind == FileType::Directory { 0 } else { stat.st_size };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let modified = match stat.st_mtime {
        near if near.abs_diff(i64::try_from(now).unwrap()) < NEAR as u64 => "now".to_owned(),
        seconds => format!("{seconds}.{:09}", stat.st_mtime_nsec),
    };
    Ok(format!(
        "{kind:?} {:o} {} {}:{} {size} {:x} {modified}",
        stat.st_mode & 0o7777,
        stat.st_nlink,
        stat.st_uid,
        stat.st_gid,
        stat.st_rdev
    ))
}

fn listing(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(root.join(&directory)).unwrap() {
            let relative = directory.join(entry.unwrap().file_name());
            let path = root.join(&relative);
            let pin = fs::open(&path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap();
            let stat = fs::fstat(&pin).unwrap();
            let mut told = attributes(&pin).unwrap();
            told.push_str(&xattrs(&path));
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => directories.push(relative.clone()),
                FileType::RegularFile => {
                    told.push_str(&format!(" {:016x}", digest(&std::fs::read(&path).unwrap())));
                }
                FileType::Symlink => told.push_str(&format!(" {:?}", std::fs::read_link(&path).unwrap())),
                _ => {}
            }
            found.insert(relative, told);
        }
    }
    found
}

fn xattrs(path: &Path) -> String {
    let mut names = vec![0; 4096];
    let len = fs::llistxattr(path, &mut names[..]).unwrap();
    let mut names: Vec<&[u8]> = names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    let one = |name: &&[u8]| {
        let mut value = vec![0; 1024];
        let len = fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
        format!(" {}={:016x}", String::from_utf8_lossy(name), digest(&value[..len]))
    };
    names.iter().map(one).collect()
}
