//! From opening a volume to giving it back.

use std::sync::Arc;

use crate::format::geometry::PAGE_SIZE;
use crate::keys::Volume;
use crate::lease::Tenure;
use crate::storage::CipherDirectory;

use super::background;
use super::error::Error;
use super::filesystem::{Filesystem, Options};

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
        let fs = Self::new(directory, volume, options, tenure)?;
        fs.start_up()?;
        Ok(fs)
    }

    /// Checks the root, finishes what a crash has left half way, and starts what runs in the background.
    fn start_up(self: &Arc<Self>) -> Result<(), Error> {
        self.directory_id(self.inodes.root())?;
        self.check_block_size()?;
        self.finish_rekeying()?;
        Ok(background::start(self)?)
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
        self.work.stop();
        self.descriptors.stop();
        let settled = if self.options.read_only { Ok(()) } else { self.settle_rested(true) };
        if !self.options.read_only {
            self.finish_what_is_left();
        }
        self.volume.ring.clear();
        let synced = if self.ownership.has_changed() { self.sync_filesystem() } else { Ok(()) };
        let durable = settled.and(self.check_ends()).and(synced.map_err(Error::from)).inspect_err(|error| {
            tracing::error!(
                "what was written last may not be durable: the backing filesystem cannot be synced: {error}"
            );
        });
        self.ownership.end();
        durable
    }

    /// A file that ran out of space may be too long, where the backing filesystem refuses to cut it too.
    fn check_ends(&self) -> Result<(), Error> {
        if self.work.unsettled.owes_an_end() {
            return Err(std::io::Error::other("a file that ran out of space cannot be cut").into());
        }
        Ok(())
    }
}
