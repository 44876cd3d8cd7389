//! `kmsfs inspect` of a ciphertext file.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use crate::cli::error::{CliError, Exit};
use crate::cli::report;
use crate::crypto::Suite;
use crate::format::geometry::{DiskOffset, PAGE_LEN, PAYLOAD_LEN, PageIndex, SizeHint, size_hint, size_with_last_page};
use crate::format::header::{Header, HeaderError, HeaderPage, Record, SLOT_LEN, parse_page};
use crate::format::hex;
use crate::format::page::{Trailer, is_hole};
use crate::keys::{ProviderKind, Volume};
use crate::storage::CipherDirectory;

use super::inspect::Volumes;
use super::inspect_paths::Entry;

/// What is shown of an entry that has no header.
#[derive(Serialize)]
struct EntryReport {
    path: String,
    plain_path: Option<String>,
    kind: &'static str,
}

#[derive(Serialize)]
struct FileReport {
    path: String,
    /// If the volume's key can be had.
    plain_path: Option<String>,
    kind: &'static str,
    disk_size: u64,
    plain_size: Option<u64>,
    plain_size_from: String,
    slot_in_use: Option<&'static str>,
    slots: Vec<SlotReport>,
}

#[derive(Serialize)]
pub(super) struct SlotReport {
    slot: &'static str,
    state: String,
    #[serde(flatten)]
    header: Option<HeaderReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
    #[serde(skip)]
    trust: Trust,
}

impl SlotReport {
    /// The suite that its header names.
    pub(super) fn suite(&self) -> Option<String> {
        self.header.as_ref().map(|header| header.suite.clone())
    }
}

/// What is known of a slot; the order says which failure is worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    Empty,
    NotChecked,
    Authentic,
    Bad,
}

#[derive(Serialize)]
struct HeaderReport {
    generation: u64,
    suite: String,
    volume_id: String,
    file_id: String,
    data_key_id: String,
    commitment: String,
    records: Vec<RecordReport>,
}

#[derive(Serialize)]
struct RecordReport {
    provider: String,
    key: String,
    wrapped_bytes: usize,
}

/// Reports on the file; it is a failure if nothing of the header holds, or if the size is impossible.
pub(super) fn inspect(entry: &Entry, json: bool, volumes: &mut Volumes) -> Result<(), CliError> {
    let path = entry.path.as_path();
    let io_error = |error: io::Error| CliError::io(path.display(), &error);
    let plain_path = volumes.plain_path(entry);
    if let Some(kind) = entry.other_kind().map_err(io_error)? {
        return report::print(&EntryReport { path: path.display().to_string(), plain_path, kind }, json);
    }
    if path.is_dir() {
        // It says why it is no volume.
        return CipherDirectory::open(path).map(drop).map_err(CliError::from);
    }
    let file = entry.open().map_err(io_error)?;
    let disk_size = file.metadata().map_err(io_error)?.len();
    let (plain_size, plain_size_from) = plain_size(&file, disk_size).map_err(io_error)?;
    let slots = if disk_size < PAGE_LEN as u64 {
        Vec::new()
    } else {
        let mut page = [0; PAGE_LEN];
        file.read_exact_at(&mut page, 0).map_err(io_error)?;
        slots(&page, volumes.at(entry.root.as_deref()))
    };
    let failure = failure(path, disk_size, plain_size, &slots);
    let path = path.display().to_string();
    let slot_in_use = in_use(&slots);
    report::print(
        &FileReport { path, plain_path, kind: "file", disk_size, plain_size, plain_size_from, slot_in_use, slots },
        json,
    )?;
    failure.map_or(Ok(()), Err)
}

/// Opens a regular file for reading, and never waits for anything that is not one.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("neither a regular file nor a directory")) }
}

/// The first bytes of a file, at most `limit`.
pub(super) fn read_start(path: &Path, limit: u64) -> Result<Vec<u8>, CliError> {
    let mut bytes = Vec::new();
    let read = open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
    read.map(|_| bytes).map_err(|error| CliError::io(path.display(), &error))
}

/// The plain size, and where it comes from.
pub(super) fn plain_size(file: &File, disk_size: u64) -> io::Result<(Option<u64>, String)> {
    Ok(match size_hint(DiskOffset(disk_size)) {
        Err(impossible) => (None, impossible.to_string()),
        Ok(SizeHint::Known(size)) => (Some(size.0), "disk size".to_owned()),
        Ok(SizeHint::AskLastPage(last)) => match last_page_len(file, last)? {
            Some(len) => (Some(size_with_last_page(last, len).0), "last page, not authenticated".to_owned()),
            None => (None, "the last page's trailer is malformed".to_owned()),
        },
    })
}

fn last_page_len(file: &File, last: PageIndex) -> io::Result<Option<usize>> {
    let mut page = [0; PAGE_LEN];
    file.read_exact_at(&mut page, last.disk().0)?;
    Ok(if is_hole(&page) { Some(PAYLOAD_LEN) } else { Trailer::parse(&page).ok().map(|trailer| trailer.len.into()) })
}

pub(super) fn slots(page: &HeaderPage, volume: Result<&Volume, &str>) -> Vec<SlotReport> {
    let parsed = parse_page(page);
    let numbered = parsed.into_iter().zip(["A", "B"]).enumerate();
    numbered
        .map(|(number, (parsed, slot))| match parsed {
            Err(HeaderError::Empty) => {
                SlotReport { slot, state: "empty".to_owned(), header: None, mac: None, trust: Trust::Empty }
            }
            Err(error) => SlotReport { slot, state: error.to_string(), header: None, mac: None, trust: Trust::Bad },
            Ok(parsed) => {
                let (trust, mac) = check_mac(page, number, volume);
                let header = Some(header_report(&parsed.header));
                SlotReport { slot, state: "header".to_owned(), header, mac: Some(mac), trust }
            }
        })
        .collect()
}

/// Checks one slot by itself: the other one is blanked out.
fn check_mac(page: &HeaderPage, slot: usize, volume: Result<&Volume, &str>) -> (Trust, String) {
    match volume {
        Err(why) => (Trust::NotChecked, format!("not checked: {why}")),
        Ok(volume) => {
            let mut alone = *page;
            alone[(1 - slot) * SLOT_LEN..][..SLOT_LEN].fill(0);
            match volume.ring.authenticate(&alone) {
                Ok(_) => (Trust::Authentic, "authentic".to_owned()),
                Err(error) => (Trust::Bad, error.to_string()),
            }
        }
    }
}

fn header_report(header: &Header) -> HeaderReport {
    let suite = Suite::from_id(header.suite).map_or_else(|| format!("unknown ({})", header.suite), |s| s.to_string());
    HeaderReport {
        generation: header.generation,
        suite,
        volume_id: hex::encode_uuid(&header.volume_id),
        file_id: hex::encode(&header.file_id),
        data_key_id: hex::encode_uuid(&header.data_key_id),
        commitment: hex::encode(&header.commitment),
        records: header.records.iter().map(record_report).collect(),
    }
}

fn record_report(record: &Record) -> RecordReport {
    let tag = record.provider;
    RecordReport {
        provider: ProviderKind::from_tag(tag).map_or_else(|| format!("unknown ({tag})"), |kind| kind.to_string()),
        key: String::from_utf8_lossy(&record.key_id).into_owned(),
        wrapped_bytes: record.wrapped.len(),
    }
}

/// The slot that a reader would take: the highest generation of those that are not known to be bad.
pub(super) fn in_use(slots: &[SlotReport]) -> Option<&'static str> {
    let usable = slots.iter().filter(|slot| matches!(slot.trust, Trust::Authentic | Trust::NotChecked));
    let newest = usable.max_by_key(|slot| slot.header.as_ref().map(|header| header.generation));
    newest.map(|slot| slot.slot)
}

pub(super) fn failure(path: &Path, disk_size: u64, plain_size: Option<u64>, slots: &[SlotReport]) -> Option<CliError> {
    let unauthentic = |why: &str| Some(unauthentic(path, why));
    let bad = slots.iter().find(|slot| slot.trust == Trust::Bad);
    if let Some(bad) = bad.filter(|_| in_use(slots).is_none()) {
        return unauthentic(bad.mac.as_ref().unwrap_or(&bad.state));
    }
    if plain_size.is_none() {
        return unauthentic(&format!("{} on disk make no whole file", report::counted(disk_size, "byte")));
    }
    None
}

/// Something of the file at `path` does not authenticate.
pub(super) fn unauthentic(path: &Path, why: &str) -> CliError {
    CliError::new(Exit::Unauthentic, format_args!("{}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::header::put_slot;

    fn header(generation: u64) -> Header {
        Header {
            suite: 1,
            generation,
            volume_id: [1; 16],
            file_id: [2; 32],
            data_key_id: [3; 16],
            records: vec![Record { provider: 200, key_id: b"key".to_vec(), wrapped: vec![9; 60] }],
            commitment: [4; 32],
        }
    }

    #[test]
    fn the_newer_slot_is_in_use_and_an_empty_one_is_no_failure() {
        let mut page = [0; PAGE_LEN];
        put_slot(&mut page, 1, &header(4).signed_bytes().unwrap(), &[5; 32]);
        let only_b = slots(&page, Err("no key"));
        assert_eq!((in_use(&only_b), only_b[0].trust, only_b[1].trust), (Some("B"), Trust::Empty, Trust::NotChecked));
        put_slot(&mut page, 0, &header(5).signed_bytes().unwrap(), &[5; 32]);
        assert_eq!(in_use(&slots(&page, Err("no key"))), Some("A"));
        assert!(failure(Path::new("f"), 4096, Some(0), &slots(&page, Err("no key"))).is_none());
    }

    #[test]
    fn what_is_no_header_is_a_failure() {
        let found = slots(&[7; PAGE_LEN], Err("no key"));
        assert_eq!(failure(Path::new("f"), 4096, Some(0), &found).unwrap().code(), Exit::Unauthentic as u8);
        assert_eq!(failure(Path::new("f"), 5000, None, &[]).unwrap().code(), Exit::Unauthentic as u8);
        assert!(failure(Path::new("f"), 0, Some(0), &[]).is_none());
    }

    #[test]
    fn plain_sizes_say_where_they_come_from() {
        let file = tempfile::tempfile().unwrap();
        let size = |len: u64| {
            file.set_len(len).unwrap();
            plain_size(&file, len).unwrap().0
        };
        assert_eq!((size(0), size(4096), size(8193)), (Some(0), Some(0), Some(1)));
        assert_eq!((size(12288), size(4097)), (Some(2 * 4048), None));
        file.write_all_at(&Trailer::last(17).encode(), 8192 + 4072).unwrap();
        assert_eq!(size(12288), Some(4048 + 17));
    }
}
