//! What a mount tells of itself: the status that people see, and all that it counts, for `kmsfs top` and for scrapers.

use serde::{Deserialize, Serialize};

use crate::audit::AuditStatus;
use crate::daemon::sandbox::Confinement;
use crate::fs::{Measures, Stats};

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
    pub(crate) stats: Stats,
    pub(crate) audit: Option<AuditStatus>,
}

/// A mount at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Watched {
    pub(crate) status: Status,
    pub(crate) measures: Measures,
}
