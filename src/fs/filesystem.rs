//! A mounted volume: its parts, and the checks and reports that every operation shares.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::content::Rules;
use crate::keys::{ProvisionedUse, Volume};
use crate::lease::{Lost, Tenure};
use crate::storage::{CipherDirectory, Node};

use super::error::Error;
use super::kernel::{InodeId, Kernel, NoKernel};
use super::state::background_work::BackgroundWork;
use super::state::backing_store::BackingStore;
use super::state::descriptor_budget::DescriptorBudget;
use super::state::handles::Handles;
use super::state::inode::Inode;
use super::state::inode_table::InodeTable;
use super::state::ownership::Ownership;
use super::state::provisioned::Stock;
use super::state::rekeying::Rekeying;
use super::state::telemetry::Telemetry;
use super::state::workers::Pools;

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
    /// Programs can use extended attributes.
    pub xattrs: bool,
}

impl Default for Options {
    /// Read-write, never locked for want of use, fetching keys ahead, with provisioned keys if no others are to be had, and with
    /// extended attributes.
    fn default() -> Self {
        Self {
            read_only: false,
            idle_lock: None,
            prefetch: true,
            provisioned_keys: ProvisionedUse::Fallback,
            keys_at_open: false,
            xattrs: true,
        }
    }
}

/// A mounted volume.
pub struct Filesystem {
    pub(super) volume: Volume,
    pub(super) options: Options,
    pub(super) backing: BackingStore,
    pub(super) ownership: Ownership,
    /// None before the mount.
    kernel: OnceLock<Box<dyn Kernel>>,
    pub(super) inodes: InodeTable,
    pub(super) handles: Handles,
    pub(super) descriptors: DescriptorBudget,
    pub(super) rekeying: Rekeying,
    pub(super) work: BackgroundWork,
    pub(super) pools: Pools,
    pub(super) telemetry: Telemetry,
}

impl Filesystem {
    /// A filesystem that does nothing yet.
    pub(super) fn new(
        directory: CipherDirectory,
        volume: Volume,
        options: Options,
        tenure: Option<Tenure>,
    ) -> Result<Arc<Self>, Error> {
        let root = Node::of_directory(directory.root_fd())?;
        let stat = root.stat()?;
        let ownership = Ownership::new(tenure);
        if !options.read_only {
            let stock = Stock { stock: directory.key_stock()?, permit: ownership.permit() };
            volume.ring.use_provisioned(Box::new(stock), options.provisioned_keys);
        }
        Ok(Arc::new(Self {
            rekeying: Rekeying::new(&volume.config),
            volume,
            options,
            backing: BackingStore::new(directory, &root)?,
            ownership,
            kernel: OnceLock::new(),
            inodes: InodeTable::new(root, &stat),
            handles: Handles::default(),
            descriptors: DescriptorBudget::new(),
            work: BackgroundWork::new(),
            pools: Pools::default(),
            telemetry: Telemetry::default(),
        }))
    }

    /// The filesystem is mounted: from now on `kernel` has it. Only the first one counts.
    pub fn connect(&self, kernel: Box<dyn Kernel>) {
        self.descriptors.set_servers(kernel.threads());
        let _ = self.kernel.set(kernel);
    }

    pub(super) fn kernel(&self) -> &dyn Kernel {
        self.kernel.get().map_or(&NoKernel, |kernel| &**kernel)
    }

    /// How it was opened.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    pub(super) fn rules(&self) -> Rules {
        Rules { holes: self.volume.config.holes, end: self.volume.config.end }
    }

    /// Whether keys are fetched ahead.
    pub(super) fn prefetches(&self) -> bool {
        self.options.prefetch && self.volume.ring.is_remote()
    }

    /// How many descriptors are in use, about: one for each inode, another for each content that has one of its own, and one
    /// for each directory that is being read.
    pub(super) fn descriptors_in_use(&self) -> usize {
        self.inodes.len() + self.descriptors.held()
    }

    /// Whether the volume is still this filesystem's to write.
    pub(super) fn check_tenure(&self) -> Result<(), Error> {
        Ok(self.check_permit()?)
    }

    /// The same in the midst of long work.
    pub(super) fn check_permit(&self) -> Result<(), Lost> {
        self.ownership.check()
    }

    pub(super) fn check_writable(&self) -> Result<(), Error> {
        if self.options.read_only {
            return Err(Error::ReadOnly);
        }
        self.check_tenure()?;
        self.ownership.note_change();
        Ok(())
    }

    pub(super) fn writable_directory(&self, id: InodeId) -> Result<Arc<Inode>, Error> {
        self.check_writable()?;
        self.inodes.get(id)
    }

    /// Logs what an operator should hear of, with the place of the file.
    pub(super) fn report(&self, inode: &Inode, error: &Error) {
        if error.is_alarming() {
            let cause = match error {
                Error::Key(error) => ("key", error.provider_kind()),
                _ => ("file", None),
            };
            let request_id = match error {
                Error::Key(error) => error.request_id(),
                _ => None,
            };
            self.telemetry.warn(cause, request_id, || format!("{}: {error}", inode.node.describe()));
        }
    }

    /// Logs a warning, unless one of the same kind was logged a moment ago.
    pub(super) fn alarm(&self, kind: &'static str, message: impl FnOnce() -> String) {
        self.telemetry.warn((kind, None), None, message);
    }
}
