//! What a check says: each finding, what was salvaged, a summary, and the exit code that follows.

use std::fmt::Write as _;

use serde::Serialize;

use crate::check::{Finding, Progress, Salvaged, Severity};
use crate::cli::error::{CliError, Exit};
use crate::cli::report::{self, counted};
use crate::keys::KeyError;

/// Everything about one volume.
#[derive(Debug, Default, Serialize)]
pub(super) struct CheckReport {
    pub(super) cipher_directory: String,
    pub(super) volume_id: Option<String>,
    /// Without keys.
    pub(super) structure_only: bool,
    pub(super) directories: u64,
    pub(super) files: u64,
    pub(super) symlinks: u64,
    pub(super) others: u64,
    /// Pages that were opened, of 4096 bytes each.
    pub(super) pages: u64,
    pub(super) unsettled: u64,
    /// Files whose size on disk was set as their writer would have.
    pub(super) settled: u64,
    pub(super) seconds: f64,
    /// Nothing is wrong, or all that was is repaired.
    pub(super) clean: bool,
    pub(super) findings: Vec<Finding>,
    pub(super) salvaged: Vec<Salvaged>,
}

impl CheckReport {
    pub(super) fn count(&mut self, progress: Progress) {
        self.directories = progress.directories;
        self.files = progress.files;
        self.symlinks = progress.symlinks;
        self.others = progress.others;
        self.pages = progress.pages;
        self.unsettled = progress.unsettled;
    }

    /// Prints it.
    pub(super) fn print(&self, json: bool) -> Result<(), CliError> {
        if json {
            return report::print(self, true);
        }
        report::say(&self.text())
    }

    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        for finding in &self.findings {
            let _ = writeln!(text, "{}", line(finding));
        }
        for salvaged in &self.salvaged {
            let _ = writeln!(text, "{}", salvaged_line(salvaged));
        }
        let _ = writeln!(
            text,
            "{}: {}: {}, {}, {}, {}, {} MiB of pages in {:.1} s{}{}",
            report::printable(&self.cipher_directory),
            if self.clean { "clean" } else { "not clean" },
            counted(self.directories, "directory"),
            counted(self.files, "file"),
            counted(self.symlinks, "symlink"),
            counted(self.others, "other"),
            self.pages / 256,
            self.seconds,
            if self.structure_only { "; structure only" } else { "" },
            if self.settled > 0 { format!("; {} settled", counted(self.settled, "file")) } else { String::new() },
        );
        text
    }

    /// What is still wrong, as the command's failure. What is lost counts most; then what could not be read, or its key
    /// not had.
    pub(super) fn verdict(&self, key_failure: Option<KeyError>) -> Option<CliError> {
        let left: Vec<&Finding> = self.findings.iter().filter(|finding| !finding.repaired).collect();
        let worst = left.iter().map(|finding| finding.severity).max()?;
        let count = |severity| left.iter().filter(|finding| finding.severity == severity).count();
        let what = format!(
            "{}: {} damaged, {} unreadable, {} without a key, {} amiss",
            self.cipher_directory,
            count(Severity::Damage),
            count(Severity::Io),
            count(Severity::Key),
            count(Severity::Amiss)
        );
        let code = match worst {
            Severity::Damage => Exit::Unauthentic as u8,
            Severity::Io => Exit::Io as u8,
            Severity::Key => key_failure.map_or(Exit::KeyRefused as u8, |error| CliError::from(error).code()),
            Severity::Amiss => Exit::Amiss as u8,
        };
        let error = CliError::with_code(code, what);
        Some(if left.iter().any(|finding| finding.repairable) {
            let place = &self.cipher_directory;
            error.hint(format_args!(
                "`kmsfs check --repair {place}`, unmounted, mends what can be mended without losing anything"
            ))
        } else if worst >= Severity::Io && self.salvaged.is_empty() {
            let place = &self.cipher_directory;
            error.hint(format_args!("`kmsfs check --salvage NEWDIR {place}` copies what still opens of damaged files"))
        } else {
            error
        })
    }
}

fn line(finding: &Finding) -> String {
    let severity = match finding.severity {
        Severity::Damage => "damage",
        Severity::Io => "unreadable",
        Severity::Key => "no key",
        Severity::Amiss => "amiss",
    };
    let pages = match (finding.page, finding.last_page) {
        (Some(first), Some(last)) => format!("pages {first} to {last}: "),
        (Some(page), None) => format!("page {page}: "),
        (None, _) => String::new(),
    };
    let repaired = if finding.repaired { " (repaired)" } else { "" };
    report::printable(&format!(
        "{severity}: {}: {pages}{}{repaired}",
        place(&finding.cipher, finding.plain.as_deref()),
        finding.what
    ))
}

fn place(cipher: &str, plain: Option<&str>) -> String {
    match plain {
        Some("") => "the root".to_owned(),
        Some(plain) => format!("{plain} ({cipher})"),
        None if cipher.is_empty() => "the root".to_owned(),
        None => cipher.to_owned(),
    }
}

fn salvaged_line(salvaged: &Salvaged) -> String {
    let place = place(&salvaged.cipher, salvaged.plain.as_deref());
    report::printable(&match &salvaged.copy {
        None => format!("not salvaged: {place}: {}", salvaged.why.as_deref().unwrap_or("nothing of it opens")),
        Some(copy) => {
            let zeros: u64 = salvaged.zeroed.iter().map(|range| range.len).sum();
            format!(
                "salvaged: {place}: {}, to {}",
                report::part(salvaged.bytes - zeros, salvaged.bytes, "byte"),
                copy.display()
            )
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Kind;

    fn finding(severity: Severity) -> Finding {
        Finding {
            severity,
            kind: Kind::Page,
            page: Some(3),
            last_page: Some(5),
            ..Finding::config("broken".into(), true)
        }
    }

    fn code(severities: &[Severity]) -> Option<u8> {
        let findings = severities.iter().map(|severity| finding(*severity)).collect();
        CheckReport { findings, ..CheckReport::default() }.verdict(None).map(|error| error.code())
    }

    #[test]
    fn the_worst_decides() {
        use Severity::{Amiss, Damage, Io, Key};
        assert_eq!(code(&[]), None);
        assert_eq!(code(&[Amiss]), Some(15));
        assert_eq!(code(&[Amiss, Key]), Some(6));
        assert_eq!(code(&[Key, Io, Amiss]), Some(14));
        assert_eq!(code(&[Io, Damage]), Some(13));
    }

    #[test]
    fn what_is_repaired_no_longer_counts_and_is_told() {
        let repaired = Finding { repaired: true, ..finding(Severity::Amiss) };
        assert_eq!(line(&repaired), "amiss: .kmsfs/volume.toml: pages 3 to 5: broken (repaired)");
        assert!(CheckReport { findings: vec![repaired], ..CheckReport::default() }.verdict(None).is_none());
    }
}
