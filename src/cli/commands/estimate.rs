//! `kmsfs estimate`: what a tree costs under AWS KMS, in calls, dollars and hours. Needs no key and asks nobody.
//!
//! The headers of a cipher directory are read but not authenticated: what they say here decides nothing.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::cli::error::{CliError, Exit};
use crate::cli::{progress, report, unlock};
use crate::format::config::MAX_FILES_PER_DATA_KEY;
use crate::storage::CipherDirectory;
use crate::storage::cipher_directory::CipherDirectoryError;

use super::estimate_walk::{self, Tree};

/// Dollars for 10 000 calls: AWS KMS pricing, symmetric requests. The calls that are free each month do not count here.
const DOLLARS_PER_10_000_CALLS: f64 = 0.03;
/// What is always shown.
const USUAL: [u32; 5] = [1, 10, 100, 1000, 10_000];

/// Show what a directory costs under AWS KMS: calls, dollars and hours for different numbers of files per data key
#[derive(Debug, Args)]
pub(crate) struct EstimateArgs {
    /// A directory with plain files, or a cipher directory
    path: PathBuf,
    /// Estimate for this many files per data key too [default: the volume's; 1, 10, 100, 1000 and 10000 are shown always]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_FILES_PER_DATA_KEY)))]
    files_per_data_key: Vec<u32>,
    /// The calls a second that may be made
    #[arg(long, value_name = "CALLS", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    kms_rate: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    path: String,
    kind: &'static str,
    #[serde(flatten)]
    tree: Tree,
    /// The volume's own.
    files_per_data_key: Option<u32>,
    dollars_per_10_000_calls: f64,
    kms_rate: u32,
    /// Of a volume with the data keys that it has.
    as_it_is: Option<Cost>,
    estimates: Vec<Estimate>,
}

/// What is to be paid for all files with `files_per_data_key`.
#[derive(Debug, PartialEq, Serialize)]
struct Estimate {
    files_per_data_key: u32,
    /// GenerateDataKey for each new data key.
    create: Cost,
    /// Decrypt for each data key, while none is in memory.
    cold_scan: Cost,
    /// ReEncrypt for each data key.
    rewrap: Cost,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Cost {
    calls: u64,
    pub(super) dollars: f64,
    pub(super) hours: f64,
}

impl Cost {
    // Counts of files are far below 2^52.
    #[allow(clippy::cast_precision_loss)]
    pub(super) fn of(calls: u64, rate: u32) -> Self {
        let dollars = calls as f64 * DOLLARS_PER_10_000_CALLS / 10_000.0;
        Self { calls, dollars, hours: calls as f64 / f64::from(rate) / 3600.0 }
    }
}

impl Estimate {
    fn of(files: u64, files_per_data_key: u32, rate: u32) -> Self {
        let each = Cost::of(files.div_ceil(files_per_data_key.into()), rate);
        Self { files_per_data_key, create: each, cold_scan: each, rewrap: each }
    }
}

/// Counts and tells.
pub(crate) fn run(args: &EstimateArgs) -> Result<(), CliError> {
    let own = files_per_data_key_of(&args.path)?;
    let tree = estimate_walk::count(&args.path, own.is_some())
        .map_err(|error| CliError::new(Exit::Io, format_args!("{}: {error}", args.path.display())))?;
    let numbers: BTreeSet<u32> = own.into_iter().chain(args.files_per_data_key.iter().copied()).chain(USUAL).collect();
    let with_content = tree.files - tree.empty_files;
    let report = Report {
        path: args.path.display().to_string(),
        kind: if own.is_some() { "volume" } else { "directory" },
        files_per_data_key: own,
        dollars_per_10_000_calls: DOLLARS_PER_10_000_CALLS,
        kms_rate: args.kms_rate,
        as_it_is: tree.data_keys.map(|keys| Cost::of(keys, args.kms_rate)),
        estimates: numbers.into_iter().map(|n| Estimate::of(with_content, n, args.kms_rate)).collect(),
        tree,
    };
    if args.json { report::print(&report, true) } else { report::say(&text(&report)) }
}

/// What the config of a cipher directory says; none of a plain directory.
fn files_per_data_key_of(path: &Path) -> Result<Option<u32>, CliError> {
    match CipherDirectory::open(path) {
        Ok(directory) => Ok(Some(unlock::read_config(&directory)?.config.files_per_data_key)),
        Err(CipherDirectoryError::NotAVolume(_) | CipherDirectoryError::ConfigMissing(_)) => Ok(None),
        // Any directory will do.
        Err(CipherDirectoryError::NotFound(path)) => {
            Err(CliError::new(Exit::CipherDirectory, format_args!("{} does not exist", path.display())))
        }
        Err(error) => Err(error.into()),
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = put(&mut text, report);
    text
}

fn put(text: &mut String, report: &Report) -> std::fmt::Result {
    let Tree { files, empty_files, bytes, unreadable, data_keys, .. } = &report.tree;
    let kind = report.kind;
    writeln!(text, "{kind} {}", report::printable(&report.path))?;
    let (counted_files, counted_bytes) = (report::counted(*files, "file"), report::counted(*bytes, "byte"));
    writeln!(text, "{counted_files} with {counted_bytes}, {empty_files} of them empty, which need no key")?;
    if *unreadable > 0 {
        let entries = report::counted(*unreadable, "entry");
        writeln!(text, "left out, since it cannot be read: {entries}")?;
    }
    if let (Some(keys), Some(cost), Some(own)) = (data_keys, &report.as_it_is, report.files_per_data_key) {
        let (dollars, time) = (dollars(cost), time(cost));
        let (data_keys, calls) = (report::counted(*keys, "data key"), report::counted(*keys, "call"));
        let own = report::counted(own.into(), "file");
        writeln!(text, "{data_keys} as it is ({own} per data key at most)")?;
        writeln!(text, "a cold scan or a rewrap of it as it is: {calls}, ${dollars}, {time}")?;
    }
    writeln!(text, "\n{:>10} {:>36} {:>12} {:>12}", "files per", "calls to", "dollars", "time")?;
    let [a, b, c] = ["create all", "scan cold", "rewrap"];
    writeln!(text, "{:>10} {a:>12}{b:>12}{c:>12} {:>12} {:>12}", "data key", "for each", "for each")?;
    for Estimate { files_per_data_key, create, cold_scan, rewrap } in &report.estimates {
        let calls = format!("{:>12}{:>12}{:>12}", create.calls, cold_scan.calls, rewrap.calls);
        writeln!(text, "{files_per_data_key:>10} {calls} {:>12} {:>12}", dollars(create), time(create))?;
    }
    let price = format!("${DOLLARS_PER_10_000_CALLS} for 10 000 calls (AWS KMS pricing, symmetric requests)");
    writeln!(text, "\nat {price}, and {} a second", report::counted(report.kms_rate.into(), "call"))
}

fn dollars(cost: &Cost) -> String {
    if cost.calls > 0 && cost.dollars < 0.01 { "<0.01".to_owned() } else { format!("{:.2}", cost.dollars) }
}

fn time(cost: &Cost) -> String {
    let seconds = (cost.hours * 3600.0).ceil();
    progress::time_text(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_files() {
        let one = Estimate::of(1_000_000, 1, 100).create;
        assert_eq!((one.calls, dollars(&one), time(&one)), (1_000_000, "3.00".to_owned(), "2 h 46 min".to_owned()));
        let many = Estimate::of(1_000_000, 10_000, 100).rewrap;
        assert_eq!((many.calls, dollars(&many), time(&many)), (100, "<0.01".to_owned(), "1 s".to_owned()));
        assert_eq!(Estimate::of(1001, 1000, 1).cold_scan.calls, 2);
        let none = Estimate::of(0, 1000, 1).cold_scan;
        assert_eq!((none.calls, dollars(&none)), (0, "0.00".to_owned()));
    }

    #[test]
    fn the_table_has_a_row_for_each_number() {
        let tree = Tree { files: 12, empty_files: 2, bytes: 345, allocated: 345, unreadable: 1, data_keys: Some(4) };
        let report = Report {
            path: "/a\u{1b}".into(),
            kind: "volume",
            tree,
            files_per_data_key: Some(3),
            dollars_per_10_000_calls: DOLLARS_PER_10_000_CALLS,
            kms_rate: 100,
            as_it_is: Some(Cost::of(4, 100)),
            estimates: [1, 3].map(|n| Estimate::of(10, n, 100)).into(),
        };
        let expected = "\
volume /a\u{fffd}
12 files with 345 bytes, 2 of them empty, which need no key
left out, since it cannot be read: 1 entry
4 data keys as it is (3 files per data key at most)
a cold scan or a rewrap of it as it is: 4 calls, $<0.01, 1 s

 files per                             calls to      dollars         time
  data key   create all   scan cold      rewrap     for each     for each
         1           10          10          10        <0.01          1 s
         3            4           4           4        <0.01          1 s

at $0.03 for 10 000 calls (AWS KMS pricing, symmetric requests), and 100 calls a second
";
        assert_eq!(text(&report), expected);
    }
}
