//! Positioned I/O on one backing file.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};

use rustix::fs::{
    AtFlags, FallocateFlags, FsWord, SeekFrom, Statx, StatxFlags, Timestamps, fallocate, fdatasync, fstat, fstatfs,
    fsync, ftruncate, futimens, seek, statx,
};
use rustix::io::{Errno, pread, pwrite};
use rustix::process::{Resource, getrlimit};

use super::privileges::Privileges;
use super::written::Written;

/// Where files of this process must end (`ulimit -f`). The kernel would write the part of a page that lies before it.
static END_OF_FILES: LazyLock<u64> = LazyLock::new(|| getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX));

/// Of a folio that is dirty in part, ext4 sends only the pages that were written. XFS sent all of it before Linux 6.6.
static SENDS_WRITTEN_PAGES_ONLY: LazyLock<bool> = LazyLock::new(|| {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(6))
});

/// Attributes without times. A kernel with multigrain timestamps that has told a change time gives the next change a finer
/// one, which reaches the mount's own files too: each sync of theirs would carry one more request.
pub(super) fn stat_without_times(file: impl AsFd, wanted: StatxFlags) -> io::Result<Statx> {
    Ok(statx(file, c"", AtFlags::EMPTY_PATH, wanted)?)
}

/// Filesystem types (`statfs(2)`) that never change a page on its way to the disk: btrfs, ZFS, tmpfs.
const STABLE_PAGES: [FsWord; 3] = [0x9123_683E, 0x2FC1_2FC1, 0x0102_1994];
/// `cachestat(2)`, on all architectures but Alpha.
const CACHESTAT: libc::c_long = 451;

/// A ciphertext file as the content layer sees it.
///
/// What is assumed of the disk below: an aligned 4096-byte page reaches it whole or not at all; size changes are
/// journaled; a sync returns only after what it covers is durable; after a crash a file has no bytes that were never
/// written to it, except zeros.
pub trait RawFile: Send + Sync {
    /// Reads at `offset` until `buffer` is full or the file ends, and returns how many bytes it read.
    ///
    /// # Errors
    /// Those of `pread(2)`.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of `bytes` at `offset`. On an error a part of them may have been written.
    ///
    /// # Errors
    /// Those of `pwrite(2)`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// The size in bytes.
    ///
    /// # Errors
    /// Those of `statx(2)`.
    fn size(&self) -> io::Result<u64>;

    /// Sets the size in bytes.
    ///
    /// # Errors
    /// Those of `ftruncate(2)`.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// Sets the size in bytes, and leaves access and modification time as they were.
    ///
    /// # Errors
    /// Those of `fstat(2)`, `ftruncate(2)` and `futimens(2)`.
    fn set_size_quietly(&self, size: u64) -> io::Result<()>;

    /// Gives the range space on the disk without changing the size. What was a hole still reads as zeros.
    ///
    /// # Errors
    /// Those of `fallocate(2)`.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the range a hole without changing the size.
    ///
    /// # Errors
    /// Those of `fallocate(2)`.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the content durable, and with `metadata` times and modes too.
    ///
    /// # Errors
    /// Those of `fsync(2)`.
    fn sync(&self, metadata: bool) -> io::Result<()>;

    /// Makes the pages of the range clean: none of them is on its way to the disk, and none sets out on it before it is written
    /// again. Costs next to nothing for pages that are clean. That one cannot be sent is an error of an earlier write, and kept
    /// for the next sync.
    fn clean(&self, offset: u64, len: u64);

    /// Begins to send the pages of the range to the disk, and does not wait. A hint: failing is not an error.
    fn start_writeback(&self, offset: u64, len: u64);

    /// Sends the pages of the range to the disk and waits until it has taken them, so that a metadata change made after
    /// this cannot become durable before them.
    ///
    /// # Errors
    /// Those of `sync_file_range(2)`.
    fn push_out(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The first range from `offset` on that is no hole; none if there are only holes. A file that cannot tell has none.
    ///
    /// # Errors
    /// Those of `lseek(2)`.
    fn data_from(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(Some(offset..u64::MAX))
    }
}

/// A file of the backing filesystem. It may begin as readable and become writable later.
pub struct DiskFile {
    first: Arc<OwnedFd>,
    writable: OnceLock<Arc<OwnedFd>>,
    privileges: Privileges,
    /// The last error that the disk has told, 0 if none: the kernel tells each only once.
    told: AtomicI32,
    has_stable_pages: OnceLock<bool>,
    written: Written,
}

impl DiskFile {
    /// Takes a descriptor open for reading only.
    #[must_use]
    pub fn readable(fd: Arc<OwnedFd>) -> Self {
        Self {
            first: fd,
            writable: OnceLock::new(),
            privileges: Privileges::default(),
            told: AtomicI32::new(0),
            has_stable_pages: OnceLock::new(),
            written: Written::unknown(),
        }
    }

    /// Takes a descriptor open for reading and writing.
    #[must_use]
    pub fn writable(fd: Arc<OwnedFd>) -> Self {
        Self { writable: OnceLock::from(Arc::clone(&fd)), ..Self::readable(fd) }
    }

    /// Whether it can be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable.get().is_some()
    }

    /// Becomes writable if `other`, the same file, is.
    pub fn make_writable_like(&self, other: &Self) {
        if let Some(fd) = other.writable.get() {
            let _ = self.writable.set(Arc::clone(fd));
        }
    }

    /// Runs a change of the file's set-id bits or capabilities, which writes keep as they find them.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn change_privileges<T>(&self, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.privileges.change(self.fd(), change)
    }

    /// The first bytes from `offset` on that may be other than zeros, as the backing filesystem knows them; none if there are none.
    /// One that does not know says all.
    ///
    /// # Errors
    /// Those of `lseek(2)`.
    pub fn data_from(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let start = match seek(self.fd(), SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => return Ok(Some(offset..u64::MAX)),
            Err(error) => return Err(error.into()),
        };
        Ok(Some(start..seek(self.fd(), SeekFrom::Hole(start))?))
    }

    /// The bytes that it takes on the disk.
    ///
    /// # Errors
    /// Those of `statx(2)`.
    pub fn space(&self) -> io::Result<u64> {
        Ok(stat_without_times(self.fd(), StatxFlags::BLOCKS)?.stx_blocks.saturating_mul(512))
    }

    /// The last error that a sync or a wait has met since this was last asked, whoever has heard of it.
    pub fn take_told(&self) -> Option<i32> {
        Some(self.told.swap(0, Ordering::Relaxed)).filter(|errno| *errno != 0)
    }

    /// Keeps an error that the kernel will not tell again.
    fn keep_told<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.inspect_err(|error| self.told.store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::Relaxed))
    }

    fn fd(&self) -> &OwnedFd {
        self.writable.get().unwrap_or(&self.first)
    }

    fn sync_range(&self, offset: u64, len: u64, flags: libc::c_uint) -> io::Result<()> {
        let range = |value: u64| i64::try_from(value).map_err(|_| io::Error::from(Errno::FBIG));
        match sync_file_range(self.fd().as_fd(), range(offset)?, range(len)?, flags) {
            // A filesystem without page cache of its own has nothing in flight that we could wait for.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::ESPIPE)) => Ok(()),
            result => self.keep_told(result),
        }
    }
}

#[allow(unsafe_code)] // no safe wrapper of this system call exists in the crates we use
fn sync_file_range(fd: BorrowedFd<'_>, offset: i64, len: i64, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: takes no pointers; the descriptor is borrowed for the call.
    match unsafe { libc::sync_file_range(fd.as_raw_fd(), offset, len, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether no page of the range is dirty or on its way to the disk. A kernel before Linux 6.5 cannot tell, and says no.
#[allow(unsafe_code)] // no safe wrapper of this system call exists in the crates we use
fn is_clean(fd: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
    let range = [offset, len];
    let mut counts = [0_u64; 5];
    // SAFETY: both structures of the kernel are arrays of 64-bit numbers of these lengths, and outlive the call.
    let asked = unsafe { libc::syscall(CACHESTAT, fd.as_raw_fd(), range.as_ptr(), counts.as_mut_ptr(), 0) };
    let [_cached, dirty, on_their_way, ..] = counts;
    asked == 0 && dirty == 0 && on_their_way == 0
}

/// Locks all of a file for its open file description, without waiting: a lock of ranges, which some filesystems carry that do
/// not carry `flock(2)`.
#[allow(unsafe_code)] // no safe wrapper of this system call exists in the crates we use
#[allow(clippy::cast_possible_truncation)] // constants below four, in the fields that are made for them
pub(super) fn lock_whole_range(fd: BorrowedFd<'_>, exclusive: bool) -> rustix::io::Result<()> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let whole = libc::flock { l_type: kind as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the structure is whole and outlives the call, which only reads it; the descriptor is borrowed for the call.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

impl RawFile for DiskFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match pread(self.fd(), &mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if offset.saturating_add(bytes.len() as u64) > *END_OF_FILES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let result = self.privileges.keep(self.fd(), || {
            let mut done = 0;
            while done < bytes.len() {
                match pwrite(self.fd(), &bytes[done..], offset + done as u64) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(n) => done += n,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(())
        });
        self.written.add(offset, bytes.len() as u64);
        result
    }

    fn size(&self) -> io::Result<u64> {
        Ok(stat_without_times(self.fd(), StatxFlags::SIZE)?.stx_size)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.privileges.keep(self.fd(), || Ok(ftruncate(self.fd(), size)?))
    }

    fn set_size_quietly(&self, size: u64) -> io::Result<()> {
        let stat = fstat(self.fd())?;
        let time = |sec, nsec| rustix::fs::Timespec { tv_sec: sec, tv_nsec: i64::try_from(nsec).unwrap_or(0) };
        let times = Timestamps {
            last_access: time(stat.st_atime, stat.st_atime_nsec),
            last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
        };
        self.set_size(size)?;
        match futimens(self.fd(), &times) {
            // Somebody else's file: only its owner may set its times, and it keeps those of this change.
            Err(Errno::PERM) => Ok(()),
            result => Ok(result?),
        }
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.privileges.keep(self.fd(), || Ok(fallocate(self.fd(), FallocateFlags::KEEP_SIZE, offset, len)?))
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE;
        self.privileges.keep(self.fd(), || Ok(fallocate(self.fd(), flags, offset, len)?))
    }

    fn sync(&self, metadata: bool) -> io::Result<()> {
        let sync = || if metadata { fsync(self.fd()) } else { fdatasync(self.fd()) };
        self.keep_told(self.written.sync(sync).map_err(io::Error::from))
    }

    fn clean(&self, offset: u64, len: u64) {
        let is_stable = || fstatfs(self.fd()).is_ok_and(|found| STABLE_PAGES.contains(&found.f_type));
        if *self.has_stable_pages.get_or_init(is_stable) {
            return;
        }
        let is_clean = |offset, len| is_clean(self.fd().as_fd(), offset, len);
        let may_be_dirty = !*SENDS_WRITTEN_PAGES_ONLY || self.written.may_be_dirty(offset, len, is_clean);
        if may_be_dirty && !is_clean(offset, len) {
            let _ = self.push_out(offset, len);
        }
    }

    fn start_writeback(&self, offset: u64, len: u64) {
        let _ = self.sync_range(offset, len, libc::SYNC_FILE_RANGE_WRITE);
    }

    fn push_out(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        self.sync_range(offset, len, flags)
    }

    fn data_from(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let start = match seek(self.fd(), SeekFrom::Data(offset)) {
            Err(Errno::NXIO) => return Ok(None),
            // The filesystem does not tell.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(offset..u64::MAX)),
            start => start?,
        };
        Ok(Some(start..seek(self.fd(), SeekFrom::Hole(start))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page that may set out for the disk while it is written can get there half old, half new.
    #[test]
    fn no_page_can_set_out_while_it_is_overwritten() {
        let home = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = home.path().join("file");
        let open = || std::fs::File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = DiskFile::writable(Arc::new(open().unwrap().into()));
        let dirty = |page: u64| !is_clean(file.fd().as_fd(), page * 4096, 4096);
        file.write_at(&[1; 3 * 4096], 0).unwrap();
        if !dirty(0) || STABLE_PAGES.contains(&fstatfs(file.fd()).unwrap().f_type) {
            return; // nothing is to be seen on this filesystem
        }
        file.clean(4096, 4096);
        assert!(!dirty(1), "it sets out when the kernel likes");
        assert_eq!(file.take_told(), None);
    }
}
