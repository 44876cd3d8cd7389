//! What a filesystem means, without the kernel's types: inodes, names, attributes, handles, and the errno table.
//!
//! Knows content, keys and storage; calls no cipher, and of crypto knows only the names of keys. Invariants:
//! * every operation names inodes by [`InodeId`] and entries by plain name, and reaches the disk through held nodes;
//! * nothing waits for a provider on the caller's thread while others could be served: see [`Filesystem::open`];
//! * every failure becomes an errno in one table: see [`Error::errno`].

mod allocate;
mod attributes;
mod backing;
mod caller;
mod error;
mod fill;
mod headers;
mod inode;
mod io;
mod kernel;
mod leases;
mod link_targets;
mod listing;
mod losses;
mod measures;
mod moves;
mod names;
mod namespace;
mod open;
mod order;
mod pace;
mod prefetch;
mod provisioned;
mod rekey;
mod set_ids;
mod settle;
mod shred;
mod stats;
mod sync_errors;
mod trim;
mod unfinished;
mod workers;
mod wrapping_keys;
mod xattrs;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

pub use allocate::Allocate;
pub use attributes::{Attributes, Change};
pub use caller::Caller;
pub use error::Error;
pub use io::ReadAnswer;
pub use kernel::{InodeId, Kernel, ROOT};
pub use listing::{DirectoryHandle, Listed, UNREADABLE};
pub use measures::{Begun, Measures, Operation, OperationCounts, OperationMeasure};
pub use open::Answer;
pub use rekey::{Rekeyed, Run};
pub use stats::Stats;
pub use sync_errors::Handle;

pub use crate::storage::{Access, FileSystemStat, NodeKind, RenameMode, SetTime, Timestamp, XattrMode};

use crate::content::{ContentError, Events, Rules};
use crate::format::geometry::PAGE_SIZE;
use crate::keys::{Moment, ProviderErrorKind, ProvisionedUse, Volume};
use crate::lease::{Lost, Tenure};
use crate::storage::{CipherDirectory, LongTargets, Node, RedoLogs};

use inode::{Inode, InodeTable};
use kernel::NoKernel;
use leases::Keeper;
use listing::OpenDirectories;
use losses::Losses;
use moves::Moves;
use names::OwedIds;
use order::NameOrder;
use prefetch::Prefetch;
use provisioned::Stock;
use settle::Settler;
use trim::Trimmer;
use unfinished::Unfinished;
use workers::Workers;

/// Threads for operations that wait for a provider.
const KEY_THREADS: usize = 16;
/// Threads that ask again for the keys of open files.
const RENEWAL_THREADS: usize = 8;
/// Threads for what may take long and asks no provider.
const CHORE_THREADS: usize = 4;
/// What a warning is about.
type Cause = (&'static str, Option<ProviderErrorKind>);

/// The same alarm is logged at most this often.
const ALARM_INTERVAL: Duration = Duration::from_secs(10);

/// How a filesystem is opened.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Nothing is changed, on disk or by the kernel.
    pub read_only: bool,
    /// After so long without a read, write or open, all keys are dropped as by [`Filesystem::lock`].
    pub idle_lock: Option<Duration>,
    /// The keys of files that will probably be opened next are fetched ahead.
    pub prefetch: bool,
    /// When new files use provisioned keys.
    pub provisioned_keys: ProvisionedUse,
    /// A near provider may withhold a key too: a file gets it when it is opened for writing, so that the refusal is the answer.
    pub keys_at_open: bool,
}

impl Default for Options {
    /// Read-write, never locked for want of use, fetching keys ahead, with provisioned keys if no others are to be had.
    fn default() -> Self {
        Self {
            read_only: false,
            idle_lock: None,
            prefetch: true,
            provisioned_keys: ProvisionedUse::Fallback,
            keys_at_open: false,
        }
    }
}

/// A mounted volume.
pub struct Filesystem {
    volume: Volume,
    /// The last handle that was given a number.
    last_handle: AtomicU64,
    directory: CipherDirectory,
    long_targets: LongTargets,
    redo_logs: RedoLogs,
    /// Redo logs that are left.
    unfinished: Mutex<Unfinished>,
    has_unfinished: AtomicBool,
    /// Held while a redo log begins to count, or the list of wrapping keys changes.
    committing: Mutex<()>,
    /// The run of `kmsfs rekey` that was heard of last.
    rekey_run: Mutex<Option<Run>>,
    inodes: InodeTable,
    directories: OpenDirectories,
    order: NameOrder,
    owed_ids: OwedIds,
    settler: Settler,
    keeper: Keeper,
    losses: Losses,
    trimmer: Trimmer,
    /// What says that nobody else writes the volume; none where a lock says it.
    tenure: Option<Tenure>,
    /// None before the mount.
    kernel: OnceLock<Box<dyn Kernel>>,
    start: Moment,
    /// When content was last used, in seconds since the start.
    last_use: AtomicU64,
    options: Options,
    lane: Workers,
    /// Apart from the lane: the keys of open files are renewed although many wait to be opened.
    renewals: Workers,
    /// For what may take long and asks no provider.
    chores: Workers,
    prefetch: Prefetch,
    /// See [`Node::renames_what_is_open`].
    renames_what_is_open: bool,
    rules: Rules,
    read_only: bool,
    /// Something was changed, or may have been.
    changed: AtomicBool,
    /// The daemon may make files for other users.
    privileged: bool,
    /// The daemon's own user.
    user: u32,
    events: Arc<Events>,
    moves: Moves,
    /// The first of the wrapping keys, as `status` names it.
    wrapping_key: Mutex<String>,
    counts: Arc<OperationCounts>,
    undecryptable_names: AtomicU64,
    alarms: Mutex<HashMap<Cause, Instant>>,
}

impl Filesystem {
    /// Opens an unlocked volume. The caller holds its lock.
    ///
    /// # Errors
    /// [`Error`] if the root cannot be pinned or its directory id does not authenticate.
    pub fn open(directory: CipherDirectory, volume: Volume, options: Options) -> Result<Arc<Self>, Error> {
        Self::open_held(directory, volume, options, None)
    }

    /// The same under a lease: the volume is written only as long as that holds. [`Self::shutdown`] gives it back.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn open_held(
        directory: CipherDirectory,
        volume: Volume,
        options: Options,
        tenure: Option<Tenure>,
    ) -> Result<Arc<Self>, Error> {
        let root = Node::of_directory(directory.root_fd())?;
        let stat = root.stat()?;
        let user = rustix::process::geteuid().as_raw();
        let renames_what_is_open = root.renames_what_is_open()?;
        if !options.read_only {
            let permit = tenure.as_ref().map(Tenure::permit).unwrap_or_default();
            let stock = Stock { stock: directory.key_stock()?, permit };
            volume.ring.use_provisioned(Box::new(stock), options.provisioned_keys);
        }
        let fs = Arc::new(Self {
            wrapping_key: Mutex::new(wrapping_keys::first_key(&volume.config)),
            moves: Moves::default(),
            rules: Rules { holes: volume.config.holes, end: volume.config.end },
            volume,
            last_handle: AtomicU64::new(0),
            long_targets: directory.long_targets()?,
            redo_logs: directory.redo_logs()?,
            unfinished: Mutex::default(),
            has_unfinished: AtomicBool::new(false),
            committing: Mutex::default(),
            rekey_run: Mutex::default(),
            directory,
            order: NameOrder::new(&root)?,
            owed_ids: OwedIds::default(),
            inodes: InodeTable::new(root, &stat),
            directories: OpenDirectories::default(),
            settler: Settler::default(),
            keeper: Keeper::default(),
            losses: Losses::default(),
            trimmer: Trimmer::new(),
            tenure,
            kernel: OnceLock::new(),
            start: Moment::now(),
            last_use: AtomicU64::new(0),
            options,
            lane: Workers::new("kmsfs-keys", KEY_THREADS),
            renewals: Workers::new("kmsfs-renewals", RENEWAL_THREADS),
            chores: Workers::new("kmsfs-chores", CHORE_THREADS),
            prefetch: Prefetch::new(),
            renames_what_is_open,
            read_only: options.read_only,
            changed: AtomicBool::new(false),
            privileged: user == 0,
            user,
            events: Arc::default(),
            counts: Arc::default(),
            undecryptable_names: AtomicU64::new(0),
            alarms: Mutex::default(),
        });
        fs.start_up()?;
        Ok(fs)
    }

    /// Checks the root, finishes what a crash has left half way, and starts what runs in the background.
    fn start_up(self: &Arc<Self>) -> Result<(), Error> {
        let root = self.inodes.get(ROOT)?;
        self.directory_id(&root)?;
        self.check_block_size()?;
        self.finish_rekeying()?;
        if !self.read_only {
            Settler::start(self)?;
        }
        Keeper::start(self)?;
        Ok(Trimmer::start(self)?)
    }

    /// A page is safe from power cuts only where the disk below writes it whole.
    fn check_block_size(&self) -> Result<(), Error> {
        let block_size = self.space()?.block_size;
        if block_size < PAGE_SIZE {
            tracing::warn!(
                "the backing filesystem has blocks of {block_size} bytes: a power cut can tear pages of {PAGE_SIZE}; \
                 make it with blocks of {PAGE_SIZE} bytes"
            );
        }
        Ok(())
    }

    /// Settles every file, wipes every key, and makes everything durable. For after the unmount: nothing may be asked of it any more.
    ///
    /// # Errors
    /// Why what was written may not be durable.
    pub fn shutdown(&self) -> Result<(), Error> {
        self.keeper.stop();
        self.losses.stop();
        self.trimmer.stop();
        self.settler.stop();
        let settled = if self.read_only { Ok(()) } else { self.settle_rested(true) };
        if !self.read_only {
            self.finish_what_is_left();
        }
        self.volume.ring.clear();
        let synced = if self.changed.load(Ordering::Relaxed) { self.sync_filesystem() } else { Ok(()) };
        let durable = settled.and(self.check_ends()).and(synced.map_err(Error::from)).inspect_err(|error| {
            tracing::error!(
                "what was written last may not be durable: the backing filesystem cannot be synced: {error}"
            );
        });
        self.tenure.iter().for_each(Tenure::end);
        durable
    }

    /// A file that ran out of space may be too long, where the backing filesystem refuses to cut it too.
    fn check_ends(&self) -> Result<(), Error> {
        if self.owes_an_end() {
            return Err(std::io::Error::other("a file that ran out of space cannot be cut").into());
        }
        Ok(())
    }

    /// The filesystem is mounted: from now on `kernel` has it. Only the first one counts.
    pub fn connect(&self, kernel: Box<dyn Kernel>) {
        self.trimmer.set_servers(kernel.threads());
        let _ = self.kernel.set(kernel);
    }

    fn kernel(&self) -> &dyn Kernel {
        self.kernel.get().map_or(&NoKernel, |kernel| &**kernel)
    }

    /// Whether the volume is still this filesystem's to write.
    fn check_tenure(&self) -> Result<(), Error> {
        Ok(self.check_permit()?)
    }

    /// The same in the midst of long work.
    fn check_permit(&self) -> Result<(), Lost> {
        self.tenure.as_ref().map_or(Ok(()), Tenure::check)
    }

    fn check_writable(&self) -> Result<(), Error> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        self.check_tenure()?;
        self.changed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Logs what an operator should hear of, with the place of the file.
    fn report(&self, inode: &Inode, error: &Error) {
        if error.is_alarming() {
            let cause = match error {
                Error::Key(error) => ("key", error.provider_kind()),
                _ => ("file", None),
            };
            let request_id = match error {
                Error::Key(error) => error.request_id(),
                _ => None,
            };
            self.warn(cause, request_id, || format!("{}: {error}", inode.node.describe()));
        }
    }

    /// Logs a warning, unless one of the same kind was logged a moment ago.
    fn alarm(&self, kind: &'static str, message: impl FnOnce() -> String) {
        self.warn((kind, None), None, message);
    }

    fn warn(&self, cause: Cause, request_id: Option<&str>, message: impl FnOnce() -> String) {
        let now = Instant::now();
        let mut alarms = self.alarms.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = alarms.get(&cause).is_some_and(|last| now.duration_since(*last) < ALARM_INTERVAL);
        if !recent {
            alarms.insert(cause, now);
            drop(alarms);
            tracing::warn!(request_id, "{}", message());
        }
    }
}
