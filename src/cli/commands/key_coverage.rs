//! Which wrapping keys the files of a volume have records of: all files, or as many as can be looked at in a moment.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use crate::cli::error::CliError;
use crate::cli::listed_key::name_of;
use crate::cli::report;
use crate::format::config::WrappingKey;
use crate::format::header::{self, HeaderPage, Record};
use crate::keys::{ProviderKind, Ring};
use crate::storage::CipherDirectory;

use super::header_files::{Bound, HeaderFiles};

/// A volume may have millions of files: no more are looked at, for no longer.
const MOST_FILES: usize = 10_000;
const LONGEST: Duration = Duration::from_secs(2);

/// A wrapping key as a header names it.
type KeyName = (u8, Vec<u8>);

/// Files by the keys that open them.
pub(super) struct Coverage {
    /// Files with a header that were looked at.
    pub(super) files: u64,
    /// There are no others.
    pub(super) whole: bool,
    /// Files by the keys that they have records of.
    by_keys: HashMap<Vec<KeyName>, u64>,
}

impl Coverage {
    /// Looks at headers; with `ring` those that do not authenticate do not count. The volume may be in use.
    pub(super) fn look(directory: &CipherDirectory, ring: Option<&Ring>) -> Result<Self, CliError> {
        Self::within(directory, ring, Bound::new(MOST_FILES, LONGEST))
    }

    fn within(directory: &CipherDirectory, ring: Option<&Ring>, mut bound: Bound) -> Result<Self, CliError> {
        let (mut found, mut unread) = (Self { files: 0, whole: true, by_keys: HashMap::new() }, None);
        HeaderFiles::of(directory)?.walk_within("", &mut bound, |path, _, page| match page {
            // It was removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => unread = Some(CliError::io(path, &error)),
            Ok(page) => found.add(page.and_then(|page| records(&page, ring))),
        });
        found.whole = !bound.was_reached();
        unread.map_or(Ok(found), Err)
    }

    fn add(&mut self, records: Option<Vec<Record>>) {
        let Some(records) = records else { return };
        let mut keys: Vec<_> = records.into_iter().map(|record| (record.provider, record.key_id)).collect();
        keys.sort_unstable();
        self.files += 1;
        *self.by_keys.entry(keys).or_default() += 1;
    }

    /// How many files have a record of `key`.
    pub(super) fn with(&self, key: &WrappingKey) -> u64 {
        self.count(|keys| keys.iter().any(|name| is_of(name, key)))
    }

    /// How many have none.
    pub(super) fn without(&self, key: &WrappingKey) -> u64 {
        self.files - self.with(key)
    }

    /// How many have a record of none of `keys`.
    pub(super) fn without_any(&self, keys: &[&WrappingKey]) -> u64 {
        self.count(|names| !names.iter().any(|name| keys.iter().any(|key| is_of(name, key))))
    }

    fn count(&self, is_meant: impl Fn(&[KeyName]) -> bool) -> u64 {
        self.by_keys.iter().filter(|(keys, _)| is_meant(keys)).map(|(_, files)| files).sum()
    }

    /// How many of how many, as in "3 of 12 files", and that there are others if that is so.
    pub(super) fn of_all(&self, files: u64) -> String {
        let sample = if self.whole { "" } else { " looked at (there are more)" };
        format!("{}{sample}", report::part(files, self.files, "file"))
    }
}

/// How many files lack `key`, and the command that gives it to them; none if no file does.
pub(super) fn lack(coverage: &Coverage, key: &WrappingKey, directory: &Path) -> Option<(String, String)> {
    let missing = coverage.without(key);
    let what = format!("{} cannot be opened with {} yet", coverage.of_all(missing), name_of(key));
    (missing > 0).then(|| (what, format!("`kmsfs rewrap {}` gives it to them", directory.display())))
}

fn is_of((provider, id): &KeyName, key: &WrappingKey) -> bool {
    ProviderKind::from_name(&key.provider).is_some_and(|kind| kind.tag() == *provider) && id == key.key.as_bytes()
}

fn records(page: &HeaderPage, ring: Option<&Ring>) -> Option<Vec<Record>> {
    match ring {
        Some(ring) => ring.authenticate(page).ok().flatten().map(|header| header.header().records.clone()),
        None => {
            let headers = header::parse_page(page).into_iter().flatten().map(|slot| slot.header);
            headers.max_by_key(|header| header.generation).map(|header| header.records)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> WrappingKey {
        WrappingKey { provider: "local".into(), key: name.into(), location: None }
    }

    #[test]
    fn counts_files_by_what_opens_them() {
        let mut coverage = Coverage { files: 0, whole: true, by_keys: HashMap::new() };
        let record = |id: &str| Record::of(ProviderKind::Local.tag(), id.to_owned(), vec![1]);
        for keys in [&["a"][..], &["b", "a"], &["a", "b"], &["c"]] {
            coverage.add(Some(keys.iter().map(|id| record(id)).collect()));
        }
        coverage.add(None);
        let (a, b, other) = (key("a"), key("b"), WrappingKey { provider: "aws-kms".into(), ..key("a") });
        assert_eq!((coverage.files, coverage.with(&a), coverage.with(&b), coverage.with(&other)), (4, 3, 2, 0));
        assert_eq!(
            (coverage.without_any(&[&b]), coverage.without_any(&[&a, &b]), coverage.without_any(&[])),
            (2, 1, 4)
        );
        let lack = |coverage: &Coverage, key| lack(coverage, key, Path::new("/srv/c"));
        let (said, how) = lack(&coverage, &b).unwrap();
        assert!(said.starts_with("2 of 4 files cannot") && how.contains("`kmsfs rewrap /srv/c`"), "{said}: {how}");
        coverage.whole = false;
        assert!(lack(&coverage, &b).unwrap().0.contains("2 of 4 files looked at (there are more)"));
        assert_eq!(lack(&Coverage { files: 0, whole: true, by_keys: HashMap::new() }, &b), None);
    }
}
