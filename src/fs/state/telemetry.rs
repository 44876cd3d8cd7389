//! Counters and alarms of a mount.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::content::Events;
use crate::fs::metrics::OperationCounts;
use crate::keys::ProviderErrorKind;

use super::rename_counter::RenameCounter;

/// The subject of a warning.
pub(crate) type Cause = (&'static str, Option<ProviderErrorKind>);

/// The same alarm is logged at most this often.
const ALARM_INTERVAL: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(crate) struct Telemetry {
    pub(crate) events: Arc<Events>,
    pub(crate) renames: RenameCounter,
    pub(crate) operations: Arc<OperationCounts>,
    pub(crate) undecryptable_names: AtomicU64,
    alarms: Mutex<HashMap<Cause, Instant>>,
}

impl Telemetry {
    /// Logs a warning, unless one of the same cause was logged a moment ago.
    pub(crate) fn warn(&self, cause: Cause, request_id: Option<&str>, message: impl FnOnce() -> String) {
        let now = Instant::now();
        let mut alarms = self.alarms.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = alarms.get(&cause).is_some_and(|last| now.duration_since(*last) < ALARM_INTERVAL);
        if !recent {
            alarms.insert(cause, now);
            drop(alarms);
            tracing::warn!(request_id, "{}", message());
        }
    }
}
