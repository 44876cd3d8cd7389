//! What takes as long as a file is large: making a file longer where holes are denied, and zeroing a range of it, is writing
//! sealed zeros. It is done in steps, on threads that serve nobody, and steps of several files take turns.
//!
//! Invariants: one such piece of work on a file at a time; what would move the end of a file meanwhile waits for it. One that
//! fails leaves the file as long as it was. It ends soon after whoever asked was killed, and does not begin a step when what is
//! missing exceeds what the disk has for ordinary users.

use std::io;
use std::sync::Arc;

use crate::format::config::Holes;
use crate::format::geometry::{MAX_PLAIN_SIZE, PAGE_SIZE, PAYLOAD};
use crate::fs::caller::Caller;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::state::answer::Answer;
use crate::fs::state::filling::Filling;
use crate::fs::state::inode::{Inode, OpenFile};
use crate::storage::Access;

/// Bytes of one step: less is done at once.
const STEP: u64 = 4096 * PAYLOAD;

/// One step; true if it was the last one.
type Step = Box<dyn FnMut(&OpenFile) -> Result<bool, Error> + Send>;

struct Work {
    fs: Arc<Filesystem>,
    inode: Arc<Inode>,
    caller: Caller,
    base: u64,
    /// The file is to reach so far.
    target: u64,
    step: Step,
    then: Answer<()>,
}

impl Filesystem {
    /// Where holes are denied makes the file reach to `target`, unless that is a step at most; `then` is told, now or later.
    pub(in crate::fs) fn fill(self: &Arc<Self>, inode: Arc<Inode>, target: u64, caller: Caller, then: Answer<()>) {
        if self.rules().holes == Holes::Allow || target > MAX_PLAIN_SIZE {
            return then(Ok(()));
        }
        let (fs, same) = (Arc::clone(self), Arc::clone(&inode));
        let begin = Box::new(move |size: Result<u64, Error>| match size {
            Err(error) => then(Err(error)),
            Ok(size) if target <= size.saturating_add(STEP) && same.filling().is_none() => then(Ok(())),
            Ok(base) => {
                let step = Box::new(move |open: &OpenFile| {
                    let size = open.content.size();
                    let next = target.min((size / STEP + 1) * STEP);
                    if next > size {
                        open.content.resize(next)?;
                    }
                    Ok(next >= target)
                });
                Work { fs, inode: same, caller, base, target, step, then }.begin();
            }
        });
        self.with_content(inode, Access::ReadWrite, begin, |fs, inode, open| {
            fs.ensure_keys(inode, open)?;
            Ok(open.content.size())
        });
    }

    /// Makes zeros of `offset` to `end`, as far as the file reaches, if that is writing them and more than a step; `then` is
    /// told whether they are.
    pub(in crate::fs) fn zero_slowly(
        self: &Arc<Self>,
        inode: Arc<Inode>,
        (offset, end): (u64, u64),
        caller: Caller,
        then: Answer<bool>,
    ) {
        if self.rules().holes == Holes::Allow || end > MAX_PLAIN_SIZE || end - offset <= STEP {
            return then(Ok(false));
        }
        let (fs, same) = (Arc::clone(self), Arc::clone(&inode));
        let begin = Box::new(move |size: Result<u64, Error>| match size {
            Err(error) => then(Err(error)),
            Ok(base) => {
                let mut at = offset;
                let step = Box::new(move |open: &OpenFile| {
                    let next = end.min((at / STEP + 1) * STEP);
                    open.content.zero(at, next - at, true)?;
                    at = next;
                    Ok(at >= end.min(open.content.size()))
                });
                let then = Box::new(|done: Result<(), Error>| then(done.map(|()| true)));
                Work { fs, inode: same, caller, base, target: 0, step, then }.begin();
            }
        });
        self.with_content(inode, Access::ReadWrite, begin, |_, _, open| Ok(open.content.size()));
    }

    /// Whether a write must wait for [`Self::fill`].
    pub(in crate::fs) fn fills_before(&self, inode: &Inode, offset: u64, len: usize) -> bool {
        if self.rules().holes == Holes::Allow {
            return false;
        }
        if let Some(filling) = inode.filling().as_ref() {
            return offset.saturating_add(len as u64) > filling.base;
        }
        let size = inode.slot().open.as_ref().map_or(0, |open| open.content.size());
        offset > size.saturating_add(STEP)
    }

    /// Fails if the disk has less for ordinary users than a file needs to reach to `target`.
    fn check_space(&self, inode: &Inode, target: u64) -> Result<(), Error> {
        let (stat, space) = (inode.node.stat()?, self.space()?);
        let needed = (target / PAYLOAD + 2).saturating_mul(PAGE_SIZE);
        let missing = needed.saturating_sub(stat.size.max(stat.blocks.saturating_mul(512)));
        if missing > space.available.saturating_mul(space.block_size) {
            return Err(io::Error::from(io::ErrorKind::StorageFull).into());
        }
        Ok(())
    }
}

impl Work {
    fn begin(self) {
        let inode = Arc::clone(&self.inode);
        let mut filling = inode.filling();
        match filling.as_mut() {
            Some(other) => other.waiting.push(Box::new(move || self.again())),
            None => {
                *filling = Some(Filling { base: self.base, waiting: Vec::new() });
                drop(filling);
                self.queue();
            }
        }
    }

    /// The work before it has ended, and may have changed the size.
    fn again(mut self) {
        match self.fs.on_content(&self.inode, Access::ReadWrite, |open| Ok(open.content.size())) {
            Ok(size) => {
                self.base = size;
                self.begin();
            }
            Err(error) => (self.then)(Err(error)),
        }
    }

    fn queue(self) {
        let fs = Arc::clone(&self.fs);
        // Its turn comes when it comes: those before it take a step each.
        fs.pools.chores.run(move |_| self.take_step());
    }

    fn take_step(mut self) {
        let may_go_on = match self.caller.is_killed() {
            true => Err(io::Error::from(io::ErrorKind::Interrupted).into()),
            false => self.fs.check_space(&self.inode, self.target),
        };
        let step = &mut self.step;
        let taken = may_go_on.and_then(|()| self.fs.on_content(&self.inode, Access::ReadWrite, |open| step(open)));
        match taken {
            Ok(false) => self.queue(),
            Ok(true) => self.end(Ok(())),
            Err(error) => {
                let shrunk =
                    self.fs.on_content(&self.inode, Access::ReadWrite, |open| match open.content.size() > self.base {
                        true => Ok(open.content.resize(self.base)?),
                        false => Ok(()),
                    });
                if let Err(error) = shrunk {
                    tracing::warn!("{} stays longer than it was: {error}", self.inode.node.describe());
                }
                self.end(Err(error));
            }
        }
    }

    fn end(self, result: Result<(), Error>) {
        self.fs.work.unsettled.watch(&self.fs.inodes, &self.inode);
        let filling = self.inode.filling().take();
        (self.then)(result);
        filling.into_iter().flat_map(|filling| filling.waiting).for_each(|next| next());
    }
}
