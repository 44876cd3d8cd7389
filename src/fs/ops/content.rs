//! The one place that holds both halves: reads a header through storage, asks keys to open it, hands the verified keys to
//! content.
//!
//! A provider may take a network's time to answer. An operation that needs it is answered later, from another thread; one
//! whose key is in memory is answered at once. No lock is held meanwhile.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::content::{Content, ContentError, set_end};
use crate::format::config::End;
use crate::format::header::HeaderPage;
use crate::format::xattr;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::state::answer::Answer;
use crate::fs::state::inode::{Inode, OpenFile};
use crate::fs::state::lease::Lease;
use crate::keys::{Moment, OpenedKeys, Pass, ProvisionedUse};
use crate::storage::{Access, DiskFile, RawFile};

use super::backing_file::Found;

impl Filesystem {
    /// Runs `work` on the content of a file and hands its result to `answer`: at once if no provider has to be asked, else
    /// from another thread.
    pub(in crate::fs) fn with_content<T: Send + 'static>(
        self: &Arc<Self>,
        inode: Arc<Inode>,
        access: Access,
        answer: Answer<T>,
        work: impl Fn(&Self, &Arc<Inode>, &OpenFile) -> Result<T, Error> + Send + 'static,
    ) {
        let work = move |fs: &Self, inode: &Arc<Inode>, open: OpenFile| match work(fs, inode, &open) {
            Err(Error::Content(ContentError::Retired)) => fs.on_content(inode, access, |open| work(fs, inode, open)),
            result => result,
        };
        match self.open_at_once(&inode, access) {
            Ok(Some(open)) => answer(work(self, &inode, open)),
            Err(error) => answer(Err(error)),
            Ok(None) => {
                let fs = Arc::clone(self);
                let later = move |turn: Result<(), Error>| {
                    let opened = turn.and_then(|()| fs.open_now(&inode, access));
                    answer(opened.and_then(|open| work(&fs, &inode, open)));
                };
                self.pools.keys.run(later);
            }
        }
    }

    /// Runs `work` on the content of a file, again if the content is given up meanwhile.
    pub(in crate::fs) fn on_content<T>(
        &self,
        inode: &Arc<Inode>,
        access: Access,
        mut work: impl FnMut(&OpenFile) -> Result<T, Error>,
    ) -> Result<T, Error> {
        loop {
            match work(&self.open_now(inode, access)?) {
                Err(Error::Content(ContentError::Retired)) => {}
                result => return result.inspect_err(|error| self.report(inode, error)),
            }
        }
    }

    /// The content, if no provider that is far away has to be asked for it.
    pub(in crate::fs) fn open_at_once(&self, inode: &Arc<Inode>, access: Access) -> Result<Option<OpenFile>, Error> {
        self.rekeying.pending.check(inode)?;
        if let Some(open) = opened(inode, access) {
            return Ok(Some(open).filter(|open| !self.must_ask(open, access)));
        }
        if !self.volume.ring.is_remote() {
            return self.open_now(inode, access).map(Some);
        }
        let pass = self.volume.ring.pass()?;
        let file = self.open_backing(inode, access)?;
        let report = |error: &Error| self.report(inode, error);
        let keys = match self.find_header(inode, &file).inspect_err(report)? {
            Found::Header(header) => match self.volume.ring.cached(&header) {
                Some(keys) => Some(keys.map_err(Error::from).inspect_err(report)?),
                None => return Ok(None),
            },
            Found::None if access == Access::ReadWrite => return self.open_new_at_once(inode, file, pass),
            Found::None => None,
        };
        self.install(inode, file, keys, pass).map(Some)
    }

    /// A file without a header that is to be written, if a data key is ready for it.
    fn open_new_at_once(&self, inode: &Arc<Inode>, file: Arc<DiskFile>, pass: Pass) -> Result<Option<OpenFile>, Error> {
        if self.rules().end == End::Strict {
            return Ok(None);
        }
        let version = self.volume.ring.key_version();
        let Some(new) = self.volume.ring.new_file_at_once() else { return Ok(None) };
        let (new, open) = (new?, self.install(inode, file, None, pass)?);
        if open.content.needs_keys() {
            adopt(inode, &open, new);
        }
        Ok(Some(open).filter(|_| !self.is_outdated(inode, version)))
    }

    /// Whether a file that is to be written has no key yet, and its provider is far away.
    fn must_ask(&self, open: &OpenFile, access: Access) -> bool {
        access == Access::ReadWrite && open.content.needs_keys() && self.volume.ring.is_remote()
    }

    /// The content; asks a provider if need be. A file that is to be written gets its key here, so that a provider's refusal
    /// is the answer to `open` and not lost in the background.
    pub(in crate::fs) fn open_now(&self, inode: &Arc<Inode>, access: Access) -> Result<OpenFile, Error> {
        loop {
            match self.try_open(inode, access) {
                Err(Error::Content(ContentError::Retired)) => {}
                result => return result,
            }
        }
    }

    fn try_open(&self, inode: &Arc<Inode>, access: Access) -> Result<OpenFile, Error> {
        self.rekeying.pending.check(inode)?;
        let open = match opened(inode, access) {
            Some(open) => open,
            None => {
                let pass = self.volume.ring.pass()?;
                let file = self.open_backing(inode, access)?;
                let keys = self.keys_of(inode, &file).inspect_err(|error| self.report(inode, error))?;
                self.install(inode, file, keys, pass)?
            }
        };
        let strict = self.rules().end == End::Strict;
        let may_be_refused = self.volume.ring.is_remote()
            || self.options.provisioned_keys == ProvisionedUse::Only
            || self.options.keys_at_open;
        if access == Access::ReadWrite && (strict || may_be_refused) {
            self.ensure_keys(inode, &open)?;
            if strict {
                open.content.ensure_header()?;
            }
        }
        Ok(open)
    }

    fn keys_of(&self, inode: &Inode, file: &DiskFile) -> Result<Option<OpenedKeys>, Error> {
        match self.find_header(inode, file)? {
            Found::Header(header) => Ok(Some(self.volume.ring.open(&header)?)),
            Found::None => Ok(None),
        }
    }

    /// Gives a headerless file keys and a header to be.
    pub(in crate::fs) fn ensure_keys(&self, inode: &Inode, open: &OpenFile) -> Result<(), Error> {
        if open.content.needs_keys() {
            let version = self.volume.ring.key_version();
            adopt(inode, open, self.volume.ring.new_file()?);
            if self.is_outdated(inode, version) {
                return Err(ContentError::Retired.into());
            }
        }
        Ok(())
    }

    /// Whether the volume's keys have changed since `version`: then a header that was made meanwhile may name keys that
    /// nobody opens any more, and the content that it was made for is given up.
    fn is_outdated(&self, inode: &Inode, version: u64) -> bool {
        let outdated = self.volume.ring.key_version() != version;
        if outdated {
            inode.slot().close();
        }
        outdated
    }

    /// Makes the content the inode's, unless another thread was first: then that one's is it. What was begun before a lock is
    /// not installed after it: the lock walks the inodes once, and may have been here.
    fn install(
        &self,
        inode: &Arc<Inode>,
        file: Arc<DiskFile>,
        keys: Option<OpenedKeys>,
        pass: Pass,
    ) -> Result<OpenFile, Error> {
        let raw: Arc<dyn RawFile> = file.clone();
        let (keys, since) = keys.map(|opened| (opened.keys, opened.since)).unzip();
        let mut slot = inode.slot();
        self.volume.ring.check(pass)?;
        if let Some(open) = slot.current() {
            open.file.make_writable_like(&file);
            return Ok(open);
        }
        // Under the slot's lock: nobody changes the file between finding its size and making this its content.
        if let Some(disk) = inode.ledger.owed() {
            set_end(raw.as_ref(), disk)?;
            inode.ledger.owe(None);
        }
        if self.kernel().sets_mtime() {
            inode.ledger.believe();
        }
        let content = Content::open(raw, keys, self.rules(), Arc::clone(&self.telemetry.events))
            .map(|content| content.with_ledger(Arc::clone(&inode.ledger)))
            .map_err(Error::from)
            .inspect_err(|error| self.report(inode, error))?;
        let lease = Lease::new(since.unwrap_or_else(Moment::now));
        let held = (!inode.node.is_new()).then(|| self.descriptors.hold());
        let open = OpenFile { content: Arc::new(content), file, lease, _held: held };
        slot.open = Some(open.clone());
        drop(slot);
        self.work.renewals.watch(inode);
        Ok(open)
    }
}

fn adopt(inode: &Inode, open: &OpenFile, (opened, header): (OpenedKeys, Box<HeaderPage>)) {
    drop_lost_attributes(inode);
    inode.has_zero_header.store(false, Ordering::Relaxed);
    open.content.adopt(opened.keys, header);
    open.lease.extend(opened.since);
}

/// The content, if the inode has one that allows `access`.
fn opened(inode: &Inode, access: Access) -> Option<OpenFile> {
    let mut slot = inode.slot();
    slot.current().filter(|open| access == Access::Read || open.file.is_writable())
}

/// Removes the encrypted attributes of a file that is to get a new header: they were bound to one that never became durable, and
/// nothing reads them. A leftover is harmless, so a failure is too.
fn drop_lost_attributes(inode: &Inode) {
    if inode.node.is_new() {
        return;
    }
    let Ok(names) = inode.node.xattr_names() else { return };
    // If another thread has given the file its header meanwhile, one of these may be bound to that.
    if inode.file_id.get().is_none() {
        for name in names.split(|byte| *byte == 0).filter(|name| xattr::classify(name).is_some()) {
            let _ = inode.node.remove_xattr(name);
        }
    }
}
