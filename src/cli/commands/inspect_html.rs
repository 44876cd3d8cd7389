//! `kmsfs inspect --html`: the envelope of one ciphertext file as a page that needs nothing else: no network, no other files.
//!
//! Invariants: no key and no plaintext is in it; what a header says is data, never markup; a file that is no such page is not
//! written over.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;
use zeroize::Zeroizing;

use crate::cli::error::CliError;
use crate::cli::report;
use crate::content::{Opened, open_page};
use crate::crypto::FileKeys;
use crate::format::anatomy::{self, Field};
use crate::format::geometry::{PAGE_LEN, PAGE_SIZE, PAYLOAD_LEN, PageIndex};
use crate::format::header::{HeaderPage, SLOT_LEN, parse_page};
use crate::format::hex;
use crate::format::page::{Page, Trailer, is_hole, part};
use crate::keys::Volume;

use super::inspect::Volumes;
use super::inspect_file::{self, SlotReport};
use super::inspect_paths::Entry;

const TEMPLATE: &str = include_str!("inspect_page.html");
/// Where the data goes in the template.
const DATA: &str = "@ENVELOPE@";
/// How every such page begins.
const MARK: &str = "<!doctype html>\n<!-- made by kmsfs inspect -->\n";
/// So many pages are opened and shown: 16 MiB of a file.
const SHOWN: u64 = 4096;
/// Bytes of a page's ciphertext that are shown.
const SAMPLE: usize = 16;

#[derive(Serialize)]
struct Envelope {
    path: String,
    /// If the volume's key can be had.
    plain_path: Option<String>,
    made_by: String,
    disk_size: u64,
    plain_size: Option<u64>,
    suite: String,
    verdict: Verdict,
    /// Whether the file's keys could be had, and why not.
    unlocked: bool,
    why: String,
    slot_in_use: Option<&'static str>,
    slots: Vec<DrawnSlot>,
    pages: Pages,
}

#[derive(Serialize)]
struct Verdict {
    kind: &'static str,
    text: String,
}

#[derive(Serialize)]
struct DrawnSlot {
    #[serde(flatten)]
    report: SlotReport,
    #[serde(flatten)]
    drawn: Option<Drawn>,
}

#[derive(Serialize)]
struct Drawn {
    /// Up to the end of the MAC, in hexadecimal.
    bytes: String,
    fields: Vec<DrawnField>,
}

#[derive(Serialize)]
struct DrawnField {
    name: String,
    meaning: &'static str,
    start: usize,
    end: usize,
}

#[derive(Serialize)]
struct Pages {
    count: u64,
    list: Vec<DrawnPage>,
}

#[derive(Serialize)]
struct DrawnPage {
    state: State,
    what: Option<String>,
    nonce: String,
    sample: String,
    trailer: String,
    tag: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Authentic,
    Hole,
    Damaged,
    Unchecked,
}

/// Draws the envelope of a file into a page at `page`. It is a failure if nothing of the header holds, or if a page that is shown
/// does not. Of what is no ciphertext file at all, no page is written.
pub(super) fn draw(entry: &Entry, page: &Path, volumes: &mut Volumes) -> Result<(), CliError> {
    let kind = entry.other_kind().map_err(|error| CliError::io(entry.path.display(), &error))?;
    if kind.is_some() || entry.path.is_dir() {
        return Err(no_file(&entry.path));
    }
    let (envelope, failure) = envelope(entry, volumes)?;
    let is_known = entry.below.is_some() || envelope.slots.iter().any(|slot| slot.drawn.is_some());
    let failure = match failure {
        Some(failure) if !is_known => return Err(failure.hint("no page was written: it is no ciphertext file")),
        failure => failure,
    };
    write(page, &render(&envelope)?)?;
    let damaged = envelope.pages.list.iter().any(|page| page.state == State::Damaged);
    let damaged = damaged.then(|| inspect_file::unauthentic(&entry.path, &envelope.verdict.text));
    failure.or(damaged).map_or(Ok(()), Err)
}

/// Only a regular file has an envelope.
pub(super) fn no_file(path: &Path) -> CliError {
    let what = if path.is_dir() { "a directory" } else { "no ciphertext file" };
    CliError::usage(format_args!("{} is {what}: --html draws one ciphertext file", path.display()))
}

fn envelope(entry: &Entry, volumes: &mut Volumes) -> Result<(Envelope, Option<CliError>), CliError> {
    let path = entry.path.as_path();
    let plain_path = volumes.plain_path(entry);
    let failed = |error: io::Error| CliError::io(path.display(), &error);
    let file = entry.open().map_err(failed)?;
    let disk_size = file.metadata().map_err(failed)?.len();
    let (plain_size, _) = inspect_file::plain_size(&file, disk_size).map_err(failed)?;
    let mut header: HeaderPage = [0; PAGE_LEN];
    if disk_size >= PAGE_SIZE {
        file.read_exact_at(&mut header, 0).map_err(failed)?;
    }
    let volume = volumes.at(entry.root.as_deref());
    let slots = inspect_file::slots(&header, volume);
    let failure = inspect_file::failure(path, disk_size, plain_size, &slots);
    let keys = volume.map_err(str::to_owned).and_then(|volume| keys_of(volume, &header));
    let count = (disk_size / PAGE_SIZE).saturating_sub(1);
    let list = pages(&file, count.min(SHOWN), keys.as_ref().ok()).map_err(failed)?;
    let slot_in_use = inspect_file::in_use(&slots);
    let suite = slots.iter().find_map(SlotReport::suite).unwrap_or_default();
    let verdict = verdict(failure.as_ref(), keys.as_ref().err(), &list, count);
    let envelope = Envelope {
        path: path.display().to_string(),
        plain_path,
        made_by: format!("kmsfs {}", env!("CARGO_PKG_VERSION")),
        disk_size,
        plain_size,
        suite,
        verdict,
        unlocked: keys.is_ok(),
        why: keys.err().unwrap_or_default(),
        slot_in_use,
        slots: draw_slots(slots, &header),
        pages: Pages { count, list },
    };
    Ok((envelope, failure))
}

/// The keys of the file with this header, if its provider gives them.
fn keys_of(volume: &Volume, header: &HeaderPage) -> Result<FileKeys, String> {
    let authentic = volume.ring.authenticate(header).map_err(|error| error.to_string())?;
    let authentic = authentic.ok_or("the file has no header")?;
    volume.ring.open(&authentic).map(|opened| opened.keys).map_err(|error| error.to_string())
}

fn draw_slots(reports: Vec<SlotReport>, header: &HeaderPage) -> Vec<DrawnSlot> {
    let parsed = parse_page(header);
    let drawn = parsed.iter().enumerate().map(|(number, slot)| {
        let mut fields = anatomy::of_slot(&slot.as_ref().ok()?.header);
        fields.retain(|field| field.name != "padding");
        let end = fields.last().map_or(0, |field| field.range.end);
        let bytes = hex::encode(&header[number * SLOT_LEN..][..end]);
        Some(Drawn { bytes, fields: draw_fields(&fields) })
    });
    reports.into_iter().zip(drawn).map(|(report, drawn)| DrawnSlot { report, drawn }).collect()
}

/// Fields that each record has are numbered where there are several records.
fn draw_fields(fields: &[Field]) -> Vec<DrawnField> {
    let with_name = |fields: &[Field], name: &str| fields.iter().filter(|field| field.name == name).count();
    let name = |at: usize, name: &str| match with_name(fields, name) {
        1 => name.to_owned(),
        _ => format!("{name} {}", with_name(&fields[..=at], name)),
    };
    let drawn = fields.iter().enumerate().map(|(at, field)| DrawnField {
        name: name(at, field.name),
        meaning: field.meaning,
        start: field.range.start,
        end: field.range.end,
    });
    drawn.collect()
}

fn pages(file: &File, count: u64, keys: Option<&FileKeys>) -> io::Result<Vec<DrawnPage>> {
    let mut plain = Zeroizing::new(vec![0; PAYLOAD_LEN]);
    let mut session = keys.map(FileKeys::session);
    let mut list = Vec::new();
    for index in (0..count).map(PageIndex) {
        let mut page: Page = [0; PAGE_LEN];
        file.read_exact_at(&mut page, index.disk().0)?;
        let (state, what) = match session.as_mut().map(|session| open_page(session, index, &page, &mut plain)) {
            Some(Ok(Opened::Sealed(_))) => (State::Authentic, None),
            Some(Ok(Opened::Hole)) => (State::Hole, None),
            Some(Err(error)) => (State::Damaged, Some(error.to_string())),
            None if is_hole(&page) => (State::Hole, None),
            None => (State::Unchecked, None),
        };
        list.push(draw_page(&page, state, what));
    }
    Ok(list)
}

fn draw_page(page: &Page, state: State, what: Option<String>) -> DrawnPage {
    let trailer = match Trailer::parse(page) {
        Ok(Trailer { len, last: true }) => format!("the last page, with {}", report::counted(len as u64, "byte")),
        Ok(Trailer { len, last: false }) => format!("{}, and more pages follow", report::counted(len as u64, "byte")),
        Err(_) => "none that this version writes".to_owned(),
    };
    DrawnPage {
        state,
        what,
        nonce: hex::encode(&page[part::NONCE]),
        sample: hex::encode(&page[part::CIPHERTEXT][..SAMPLE]),
        trailer,
        tag: hex::encode(&page[part::TAG]),
    }
}

fn verdict(failure: Option<&CliError>, locked: Option<&String>, list: &[DrawnPage], count: u64) -> Verdict {
    let damaged = list.iter().filter(|page| page.state == State::Damaged).count();
    let shown = list.len();
    let pages = report::counted(count, "page");
    let of = if (shown as u64) < count { format!("the first {shown} of {pages}") } else { pages };
    let verb = if count == 1 { "does" } else { "do" };
    match (failure, damaged, locked) {
        (Some(failure), _, _) => Verdict { kind: "bad", text: failure.to_string() },
        (None, 1.., _) => Verdict { kind: "bad", text: format!("{damaged} of {of} {verb} not authenticate") },
        (None, 0, Some(why)) => Verdict { kind: "open", text: format!("not checked: {why}") },
        (None, 0, None) => Verdict { kind: "good", text: format!("the header and {of} are authentic") },
    }
}

fn render(envelope: &Envelope) -> Result<String, CliError> {
    let data = serde_json::to_string(envelope).map_err(CliError::usage)?;
    // No text in a header can end the element that the data is in.
    Ok(TEMPLATE.replacen(DATA, &data.replace('<', "\\u003c"), 1))
}

/// The page is there whole or not at all.
fn write(path: &Path, page: &str) -> Result<(), CliError> {
    let failed = |error: io::Error| CliError::io(path.display(), &error);
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(found) if found.is_file() && is_ours(path).map_err(failed)? => {}
        Ok(_) => {
            let what = format_args!("{} is there, and is no page of `kmsfs inspect --html`", path.display());
            return Err(CliError::usage(what).hint("name a new file after --html, and the ciphertext file after that"));
        }
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.partial", std::process::id()));
    let partial = path.with_file_name(name);
    let written = File::create_new(&partial).and_then(|mut file| {
        let written = file.write_all(page.as_bytes()).and_then(|()| file.sync_all());
        written.and_then(|()| fs::rename(&partial, path)).inspect_err(|_| _ = fs::remove_file(&partial))
    });
    written.map_err(failed)
}

fn is_ours(path: &Path) -> io::Result<bool> {
    let mut start = Vec::new();
    File::open(path)?.take(MARK.len() as u64).read_to_end(&mut start)?;
    Ok(start == MARK.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::error::Exit;

    #[test]
    fn the_template_begins_as_is_looked_for_and_has_a_place_for_the_data() {
        assert!(TEMPLATE.starts_with(MARK));
        assert_eq!(TEMPLATE.matches(DATA).count(), 1);
        for loads in ["http:", "https:", "src=", "@import", "url(", "innerHTML"] {
            assert!(!TEMPLATE.contains(loads), "{loads}");
        }
    }

    #[test]
    fn only_a_page_of_ours_is_written_over() {
        let home = tempfile::tempdir().unwrap();
        let (new, other) = (home.path().join("new.html"), home.path().join("other"));
        write(&new, MARK).unwrap();
        write(&new, &format!("{MARK}second")).unwrap();
        assert!(fs::read_to_string(&new).unwrap().ends_with("second"));
        fs::write(&other, "ciphertext").unwrap();
        assert_eq!(write(&other, MARK).unwrap_err().code(), Exit::Usage as u8);
        assert_eq!(fs::read_to_string(&other).unwrap(), "ciphertext");
        std::os::unix::fs::symlink(&new, home.path().join("link")).unwrap();
        assert!(write(&home.path().join("link"), MARK).is_err());
    }

    #[test]
    fn verdicts_name_the_worst() {
        let page = |state| draw_page(&[7; PAGE_LEN], state, None);
        let good = verdict(None, None, &[page(State::Authentic)], 1);
        assert_eq!((good.kind, good.text.as_str()), ("good", "the header and 1 page are authentic"));
        assert_eq!(verdict(None, Some(&"locked".to_owned()), &[page(State::Unchecked)], 1).kind, "open");
        let damaged = verdict(None, None, &[page(State::Authentic), page(State::Damaged)], 9);
        assert_eq!(damaged.text, "1 of the first 2 of 9 pages do not authenticate");
    }
}
