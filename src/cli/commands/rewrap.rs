//! `kmsfs rewrap`: brings the data keys of a volume under another wrapping key, or under all of its recipients.
//!
//! The order is the argument: first the config lists the new key beside the old one, so that headers under either open; then the
//! headers change, each for itself; then everything is made durable; and only when nothing is left under the old key does the
//! config let go of it. An interruption at any point leaves a volume that opens, and the same command goes on from there.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::key_spec::KeySpec;
use crate::cli::pins::Pins;
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::{progress, report};
use crate::daemon::log::Level;
use crate::format::config::WrappingKey;
use crate::keys::KeyLimits;
use crate::storage::CipherDirectory;

use super::estimate::Cost;
use super::header_files::HeaderFiles;
use super::header_writer::HeaderWriter;
use super::key_change::{self, KeyChange};
use super::recipients;
use super::rewrap_work::{Done, Failures, Todo, Work};

/// Bring a volume's data keys under another wrapping key, or under all its recipients; headers only, no data is touched
///
/// With --to the volume moves to that key: under AWS KMS by one ReEncrypt for each data key, so that no key leaves the KMS.
/// Without --to each file gets a record of each recipient that it lacks, and loses those of keys that are no recipients any
/// more. The volume may be mounted: the mount then
/// takes each step along, if it can use the new key. An interrupted run is continued by the same command.
#[derive(Debug, Args)]
pub(crate) struct RewrapArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// Only this file or directory, by its plain path in the volume; the old key then stays
    #[arg(value_name = "PATH")]
    path: Option<String>,
    /// The new key: local:PATH (a keyring, made if missing), aws-kms:KEY (ARN, id or alias),
    /// vault:KEY (a key of the transit engine), pkcs11:URI or age:RECIPIENT
    #[arg(long, value_name = "PROVIDER:ID")]
    to: Option<KeySpec>,
    /// The key that --to replaces, as the volume's config names it, if the volume has several
    #[arg(long, value_name = "PROVIDER:ID", requires = "to")]
    from: Option<KeySpec>,
    /// Leave the old key on the volume's list, so that old copies of files still open; it wraps nothing new
    #[arg(long, requires = "to")]
    keep_old: bool,
    /// Make so many calls of each key's provider a second at most
    #[arg(long, value_name = "CALLS")]
    kms_rate: Option<NonZeroU32>,
    /// Make so many calls at a time at most
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u8).range(1..=128))]
    parallel: u8,
    /// Show the files, calls and dollars that it would take, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// What `--dry-run` shows.
#[derive(Serialize)]
struct Plan {
    files: u64,
    files_to_change: u64,
    data_keys: u64,
    provisioned_keys: u64,
    re_encrypt: u64,
    decrypt: u64,
    encrypt: u64,
    calls: u64,
    dollars: f64,
    /// At the rate of `--kms-rate`, if it is given.
    hours: Option<f64>,
}

/// What `--json` shows at the end.
#[derive(Serialize)]
struct Report {
    files_changed: u64,
    provisioned_keys_changed: u64,
    failed: u64,
    /// Calls of providers, those of keyrings too.
    re_encrypt: u64,
    decrypt: u64,
    encrypt: u64,
    /// The keys that the volume's config lists now.
    wrapping_keys: Vec<String>,
}

/// Does it.
pub(crate) fn run(args: &RewrapArgs) -> Result<(), CliError> {
    let environment = Environment::of_process();
    let settings = Settings::load(&args.settings, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    let mut change =
        KeyChange::begin(&args.cipher_directory, &settings, &environment, Pins::of(&environment).as_ref())?;
    let introduced = args.to.as_ref().map(|to| change.introduce(to, args.from.as_ref(), !args.dry_run));
    let old = introduced.transpose()?.flatten();
    let wanted = change.wanted(old.as_ref());
    let limits = KeyLimits { calls_per_second: args.kms_rate, ..KeyLimits::default() };
    let volume = change.volume(limits);
    let files = HeaderFiles::of(&change.directory)?;
    let stock = change.directory.key_stock().map_err(|error| CliError::io(".kmsfs/keys", &error))?;
    // Another descriptor than that of what is changed below.
    let directory = CipherDirectory::open(&args.cipher_directory)?;
    let writer = HeaderWriter::new(&directory, change.writes_alone(), change.permit());
    let (ring, failures) = (&volume.ring, Failures::default());
    let names = files.names(&volume);
    let work = Work { ring, files: &files, names: &names, writer: &writer, stock: &stock, wanted: &wanted, failures };
    let start = match &args.path {
        Some(path) => files.cipher_path(&volume, path)?,
        None => String::new(),
    };
    let todo = work.find(&start, args.path.is_none(), volume.config.files_per_data_key > 1)?;
    if args.dry_run {
        return report::print(&plan(&todo, args.kms_rate), args.json);
    }
    let parallel = args.kms_rate.map_or(args.parallel.into(), |rate| usize::from(args.parallel).min(as_usize(rate)));
    let mut done = work.run(todo, parallel)?;
    if let Some(old) = old.filter(|_| done.failed == 0 && args.path.is_none()) {
        let again = || work.run(work.find("", true, volume.config.files_per_data_key > 1)?, parallel);
        done = finish(&mut change, &old, args.keep_old, done, again)?;
    }
    if args.json {
        let calls = volume.ring.stats().calls;
        report::print(
            &Report {
                files_changed: done.files,
                provisioned_keys_changed: done.provisioned,
                failed: done.failed,
                re_encrypt: calls.rewrap,
                decrypt: calls.unwrap,
                encrypt: calls.wrap,
                wrapping_keys: key_change::names(change.config()),
            },
            true,
        )?;
    }
    let conclusion = conclusion(&done);
    verdict(done, args.to.is_some())?;
    progress::conclude(&conclusion, args.json);
    Ok(())
}

fn conclusion(done: &Done) -> String {
    let files = report::counted(done.files, "file");
    let provisioned = match done.provisioned {
        0 => String::new(),
        keys => format!(", and {}", report::counted(keys, "provisioned key")),
    };
    format!("rewrapped {files}{provisioned}")
}

/// So often what was made or moved meanwhile is looked for.
const PASSES: u32 = 20;
/// The wait before looking again while files are being moved.
const PAUSE: Duration = Duration::from_millis(200);

/// Lets go of the old key once no file needs it: in a mount files are made and moved while the others are dealt with.
fn finish(
    change: &mut KeyChange,
    old: &WrappingKey,
    keep: bool,
    mut done: Done,
    again: impl Fn() -> Result<Done, CliError>,
) -> Result<Done, CliError> {
    for _ in 0..PASSES {
        let nobody_works = || (true, Ok(0));
        let look = || change.walk_all(|| recipients::count_needing(change, old));
        let (whole, needing) = if change.is_mounted() { look() } else { nobody_works() };
        match (whole, needing?) {
            (true, 0) => {
                change.retire(old, keep)?;
                return drop_needless(change, done, again);
            }
            (false, 0) => std::thread::sleep(PAUSE),
            _ => {
                done.add(again()?);
                if done.failed > 0 {
                    return Ok(done);
                }
            }
        }
    }
    let what =
        "programs of the mount move files all the time, so that one may have been missed: the volume keeps the old key";
    Err(CliError::new(Exit::Other, what).hint("run the command again when they pause"))
}

/// What was made while both keys were on the list has records of both. It opens, but looks as if it needed the old one.
fn drop_needless(
    change: &KeyChange,
    mut done: Done,
    again: impl Fn() -> Result<Done, CliError>,
) -> Result<Done, CliError> {
    for _ in 0..PASSES {
        if !change.is_mounted() || done.failed > 0 {
            break;
        }
        let (whole, more) = change.walk_all(&again);
        let more = more?;
        let is_last = whole && more.files == 0;
        done.add(more);
        if is_last {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(done)
}

fn as_usize(rate: NonZeroU32) -> usize {
    usize::try_from(rate.get()).unwrap_or(usize::MAX)
}

fn plan(todo: &Todo, rate: Option<NonZeroU32>) -> Plan {
    let missing = todo.missing;
    // What unlocks the volume and wraps its key again comes to two at most.
    let calls = missing.rewrap + missing.unwrap + missing.wrap;
    let cost = Cost::of(calls, rate.map_or(1, NonZeroU32::get));
    Plan {
        files: todo.files,
        files_to_change: todo.to_change,
        data_keys: todo.data_keys,
        provisioned_keys: todo.provisioned,
        re_encrypt: missing.rewrap,
        decrypt: missing.unwrap,
        encrypt: missing.wrap,
        calls,
        dollars: Cost::of(missing.priced, 1).dollars,
        hours: rate.map(|_| cost.hours),
    }
}

fn verdict(done: Done, moves: bool) -> Result<(), CliError> {
    if done.failed == 0 {
        return Ok(());
    }
    let (code, why) =
        done.first_failure.map_or((Exit::Other as u8, String::new()), |error| (error.code(), error.to_string()));
    let what = format!("{} done, {} not; the first: {why}", report::counted(done.files, "file"), done.failed);
    let kept = if moves { "; until then the volume keeps the old key" } else { "" };
    Err(CliError::with_code(code, what).hint(format_args!("the same command goes on from here{kept}")))
}
