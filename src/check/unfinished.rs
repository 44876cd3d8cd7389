//! Files that are half way to a new data key: each is what its redo log says, and the log is looked at in its place.
//!
//! Invariant: a log counts for the file that it names, and for no other; one that does not count hides nothing of a file.

use std::io;

use crate::format::geometry::PAGE_LEN;
use crate::format::header::{Header, HeaderPage};
use crate::format::name::{REDO_LOGS_DIR, RedoLog, VOLUME_DIR};
use crate::keys::{AuthenticHeader, Volume};
use crate::storage::{DiskFile, Node, RawFile, RedoLogs};

use super::finding::{Found, Kind, Place, Severity};
use super::{Checker, locked};

/// The next writer seals the rest.
const FINISHES: &str = "the file is half way to a new data key, and nothing of it is lost: the next mount finishes it";

/// The log of a file.
pub(super) struct LogOf {
    pub(super) file: DiskFile,
    pub(super) header: AuthenticHeader,
    /// The file has the log's header already: of the log only pages count that the file lacks.
    pub(super) is_applied: bool,
}

impl Checker<'_> {
    /// The log that says what the file behind `node`, with `there` as its header, is to become.
    pub(super) fn log_of(&self, volume: &Volume, node: &Node, there: &Header, size: u64) -> io::Result<Option<LogOf>> {
        let log = RedoLog { ino: node.stat()?.ino, file_id: there.file_id };
        let Some((file, header)) = read(&self.directory.redo_logs()?, &log, volume)? else { return Ok(None) };
        let wanted = header.header();
        let is_applied = wanted == there;
        let follows = there.generation.checked_add(1) == Some(wanted.generation) && wanted.suite == there.suite;
        Ok((is_applied || (follows && file.size()? == size)).then_some(LogOf { file, header, is_applied }))
    }

    /// Notes that a file is to become what `log` says.
    pub(super) fn report_half_way(&self, node: &Node, log: &LogOf, place: &Place, found: &mut Found) {
        if let Ok(stat) = node.stat() {
            let name = RedoLog { ino: stat.ino, file_id: log.header.header().file_id };
            locked(&self.half_way).insert(name.text());
        }
        found.add_repairable(place, Kind::Unfinished, FINISHES);
    }

    /// Looks at the logs that are there when everything else has been looked at.
    pub(super) fn check_redo_logs(&self) -> io::Result<()> {
        let logs = self.directory.redo_logs()?;
        let above = Place { cipher: VOLUME_DIR.to_owned(), plain: None }.entry(REDO_LOGS_DIR, None);
        let mut found = Found::default();
        for log in logs.all()? {
            let place = above.entry(&log.text(), None);
            if locked(&self.half_way).contains(&log.text()) {
                continue;
            }
            let counts = self.volume.map(|volume| read(&logs, &log, volume)).transpose();
            match counts.map(|counts| counts.is_none_or(|header| header.is_some())) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.kind() != io::ErrorKind::InvalidData => found.io(&place, &error),
                Ok(true) => found.add(
                    &place,
                    Severity::Amiss,
                    Kind::Unfinished,
                    "the redo log of a file: unless `kmsfs rekey` is at it now, the next mount finishes the file or removes the log",
                ),
                _ => found.add_repairable(
                    &place,
                    Kind::Leftover,
                    "a redo log that does not count: the next mount removes it",
                ),
            }
        }
        self.conclude("", found, None);
        Ok(())
    }
}

/// The content and the header of a log; none if it does not count for any file.
fn read(logs: &RedoLogs, log: &RedoLog, volume: &Volume) -> io::Result<Option<(DiskFile, AuthenticHeader)>> {
    let Some(file) = logs.read(log)? else { return Ok(None) };
    let mut page: HeaderPage = [0; PAGE_LEN];
    if file.read_at(&mut page, 0)? < PAGE_LEN {
        return Ok(None);
    }
    let header = volume.ring.authenticate(&page).ok().flatten();
    Ok(header.filter(|header| header.header().file_id == log.file_id).map(|header| (file, header)))
}
