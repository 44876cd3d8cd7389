//! What the process behind a mount answers: to `kmsfs status`, `top`, `lock`, `unlock`, `rewrap` and `rekey`, and to scrapers of metrics.

use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

use crate::audit::AuditTrail;
use crate::cli::open_metrics;
use crate::cli::watched::{MountLimits, Status, Watched};
use crate::daemon::control::Ask;
use crate::daemon::log::Target;
use crate::daemon::sandbox::Confinement;
use crate::fs::Filesystem;
use crate::mount::End;

use super::header_writer::Written;
use super::key_reload::KeyReload;
use super::observe::Observers;
use super::rekey;

/// Knows everything that there is to tell of a mount.
pub(super) struct Teller {
    filesystem: Arc<Filesystem>,
    mountpoint: String,
    log_file: Option<String>,
    metrics: Option<String>,
    audit: Option<Arc<AuditTrail>>,
    confinement: Confinement,
    keys: KeyReload,
    limits: MountLimits,
    end: Mutex<Sender<End>>,
    start: Instant,
}

/// What there is to tell beyond the filesystem.
pub(super) struct Told<'a> {
    pub(super) mountpoint: &'a Path,
    pub(super) log: &'a Target,
    pub(super) observers: &'a Observers,
    pub(super) confinement: Confinement,
    pub(super) keys: KeyReload,
    pub(super) limits: MountLimits,
}

impl Teller {
    pub(super) fn new(filesystem: &Arc<Filesystem>, told: Told<'_>, end: Sender<End>) -> Self {
        let Told { mountpoint, log, observers, confinement, keys, limits } = told;
        let log_file = match log {
            Target::Stderr | Target::Journal | Target::Later => None,
            Target::File(path) => Some(path.to_string_lossy().into_owned()),
        };
        Self {
            filesystem: Arc::clone(filesystem),
            mountpoint: mountpoint.to_string_lossy().into_owned(),
            log_file,
            metrics: observers.metrics.clone(),
            audit: observers.audit(),
            confinement,
            keys,
            limits,
            end: Mutex::new(end),
            start: Instant::now(),
        }
    }

    /// Does what a client of the control socket asks for, and says how the mount fares after it.
    pub(super) fn answers(self: &Arc<Self>) -> impl Fn(Ask) -> String + Send + Sync + 'static {
        let teller = Arc::clone(self);
        move |ask| {
            match ask {
                Ask::Status => {}
                Ask::End => drop(teller.end.lock().unwrap_or_else(PoisonError::into_inner).send(Ok(()))),
                Ask::Measures => return json(&teller.watched()),
                Ask::Lock => teller.filesystem.lock(),
                Ask::Unlock => teller.filesystem.unlock(),
                Ask::Sync => {
                    if let Err(error) = teller.filesystem.sync_everything() {
                        return json(&serde_json::json!({"error": error.to_string()}));
                    }
                }
                Ask::Rekey { path, run } => {
                    let run = run.and_then(|run| crate::format::hex::decode(&run));
                    return json(&rekey::Answer::of(&teller.filesystem, &path, run));
                }
                Ask::Header { path, judged, new } => {
                    return json(&Written::by(&teller.filesystem, &path, &judged, &new));
                }
                Ask::Keys => {
                    if let Err(error) = teller.keys.run(&teller.filesystem) {
                        tracing::warn!("the volume's keys stay as they were: {error}");
                        return json(&serde_json::json!({"error": error.to_string()}));
                    }
                }
            }
            json(&teller.status())
        }
    }

    /// Makes the page of metrics.
    pub(super) fn page(self: &Arc<Self>) -> impl Fn() -> String + Send + Sync + 'static {
        let teller = Arc::clone(self);
        move || open_metrics::render(&teller.watched())
    }

    fn watched(&self) -> Watched {
        Watched { status: self.status(), measures: self.filesystem.metrics() }
    }

    fn status(&self) -> Status {
        Status {
            mountpoint: self.mountpoint.clone(),
            pid: std::process::id(),
            uptime_seconds: self.start.elapsed().as_secs(),
            log_file: self.log_file.clone(),
            metrics: self.metrics.clone(),
            sandbox: self.confinement.clone(),
            limits: self.limits,
            stats: self.filesystem.stats(),
            audit: self.audit.as_ref().map(|trail| trail.status()),
        }
    }
}

fn json(told: &impl Serialize) -> String {
    serde_json::to_string(told).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
}
