//! What is told of a mount that is served, to the log and the service manager, the signals that ask it to end, and the end.

use std::env;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::cli::error::{CliError, Exit};
use crate::daemon::notify::{Notifier, Watch};
use crate::daemon::own_socket::Unbound;
use crate::daemon::sandbox::Confinement;
use crate::daemon::signals::{self, SignalWatch};
use crate::fs::Filesystem;
use crate::mount::{Attendant, MountError};

/// How long operations may take that are under way at the end: longer than any wait for a provider.
const LAST_OPERATIONS: Duration = Duration::from_secs(15);

/// What the process talks with on this machine. In its sandbox it can make no other socket.
pub(super) struct Sockets {
    pub(super) control: Unbound,
    pub(super) notifier: Notifier,
}

impl Sockets {
    /// Only a process in the foreground is a service.
    pub(super) fn make(in_foreground: bool) -> Result<Self, CliError> {
        let control = Unbound::new().map_err(|error| CliError::io("making a socket", &error))?;
        let notifier = Notifier::new(|name| env::var_os(name).filter(|_| in_foreground))
            .map_err(|error| CliError::usage(format_args!("NOTIFY_SOCKET: {error}")))?;
        Ok(Self { control, notifier })
    }
}

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

/// The end of a filesystem. Whoever ends a mount for everybody leaves threads that serve it: they begin nothing more.
pub(super) fn make_durable(filesystem: &Filesystem) -> Result<(), CliError> {
    let failed = |why: &dyn std::fmt::Display| {
        CliError::new(Exit::Io, format_args!("what was written last may not be durable: {why}"))
    };
    let ended = filesystem.end_operations(LAST_OPERATIONS);
    filesystem.shutdown().map_err(|error| failed(&error))?;
    if ended { Ok(()) } else { Err(failed(&format!("operations were under way after {LAST_OPERATIONS:?}"))) }
}
