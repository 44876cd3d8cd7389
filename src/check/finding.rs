//! What a check finds: where, what happened, how bad it is, and whether it can be mended.

use std::ops::RangeInclusive;

use serde::Serialize;

use crate::format::config::CONFIG_FILE;
use crate::format::name::{REDO_LOGS_DIR, RedoLog, VOLUME_DIR};

/// How bad a finding is, from the least to the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Not as a writer leaves things, and nothing is lost that can be read now.
    Amiss,
    /// The key was refused or could not be had: nothing is known of the content.
    Key,
    /// The backing filesystem failed to read it.
    Io,
    /// It does not authenticate, or something that must be there is missing.
    Damage,
}

/// What a finding is about; each has one word in reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A file's header: none of its slots is valid.
    Header,
    /// One header slot of a file; the other one is valid.
    HeaderSlot,
    /// A header page of zeros, or no header where there must be one.
    NoHeader,
    /// The size on disk is no file's.
    Size,
    /// A page does not authenticate, or is of another version.
    Page,
    /// A page of zeros in a volume that denies holes.
    Hole,
    /// The last page lacks its end mark.
    EndMark,
    /// The key of a file cannot be had.
    Key,
    /// The unwrapped key is not the header's.
    WrongKey,
    /// An entry's name does not decrypt.
    Name,
    /// The symlink of a long name is missing or belongs to another entry.
    LongName,
    /// The symlink of a long name without its entry.
    OrphanLink,
    /// A directory's id is missing or does not authenticate.
    DirectoryId,
    /// An empty directory without an id.
    EmptyDirectory,
    /// Two directories have one id.
    SameId,
    /// A symlink's target does not authenticate.
    Link,
    /// An extended attribute does not authenticate.
    Xattr,
    /// Something that no writer of a volume makes.
    Stray,
    /// Something that a crash left.
    Leftover,
    /// A file that is half way to a new data key.
    Unfinished,
    /// The volume config is missing, or does not hold.
    Config,
    /// A provisioned key that is not this volume's.
    ProvisionedKey,
    /// The backing filesystem failed.
    Io,
}

/// What repairing does about a finding. Each destroys nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mend {
    /// Removes an entry that means nothing.
    Remove,
    /// Gives an empty directory an id.
    GiveId,
    /// Writes the valid header slot over the other one.
    CopySlot,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about.
    pub kind: Kind,
    /// The path in the cipher directory; empty for the root.
    pub cipher: String,
    /// The path on a mount, if all names of it are known.
    pub plain: Option<String>,
    /// The first page that it is about.
    pub page: Option<u64>,
    /// The last one, if there are several in a row.
    pub last_page: Option<u64>,
    /// What happened, in words.
    pub what: String,
    /// Whether repairing does something about it.
    pub repairable: bool,
    /// Whether it was repaired.
    pub repaired: bool,
    /// What repairing does.
    #[serde(skip)]
    pub mend: Option<Mend>,
}

impl Finding {
    /// One about the whole volume: its config.
    #[must_use]
    pub fn config(what: String, repairable: bool) -> Self {
        let place = Place { cipher: format!("{VOLUME_DIR}/{CONFIG_FILE}"), plain: None };
        Self { repairable, ..place.finding(Severity::Damage, Kind::Config, what) }
    }

    /// A file that was half way to a new data key, or a redo log that did not count, and was finished or removed.
    #[must_use]
    pub fn finished(log: &RedoLog) -> Self {
        let place = Place { cipher: format!("{VOLUME_DIR}/{REDO_LOGS_DIR}/{}", log.text()), plain: None };
        let what = "a file was half way to a new data key".to_owned();
        let finding = place.finding(Severity::Amiss, Kind::Unfinished, what);
        Self { repairable: true, repaired: true, ..finding }
    }

    /// Whether `other` is about the same thing.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (self.kind, self.page, &self.cipher) == (other.kind, other.page, &other.cipher)
            && (self.kind == Kind::Io || self.what == other.what)
    }
}

/// What was found of one object: an entry of a directory with its name, header and content.
#[derive(Debug, Default)]
pub(super) struct Found(pub(super) Vec<Finding>);

impl Found {
    pub(super) fn add(&mut self, place: &Place, severity: Severity, kind: Kind, what: impl Into<String>) {
        self.0.push(place.finding(severity, kind, what.into()));
    }

    /// The backing filesystem failed.
    pub(super) fn io(&mut self, place: &Place, error: &std::io::Error) {
        self.add(place, Severity::Io, Kind::Io, format!("it cannot be read: {error}"));
    }

    /// Something that the next writer mends, and repairing too.
    pub(super) fn add_repairable(&mut self, place: &Place, kind: Kind, what: impl Into<String>) {
        self.0.push(Finding { repairable: true, ..place.finding(Severity::Amiss, kind, what.into()) });
    }

    pub(super) fn add_mendable(&mut self, place: &Place, kind: Kind, mend: Mend, what: impl Into<String>) {
        let finding = place.finding(Severity::Amiss, kind, what.into());
        self.0.push(Finding { repairable: true, mend: Some(mend), ..finding });
    }

    /// Something about pages in a row.
    pub(super) fn pages(
        &mut self,
        place: &Place,
        severity: Severity,
        kind: Kind,
        pages: RangeInclusive<u64>,
        what: impl Into<String>,
    ) {
        let (page, last) = (*pages.start(), *pages.end());
        let last_page = (last > page).then_some(last);
        let finding = place.finding(severity, kind, what.into());
        self.0.push(Finding { page: Some(page), last_page, ..finding });
    }

    /// Something about a page; one after the last finding's, and otherwise like it, belongs to that.
    pub(super) fn page(&mut self, place: &Place, severity: Severity, kind: Kind, page: u64, what: impl Into<String>) {
        let what = what.into();
        if let Some(last) = self.0.last_mut()
            && (last.kind, last.severity) == (kind, severity)
            && last.what == what
            && last.last_page.or(last.page).and_then(|page| page.checked_add(1)) == Some(page)
        {
            last.last_page = Some(page);
            return;
        }
        self.pages(place, severity, kind, page..=page, what);
    }
}

/// Where an object lies.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Relative to the cipher directory.
    pub(super) cipher: String,
    /// Relative to a mount.
    pub(super) plain: Option<Vec<u8>>,
}

impl Place {
    fn finding(&self, severity: Severity, kind: Kind, what: String) -> Finding {
        Finding {
            severity,
            kind,
            cipher: self.cipher.clone(),
            plain: self.plain.as_ref().map(|plain| String::from_utf8_lossy(plain).into_owned()),
            page: None,
            last_page: None,
            what,
            repairable: false,
            repaired: false,
            mend: None,
        }
    }

    /// The place of an entry in the directory at this one, whose plain name is `plain`, if it is known.
    pub(super) fn entry(&self, entry: &str, plain: Option<&[u8]>) -> Self {
        let cipher = if self.cipher.is_empty() { entry.to_owned() } else { format!("{}/{entry}", self.cipher) };
        let plain = self.plain.as_ref().zip(plain).map(|(above, name)| match above.as_slice() {
            [] => name.to_vec(),
            above => [above, b"/", name].concat(),
        });
        Self { cipher, plain }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_in_a_row_are_one_finding() {
        let place = Place { cipher: "c".to_owned(), plain: None };
        let mut found = Found::default();
        for page in [3, 4, 5, 7] {
            found.page(&place, Severity::Damage, Kind::Page, page, "broken");
        }
        found.page(&place, Severity::Damage, Kind::Hole, 8, "a hole");
        let pages: Vec<_> = found.0.iter().map(|finding| (finding.page, finding.last_page)).collect();
        assert_eq!(pages, [(Some(3), Some(5)), (Some(7), None), (Some(8), None)]);
    }

    #[test]
    fn a_path_is_plain_only_if_all_of_it_is_known() {
        let root = Place { cipher: String::new(), plain: Some(Vec::new()) };
        let known = root.entry("x", Some(b"a")).entry("y", Some(b"b"));
        assert_eq!((known.cipher.as_str(), known.plain.as_deref()), ("x/y", Some(&b"a/b"[..])));
        let unknown = root.entry("x", None).entry("y", Some(b"b"));
        assert_eq!((unknown.cipher.as_str(), unknown.plain), ("x/y", None));
    }
}
