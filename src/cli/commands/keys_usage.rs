//! Which wrapping keys, and which versions of local ones, files still need, and whether a rotation is due.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::cli::error::CliError;
use crate::cli::report;
use crate::format::header;
use crate::keys::ProviderKind;
use crate::keys::providers::{KeyringKey, local_version_number};
use crate::storage::CipherDirectory;

use super::header_files::HeaderFiles;

/// A local key is due for rotation when its newest version is older, unless told otherwise.
pub(super) const DUE_AFTER_DAYS: u32 = 365;
const DAY: u64 = 86_400;

/// Numbers of files by version; those of a provider without versions under none.
pub(super) type ByVersion = BTreeMap<Option<u32>, u64>;

/// A version of a local key.
#[derive(Serialize)]
pub(super) struct VersionReport {
    version: u32,
    days_old: u64,
    /// Files with a record of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    files: Option<u64>,
}

/// How many files have a record of each key in their newest header.
#[derive(Default)]
pub(super) struct Usage(BTreeMap<String, ByVersion>);

impl Usage {
    /// Counts. Nothing is locked, so the volume may be in use.
    pub(super) fn of(directory: &CipherDirectory) -> Result<Self, CliError> {
        let mut counts = Self::default();
        let mut unread = None;
        HeaderFiles::of(directory)?.walk("", |path, page| match page {
            // It was removed meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => unread = Some(CliError::io(path, &error)),
            Ok(None) => {}
            Ok(Some(page)) => {
                let headers = header::parse_page(&page).into_iter().flatten().map(|slot| slot.header);
                let newest = headers.max_by_key(|header| header.generation);
                newest.iter().flat_map(|header| &header.records).for_each(|record| counts.count(record));
            }
        });
        unread.map_or(Ok(counts), Err)
    }

    fn count(&mut self, record: &header::Record) {
        let kind = ProviderKind::from_tag(record.provider);
        let name = kind.map_or("unknown", ProviderKind::name);
        let key = format!("{name}:{}", String::from_utf8_lossy(&record.key_id));
        let version =
            kind.filter(|kind| *kind == ProviderKind::Local).and_then(|_| local_version_number(&record.wrapped));
        *self.0.entry(key).or_default().entry(version).or_default() += 1;
    }

    /// The number of files with a record of `key`, and by its versions.
    pub(super) fn take(&mut self, key: &str) -> (u64, ByVersion) {
        let counts = self.0.remove(key).unwrap_or_default();
        (counts.values().sum(), counts)
    }

    /// What was not taken.
    pub(super) fn rest(self) -> impl Iterator<Item = (String, u64)> {
        self.0.into_iter().map(|(key, counts)| (key, counts.values().sum()))
    }
}

/// The versions of a local key from the oldest to the newest, with their files if those were counted.
pub(super) fn versions(key: &KeyringKey, counts: Option<&ByVersion>) -> Vec<VersionReport> {
    let report = |&(version, created): &(u32, u64)| VersionReport {
        version,
        days_old: days_since(created),
        files: counts.map(|counts| counts.get(&Some(version)).copied().unwrap_or(0)),
    };
    key.versions.iter().map(report).collect()
}

/// Whether a rotation of a local key is due, in words.
pub(super) fn rotation(key: &KeyringKey, due_after: u32) -> String {
    let days = days_since(key.versions.last().map_or(key.created, |(_, created)| *created));
    match (key.enabled, days > u64::from(due_after)) {
        (false, _) => "none: the key is disabled".to_owned(),
        (true, true) => {
            format!("due: the newest version is {} old (kmsfs keys rotate {})", report::counted(days, "day"), key.id)
        }
        (true, false) => format!("due in {}", report::counted(u64::from(due_after) - days, "day")),
    }
}

fn days_since(seconds: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    now.saturating_sub(seconds) / DAY
}
