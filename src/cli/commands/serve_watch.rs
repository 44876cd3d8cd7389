//! What is told of a mount that is served, to the log and the service manager, and the signals that ask it to end.

use std::path::Path;
use std::sync::Arc;

use crate::daemon::notify::{Notifier, Watch};
use crate::daemon::sandbox::Confinement;
use crate::daemon::signals::{self, SignalWatch};
use crate::mount::{Attendant, MountError};

/// Tells the service manager that the mount is live, and from now on that it still is: whoever asks for the space of the
/// filesystem is answered by a thread that serves it.
pub(super) fn announce(notifier: &Arc<Notifier>, mountpoint: &Path) -> Option<Watch> {
    notifier.ready(&format!("mounted at {}", mountpoint.display()));
    let mountpoint = mountpoint.to_owned();
    let watch = Arc::clone(notifier).watch(move || rustix::fs::statvfs(&mountpoint).is_ok());
    watch.inspect_err(|error| tracing::error!("no watchdog: {error}")).ok().flatten()
}

/// Unmounts when a signal asks for it; what is busy is detached, and ends when its last file is closed.
pub(super) fn watch_signals(mountpoint: &Path, attendant: Arc<Attendant>) -> Option<SignalWatch> {
    let mountpoint = mountpoint.to_owned();
    let watch = signals::on_end_request(move || {
        tracing::info!("a signal asks to end");
        let unmounted = match attendant.detach(false) {
            Err(MountError::Busy) => {
                tracing::warn!("{} is in use: the mount ends when its last file is closed", mountpoint.display());
                attendant.detach(true)
            }
            other => other,
        };
        if let Err(error) = unmounted {
            tracing::error!("{} cannot be unmounted: {error}", mountpoint.display());
        }
    });
    watch.inspect_err(|error| tracing::error!("signals will not unmount: {error}")).ok()
}

/// Says what of the sandbox this kernel does not have.
pub(super) fn tell_gaps(confinement: &Confinement) {
    if *confinement != Confinement::off() {
        for gap in confinement.gaps() {
            tracing::warn!("the sandbox is incomplete: {gap}");
        }
    }
}
