//! What a mount's process answers on its control socket.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use crate::daemon::control::Ask;
use crate::daemon::log::Target;
use crate::daemon::sandbox::Confinement;
use crate::fs::{self, Filesystem};

/// What `kmsfs status` shows.
#[derive(Serialize)]
struct Status<'a> {
    mountpoint: &'a str,
    pid: u32,
    uptime_seconds: u64,
    log_file: Option<&'a str>,
    #[serde(flatten)]
    sandbox: &'a Confinement,
    #[serde(flatten)]
    stats: fs::Stats,
}

/// Does what a client of the control socket asks for; every answer is the status after it.
pub(super) fn answers_of(
    filesystem: &Arc<Filesystem>,
    mountpoint: &Path,
    log: &Target,
    confinement: Confinement,
) -> impl Fn(Ask) -> String + Send + Sync + 'static {
    let (filesystem, start) = (Arc::clone(filesystem), Instant::now());
    let mountpoint = mountpoint.to_string_lossy().into_owned();
    let log_file = match log {
        Target::Stderr => None,
        Target::File(path) => Some(path.to_string_lossy().into_owned()),
    };
    move |ask| {
        match ask {
            Ask::Status => {}
            Ask::Lock => filesystem.lock(),
            Ask::Unlock => filesystem.unlock(),
        }
        let status = Status {
            mountpoint: &mountpoint,
            pid: std::process::id(),
            uptime_seconds: start.elapsed().as_secs(),
            log_file: log_file.as_deref(),
            sandbox: &confinement,
            stats: filesystem.stats(),
        };
        serde_json::to_string(&status).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
    }
}
