//! What a mount tells of itself: the status that people see, and all that it counts, for `kmsfs top` and for scrapers.

use std::num::NonZeroU32;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::audit::AuditStatus;
use crate::daemon::sandbox::Confinement;
use crate::fs::{Metrics, Stats};
use crate::keys::KeyLimits;

/// What `kmsfs status` shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) mountpoint: String,
    pub(crate) pid: u32,
    pub(crate) uptime_seconds: u64,
    pub(crate) log_file: Option<String>,
    /// Where metrics can be read.
    pub(crate) metrics: Option<String>,
    #[serde(flatten)]
    pub(crate) sandbox: Confinement,
    #[serde(flatten)]
    pub(crate) limits: MountLimits,
    #[serde(flatten)]
    pub(crate) stats: Stats,
    pub(crate) audit: Option<AuditStatus>,
}

/// How long and how often keys are used and asked for, as the mount was told.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct MountLimits {
    key_max_age_seconds: f64,
    stale_grace_seconds: f64,
    /// None: keys stay, however long nobody uses them.
    idle_lock_seconds: Option<f64>,
    /// Calls a second at most.
    kms_rate: Option<NonZeroU32>,
}

impl MountLimits {
    pub(crate) fn new(keys: &KeyLimits, idle_lock: Option<Duration>) -> Self {
        Self {
            key_max_age_seconds: keys.max_age.as_secs_f64(),
            stale_grace_seconds: keys.stale_grace.as_secs_f64(),
            idle_lock_seconds: idle_lock.map(|span| span.as_secs_f64()),
            kms_rate: keys.calls_per_second,
        }
    }
}

/// A mount at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Watched {
    pub(crate) status: Status,
    pub(crate) measures: Metrics,
}
