//! Settles files in the background, and tries again what could not be done when it was to be.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::fs::filesystem::Filesystem;
use crate::fs::state::descriptors::enter_background;
use crate::runtime::{Next, Periodic};

/// How long the end of a file must have rested: at least one and at most two of these.
const REST: Duration = Duration::from_secs(5);

/// Settles files of `fs` until it is stopped or dropped.
pub(super) fn start(fs: &Arc<Filesystem>) -> io::Result<()> {
    let weak = Arc::downgrade(fs);
    let periodic = Periodic::start("kmsfs-settle", Next::After(REST), move || run(&weak))?;
    let _ = fs.work.unsettled.thread.set(periodic);
    Ok(())
}

fn run(weak: &Weak<Filesystem>) -> Next {
    enter_background();
    let Some(fs) = weak.upgrade() else { return Next::Never };
    // What fails is logged, and kept for those who sync.
    let _ = fs.settle_rested(false);
    fs.finish_what_is_left();
    fs.work.renewals.in_use().iter().for_each(|(inode, _)| fs.tell_space(inode, false));
    Next::After(REST)
}
