//! An inode that the kernel knows, and what is kept for it. All handles and hard links of a file share one, and so one content.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::content::{Content, Ledger};
use crate::storage::{DiskFile, Node, NodeKind, SetTime, Stat, Timestamp};

use crate::fs::error::Error;
use crate::fs::kernel::InodeId;

use super::descriptors::Held;
use super::filling::Filling;
use super::lease::Lease;
use super::sync_errors::SyncErrors;

/// Where a directory keeps the ACL of its new entries.
pub(crate) const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

pub(crate) struct Inode {
    pub(crate) id: InodeId,
    pub(crate) node: Node,
    pub(crate) kind: NodeKind,
    /// Set once the directory's id was read and authenticated.
    pub(crate) directory_id: OnceLock<[u8; 16]>,
    /// Set once the file's header was found.
    pub(crate) file_id: OnceLock<[u8; 32]>,
    pub(crate) default_acl: DefaultAcl,
    /// The file has no capabilities for programs, or has lost them; where nobody can set attributes that stays so.
    pub(crate) lacks_capabilities: AtomicBool,
    slot: Mutex<Slot>,
    /// What programs take for written and is not stored.
    pub(crate) ledger: Arc<Ledger>,
    /// Towards the kernel, the inode of another generation is another one: nothing that it knew of the old one counts.
    pub(crate) generation: AtomicU32,
    /// The kernel has not looked it up since its generation changed.
    pub(crate) must_be_looked_up: AtomicBool,
    /// The header turned out to be zeros: the file is empty, and the kernel may have heard otherwise.
    pub(crate) has_zero_header: AtomicBool,
    pub(crate) is_without_size: AtomicBool,
    /// A modification time that the kernel has set on an open file and the disk has not. Held while times are set, so that
    /// settling does not put older ones back.
    late_mtime: Mutex<Option<Timestamp>>,
    /// The file is being sealed anew, which moves its modification time: that counts as late meanwhile. Changes under the guard
    /// of the late time.
    sealing: AtomicBool,
    /// Held by whoever gives the file another header.
    keys: Mutex<()>,
    /// Held while owner, mode or capabilities change, or one that was found is put back; after the slot's.
    privileges: Mutex<()>,
    /// Work that takes as long as the file is large.
    filling: Mutex<Option<Filling>>,
    /// It has lost its last name, and the backing filesystem has given it another one while it is open.
    pub(crate) condemned: AtomicBool,
    /// What the kernel was last told of the space that the file takes.
    pub(crate) told_blocks: AtomicU64,
    /// It is on the list of unsettled files.
    pub(crate) watched: AtomicBool,
    pub(super) lookups: AtomicU64,
    /// Orders inodes by when they were last looked up.
    pub(crate) last_lookup: AtomicU64,
}

/// A file's content, while it is in use.
#[derive(Default)]
pub(crate) struct Slot {
    pub(crate) open: Option<OpenFile>,
    /// Opened and not yet released by the kernel.
    pub(crate) handles: u64,
    errors: SyncErrors,
}

#[derive(Clone)]
pub(crate) struct OpenFile {
    pub(crate) content: Arc<Content>,
    pub(crate) file: Arc<DiskFile>,
    pub(crate) lease: Arc<Lease>,
    /// None if the file is read and written through the descriptor that pins it.
    pub(crate) _held: Option<Arc<Held>>,
}

impl Slot {
    /// Gives the content up. Operations under way are waited for, so that no second content of the file lives beside it.
    pub(crate) fn close(&mut self) {
        if let Some(open) = self.open.take() {
            open.content.retire();
            self.note_told(&open.file);
        }
    }

    /// The content; one that ended by itself is none.
    pub(crate) fn current(&mut self) -> Option<OpenFile> {
        if let Some(open) = self.open.take_if(|open| open.content.is_retired()) {
            self.note_told(&open.file);
        }
        self.open.clone()
    }

    /// Keeps what the disk has told of the file, by this descriptor of it.
    pub(crate) fn note_told(&mut self, file: &DiskFile) {
        if let Some(errno) = file.take_told() {
            self.errors.note(errno);
        }
    }

    /// The errors of the disk that its handles have to hear of.
    pub(crate) fn errors(&mut self) -> &mut SyncErrors {
        if let Some(open) = self.open.clone() {
            self.note_told(&open.file);
        }
        &mut self.errors
    }

    /// Whether the content turned out to be cut off.
    pub(crate) fn lacks_end_mark(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.content.lacks_end_mark())
    }
}

impl Inode {
    pub(super) fn new(id: InodeId, node: Node, kind: NodeKind) -> Self {
        Self {
            id,
            node,
            kind,
            directory_id: OnceLock::new(),
            file_id: OnceLock::new(),
            default_acl: DefaultAcl::default(),
            lacks_capabilities: AtomicBool::new(false),
            slot: Mutex::default(),
            ledger: Arc::default(),
            generation: AtomicU32::new(0),
            must_be_looked_up: AtomicBool::new(false),
            has_zero_header: AtomicBool::new(false),
            is_without_size: AtomicBool::new(false),
            late_mtime: Mutex::default(),
            sealing: AtomicBool::new(false),
            keys: Mutex::default(),
            privileges: Mutex::default(),
            filling: Mutex::default(),
            condemned: AtomicBool::new(false),
            told_blocks: AtomicU64::new(0),
            watched: AtomicBool::new(false),
            lookups: AtomicU64::new(0),
            last_lookup: AtomicU64::new(0),
        }
    }

    pub(crate) fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes owner, mode or capabilities. Writes of the content keep those that they find, so no content begins meanwhile that
    /// does not know of the change.
    pub(crate) fn change_privileges<T>(&self, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let slot = self.slot();
        let _alone = self.own_privileges();
        match &slot.open {
            Some(open) => open.file.change_privileges(change),
            None => change(),
        }
    }

    /// Keeps the privileges as they are, for who puts back what was found.
    pub(crate) fn own_privileges(&self) -> MutexGuard<'_, ()> {
        self.privileges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn late_mtime(&self) -> MutexGuard<'_, Option<Timestamp>> {
        self.late_mtime.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the disk the modification time that the kernel has set, if it lacks it. Times do not change while the guard is
    /// held.
    pub(crate) fn write_late_mtime(&self) -> io::Result<MutexGuard<'_, Option<Timestamp>>> {
        let mut late = self.late_mtime();
        if let Some(mtime) = *late {
            self.put_mtime(mtime)?;
            if !self.is_sealing() {
                *late = None;
            }
        }
        Ok(late)
    }

    /// Does the same as far as that is possible, and says if it is not.
    pub(crate) fn try_late_mtime(&self) {
        if let Err(error) = self.write_late_mtime() {
            tracing::warn!("{}: the modification time cannot be set: {error}", self.node.describe());
        }
    }

    /// Gives the disk a modification time that nobody has asked for. Of somebody else's file only its owner may set one: it
    /// keeps the disk's own, that of the last write.
    pub(crate) fn put_mtime(&self, mtime: Timestamp) -> io::Result<()> {
        match self.node.set_times(SetTime::Keep, SetTime::At(mtime)) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            result => result,
        }
    }

    /// Makes the caller the only one who gives the file another header.
    pub(crate) fn own_keys(&self) -> MutexGuard<'_, ()> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what is written to the file is nobody's write.
    pub(crate) fn is_sealing(&self) -> bool {
        self.sealing.load(Ordering::Relaxed)
    }

    /// From now on the modification time is the one that the file has, or that programs set, whatever is written. The attributes.
    pub(crate) fn begin_sealing(&self) -> io::Result<Stat> {
        let mut late = self.late_mtime();
        let stat = self.node.stat()?;
        late.get_or_insert(stat.mtime);
        self.sealing.store(true, Ordering::Relaxed);
        Ok(stat)
    }

    /// Ends that: the disk gets the time that counts. Who has pages of the file locked must not wait for the guard of the time.
    pub(crate) fn end_sealing(&self, may_wait: bool) {
        let late = if may_wait { Some(self.late_mtime()) } else { self.late_mtime.try_lock().ok() };
        let Some(mut late) = late.filter(|_| self.sealing.swap(false, Ordering::Relaxed)) else { return };
        // What cannot be set now stays late.
        late.take_if(|mtime| self.node.set_times(SetTime::Keep, SetTime::At(*mtime)).is_ok());
    }

    /// The file is being opened. Fails if the kernel has to look it up again first, because it counts what is not there: then
    /// it takes the file for another one than before, and has all of it anew.
    pub(crate) fn check_is_fresh(&self) -> Result<(), Error> {
        let slot = self.slot();
        let is_wrong = || self.ledger.has_lost() || self.is_without_size.swap(false, Ordering::Relaxed);
        if slot.handles == 0 && is_wrong() {
            self.generation.fetch_add(1, Ordering::Relaxed);
            self.must_be_looked_up.store(true, Ordering::Relaxed);
            self.ledger.clear();
        }
        drop(slot);
        if self.must_be_looked_up.load(Ordering::Relaxed) { Err(Error::UnknownInode) } else { Ok(()) }
    }

    /// The work that is under way.
    pub(crate) fn filling(&self) -> MutexGuard<'_, Option<Filling>> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether new entries of a directory take their modes from its default ACL; asked once.
#[derive(Default)]
pub(crate) struct DefaultAcl(AtomicU8);

impl DefaultAcl {
    const UNKNOWN: u8 = 0;
    const NONE: u8 = 1;
    const SOME: u8 = 2;

    pub(crate) fn is_set(&self, directory: &Inode) -> bool {
        if self.0.load(Ordering::Relaxed) == Self::UNKNOWN {
            let found = directory.node.xattr(DEFAULT_ACL).is_ok();
            self.0.store(if found { Self::SOME } else { Self::NONE }, Ordering::Relaxed);
        }
        self.0.load(Ordering::Relaxed) == Self::SOME
    }

    pub(crate) fn forget(&self) {
        self.0.store(Self::UNKNOWN, Ordering::Relaxed);
    }
}
