//! Looking at what lies on the disk, and how the demonstration says that it must not lie there so.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::cli::error::{CliError, Exit};
use crate::format::geometry::{PAGE_LEN, PAGE_SIZE};
use crate::format::header::{Header, parse_page};
use crate::format::hex;

/// Bytes that differ between two states of the ciphertext.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) bytes: u64,
    pub(super) in_headers: u64,
    pub(super) in_pages: u64,
}

impl Changed {
    pub(super) fn between(before: &BTreeMap<PathBuf, Vec<u8>>, after: &BTreeMap<PathBuf, Vec<u8>>) -> Self {
        let mut changed = Self::default();
        for (path, old) in before {
            let new = after.get(path).map_or(&[][..], Vec::as_slice);
            changed.bytes += old.len() as u64;
            for at in 0..old.len().max(new.len()) {
                let differs = u64::from(old.get(at) != new.get(at));
                *if at < PAGE_LEN { &mut changed.in_headers } else { &mut changed.in_pages } += differs;
            }
        }
        changed
    }
}

/// Asks again and again until there is an answer, or too long.
pub(super) fn wait<T>(patience: Duration, mut answer: impl FnMut() -> Option<T>) -> Option<T> {
    let until = Instant::now() + patience;
    loop {
        match answer() {
            None if Instant::now() < until => thread::sleep(Duration::from_millis(20)),
            answer => return answer,
        }
    }
}

/// The page of the file that begins at so many pages of the disk; 0 is the header.
pub(super) fn read_page(file: &Path, number: u64) -> Result<[u8; PAGE_LEN], CliError> {
    let mut page = [0; PAGE_LEN];
    let read = File::open(file).and_then(|file| file.read_exact_at(&mut page, number * PAGE_SIZE));
    read.map(|()| page).map_err(|error| CliError::io(file.display(), &error))
}

pub(super) fn header_of(file: &Path) -> Result<Header, CliError> {
    let page = read_page(file, 0)?;
    let headers = parse_page(&page).into_iter().flatten().map(|slot| slot.header);
    headers.max_by_key(|header| header.generation).ok_or_else(|| amiss("a file has no header"))
}

pub(super) fn fingerprint(header: &Header) -> String {
    hex::encode(first(&header.commitment, 8))
}

pub(super) fn first(bytes: &[u8], len: usize) -> &[u8] {
    bytes.get(..len).unwrap_or(bytes)
}

/// The demonstration found something that must not be.
pub(super) fn amiss(what: &str) -> CliError {
    CliError::new(Exit::Other, format_args!("this must not happen: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_counted_where_they_are() {
        let state = |bytes: Vec<u8>| BTreeMap::from([(PathBuf::from("f"), bytes)]);
        let old = vec![0; 2 * PAGE_LEN];
        let mut new = old.clone();
        new[5] = 1;
        new[PAGE_LEN] = 1;
        let changed = Changed::between(&state(old.clone()), &state(new.clone()));
        assert_eq!(changed, Changed { bytes: 8192, in_headers: 1, in_pages: 1 });
        assert_eq!(Changed::between(&state(old), &BTreeMap::new()).in_pages, 4096);
    }
}
