//! A plain mirror of a directory over the FUSE layer that kmsfs uses, set up as kmsfs sets it up, without cryptography: the
//! ceiling for benchmarks. It keeps a descriptor for each inode that the kernel knows, and does nothing for safety.
#![allow(clippy::unwrap_used)] // a benchmark's helper may end that way

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, ReplyXattr, Request, SessionACL,
    TimeOrNow, WriteFlags,
};
use rustix::fs::{self as sys, AtFlags, Dir, FileType as Kind, Mode, OFlags, Stat, Timespec, Timestamps};

const KEEP: Duration = Duration::from_secs(3600);
const FLAGS: [InitFlags; 9] = [
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    InitFlags::FUSE_NO_EXPORT_SUPPORT,
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_POSIX_ACL,
    InitFlags::FUSE_WRITEBACK_CACHE,
];

type Answer<T> = Result<T, Errno>;

struct Mirror {
    known: Mutex<HashMap<u64, (Arc<OwnedFd>, u64)>>,
    root: u64,
    files: Mutex<HashMap<u64, Arc<fs::File>>>,
    directories: Mutex<HashMap<u64, Arc<Mutex<Dir>>>>,
    next: AtomicU64,
}

fn failed(error: impl Into<io::Error>) -> Errno {
    Errno::from_i32(error.into().raw_os_error().unwrap_or(5))
}

fn through(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

impl Mirror {
    fn new(directory: &Path) -> io::Result<Self> {
        let fd = sys::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let root = sys::fstat(&fd)?.st_ino;
        let known = HashMap::from([(1, (Arc::new(fd), 1))]);
        Ok(Self {
            known: Mutex::new(known),
            root,
            files: Mutex::default(),
            directories: Mutex::default(),
            next: AtomicU64::new(1),
        })
    }

    fn node(&self, ino: INodeNo) -> Answer<Arc<OwnedFd>> {
        self.known.lock().unwrap().get(&ino.0).map(|(fd, _)| Arc::clone(fd)).ok_or(Errno::ESTALE)
    }

    fn file(&self, handle: FileHandle) -> Answer<Arc<fs::File>> {
        self.files.lock().unwrap().get(&handle.0).cloned().ok_or(Errno::EBADF)
    }

    fn put<T>(&self, map: &Mutex<HashMap<u64, T>>, value: T) -> FileHandle {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        map.lock().unwrap().insert(handle, value);
        FileHandle(handle)
    }

    fn number(&self, ino: u64) -> u64 {
        if ino == self.root { 1 } else { ino }
    }

    fn attributes(&self, stat: &Stat) -> FileAttr {
        let time = |seconds: i64, nanoseconds: u64| {
            UNIX_EPOCH + Duration::new(u64::try_from(seconds).unwrap_or(0), u32::try_from(nanoseconds).unwrap_or(0))
        };
        let kind = match Kind::from_raw_mode(stat.st_mode) {
            Kind::Directory => FileType::Directory,
            Kind::Symlink => FileType::Symlink,
            _ => FileType::RegularFile,
        };
        FileAttr {
            ino: INodeNo(self.number(stat.st_ino)),
            size: u64::try_from(stat.st_size).unwrap_or(0),
            blocks: u64::try_from(stat.st_blocks).unwrap_or(0),
            atime: time(stat.st_atime, stat.st_atime_nsec),
            mtime: time(stat.st_mtime, stat.st_mtime_nsec),
            ctime: time(stat.st_ctime, stat.st_ctime_nsec),
            crtime: UNIX_EPOCH,
            kind,
            perm: u16::try_from(stat.st_mode & 0o7777).unwrap_or(0),
            nlink: u32::try_from(stat.st_nlink).unwrap_or(1),
            uid: stat.st_uid,
            gid: stat.st_gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// Counts a lookup.
    fn learn(&self, parent: &OwnedFd, name: &OsStr) -> Answer<FileAttr> {
        let fd = sys::openat(parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let fd = fd.map_err(failed)?;
        let stat = sys::fstat(&fd).map_err(failed)?;
        let mut known = self.known.lock().unwrap();
        known.entry(self.number(stat.st_ino)).or_insert_with(|| (Arc::new(fd), 0)).1 += 1;
        Ok(self.attributes(&stat))
    }

    fn open_file(&self, ino: INodeNo, flags: OpenFlags) -> Answer<FileHandle> {
        let node = self.node(ino)?;
        // With a writeback cache the kernel reads through handles that were opened for writing.
        let writes = flags.0 & libc::O_ACCMODE != libc::O_RDONLY;
        let file = fs::File::options().read(true).write(writes).open(through(&node)).map_err(failed)?;
        Ok(self.put(&self.files, Arc::new(file)))
    }

    fn change(
        &self,
        ino: INodeNo,
        mode: Option<u32>,
        size: Option<u64>,
        [atime, mtime]: [Option<TimeOrNow>; 2],
    ) -> Answer<FileAttr> {
        let node = self.node(ino)?;
        if let Some(mode) = mode {
            sys::chmod(through(&node), Mode::from_raw_mode(mode)).map_err(failed)?;
        }
        if let Some(size) = size {
            let file = fs::File::options().write(true).open(through(&node)).map_err(failed)?;
            file.set_len(size).map_err(failed)?;
        }
        if atime.is_some() || mtime.is_some() {
            let time = |time: Option<TimeOrNow>| match time {
                None => Timespec { tv_sec: 0, tv_nsec: sys::UTIME_OMIT },
                Some(TimeOrNow::Now) => Timespec { tv_sec: 0, tv_nsec: sys::UTIME_NOW },
                Some(TimeOrNow::SpecificTime(time)) => {
                    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
                    Timespec {
                        tv_sec: i64::try_from(since.as_secs()).unwrap_or(0),
                        tv_nsec: since.subsec_nanos().into(),
                    }
                }
            };
            let times = Timestamps { last_access: time(atime), last_modification: time(mtime) };
            sys::utimensat(sys::CWD, through(&node), &times, AtFlags::empty()).map_err(failed)?;
        }
        Ok(self.attributes(&sys::fstat(&node).map_err(failed)?))
    }

    fn make(
        &self,
        parent: INodeNo,
        name: &OsStr,
        make: impl FnOnce(&OwnedFd) -> rustix::io::Result<()>,
    ) -> Answer<FileAttr> {
        let parent = self.node(parent)?;
        make(&parent).map_err(failed)?;
        self.learn(&parent, name)
    }

    fn list(&self, handle: FileHandle, offset: u64, mut add: impl FnMut(&sys::DirEntry, u64) -> bool) -> Answer<()> {
        let directory = self.directories.lock().unwrap().get(&handle.0).cloned().ok_or(Errno::EBADF)?;
        let mut directory = directory.lock().unwrap();
        if offset == 0 {
            directory.rewind();
        } else {
            directory.seek(i64::try_from(offset).unwrap_or(0)).map_err(failed)?;
        }
        while let Some(entry) = directory.read() {
            let entry = entry.map_err(failed)?;
            let next = u64::try_from(entry.offset()).unwrap_or(0);
            if add(&entry, next) {
                break;
            }
        }
        Ok(())
    }
}

fn entry(reply: ReplyEntry, result: Answer<FileAttr>) {
    match result {
        Ok(attributes) => reply.entry(&KEEP, &attributes, Generation(0)),
        Err(Errno::ENOENT) => {
            let nothing = FileAttr { ino: INodeNo(0), ..blank() };
            reply.entry_with_ttls(&KEEP, &KEEP, &nothing, Generation(0));
        }
        Err(error) => reply.error(error),
    }
}

fn blank() -> FileAttr {
    let never = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: never,
        mtime: never,
        ctime: never,
        crtime: never,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

fn empty(reply: ReplyEmpty, result: Answer<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

impl Filesystem for Mirror {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in FLAGS {
            let _ = config.add_capabilities(flag);
        }
        let _ = config.set_max_write(1 << 20);
        let _ = config.set_max_background(64);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(reply, self.node(parent).and_then(|parent| self.learn(&parent, name)));
    }

    fn forget(&self, _: &Request, ino: INodeNo, lookups: u64) {
        let mut known = self.known.lock().unwrap();
        if let Some((_, count)) = known.get_mut(&ino.0) {
            *count = count.saturating_sub(lookups);
            if *count == 0 && ino.0 != 1 {
                known.remove(&ino.0);
            }
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let stat = self.node(ino).and_then(|node| sys::fstat(node).map_err(failed));
        match stat {
            Ok(stat) => reply.attr(&KEEP, &self.attributes(&stat)),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.change(ino, mode, size, [atime, mtime]) {
            Ok(attributes) => reply.attr(&KEEP, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.node(ino).and_then(|node| sys::readlinkat(node, "", Vec::new()).map_err(failed)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let mode = Mode::from_raw_mode(mode & !umask);
        entry(reply, self.make(parent, name, |parent| sys::mkdirat(parent, name, mode)));
    }

    fn symlink(&self, _: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        entry(reply, self.make(parent, name, |parent| sys::symlinkat(target, parent, name)));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let unlink = |parent| sys::unlinkat(parent, name, AtFlags::empty()).map_err(failed);
        empty(reply, self.node(parent).and_then(unlink));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let rmdir = |parent| sys::unlinkat(parent, name, AtFlags::REMOVEDIR).map_err(failed);
        empty(reply, self.node(parent).and_then(rmdir));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        to: INodeNo,
        new_name: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let both = self.node(parent).and_then(|from| Ok((from, self.node(to)?)));
        empty(reply, both.and_then(|(from, to)| sys::renameat(from, name, to, new_name).map_err(failed)));
    }

    fn link(&self, _: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let node = self.node(ino);
        let link = |node: Arc<OwnedFd>| {
            let path = through(&node);
            self.make(parent, name, |parent| sys::linkat(sys::CWD, path, parent, name, AtFlags::SYMLINK_FOLLOW))
        };
        entry(reply, node.and_then(link));
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.open_file(ino, flags) {
            Ok(handle) => reply.opened(handle, FopenFlags::FOPEN_KEEP_CACHE),
            Err(error) => reply.error(error),
        }
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, _: i32, reply: ReplyCreate) {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let made = self.node(parent).and_then(|parent| {
            let file = sys::openat(&parent, name, flags, Mode::from_raw_mode(mode & !umask)).map_err(failed)?;
            Ok((self.learn(&parent, name)?, self.put(&self.files, Arc::new(fs::File::from(file)))))
        });
        match made {
            Ok((made, handle)) => {
                reply.created(&KEEP, &made, Generation(0), handle, FopenFlags::FOPEN_KEEP_CACHE);
            }
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buffer = vec![0; size as usize];
        match self.file(handle).and_then(|file| file.read_at(&mut buffer, offset).map_err(failed)) {
            Ok(len) => reply.data(&buffer[..len]),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.file(handle).and_then(|file| file.write_all_at(data, offset).map_err(failed)) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap()),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.files.lock().unwrap().remove(&handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let sync = |file: Arc<fs::File>| if data_only { file.sync_data() } else { file.sync_all() }.map_err(failed);
        empty(reply, self.file(handle).and_then(sync));
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = self.node(ino).and_then(|node| {
            let fd = sys::openat(&node, ".", flags, Mode::empty()).map_err(failed)?;
            Dir::new(fd).map_err(failed)
        });
        match opened {
            Ok(directory) => {
                let handle = self.put(&self.directories, Arc::new(Mutex::new(directory)));
                reply.opened(handle, FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE);
            }
            Err(error) => reply.error(error),
        }
    }

    fn readdir(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.list(handle, offset, |entry, next| {
            let kind = match entry.file_type() {
                Kind::Directory => FileType::Directory,
                Kind::Symlink => FileType::Symlink,
                _ => FileType::RegularFile,
            };
            reply.add(INodeNo(entry.ino()), next, kind, OsStr::from_bytes(entry.file_name().to_bytes()))
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let Ok(parent) = self.node(ino) else { return reply.error(Errno::ESTALE) };
        let listed = self.list(handle, offset, |entry, next| {
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                let attributes = FileAttr { ino: INodeNo(entry.ino()), kind: FileType::Directory, ..blank() };
                return reply.add(attributes.ino, next, name, &KEEP, &attributes, Generation(0));
            }
            let Ok(attributes) = self.learn(&parent, name) else { return false };
            let full = reply.add(attributes.ino, next, name, &KEEP, &attributes, Generation(0));
            if full && let Some((_, count)) = self.known.lock().unwrap().get_mut(&attributes.ino.0) {
                *count -= 1;
            }
            full
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        let directory = self.directories.lock().unwrap().get(&handle.0).cloned().ok_or(Errno::EBADF);
        let synced = directory.and_then(|directory| {
            let directory = directory.lock().unwrap();
            sys::fsync(directory.fd().map_err(failed)?).map_err(failed)
        });
        empty(reply, synced);
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.directories.lock().unwrap().remove(&handle.0);
        reply.ok();
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let mut value = vec![0; 65536];
        let got = self.node(ino).and_then(|node| sys::getxattr(through(&node), name, &mut value[..]).map_err(failed));
        match got {
            Ok(len) if size == 0 => reply.size(u32::try_from(len).unwrap()),
            Ok(len) => reply.data(&value[..len]),
            Err(error) => reply.error(error),
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(directory), Some(mountpoint), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        return Err("usage: mirror DIRECTORY MOUNTPOINT".into());
    };
    let mut config = Config::default();
    config.n_threads = Some(4);
    config.acl = SessionACL::All;
    config.mount_options = vec![MountOption::FSName("mirror".to_owned()), MountOption::DefaultPermissions];
    Ok(fuser::mount(Mirror::new(&directory)?, &mountpoint, &config)?)
}
