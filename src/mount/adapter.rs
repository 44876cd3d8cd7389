//! One short method per operation of the protocol.

use std::cell::Cell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, FileHandle, FopenFlags, Generation, INodeNo, IoctlFlags, KernelConfig, LockOwner, OpenFlags,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::fs::{Begun, Change, DirectoryHandle, Error, Filesystem, NodeKind, Operation, OperationCounts};

use super::convert;
use super::low_latency::LowLatency;
use super::reply::{KEEP, name_alone, reply_attributes, reply_created, reply_empty, reply_entry, reply_xattr};
use super::wishes;

const NAME_MAX: u32 = 255;

thread_local! {
    /// Plaintext on its way to the kernel, reused.
    static REPLY: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

pub(super) struct Adapter {
    fs: Arc<Filesystem>,
    /// Extended attributes can be used.
    xattrs: bool,
    latency: Option<LowLatency>,
    /// Set when the session begins, if the kernel has a writeback cache.
    writes_back: Arc<AtomicBool>,
}

impl Adapter {
    pub(super) fn new(fs: Arc<Filesystem>, latency: Option<LowLatency>, writes_back: Arc<AtomicBool>) -> Self {
        Self { xattrs: fs.options().xattrs, fs, latency, writes_back }
    }

    fn note_request(&self) {
        if let Some(latency) = &self.latency {
            latency.note();
        }
    }

    /// An operation that is answered by the thread that got it.
    fn begin(&self, operation: Operation, request: &Request) -> Begun<&OperationCounts> {
        self.note_request();
        self.fs.begin(operation, convert::caller(request))
    }

    /// An operation that may be answered by another thread.
    fn begin_to_end_anywhere(&self, operation: Operation, request: &Request) -> Begun<Arc<OperationCounts>> {
        self.note_request();
        self.fs.begin_to_end_anywhere(operation, convert::caller(request))
    }
}

impl fuser::Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let writes_back = wishes::tell(config, self.xattrs, !self.fs.options().read_only);
        self.writes_back.store(writes_back, Ordering::Relaxed);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let begun = self.begin(Operation::Lookup, request);
        reply_entry(reply, begun.end(self.fs.lookup(convert::inode(parent), name.as_bytes())));
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        self.fs.forget(convert::inode(ino), lookups);
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let begun = self.begin(Operation::Getattr, request);
        reply_attributes(reply, begun.end(self.fs.attributes(convert::inode(ino))));
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (atime, mtime) = (convert::set_time(atime), convert::set_time(mtime));
        let change = Change { mode, uid, gid, atime, mtime };
        let begun = self.begin_to_end_anywhere(Operation::Setattr, request);
        let answer = move |result| reply_attributes(reply, begun.end(result));
        let (id, caller) = (convert::inode(ino), convert::caller(request));
        if size.is_none() && change.is_none() {
            return answer(self.fs.lose_privileges(id, ctime.is_some(), caller));
        }
        self.fs.set_attributes(id, size, change, caller, Box::new(answer));
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let begun = self.begin(Operation::Readlink, request);
        match begun.end(self.fs.readlink(convert::inode(ino))) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(convert::errno(&error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let Some(kind) = convert::kind_of_mode(mode) else { return reply.error(convert::errno(&Error::WrongKind)) };
        let (parent, caller) = (convert::inode(parent), convert::creator(request, umask));
        let begun = self.begin_to_end_anywhere(Operation::Mknod, request);
        let answer = Box::new(move |result| reply_entry(reply, begun.end(result)));
        self.fs.mknod(parent, name.as_bytes(), (kind, rdev.into()), mode & 0o7777, caller, answer);
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let begun = self.begin(Operation::Mkdir, request);
        let (parent, caller) = (convert::inode(parent), convert::creator(request, umask));
        reply_entry(reply, begun.end(self.fs.mkdir(parent, name.as_bytes(), mode & 0o7777, caller)));
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let begun = self.begin(Operation::Unlink, request);
        reply_empty(reply, begun.end(self.fs.unlink(convert::inode(parent), name.as_bytes())));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let begun = self.begin_to_end_anywhere(Operation::Rmdir, request);
        let answer = Box::new(move |result| reply_empty(reply, begun.end(result)));
        self.fs.remove_directory(convert::inode(parent), name.as_bytes(), answer);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let begun = self.begin(Operation::Symlink, request);
        let (parent, caller) = (convert::inode(parent), convert::caller(request));
        let target = target.as_os_str().as_bytes();
        reply_entry(reply, begun.end(self.fs.symlink(parent, name.as_bytes(), target, caller)));
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let Some(mode) = convert::rename_mode(flags) else { return reply.error(convert::errno(&Error::WrongKind)) };
        let (from, to) = (convert::inode(parent), convert::inode(new_parent));
        let begun = self.begin(Operation::Rename, request);
        reply_empty(reply, begun.end(self.fs.rename(from, name.as_bytes(), to, new_name.as_bytes(), mode)));
    }

    fn link(&self, request: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let begun = self.begin(Operation::Link, request);
        reply_entry(reply, begun.end(self.fs.link(convert::inode(ino), convert::inode(parent), name.as_bytes())));
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let begun = self.begin_to_end_anywhere(Operation::Open, request);
        let handle = FileHandle(self.fs.new_handle().0);
        let answer = move |result| match begun.end(result) {
            Ok(()) => reply.opened(handle, FopenFlags::FOPEN_KEEP_CACHE),
            Err(error) => reply.error(convert::errno(&error)),
        };
        self.fs.open_file(convert::inode(ino), convert::access(flags), Box::new(answer));
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let begun = self.begin_to_end_anywhere(Operation::Create, request);
        let handle = FileHandle(self.fs.new_handle().0);
        let answer = move |result| reply_created(reply, handle, begun.end(result));
        let (parent, caller) = (convert::inode(parent), convert::creator(request, umask));
        self.fs.create(parent, name.as_bytes(), mode & 0o7777, caller, Box::new(answer));
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let begun = self.begin_to_end_anywhere(Operation::Read, request);
        let mut buffer = REPLY.take();
        let size = size as usize;
        if buffer.len() < size {
            buffer.resize(size, 0);
        }
        let answer = move |read: Result<&[u8], Error>| match begun.end_moving(read, |plain| plain.len()) {
            Ok(plain) => reply.data(plain),
            Err(error) => reply.error(convert::errno(&error)),
        };
        self.fs.answer_read(convert::inode(ino), offset, &mut buffer[..size], Box::new(answer));
        REPLY.set(buffer);
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let begun = self.begin_to_end_anywhere(Operation::Write, request);
        let (fs, size) = (Arc::clone(&self.fs), data.len());
        let answer = move |written| match begun.end_moving(written, |()| size) {
            Ok(()) => reply.written(u32::try_from(size).unwrap_or(u32::MAX)),
            Err(error) => {
                fs.lose(convert::inode(ino), offset, size);
                reply.error(convert::errno(&error));
            }
        };
        let loses_set_ids = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let unprivileged = loses_set_ids.then(|| convert::caller(request));
        self.fs.answer_write(convert::inode(ino), offset, data, unprivileged, Box::new(answer));
    }

    /// Writes reach the backing file before they are answered, so there is nothing to flush: the kernel need not ask again.
    fn flush(&self, _request: &Request, _ino: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.error(convert::errno(&Error::LeftToKernel));
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let begun = self.begin(Operation::Release, request);
        self.fs.release(convert::inode(ino));
        reply_empty(reply, begun.end(Ok(())));
    }

    fn fsync(&self, request: &Request, ino: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let begun = self.begin(Operation::Fsync, request);
        reply_empty(reply, begun.end(self.fs.sync_for(convert::inode(ino), crate::fs::Handle(handle.0), !data_only)));
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let keep = FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE;
        let begun = self.begin(Operation::Opendir, request);
        match begun.end(self.fs.open_directory(convert::inode(ino))) {
            Ok(handle) => reply.opened(FileHandle(handle.0), keep),
            Err(error) => reply.error(convert::errno(&error)),
        }
    }

    fn readdir(&self, request: &Request, _ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let begun = self.begin(Operation::Readdir, request);
        let listed = self.fs.list(DirectoryHandle(handle.0), offset, false, |entry| {
            let kind = convert::file_type(entry.kind.unwrap_or(NodeKind::File));
            !reply.add(INodeNo(entry.id.0), entry.next_position, kind, OsStr::from_bytes(entry.name))
        });
        match begun.end(listed) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(convert::errno(&error)),
        }
    }

    fn readdirplus(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let begun = self.begin(Operation::Readdir, request);
        let listed = self.fs.list(DirectoryHandle(handle.0), offset, true, |entry| {
            let attributes = entry.attributes.as_ref().map_or_else(|| name_alone(entry), convert::attributes);
            let generation = Generation(entry.attributes.as_ref().map_or(0, |entry| entry.generation.into()));
            let name = OsStr::from_bytes(entry.name);
            !reply.add(attributes.ino, entry.next_position, name, &KEEP, &attributes, generation)
        });
        match begun.end(listed) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(convert::errno(&error)),
        }
    }

    fn releasedir(&self, _request: &Request, _ino: INodeNo, handle: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.fs.close_directory(DirectoryHandle(handle.0));
        reply.ok();
    }

    fn fsyncdir(&self, request: &Request, _ino: INodeNo, handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        let begun = self.begin(Operation::Fsyncdir, request);
        reply_empty(reply, begun.end(self.fs.sync_directory(DirectoryHandle(handle.0))));
    }

    fn statfs(&self, request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let begun = self.begin(Operation::Statfs, request);
        match begun.end(self.fs.space()) {
            Ok(space) => {
                let block = u32::try_from(space.block_size).unwrap_or(u32::MAX);
                let (blocks, files) = ((space.blocks, space.free, space.available), (space.files, space.files_free));
                reply.statfs(blocks.0, blocks.1, blocks.2, files.0, files.1, block, NAME_MAX, block);
            }
            Err(error) => reply.error(convert::errno(&error)),
        }
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if !self.xattrs {
            return reply.error(convert::errno(&Error::LeftToKernel));
        }
        let begun = self.begin(Operation::Getxattr, request);
        reply_xattr(reply, size, begun.end(self.fs.xattr(convert::inode(ino), name.as_bytes())));
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        if !self.xattrs {
            return reply.error(convert::errno(&Error::LeftToKernel));
        }
        let begun = self.begin(Operation::Listxattr, request);
        reply_xattr(reply, size, begun.end(self.fs.xattr_names(convert::inode(ino), convert::caller(request))));
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        if !self.xattrs {
            return reply.error(convert::errno(&Error::LeftToKernel));
        }
        let (name, caller) = (name.as_bytes(), convert::caller(request));
        let begun = self.begin_to_end_anywhere(Operation::Setxattr, request);
        let answer = move |result| reply_empty(reply, begun.end(result));
        self.fs.set_xattr(convert::inode(ino), name, value, convert::xattr_mode(flags), caller, Box::new(answer));
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if !self.xattrs {
            return reply.error(convert::errno(&Error::LeftToKernel));
        }
        let begun = self.begin(Operation::Removexattr, request);
        reply_empty(reply, begun.end(self.fs.remove_xattr(convert::inode(ino), name.as_bytes())));
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(what) = convert::allocate(mode) else { return reply.error(convert::errno(&Error::Unsupported)) };
        let begun = self.begin_to_end_anywhere(Operation::Fallocate, request);
        let answer = move |result| reply_empty(reply, begun.end(result));
        self.fs.allocate(convert::inode(ino), what, offset, len, convert::caller(request), Box::new(answer));
    }

    /// With a writeback cache the kernel does not send its dirty pages first, so an answer about holes would lose data: it
    /// answers for itself by the file's size.
    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        reply.error(convert::errno(&Error::LeftToKernel));
    }

    /// Every file has its own key, so nothing can be copied on disk; the kernel reads and writes instead.
    fn copy_file_range(
        &self,
        _request: &Request,
        _ino_in: INodeNo,
        _handle_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _handle_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: fuser::CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(convert::errno(&Error::LeftToKernel));
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(convert::errno(&Error::NoControl));
    }
}
