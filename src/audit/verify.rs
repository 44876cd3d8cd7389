//! Whether a log is whole: every record authentic and after the one that it names.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::crypto::AuditKey;

use super::record::{Event, Line, MAX_LINE, Record};

/// Faults that are named at most; the others are counted.
const NAMED: usize = 100;

/// Why a log cannot be verified at all.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {error}")]
pub struct VerifyError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub error: io::Error,
}

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The file.
    pub file: String,
    /// Its line, counted from 1.
    pub line: u64,
    /// What.
    pub what: String,
}

/// What was found in a log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// There are records, and the MAC of each one holds. Without it, whoever can write the log can have made all of it.
    pub authenticated: bool,
    /// The volume that the first mount in the log names, whether that record authenticates or not.
    pub volume: Option<String>,
    /// Records.
    pub records: u64,
    /// The numbers of the first and the last.
    pub first: u64,
    /// See `first`.
    pub last: u64,
    /// The hash of the last line.
    pub head: String,
    /// Uses of keys, and of these those that failed.
    pub uses: u64,
    /// See `uses`.
    pub failed_uses: u64,
    /// Mounts that began.
    pub mounts: u64,
    /// The last record is the end of a mount. If not, that mount lives, was killed, or the end of the log is missing.
    pub ended: bool,
    /// Records whose MAC does not hold.
    pub unauthentic: u64,
    /// Uses that the log itself says are in no record.
    pub lost: u64,
    /// Pieces of lines that the log itself tells of.
    pub torn: u64,
    /// Bytes after the last whole line.
    pub torn_end: u64,
    /// What is wrong.
    pub faults: Vec<Fault>,
    /// What is wrong beyond those.
    pub more_faults: u64,
}

/// Looks at all records of a log, which may be in several files, in any order. With `key`, that of the volume, each record's
/// MAC is checked too. Also returns those of the hashes in `heads` that no good record's line has.
///
/// # Errors
/// [`VerifyError`] if a file cannot be read.
pub fn verify(
    files: &[PathBuf],
    key: Option<&AuditKey>,
    heads: &[String],
) -> Result<(Report, Vec<String>), VerifyError> {
    let mut ordered: Vec<_> = files.iter().map(|path| Ok((first_number(path)?, path))).collect::<Result<_, _>>()?;
    ordered.sort();
    let mut walk = Walk { key, report: Report::default(), before: None, odd: None, heads: heads.to_vec() };
    for (_, path) in ordered {
        let mut number = 0;
        each_line(path, |line, whole| {
            number += 1;
            walk.line(path, number, line, whole);
        })?;
    }
    walk.give_up_odd();
    let report = &mut walk.report;
    report.authenticated = key.is_some() && report.records > 0 && report.unauthentic == 0;
    Ok((walk.report, walk.heads))
}

/// Gives each record to `show`, whether it is authentic or not; returns how many lines are no records.
///
/// # Errors
/// [`VerifyError`] if a file cannot be read.
pub fn each_record(path: &Path, mut show: impl FnMut(Record)) -> Result<u64, VerifyError> {
    let mut others = 0;
    each_line(path, |line, _| match Line::parse(line) {
        Some(line) => show(line.record),
        None => others += 1,
    })?;
    Ok(others)
}

/// The number of the first record of a file.
fn first_number(path: &Path) -> Result<u64, VerifyError> {
    let mut first = None;
    each_record(path, |record| first = first.or(Some(record.seq)))?;
    Ok(first.unwrap_or(u64::MAX))
}

/// Gives each line without its end, and whether it has one. Of a line that is too long only the beginning is given.
fn each_line(path: &Path, mut line: impl FnMut(&[u8], bool)) -> Result<(), VerifyError> {
    let failed = |error| VerifyError { path: path.to_owned(), error };
    let mut file = BufReader::new(File::open(path).map_err(failed)?);
    let mut bytes = Vec::new();
    loop {
        let part = file.fill_buf().map_err(failed)?;
        if part.is_empty() {
            break;
        }
        let end = part.iter().position(|byte| *byte == b'\n');
        let taken = end.unwrap_or(part.len());
        // One byte beyond what a line may have shows that it is too long.
        let room = (MAX_LINE + 1).saturating_sub(bytes.len()).min(taken);
        bytes.extend_from_slice(&part[..room]);
        file.consume(taken + usize::from(end.is_some()));
        if end.is_some() {
            line(&bytes, true);
            bytes.clear();
        }
    }
    if !bytes.is_empty() {
        line(&bytes, false);
    }
    Ok(())
}

struct Walk<'k> {
    key: Option<&'k AuditKey>,
    report: Report,
    /// Number and hash of the last good record.
    before: Option<(u64, String)>,
    /// A line that is no record: a fault, unless the next one tells of it.
    odd: Option<(Fault, u64)>,
    /// Hashes that were not found yet.
    heads: Vec<String>,
}

impl Walk<'_> {
    fn line(&mut self, path: &Path, number: u64, bytes: &[u8], whole: bool) {
        let fault = |what: &str| Fault { file: path.display().to_string(), line: number, what: what.to_owned() };
        let Some(line) = Line::parse(bytes).filter(|_| whole) else {
            let len = bytes.len() as u64;
            self.odd = Some(match self.odd.take() {
                Some((first, before)) => (first, before + 1 + len),
                None => (fault("it is no record"), len),
            });
            self.report.torn_end = if whole { 0 } else { bytes.len() as u64 };
            return;
        };
        self.report.torn_end = 0;
        if let Event::Begin { volume, .. } = &line.record.event {
            self.report.volume.get_or_insert_with(|| volume.clone());
        }
        if self.key.is_some_and(|key| !line.is_authentic(key)) {
            self.report.unauthentic += 1;
            self.give_up_odd();
            return self.fault(fault("it does not authenticate: it was changed, or is of another volume"));
        }
        self.settle_odd(&line.record.event);
        match &self.before {
            Some((seq, link)) if line.record.seq != seq + 1 || line.record.prev != *link => {
                let what = match line.record.seq.checked_sub(seq + 1) {
                    Some(0) => format!("record {} is not the one before it", seq),
                    Some(1) => "the record before it is missing".to_owned(),
                    Some(missing) => format!("{missing} records before it are missing"),
                    None => format!("record {} comes after record {seq}", line.record.seq),
                };
                self.fault(fault(&what));
            }
            None if line.record.seq == 1 && line.record.prev.bytes().any(|digit| digit != b'0') => {
                self.fault(fault("the first record names one before it"));
            }
            _ => {}
        }
        self.count(&line);
        let link = line.link();
        self.heads.retain(|head| *head != link);
        self.before = Some((line.record.seq, link));
    }

    fn count(&mut self, line: &Line<'_>) {
        let report = &mut self.report;
        if report.records == 0 {
            report.first = line.record.seq;
        }
        report.records += 1;
        (report.last, report.head) = (line.record.seq, line.link());
        report.ended = matches!(line.record.event, Event::End {});
        match &line.record.event {
            Event::Begin { .. } => report.mounts += 1,
            Event::Use(key_use) => {
                report.uses += 1;
                report.failed_uses += u64::from(key_use.result != "ok");
            }
            Event::Lost { count, .. } => report.lost += count,
            Event::Resumed { .. } | Event::End {} => {}
        }
    }

    /// A piece of a line is no fault if the record after it says how long it is.
    fn settle_odd(&mut self, event: &Event) {
        let told = match event {
            Event::Begin { torn, .. } | Event::Resumed { torn } => *torn,
            _ => 0,
        };
        match self.odd.take() {
            Some((_, len)) if len == told => self.report.torn += 1,
            Some((fault, _)) => self.fault(fault),
            None => {}
        }
    }

    fn give_up_odd(&mut self) {
        match self.odd.take() {
            // At the end of all: a writer that did not come to an end, or is not there yet.
            Some((_, len)) if self.report.torn_end == len => {}
            Some((fault, _)) => self.fault(fault),
            None => {}
        }
    }

    fn fault(&mut self, fault: Fault) {
        if self.report.faults.len() < NAMED {
            self.report.faults.push(fault);
        } else {
            self.report.more_faults += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::Head;
    use super::*;
    use crate::crypto::{Secret, Suite, VolumeKeys};
    use std::time::SystemTime;

    fn lines(key: &AuditKey, count: u64) -> Vec<Vec<u8>> {
        let mut head = Head::start();
        (0..count).map(|n| head.seal(SystemTime::now(), Event::Lost { count: n, why: String::new() }, key)).collect()
    }

    fn check(lines: &[Vec<u8>], key: Option<&AuditKey>) -> Vec<(u64, String)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), lines.concat()).unwrap();
        let heads = ["0".to_owned()];
        let (report, missing) = verify(&[file.path().to_owned()], key, &heads).unwrap();
        assert_eq!(missing, heads);
        if report.records > 0 {
            let heads = std::slice::from_ref(&report.head);
            assert!(verify(&[file.path().to_owned()], key, heads).unwrap().1.is_empty());
        }
        report.faults.into_iter().map(|fault| (fault.line, fault.what)).collect()
    }

    #[test]
    fn whatever_is_done_to_records_shows_but_for_their_end() {
        let key = VolumeKeys::derive(&Secret::random(), &[1; 16], Suite::Xaes256Gcm).audit;
        let other = VolumeKeys::derive(&Secret::random(), &[1; 16], Suite::Xaes256Gcm).audit;
        let good = lines(&key, 10);
        assert_eq!(check(&good, Some(&key)), []);
        assert_eq!(check(&good[..7], Some(&key)), [], "a log that ends earlier is a log");
        assert_eq!(check(&good, Some(&other)).len(), 10);
        let mut gap = good.clone();
        gap.remove(4);
        assert_eq!(check(&gap, Some(&key)), [(5, "the record before it is missing".to_owned())]);
        let mut swapped = good.clone();
        swapped.swap(3, 4);
        assert!(!check(&swapped, Some(&key)).is_empty() && !check(&swapped, None).is_empty());
        let mut twice = good.clone();
        twice.insert(5, good[4].clone());
        assert_eq!(check(&twice, Some(&key)).len(), 1);
        let mut changed = good.clone();
        let at = changed[6].windows(10).position(|window| window == b"\"count\":6,").unwrap();
        changed[6][at + 8] = b'7';
        let found = check(&changed, Some(&key));
        assert!(found[0].0 == 7 && found[0].1.contains("does not authenticate"), "{found:?}");
        // Without the key the next line still knows the hash.
        assert_eq!(check(&changed, None)[0].0, 8);
        // Whoever has no key can make a chain, and not the MACs.
        assert_eq!((check(&lines(&other, 10), None).len(), check(&lines(&other, 10), Some(&key)).len()), (0, 10));
        let mut strange = good.clone();
        strange.insert(2, b"strange\n".to_vec());
        assert_eq!(check(&strange, Some(&key)), [(3, "it is no record".to_owned())]);
        strange.insert(3, vec![b'x'; 10 * MAX_LINE]);
        assert!(!check(&strange, Some(&key)).is_empty());
    }
}
